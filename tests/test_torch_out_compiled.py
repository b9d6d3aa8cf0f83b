# SPDX-License-Identifier: Apache-2.0
"""`out` and `stream` in what PyTorch traces: an op that writes, a graph break, or one sentence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import Router, RoutingMethod, activation_topk, dense_router, hash_router, topk_select
from cupy_router.ops import _run
from cupy_router.ops import activation_topk as activation_op
from cupy_router.results import Routing, TopK
from tests import frameworks, inputs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from cupy_router.torch import _intercept, _state  # noqa: E402

METHOD = RoutingMethod(16, 4)
LOGITS = torch.from_numpy(inputs.normal((5, 16), seed=410))
X, WEIGHT = torch.from_numpy(inputs.normal((5, 8), seed=411)), torch.from_numpy(inputs.normal((16, 8), seed=412))
IDS, TABLE = torch.arange(5), torch.from_numpy(np.stack([inputs.rng(413, r).permutation(16)[:4] for r in range(9)]))
DENSE, OF_NUMPY = Router(METHOD, weight=WEIGHT), Router(METHOD, weight=WEIGHT.numpy())
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))

CALLS: dict[str, Callable[..., Any]] = {
    "activation_topk": lambda **more: activation_topk(LOGITS + 0, METHOD, **more),
    "topk_select": lambda **more: topk_select(LOGITS + 0, 3, **more),
    "dense_router": lambda **more: dense_router(X + 0, WEIGHT, METHOD, num_valid=4, **more),
    "hash_router": lambda **more: hash_router(IDS + 0, TABLE, **more),
    "a Router": lambda **more: DENSE(X + 0, **more),
    "a hash Router": lambda **more: Router(METHOD, weight=WEIGHT, table=TABLE)(X + 0, IDS, **more),
    "a Router of NumPy arrays": lambda **more: OF_NUMPY(X + 0, **more),
}


def buffers(n: int = 5) -> Routing:
    return Routing(torch.zeros(n, 4), torch.zeros(n, 4, dtype=torch.int32))


def assert_same(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def compiled(call: Any, fullgraph: bool = True, **more: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(call, backend=more.pop("backend", "aot_eager"), fullgraph=fullgraph, **more)


@pytest.mark.slow("seconds", every=3)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", CALLS)
def test_out_is_filled_in_one_graph(name: str, backend: str) -> None:
    call = CALLS[name]
    want = call()
    out = type(want)(*map(torch.zeros_like, want))
    returned, doubled = compiled(lambda out: (call(out=out), out[0] * 2), backend=backend)(out)
    assert_same(out, want)
    assert_same([doubled], [want[0] * 2])
    assert type(returned) is type(out)
    assert returned[0] is out[0]
    assert all(array._version for array in out)


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", CALLS)
def test_a_stream_breaks_the_graph(name: str, backend: str, fullgraph: bool) -> None:
    """The call runs as it stands, outside of graphs, with the right result; or one sentence says why there is none."""
    call = CALLS[name]
    found = compiled(lambda: tuple(call(stream=0))[-1] * 2, fullgraph, backend=backend)
    if fullgraph:
        sentence = "a graph holds no stream= and no arrays but PyTorch's" if VERSION >= (2, 7) else "no_graph_can_hold"
        with pytest.raises(torch._dynamo.exc.Unsupported, match=sentence):
            found()
    else:
        for _ in range(2):
            assert_same([found()], [call()[-1] * 2])


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("dynamic", [True, False])
def test_parts_of_larger_buffers_of_any_size(dynamic: bool) -> None:
    """As of a captured batch: rows and columns of buffers, which the graph gets or which it slices itself."""
    for inside in (True, False):
        call = compiled(lambda logits, out: activation_topk(logits, METHOD, out=out).weights.sum(), dynamic=dynamic)
        sliced = compiled(
            lambda logits, whole: activation_topk(
                logits, METHOD, out=Routing(whole.weights[: len(logits)], whole.indices[: len(logits)])
            ).weights.sum(),
            dynamic=dynamic,
        )
        for n in (5, 3, 4):
            whole = buffers(9)
            wide = Routing(torch.zeros(9, 7), whole.indices)
            got = (
                sliced(LOGITS[:n], whole)
                if inside
                else call(LOGITS[:n], Routing(wide.weights[:n, 2:6], wide.indices[:n]))
            )
            want = activation_topk(LOGITS[:n], METHOD)
            assert_same([whole.weights[:n] if inside else wide.weights[:n, 2:6], whole.indices[:n]], want)
            assert not whole.weights[n:].any()
            assert not wide.weights[:, :2].any()
            torch.testing.assert_close(got, want.weights.sum())


@pytest.mark.slow("seconds")
def test_buffers_made_in_the_graph_and_values_that_do_not_exist() -> None:
    def call(logits: Any) -> Any:
        out = Routing(torch.empty(5, 4), torch.empty(5, 4, dtype=torch.int32))
        activation_topk(logits, METHOD, out=out)
        return out.weights * 2, out.indices

    want = activation_topk(LOGITS, METHOD)
    assert_same(compiled(call, backend="inductor")(LOGITS), (want.weights * 2, want.indices))
    out = TopK(None, torch.zeros(5, 3, dtype=torch.int32))
    assert compiled(lambda out: topk_select(LOGITS, 3, return_values=False, out=out))(out)[0] is None
    assert_same(out[1:], topk_select(LOGITS, 3)[1:])


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_two_micro_batches_into_the_same_buffers_before_one_backward(backend: str) -> None:
    call = compiled(lambda logits, out: activation_topk(logits, METHOD, out=out).weights, backend=backend)
    out, expert, losses = buffers(), torch.ones(4, requires_grad=True), []
    for logits in (LOGITS, LOGITS.flip(0)):
        call(logits, out)
        losses.append((out.weights * expert).sum())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(losses).backward()


@pytest.mark.slow("seconds", every=3)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["activation_topk", "topk_select", "a Router", "a Router of NumPy arrays"])
def test_two_micro_batches_in_one_graph(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd traces the writes: PyTorch's own functions with `out` raise as well."""
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # they would keep what an earlier version made
    call = CALLS[name]
    out, expert = call(), torch.zeros(5, 16, requires_grad=True)

    def loss(out: Any, expert: Any) -> Any:
        values, indices = out[0] + 0, out[1].long()
        first = (expert.gather(1, indices + 0) * values * out[0]).sum()
        weighted = (expert.sum() * out[0]).sum()
        call(out=out)
        return first + weighted

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        compiled(loss, backend=backend)(out, expert).backward()


