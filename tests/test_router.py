# SPDX-License-Identifier: Apache-2.0
"""Router: dense and hash layers, what it refuses, and its place in a model."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_router import Router, Routing, RoutingMethod, dense_router, gemm, hash_router
from cupy_router.ops import _chunks
from cupy_router.tuning import gpu_of
from tests import compare, frameworks, inputs, oracle
from tests.backends import DTYPES, Backend
from tests.test_dense_router import exact, logits_of

EXPERTS, K, HIDDEN, VOCABULARY = 24, 4, 40, 50
METHOD = RoutingMethod(EXPERTS, K, renormalize_eps=1e-20, scale=1.5)


def gate(dtype: str = "float32") -> np.ndarray:
    return exact((EXPERTS, HIDDEN), 70, dtype)


def tokens(n: int, dtype: str = "float32") -> np.ndarray:
    return exact((n, HIDDEN), 71, dtype)


def table(dtype: str = "int32") -> np.ndarray:
    rows = [inputs.rng(72, token).permutation(EXPERTS)[:K] for token in range(VOCABULARY)]
    return np.array(rows, DTYPES[dtype])


def token_ids(n: int) -> np.ndarray:
    return inputs.rng(73, n).integers(-1, VOCABULARY, n)


BIAS = inputs.normal((EXPERTS,), seed=74)


def to_host(backend: Backend, result: Any) -> Routing:
    return Routing(backend.numpy(result.weights), backend.numpy(result.indices))


def assert_same(got: Routing, want: Routing) -> None:
    for a, b in zip(got, want, strict=True):
        compare.assert_same_bits(np.asarray(a), np.asarray(b))


# -- Dense -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 5, 80])
@pytest.mark.parametrize("biased", [False, True])
def test_a_dense_router_is_dense_router(backend: Backend, n: int, biased: bool) -> None:
    x, weight, bias = backend.array(tokens(n)), backend.array(gate()), backend.array(BIAS) if biased else None
    router = Router(METHOD, weight=weight, bias=bias)
    assert not router.is_hash
    got = to_host(backend, router(x))
    assert_same(got, to_host(backend, dense_router(x, weight, METHOD, bias=bias)))
    compare.assert_routes(
        got,
        oracle.route(logits_of(tokens(n), gate()), METHOD, BIAS if biased else None),
        logits_of(tokens(n), gate()),
        METHOD,
        BIAS if biased else None,
    )
    assert_same(got, to_host(backend, router(x, backend.array(token_ids(n)))))  # a dense router has no use for them


def test_arrays_are_held_without_a_copy(backend: Backend) -> None:
    weight, bias = backend.array(gate()), backend.array(BIAS)
    router = Router("deepseek-v4-flash", weight=backend.array(np.zeros((256, 8), np.float32)))
    assert router.method == RoutingMethod(256, 6, renormalize_eps=1e-20, scale=1.5)
    router = Router(METHOD, weight=weight, bias=bias)
    assert router.weight is weight
    assert router.bias is bias
    x = backend.array(tokens(3))
    weight[:] = 0
    bias[:] = backend.array(np.arange(EXPERTS, dtype=np.float32))
    np.testing.assert_array_equal(backend.numpy(router(x).indices), [[23, 22, 21, 20]] * 3)


def test_a_router_of_a_file_has_no_stale_copies(backend: Backend, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({"gate.weight": gate(), "gate.e_score_correction_bias": BIAS}, tmp_path / "one.safetensors")
    router, x = Router.from_safetensors(tmp_path / "one.safetensors", "", METHOD), backend.array(tokens(5))
    before = to_host(backend, router(x))
    for array in (router.weight, router.bias):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
    router.bias, router.method = np.arange(EXPERTS, dtype=np.float32), replace(METHOD, scale=2.5)
    arrays = {"weight": backend.array(gate()), "bias": backend.array(np.arange(EXPERTS, dtype=np.float32))}
    got = to_host(backend, router(x))
    assert_same(got, to_host(backend, Router(router.method, **arrays)(x)))
    assert not np.array_equal(got.indices, before.indices)
    router.bias[:] = BIAS  # of an assigned array, which may be written
    np.testing.assert_array_equal(to_host(backend, router(x)).indices, before.indices)
    twin = copy.deepcopy(router)
    assert not twin.weight.flags.writeable
    np.testing.assert_array_equal(to_host(backend, twin(x)).indices, before.indices)


def test_num_valid_and_out(backend: Backend) -> None:
    x = backend.array(tokens(6))
    for router in (
        Router(METHOD, weight=backend.array(gate())),
        Router(METHOD, weight=backend.array(gate()), table=backend.array(table())),
    ):
        ids = backend.array(np.arange(6))
        full = to_host(backend, router(x, ids))
        for count in (2, np.int64(2), backend.array(np.array([2], np.int32))):
            out = Routing(backend.array(np.ones((6, K), np.float32)), backend.array(np.ones((6, K), np.int32)))
            assert router(x, ids, num_valid=count, out=out) is out
            got = to_host(backend, out)
            assert_same(Routing(got.weights[:2], got.indices[:2]), Routing(full.weights[:2], full.indices[:2]))
            assert (got.indices[2:] == -1).all()
            assert (got.weights[2:] == 0).all()


# -- Hash --------------------------------------------------------------------------------------------------------------


def check_hash(backend: Backend, n: int, dtype: str, table_dtype: str, method: RoutingMethod, **layout: int) -> None:
    x, ids = tokens(n, dtype), token_ids(n)
    router = Router(
        method,
        weight=backend.array(gate(dtype), **layout),
        table=backend.array(table(table_dtype), **layout),
    )
    assert router.is_hash
    got = to_host(backend, router(backend.array(x, **layout), backend.array(ids)))
    logits = logits_of(x, gate(dtype))
    want = oracle.hash_route(ids, table(), method, logits)
    np.testing.assert_array_equal(got.indices, want.indices)
    rtol = compare.tolerance(logits, np.maximum(got.indices, 0), method)
    compare.assert_weights_close(got.weights, want.weights, rtol, method.scale)


@pytest.mark.parametrize("n", [0, 1, 9, 24, 25, 200])  # up to 24 by single dot products, then by the full product
@pytest.mark.parametrize("score", ["sqrtsoftplus", "softmax"])
def test_hash_layers(backend: Backend, n: int, score: str) -> None:
    check_hash(backend, n, "bfloat16", "int64", RoutingMethod(EXPERTS, K, score, scale=1.5))


@pytest.mark.parametrize("layout", [{"row_pad": 3}, {"row_pad": 1, "offset": 1}], ids=str)
@pytest.mark.parametrize("n", [9, 200])
def test_hash_layers_of_any_layout(backend: Backend, n: int, layout: dict[str, int]) -> None:
    check_hash(backend, n, "float16", "int32", METHOD, **layout)


@pytest.mark.parametrize("n", [70, 64])
def test_hash_layers_in_chunks(backend: Backend, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunks, "budget", lambda gpu: 32 * EXPERTS * 4)
    method = RoutingMethod(EXPERTS, K, scale=1.25)  # whose plans no other test has made
    check_hash(backend, n, "float32", "int32", method)
    router = Router(method, weight=backend.array(gate()), table=backend.array(table()))
    ids, count = np.arange(n) % VOCABULARY, backend.array(np.array(40, np.int32))
    got = to_host(backend, router(backend.array(tokens(n)), backend.array(ids), num_valid=count))
    np.testing.assert_array_equal(got.indices, np.where(np.arange(n)[:, None] < 40, table()[ids], -1))


@pytest.mark.needs_kernels
def test_hash_layers_choose_a_path_by_shape(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in rows of the gate that no token needs reach no weight either way; only the full product reads them."""
    products: list[int] = []
    multiply = type(gemm.product(backend_device(backend), *matrices())).multiply

    def counting(self: Any, stream: int, x: int, weight: int, out: int, num_rows: int) -> None:
        products.append(num_rows)
        multiply(self, stream, x, weight, out, num_rows)

    monkeypatch.setattr(gemm.HostProduct, "multiply", counting)
    monkeypatch.setattr(gemm.CudaProduct, "multiply", counting)
    router = Router(METHOD, weight=backend.array(gate()), table=backend.array(table()))
    limit = gpu_of(backend_device(backend)).table.hash_layer.max_gates_read * EXPERTS // K
    for n in (1, limit, limit + 1):
        router(backend.array(tokens(n)), backend.array(np.arange(n) % VOCABULARY))
    assert products == [limit + 1]


