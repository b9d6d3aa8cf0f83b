# SPDX-License-Identifier: Apache-2.0
"""The decode kernel of dense_router alone, in tilings chosen by the test, against the reference.

The kernel also returns the logits that it routed by. They are compared with float64; weights and indices are compared
with what activation_topk's reference makes of those very logits, so that no rounding can hide an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, compiler
from cupy_router.arrays import framework_of
from cupy_router.launcher import Launch
from cupy_router.ops import _dense_decode as decode
from cupy_router.ops._dense_tiling import Tiling
from cupy_router.reference.activation_topk import activation_topk
from cupy_router.tuning import gpu_of
from tests import compare, inputs, oracle
from tests.backends import Backend

pytestmark = pytest.mark.needs_kernels

# Errors of a logit in units of the norm of its products. FMA rounds, to either side; tensor cores truncate, so that
# errors of one accumulator add up step by step.
FMA_BOUND, STEP_BOUND = 1e-6, 2.0**-23


@dataclass(frozen=True)
class Case:
    """What to route and how; `pad` and `offset` in elements, as in tests.backends.Backend.array."""

    num_experts: int = 96
    top_k: int = 6
    num_tokens: int = 5
    hidden: int = 264
    score: str = "sqrtsoftplus"
    dtype: str = "bfloat16"
    weight_dtype: str | None = None
    has_bias: bool = True
    pad: int = 0
    offset: int = 0
    tiling: Tiling | None = None

    @property
    def method(self) -> RoutingMethod:
        return RoutingMethod(self.num_experts, self.top_k, self.score, scale=1.5)


@dataclass
class Run:
    """Device arrays of a case and its launch, which may be repeated."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    backend: Backend
    arrays: list[Any]
    outputs: list[Any]
    launch: Callable[[bool], Launch]  # of the kernel for a count of valid rows in memory, or for a number
    plan: decode.DecodeLaunch
    method: RoutingMethod

    def __call__(self, num_valid: int = -1, device_num_valid: Any = None) -> tuple[np.ndarray, np.ndarray]:
        x, weight, bias = self.arrays
        for array in self.outputs[:3]:
            array.fill(7)
        given = {"x": x, "weight": weight, "bias": bias, "num_valid": device_num_valid}
        inputs = [given.get(name) for name in decode.INPUTS]
        pointers = [0 if array is None else pointer(array) for array in (*inputs, *self.outputs)]
        self.launch(device_num_valid is not None)(0, [*pointers, num_valid])
        weights, indices, _, counters, _ = (self.backend.numpy(array) for array in self.outputs)
        assert not counters.any(), "the kernel leaves its counters as it found them"
        return weights, indices

    def logits(self) -> np.ndarray:
        return self.backend.numpy(self.outputs[2]).copy()


def pointer(array: Any) -> int:
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def prepare(backend: Backend, case: Case, x: np.ndarray | None = None, weight: np.ndarray | None = None) -> Run:
    method, weight_dtype = case.method, case.weight_dtype or case.dtype
    if x is None:
        x = inputs.normal((case.num_tokens, case.hidden), case.dtype, seed=50)
    if weight is None:
        weight = inputs.normal((case.num_experts, case.hidden), weight_dtype, seed=51, scale=2 * case.hidden**-0.5)
    bias = inputs.normal((case.num_experts,), seed=52) if case.has_bias else None
    device_x, device_weight = (backend.array(a, case.pad, case.offset) for a in (x, weight))
    device_bias = None if bias is None else backend.array(bias)
    views = [framework_of("x", a).view("x", a, None) for a in (device_x, device_weight)]
    aligned = case.hidden % 8 == 0 and all(v.pointer % 16 == 0 and a.strides[0] % 16 == 0 for v, a in
                                           zip(views, (device_x, device_weight), strict=True))  # fmt: skip
    plan = decode.launch_for(
        gpu_of(views[0].device), method, case.dtype, weight_dtype, len(x), case.hidden,
        aligned=aligned, dense=case.pad == 0, given=["bias"] * case.has_bias,
        logits_dtype="float32", tiling=case.tiling,
    )  # fmt: skip
    k = case.top_k
    strides = views[0].row_stride, views[1].row_stride, k, k
    fixed = decode.fixed_arguments(method, len(x), *strides, logits_stride=case.num_experts)
    xp = backend.xp
    outputs = [
        xp.empty((len(x), k), np.float32), xp.empty((len(x), k), np.int32),
        xp.full((len(x), case.num_experts), 7, np.float32),
        xp.zeros(plan.counters, np.uint32), xp.full(plan.partials, np.nan, np.float32),
    ]  # fmt: skip

    def launch(counted: bool) -> Launch:
        macros = plan.macros | {"HAS_NUM_VALID": int(counted)}
        function = compiler.compile(decode.FILE, decode.FUNCTION, macros, views[0].device)
        return Launch(function, plan.grid, plan.block, decode.VARYING, fixed)

    return Run(x, weight, bias, backend, [device_x, device_weight, device_bias], outputs, launch, plan, method)