@pytest.mark.parametrize("name", ["activation_topk", "a Router of NumPy arrays"])
def test_tensors_on_meta_beside_others_are_refused(name: str) -> None:
    """PyTorch asks for fake results there, whose memory is not initialised."""
    out = buffers()
    elsewhere = out._replace(weights=out.weights.to("meta"))
    with pytest.raises(Exception, match=r"all arrays must lie on one device, got .*weights on meta"):
        compiled(lambda out: CALLS[name](out=out), backend="eager")(elsewhere)
    with pytest.raises(Exception, match=r"one device, got x on cpu, weight on meta"):
        compiled(lambda x, gate: dense_router(x, gate, METHOD))(X, WEIGHT.to("meta"))
    assert compiled(lambda x, gate: dense_router(x, gate, METHOD))(X.to("meta"), WEIGHT.to("meta")).indices.is_meta


def _requires_grad(out: Routing) -> Routing:
    return out._replace(weights=out.weights.requires_grad_())


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], Callable[[], tuple[Any, Any]], str]] = {
    "a leaf that requires grad": (
        lambda logits, out: activation_topk(logits, METHOD, out=out),
        lambda: (LOGITS, _requires_grad(buffers())),
        r"out\.weights must not require grad unless under torch\.no_grad\(\)",
    ),
    "weights with a gradient": (
        lambda logits, out: activation_topk(logits, METHOD, out=out),
        lambda: (LOGITS.clone().requires_grad_(), buffers()),
        "out cannot be given where weights have a gradient",
    ),
    "a Router's weights with a gradient": (
        lambda x, out: OF_NUMPY(x, out=out),
        lambda: (X.clone().requires_grad_(), buffers()),
        "out cannot be given where weights have a gradient",
    ),
    "torch.func.grad": (
        lambda logits, out: torch.func.grad(lambda a: activation_topk(a, METHOD, out=out).weights.sum())(logits),
        lambda: (LOGITS, buffers()),
        "out and stream cannot be given inside torch.func",
    ),
    "torch.func.vmap": (
        lambda logits, out: torch.func.vmap(lambda a: activation_topk(a, METHOD, out=out).weights)(logits[None]),
        lambda: (LOGITS, buffers()),
        "out and stream cannot be given inside torch.func",
    ),
    "a tuple": (
        lambda logits, out: activation_topk(logits, METHOD, out=tuple(out)),
        lambda: (LOGITS, buffers()),
        r"out must be Routing\(weights, indices\), got tuple",
    ),
    "an array of NumPy": (
        lambda logits, out: activation_topk(logits, METHOD, out=out),
        lambda: (LOGITS, buffers()._replace(indices=np.zeros((5, 4), np.int64))),
        "a graph holds no|out.indices must be int32, got int64",
    ),
    "another shape": (
        lambda logits, out: activation_topk(logits, METHOD, out=out),
        lambda: (LOGITS, buffers(4)),
        r"activation_topk: out\.weights must have shape",
    ),
}