def backend_device(backend: Backend) -> tuple[str, int]:
    return ("cuda", 0) if backend.name == "gpu" else ("cpu", 0)


def matrices() -> tuple[gemm.Matrix, gemm.Matrix]:
    return gemm.Matrix("float32", 9, HIDDEN, HIDDEN), gemm.Matrix("float32", EXPERTS, HIDDEN, HIDDEN)


def test_a_hash_router_without_a_gate_weighs_uniformly(backend: Backend) -> None:
    router, ids = Router(METHOD, table=backend.array(table())), backend.array(token_ids(9))
    got = to_host(backend, router(backend.array(tokens(9)), ids))
    assert_same(got, to_host(backend, hash_router(ids, router.table, METHOD)))


def test_a_hash_router_needs_token_ids(backend: Backend) -> None:
    router = Router(METHOD, weight=backend.array(gate()), table=backend.array(table()))
    with pytest.raises(TypeError, match="Router: token_ids must be an array, got None"):
        router(backend.array(tokens(3)))
    with pytest.raises(ValueError, match=r"Router: token_ids must have shape \[num_tokens\] = \[3\], got int64 \[2\]"):
        router(backend.array(tokens(3)), backend.array(np.arange(2)))


def test_errors_of_calls_without_a_table_begin_with_router() -> None:
    router = Router(METHOD, weight=gate())
    with pytest.raises(ValueError, match=r"^Router: bias_index needs a bias \[num_biases, num_experts\], got none$"):
        router(tokens(3), bias_index=np.zeros(3, np.int32))
    with pytest.raises(TypeError, match=r"^Router: x must be an array of CuPy"):
        router([1.0])


