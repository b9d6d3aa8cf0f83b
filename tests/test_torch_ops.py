# SPDX-License-Identifier: Apache-2.0
"""The ops under torch.compile(fullgraph=True), torch.export and torch.library, on CPU tensors."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import Router, RoutingMethod, activation_topk, dense_router, hash_router, topk_select
from cupy_router.method import from_text
from cupy_router.ops.topk_select import TopKOptions
from tests import generated_code, inputs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from cupy_router.torch import _router_op  # noqa: E402

METHOD = RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5)
WEIGHT = torch.from_numpy(inputs.normal((16, 8), seed=80))
BIAS = torch.from_numpy(inputs.normal((16,), seed=81))
TABLE = torch.from_numpy(np.stack([inputs.rng(82, r).permutation(16)[:4] for r in range(30)]))
PAGES = torch.tensor([[3, 9, 0, 7]], dtype=torch.int32)
DENSE = Router(METHOD, weight=WEIGHT, bias=BIAS)
HASH = Router(METHOD, weight=WEIGHT, table=TABLE)
OF_NUMPY = Router(METHOD, weight=WEIGHT.numpy(), bias=BIAS.numpy())

CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "topk_select": lambda x, ids, count: topk_select(x, 3),
    "topk_select with lengths": lambda x, ids, count: topk_select(x, 3, lengths=ids, starts=ids // 8),
    "topk_select by column, mapped": lambda x, ids, count: topk_select(
        x, 3, order="column", index_map=PAGES, page_size=2, starts=ids // 8
    ),
    "topk_select without values": lambda x, ids, count: (topk_select(x, 3, return_values=False).indices,),
    "activation_topk": lambda x, ids, count: activation_topk(x @ WEIGHT.T, METHOD, bias=BIAS),
    "activation_topk of a preset": lambda x, ids, count: activation_topk(x.repeat(1, 32), "deepseek-v4-flash"),
    "activation_topk with num_valid": lambda x, ids, count: activation_topk(x @ WEIGHT.T, METHOD, num_valid=count),
    "hash_router alone": lambda x, ids, count: hash_router(ids, TABLE),
    "hash_router of logits": lambda x, ids, count: hash_router(ids, TABLE, METHOD, logits=x @ WEIGHT.T, num_valid=2),
    "hash_router of x": lambda x, ids, count: hash_router(ids, TABLE, METHOD, x=x, weight=WEIGHT),
    "dense_router": lambda x, ids, count: dense_router(x, WEIGHT, METHOD, bias=BIAS, num_valid=count),
    "dense_router prefill": lambda x, ids, count: dense_router(x, WEIGHT, METHOD, path="prefill", num_valid=1),
    "a dense Router": lambda x, ids, count: DENSE(x),
    "a dense Router with num_valid": lambda x, ids, count: DENSE(x, num_valid=count),
    "a dense Router with a number": lambda x, ids, count: DENSE(x, num_valid=2),
    "a hash Router": lambda x, ids, count: HASH(x, ids),
    "a Router of NumPy arrays": lambda x, ids, count: OF_NUMPY(x),
}


def arguments(n: int) -> tuple[Any, Any, Any]:
    x = torch.from_numpy(inputs.normal((n, 8), seed=83 + n))
    ids = torch.from_numpy(inputs.rng(84, n).integers(0, 30, n, np.int32))
    return x, ids, torch.tensor([n // 2], dtype=torch.int32)


def assert_same(got: Any, want: Any) -> None:
    assert type(got) is type(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_compiles_into_one_graph(name: str) -> None:
    """Also for other numbers of tokens."""
    call = CALLS[name]
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: (call(*given), given[0] * 2), backend="aot_eager", fullgraph=True)
    for n in (5, 7, 9):
        given = arguments(n)
        assert_same(compiled(*given)[0], call(*given))


class Model(torch.nn.Module):  # type: ignore[misc]
    """Layers that share code and differ in their routers, methods and gates."""

    def __init__(self) -> None:
        super().__init__()
        gates = [inputs.normal((16, 8), seed=90 + i) for i in range(3)]
        self.routers = [Router(RoutingMethod(16, 2 + i), weight=torch.from_numpy(g)) for i, g in enumerate(gates)]
        self.gate = torch.nn.Parameter(WEIGHT.clone())
        self.methods = [RoutingMethod(16, 3, score) for score in inputs.SCORES]

    def forward(self, x: Any) -> list[Any]:
        found = [router(x.tanh()) for router in self.routers]
        found += [dense_router(x.tanh(), self.gate, method) for method in self.methods]
        return [(weights * 2, indices) for weights, indices in found]


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_that_holds_routers_compiles_into_one_graph(backend: str) -> None:
    torch.compiler.reset()
    model = Model()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for n in (4, 6):
        x = arguments(n)[0]
        for got, want in zip(compiled(x), model(x), strict=True):
            assert_same(got, want)
            assert got[0].requires_grad == want[0].requires_grad


@pytest.mark.slow("seconds", every=2)
@pytest.mark.parametrize("strict", [False, True])
def test_a_model_exports(strict: bool) -> None:
    x = arguments(6)[0]
    model = Model()
    program = torch.export.export(model, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if "cupy_router" in str(node.target)]
    assert targets == 7 * ["cupy_router.dense_router.default"]  # no Router: its arrays are the program's
    for got, want in zip(program.module()(x), model(x), strict=True):
        assert_same(tuple(got), want)


LOADED = """
import sys
import numpy as np, torch
import cupy_router, cupy_router.torch
others = [cupy_router.RoutingMethod(16, 1, score, scale=3.0) for score in ("softmax", "identity", "sigmoid")]
routers = [cupy_router.Router(method, weight=np.ones((16, 8), np.float32)) for method in others]
x, wanted = torch.load(sys.argv[2])
for got, want in zip(torch.export.load(sys.argv[1]).module()(x), wanted, strict=True):
    assert all(map(torch.equal, got, want))