@pytest.mark.slow("seconds", every=2)
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_eager_calls_refuse(name: str, fullgraph: bool) -> None:
    """With the sentence of the eager call. PyTorch 2.4 does not show it with fullgraph=True."""
    call, given, sentence = REFUSED[name]
    arrays = given()
    raised: Any = Exception if fullgraph else (TypeError, ValueError)
    with pytest.raises(raised, match=None if fullgraph and VERSION < (2, 7) else sentence):
        compiled(call, fullgraph)(*arrays)
    assert not arrays[1].weights.any()


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tensors_that_require_grad_are_written_without_grad_mode(mode: Any) -> None:
    logits, out = LOGITS.clone().requires_grad_(), _requires_grad(buffers())
    with mode():
        compiled(lambda a, out: activation_topk(a, METHOD, out=out).indices * 1)(logits, out)
    assert_same(map(torch.detach, out), activation_topk(LOGITS, METHOD))
    assert out.weights._version


class Into(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("indices", torch.zeros(5, 4, dtype=torch.int32))

    def forward(self, logits: Any, weights: Any) -> Any:
        return activation_topk(logits, METHOD, out=Routing(weights, self.indices)).weights * 2


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_writes_buffers_and_arguments(strict: bool) -> None:
    program = torch.export.export(Into(), (LOGITS, torch.zeros(5, 4)), strict=strict).module()
    logits, weights = LOGITS.flip(0), torch.zeros(5, 4)
    doubled, want = program(logits, weights), activation_topk(logits, METHOD)
    assert_same((weights, program.indices, doubled), (*want, want.weights * 2))


def test_traces_write() -> None:
    """make_fx in each of its modes, and torch.jit.trace."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def call(logits: Any, weights: Any, indices: Any) -> Any:
        return activation_topk(logits, METHOD, out=Routing(weights, indices)).weights * 2

    given = (LOGITS, *buffers())
    traces = [make_fx(call, tracing_mode=mode)(*given) for mode in ("real", "fake", "symbolic")]
    logits = LOGITS.flip(0)
    want = activation_topk(logits, METHOD)
    for traced in (*traces, torch.jit.trace(call, given)):
        out = buffers()
        assert_same((traced(logits, *out), *out), (want.weights * 2, *want))


def test_traces_refuse_a_stream_and_other_arrays() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def refused(name: str, call: Any, **given: Any) -> None:
        for trace in (make_fx(lambda a: call(a, **given).weights * 2), traced_by_jit(call, **given)):
            with pytest.raises(ValueError, match=f"^{name}: stream, and arrays that are no tensors, cannot be given"):
                trace(LOGITS)

    def traced_by_jit(call: Any, **given: Any) -> Any:
        return lambda logits: torch.jit.trace(lambda a: call(a, **given).weights * 2, (logits,))

    for given in ({"stream": 0}, {"out": Routing(*map(np.asarray, buffers()))}):
        refused("activation_topk", lambda a, **more: activation_topk(a, METHOD, **more), **given)
        refused("Router", lambda a, **more: OF_NUMPY(a[:, :8], **more), **given)


def test_arrays_of_other_frameworks_while_pytorch_traces() -> None:
    """First, they make an eager call whose result is a constant of the trace; beside tensors, NumPy's are constants."""
    bias, want = np.zeros(16, np.float32), activation_topk(LOGITS, METHOD)

    def call(logits: Any) -> Any:
        experts = activation_topk(bias[None], METHOD).indices
        return activation_topk(logits, METHOD, bias=bias).weights + float(experts[0, 1])

    with pytest.warns(torch.jit.TracerWarning, match="registered as constants"):
        traced = torch.jit.trace(call, (LOGITS,))
    assert_same([traced(LOGITS)], [want.weights + 1])


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("kind", ["NumPy", "JAX"])
def test_arrays_of_other_frameworks_in_compiled_code(kind: str) -> None:
    """They break the graph, and results are of their type."""
    framework = getattr(frameworks, kind)()
    array, want = framework.array(LOGITS.numpy()), activation_topk(LOGITS.numpy(), METHOD)
    found = compiled(lambda a, b: (activation_topk(a, METHOD), b + 1), fullgraph=False)(array, X)[0]
    assert isinstance(found.weights, framework.result_type)
    assert_same(map(framework.numpy, found), want)
    bias = np.ones(16, np.float32)
    assert_same(compiled(lambda a: activation_topk(a, METHOD, bias=bias))(LOGITS), want)


BEYOND_THE_LIMIT = """
import torch
import cupy_router, cupy_router.torch
from cupy_router import RoutingMethod, activation_topk

torch._dynamo.config.{limit} = 1
logits = torch.randn(6, 16)
compiled = torch.compile(lambda a, k: tuple(activation_topk(a + 0, RoutingMethod(16, k), **{more})), backend="eager")
for k in (1, 2, 3, 4, 5):
    want = activation_topk(logits, RoutingMethod(16, k))
    assert all(map(torch.equal, compiled(logits, k), want)), k
print("right")
"""


@pytest.mark.slow("process")
@pytest.mark.parametrize("more", [{}, {"stream": 0}], ids=["plain", "stream"])
def test_beyond_the_limit_of_recompilations(more: dict[str, int]) -> None:
    """Where torch.compile gives functions up one by one, and would trace those that they call."""
    limit = "recompile_limit" if VERSION >= (2, 6) else "cache_size_limit"
    root, program = Path(cupy_router.__file__).parents[1], BEYOND_THE_LIMIT.format(limit=limit, more=more)
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.stdout == "right\n", done.stderr


def test_the_reference_is_never_traced() -> None:
    """Not by frames that torch.compile runs as they stand either."""
    traced: list[str] = []

    def call(logits: Any) -> Any:
        torch._dynamo.graph_break()
        return activation_topk(logits, METHOD, stream=0).weights

    def backend(graph: Any, example: Any) -> Any:
        traced.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    torch.compiler.reset()
    found = torch.compile(lambda logits: call(logits + 1) * 2, backend=backend)(LOGITS)
    assert_same([found], [activation_topk(LOGITS + 1, METHOD).weights * 2])
    assert len(traced) == 2, traced  # the addition and the product


@pytest.mark.parametrize("out", [True, False])
def test_frames_that_torch_compile_gave_up_lead_to_no_traced_reference(
    out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs such frames as they stand, where nothing seems to be traced, and would trace the functions they call."""

    def given_up(function: Any) -> Any:
        return torch.compiler.disable(function, recursive=False)

    class Interceptor:
        wants = staticmethod(given_up(_intercept.wants))
        run = staticmethod(given_up(_intercept.run))

    monkeypatch.setattr(_intercept, "is_special", given_up(_intercept.is_special))
    monkeypatch.setattr(_state, "is_tracing", given_up(_state.is_tracing))
    monkeypatch.setattr(_run, "interceptors", [Interceptor])
    run, into = given_up(_run.run), buffers() if out else None
    given = activation_op.OP, METHOD, (LOGITS, *[None] * (len(activation_op.OP.inputs) - 1)), into, None
    found = compiled(lambda x: run(*given).weights + x, fullgraph=False, backend="eager")(torch.ones(()))
    assert_same([found], [activation_topk(LOGITS, METHOD).weights + 1])