def test_results_have_the_framework_of_x() -> None:
    torch = pytest.importorskip("torch")
    router = Router(METHOD, weight=gate(), table=table())
    got = router(torch.from_numpy(tokens(3)), np.arange(3))
    assert type(got.weights) is torch.Tensor
    assert_same(Routing(*(a.numpy() for a in got)), router(tokens(3), torch.arange(3)))


# -- Built wrong -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "error", "words"),
    [
        ({}, TypeError, "Router: weight must be an array, got None"),
        ({"weight": "x"}, TypeError, "Router: weight must be an array of .* got str"),
        (
            {"weight": gate().T},
            ValueError,
            r"Router: weight must have shape \[num_experts \(\+ shared\), hidden\] = \[24, hidden\]",
        ),
        ({"weight": gate().astype(np.float64)}, TypeError, "Router: weight must be float32 .* got float64"),
        ({"weight": gate()[:, ::2]}, ValueError, "Router: weight must be contiguous along its last axis"),
        ({"weight": gate(), "bias": BIAS[:5]}, ValueError, r"Router: bias must have shape \[num_experts\] = \[24\]"),
        ({"weight": gate(), "bias": BIAS.astype(np.float16)}, TypeError, "Router: bias must be float32, got float16"),
        (
            {"weight": gate(), "table": table()[:, :3]},
            ValueError,
            r"Router: table must have shape .* = \[vocab_size, 4\]",
        ),
        ({"weight": gate(), "table": BIAS}, TypeError, "Router: table must be int32 or int64, got float32"),
        ({"weight": gate(), "table": table(), "bias": BIAS}, ValueError, "Router: bias and table do not go together"),
        ({"table": table(), "bias": BIAS[None]}, ValueError, "Router: bias needs a weight"),
        (
            {"weight": gate(), "table": table(), "bias": BIAS[None, :5]},
            ValueError,
            r"Router: bias must have shape \[num_biases, num_experts\] = ",
        ),
    ],
)
def test_refused_router_arguments(backend: Backend, arrays: dict[str, Any], error: type, words: str) -> None:
    given = {name: upload(backend, a) if isinstance(a, np.ndarray) else a for name, a in arrays.items()}
    with pytest.raises(error, match=words):
        Router(METHOD, **given)