def assert_right(run: Run, valid: int | None = None, device_num_valid: Any = None) -> None:
    """`valid` is passed as a number, or as an array."""
    number = -1 if valid is None or device_num_valid is not None else valid
    weights, indices = run(number, device_num_valid)
    logits = run.logits()
    x, weight = run.x.astype(np.float64), run.weight.astype(np.float64)
    norms = np.sqrt((x**2) @ (weight**2).T)
    macros = run.plan.macros
    layers = macros["WARPS"] * macros["EXPERTS_PER_WARP"] // macros["EXPERTS_PER_BLOCK"]
    steps = -(-x.shape[1] // (16 * macros["SPLITS"] * layers)) if macros["TENSOR_CORES"] else 0
    exact = x @ weight.T
    exact[len(x) if valid is None else valid :] = 0
    errors, bound = np.abs(logits - exact), FMA_BOUND + STEP_BOUND * steps
    assert (errors <= bound * norms + oracle.TINY).all(), f"{np.max(errors / norms)} of the norm after {steps} steps"
    want = activation_topk(logits, run.method, run.bias, num_valid=len(x) if valid is None else valid)
    np.testing.assert_array_equal(indices, want[1])
    chosen = compare.tolerance(logits, np.maximum(indices, 0), run.method)
    compare.assert_weights_close(weights, want[0], chosen, run.method.scale)
    again = run(number, device_num_valid)
    compare.assert_same_bits(again[0], weights)
    np.testing.assert_array_equal(again[1], indices)


def shapes() -> Iterator[Case]:
    yield Case(num_experts=256, hidden=4096, num_tokens=1)
    yield Case(num_experts=256, hidden=4096, num_tokens=64)
    yield Case(num_experts=384, hidden=7168, num_tokens=16)
    yield Case(num_experts=1024, top_k=32, num_tokens=3, hidden=72, score="softmax")
    yield Case(num_experts=1, top_k=1, num_tokens=64, hidden=1, score="sigmoid")
    yield Case(num_experts=60, top_k=4, hidden=7, dtype="float16", score="softmax")
    yield Case(num_experts=100, top_k=8, num_tokens=33, hidden=100, score="identity", has_bias=False)
    yield Case(num_experts=8, top_k=2, num_tokens=64, hidden=8, dtype="float16", has_bias=False)
    yield Case(hidden=100, dtype="float32", num_tokens=7)
    yield Case(hidden=4096, dtype="float32", weight_dtype="bfloat16", score="softmax")
    yield Case(hidden=264, dtype="float16", weight_dtype="bfloat16", num_tokens=1)


TILINGS = [
    Tiling(4, 3, 48, 16, 6),
    Tiling(5, 2, 32, 16, 8),
    Tiling(8, 2, 64, 32, 4),
    Tiling(8, 9, 16, 16, 4),
    Tiling(32, 2, 32, 32, 4, 2),
    Tiling(32, 1, 128, 32, 4, 3),
    Tiling(64, 4, 16, 16, 4, 1),
    Tiling(2, 3, 16, 4, 4, tensor_cores=False),
    Tiling(32, 3, 8, 1, 8, 2, tensor_cores=False),
]


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c.num_experts}-{c.num_tokens}-{c.hidden}") for c in shapes()])
def test_shapes_and_dtypes(backend: Backend, case: Case) -> None:
    assert_right(prepare(backend, case))


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_tilings(backend: Backend, tiling: Tiling) -> None:
    assert_right(prepare(backend, Case(num_experts=130, num_tokens=29, hidden=840, tiling=tiling)))


@pytest.mark.parametrize(("pad", "offset", "hidden"), [(3, 1, 264), (8, 8, 264), (1, 0, 7), (0, 1, 64)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_stride_and_offset(backend: Backend, dtype: str, pad: int, offset: int, hidden: int) -> None:
    assert_right(prepare(backend, Case(dtype=dtype, pad=pad, offset=offset, hidden=hidden)))


@pytest.mark.parametrize("tiling", [None, Tiling(2, 2, 16, 16, 4), Tiling(8, 4, 16, 16, 4, 1)], ids=str)
def test_padding(backend: Backend, tiling: Tiling | None) -> None:
    run = prepare(backend, Case(tiling=tiling))
    for valid in (0, 3, 5):
        assert_right(run, valid)
    for count, valid in ((-3, 0), (2, 2), (99, 5)):
        assert_right(run, valid, backend.array(np.array([count], np.int32)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nan_and_infinity_do_not_spread(backend: Backend, dtype: str) -> None:
    case = Case(dtype=dtype, hidden=64, num_tokens=9)
    clean = prepare(backend, case)
    want = clean()
    x, weight = clean.x.copy(), clean.weight.copy()
    x[3, 5], x[4, 60], weight[17, 2] = np.nan, np.inf, np.nan
    run = prepare(backend, case, x, weight)
    weights, indices = run()
    logits = run.logits()
    np.testing.assert_array_equal(np.isnan(logits[:3, :17]), False)
    assert np.isnan(logits[:, 17]).all()
    assert np.isnan(logits[3]).all()
    reference = activation_topk(logits, run.method, run.bias)
    np.testing.assert_array_equal(indices, reference[1])
    np.testing.assert_array_equal(indices[3], np.arange(case.top_k))
    compare.assert_weights_close(weights, reference[0], 2e-6, 1.5)
    untouched = [t for t in (0, 1, 2, 5, 6, 7, 8) if 17 not in want[1][t]]
    compare.assert_same_bits(weights[untouched], want[0][untouched])


def test_a_stale_flag_is_reset(backend: Backend) -> None:
    run = prepare(backend, Case(tiling=Tiling(8, 4, 16, 16, 4, 1)))
    run.outputs[3][3] = 1
    assert_right(run)


@pytest.mark.parametrize("score", inputs.SCORES)
def test_equal_logits_go_to_lower_experts(backend: Backend, score: str) -> None:
    case = replace(Case(num_experts=200, has_bias=False), score=score)
    weight = np.repeat(inputs.normal((1, case.hidden), seed=53), 200, axis=0).astype("bfloat16")
    _, indices = prepare(backend, case, weight=weight)()
    np.testing.assert_array_equal(indices, np.broadcast_to(np.arange(6), indices.shape))