"""


@pytest.mark.slow("process")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_runs_in_another_process(strict: bool, tmp_path: Path) -> None:
    """Where other methods and Routers were made before it is loaded."""
    x, model = arguments(6)[0], Model()
    torch.export.save(torch.export.export(model, (x,), strict=strict), tmp_path / "model.pt2")
    torch.save((x, [tuple(found) for found in model(x)]), tmp_path / "results.pt")
    program = [sys.executable, "-c", LOADED, tmp_path / "model.pt2", tmp_path / "results.pt"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.__version__ < "2.5", reason="PyTorch 2.4 compiles every module by itself")
def test_equal_layers_share_one_graph() -> None:
    """As many as a model has, each with a Router of its own: regional compilation makes one of them."""
    from torch._dynamo.testing import CompileCounter

    class Layer(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.router = Router(METHOD, weight=torch.randn(16, 8), bias=torch.randn(16))

        def forward(self, x: Any) -> Any:
            return self.router(x).weights * 2

    torch.compiler.reset()
    layers, graphs, x = [Layer() for _ in range(12)], CompileCounter(), arguments(4)[0]
    for layer in layers:
        layer.compile(backend=graphs, fullgraph=True)
        with torch.no_grad():
            assert torch.equal(layer(x), layer.forward(x))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fake_tensors_have_the_right_shapes_and_dtypes(dtype: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tests.torch_samples import samples

    for name, calls in samples().items():
        for given in calls:
            inner = [array.detach() if isinstance(array, torch.Tensor) else array for array in given]
            op = getattr(torch.ops.cupy_router, name)
            if not name.endswith("_backward"):  # weights have one dtype, and so has a bias
                names = [argument.name for argument in op.default._schema.arguments]
                inner = [
                    a.to(dtype)
                    if isinstance(a, torch.Tensor) and a.ndim == 2 and a.is_floating_point() and argument != "bias"
                    else a
                    for argument, a in zip(names, inner, strict=True)
                ]
            want = op(*inner)
            with FakeTensorMode() as mode:
                got = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in inner))
            pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
            if name.endswith("_write"):  # returns nothing
                pairs = []
            for a, b in pairs:
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.slow("seconds")
def test_an_option_that_torch_compile_takes_for_symbolic() -> None:
    torch.compiler.reset()
    x = torch.from_numpy(inputs.normal((5, 8), seed=90))
    compiled = torch.compile(lambda x, k: topk_select(x, k), fullgraph=True, dynamic=True, backend="aot_eager")
    for k in (3, 4, 3):
        for got, want in zip(compiled(x, k), topk_select(x, k), strict=True):
            assert torch.equal(got, want)


def test_equal_methods_share_a_text_and_routers_share_no_key() -> None:
    assert METHOD.text == RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5).text
    assert METHOD.text != RoutingMethod(16, 4, scale=1.5).text
    assert from_text(METHOD.text) == METHOD
    router = Router(METHOD, weight=WEIGHT, bias=BIAS)
    twin = copy.deepcopy(router)
    assert len({router.key, twin.key, DENSE.key}) == 3
    assert _router_op._router_of(twin.key) is twin
    key = router.key
    del router
    with pytest.raises(RuntimeError, match="a Router that is gone: keep it as long as the graph"):
        _router_op._router_of(key)


def test_eager_calls_bypass_the_dispatcher() -> None:
    x, ids, count = arguments(5)
    logits = x @ WEIGHT.T

    def seen(call: Any) -> bool:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        return any("cupy_router" in event.key for event in profile.key_averages())

    assert not seen(lambda: (activation_topk(logits, METHOD, num_valid=count), DENSE(x), HASH(x, ids)))
    assert seen(lambda: torch.ops.cupy_router.topk_select(TopKOptions(3).text, logits, None, None, None))


def test_traces_have_ops_and_no_constants() -> None:
    """make_fx, in each of its modes, and torch.jit.trace."""
    from torch.fx.experimental.proxy_tensor import make_fx

    logits = arguments(6)[0] @ WEIGHT.T
    others = logits.flip(0)

    def function(logits: Any) -> Any:
        return tuple(activation_topk(logits * 2, METHOD))

    traces = [make_fx(function, tracing_mode=mode)(logits) for mode in ("real", "fake", "symbolic")]
    for traced in (*traces, torch.jit.trace(function, (logits,))):
        assert_same(tuple(traced(others)), function(others))


def test_tensor_wrappers_are_refused_by_name() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(3, 16)
        assert topk_select(fake, 2).indices.shape == (3, 2)  # within the mode it is an op like any other
    with pytest.raises(ValueError, match="logits must be a tensor with its own memory, got a FakeTensor"):
        activation_topk(fake, METHOD)
    with pytest.raises(ValueError, match="bias must be a tensor with its own memory, got a FakeTensor"):
        activation_topk(torch.empty(3, 16), METHOD, bias=fake[0])


PROGRAM = """
import sys
from cupy_router import Router, RoutingMethod
import torch
assert "cupy_router.torch" not in sys.modules
router = Router(RoutingMethod(16, 4), weight=torch.eye(16))
assert "torch._dynamo" not in sys.modules
x = torch.eye(16)[:3]
compiled = torch.compile(lambda x: router(x + 0), backend="eager", fullgraph=True)
print(compiled(x).indices.tolist() == router(x).indices.tolist())
"""


FIRST_CALL_COMPILED = """
import torch
from cupy_router import activation_topk
compiled = torch.compile(lambda a: tuple(activation_topk(a, "mixtral")), backend="eager", fullgraph=True)
print(compiled(torch.eye(8)[:2])[1].tolist() == [[0, 1], [1, 0]])
"""


TOPK_COMPILED = """
import torch
from cupy_router import topk_select
compiled = torch.compile(lambda a: tuple(topk_select(a, 1)), backend="eager", fullgraph=True)
print(compiled(torch.eye(8)[:2])[1].tolist() == [[0], [1]])
"""

JAX_FIRST = """
import sys, types
try:
    import cupy_router.jax