def upload(backend: Backend, host: np.ndarray) -> Any:
    """As `backend.array`, with a stride along the last axis kept."""
    if host.ndim == 2 and host.strides[1] == 2 * host.itemsize:
        return backend.array(np.repeat(host, 2, axis=1))[:, ::2]
    return backend.array(np.ascontiguousarray(host))


def test_repr_lists_the_arrays_that_it_has_now() -> None:
    router = Router(METHOD, weight=gate("bfloat16"), table=table("int64"))
    assert repr(router) == f"Router({METHOD!r}, weight=bfloat16 [24, 40] on cpu, table=int64 [50, 4] on cpu)"
    router.weight, router.table, router.bias = gate(), None, BIAS
    assert repr(router) == f"Router({METHOD!r}, weight=float32 [24, 40] on cpu, bias=float32 [24] on cpu)"
    router.weight, router.bias = object(), None  # as a leaf of a pytree may be
    assert repr(router) == f"Router({METHOD!r}, weight=object)"


# -- In a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1], ids=["hash", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transformers_block_with_our_router_gives_the_same(layer: int, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = frameworks.transformers_with_models()
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4SparseMoeBlock

    config = transformers.DeepseekV4Config(
        vocab_size=60, hidden_size=64, n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=32,
        num_hidden_layers=2, mlp_layer_types=["hash_moe", "moe"], routed_scaling_factor=1.5,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(20261122)
        block = DeepseekV4SparseMoeBlock(config, layer)
        for parameter in block.parameters():
            parameter.normal_(std=2 / math.sqrt(64))
        if layer == 0:
            block.gate.tid2eid.copy_(torch.rand(60, 16).argsort()[:, :4])
        else:
            block.gate.e_score_correction_bias.normal_(std=0.1)
        block.gate.weight.copy_(torch.randint(-8, 9, (16, 64)) / 32)  # exact in bfloat16, as are the logits in float32
        block = block.to(getattr(torch, dtype))
        block.gate = block.gate.float()  # transformers would round the logits to bfloat16, which is not our business
        x = (torch.randint(-8, 9, (2, 9, 64)) / 16).to(getattr(torch, dtype))
        ids = torch.randint(60, (2, 9))

        theirs = block.gate
        block.gate = Upcast(torch, theirs, getattr(torch, dtype))
        want = block(x, ids)
        method = RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5)
        router = Router.from_state_dict(theirs.state_dict(), "", method)
        assert router.is_hash == (layer == 0)
        block.gate = Ours(torch, router, getattr(torch, dtype))
        got = block(x, ids)
        torch.testing.assert_close(got, want, rtol=1e-5 if dtype == "float32" else 2e-2, atol=1e-5)
        routed = want - block.shared_experts(x)
        assert routed.std() > 0.1 * want.std(), "the routed experts' part is too small to show"


def Upcast(torch: Any, gate: Any, dtype: Any) -> Any:  # noqa: N802  # a module of a class that torch is needed to define
    class Module(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any, ids: Any = None) -> Any:
            logits, weights, indices = gate(x.float(), *(() if ids is None else (ids,)))
            return logits, weights.to(dtype), indices

    return Module()


def Ours(torch: Any, router: Router, dtype: Any) -> Any:  # noqa: N802
    class Module(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any, ids: Any = None) -> Any:
            weights, indices = router(x.reshape(-1, x.shape[-1]), None if ids is None else ids.reshape(-1))
            return None, weights.to(dtype), indices.long()

    return Module()