except ImportError:
    sys.exit(print(True))
import torch
from cupy_router import activation_topk
compiled = torch.compile(lambda a: tuple(activation_topk(a, "mixtral")), backend="eager", fullgraph=True)
print(compiled(torch.eye(8)[:2])[1].tolist() == [[0, 1], [1, 0]])
"""


@pytest.mark.slow("process")
@pytest.mark.parametrize(
    "program",
    [PROGRAM, FIRST_CALL_COMPILED, TOPK_COMPILED, JAX_FIRST],
    ids=["router", "first call", "first call of topk_select", "JAX's package loaded first"],
)
def test_tensors_compile_without_another_import(program: str) -> None:
    root = Path(cupy_router.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


UNUSABLE = """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")
import numpy
from cupy_router import activation_topk
print(activation_topk(numpy.eye(8, dtype="float32")[:1], "mixtral").indices.tolist() == [[0, 1]])
"""


@pytest.mark.slow("process")
def test_other_frameworks_work_with_a_broken_torch() -> None:
    root = Path(cupy_router.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", UNUSABLE], cwd=root, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


# -- Generated code ----------------------------------------------------------------------------------------------------


@pytest.mark.slow("seconds")
def test_generated_code_has_the_ops_and_no_copy() -> None:
    """Also of rows that lie apart: they are handed over as they are."""
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    call, wide = generated_code.strided_call(torch, "cpu")
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    got, (code, *others) = run_and_get_code(compiled, wide)
    assert not others, "more than one graph"
    generated_code.assert_nothing_but_ops(code, {"activation_topk": 1, "dense_router": 1})
    for a, b in zip(got, call(wide), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "line", ["cpp_fused_clone_0 = async_compile.cpp_pybinding([", "    triton_poi_0.run(a, b, 9)", "    b.copy_(a)"]
)
def test_the_check_of_generated_code_sees_copies(line: str) -> None:
    """Such lines as Inductor writes; letting it write them here would take a C++ compiler."""
    code = "    buf0 = torch.ops.cupy_router.topk_select.default(2, arg0_1, None, None)\n"
    generated_code.assert_nothing_but_ops(code, {"topk_select": 1})
    with pytest.raises(AssertionError):
        generated_code.assert_nothing_but_ops(code + line + "\n", {"topk_select": 1})


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_calls_of_any_size_without_gradients(mode: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x: DENSE(x), backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (5, 1, 9):
        with mode():
            x = arguments(n)[0].requires_grad_()
            assert_same(compiled(x), DENSE(x))
