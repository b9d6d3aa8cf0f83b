# SPDX-License-Identifier: Apache-2.0
"""Small calls that reach every kernel, each with inputs whose right results rounding cannot change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cupy_router import compiler, tuning
from cupy_router.launcher import Launch
from cupy_router.method import RoutingMethod
from cupy_router.ops._layout import LayoutSpec
from cupy_router.ops._permute_backward import OP as PERMUTE_BACKWARD
from cupy_router.ops._rows import GradientOptions
from cupy_router.ops._run import run
from cupy_router.ops._unpermute_backward import OP as UNPERMUTE_BACKWARD
from cupy_router.ops.activation_topk import activation_topk
from cupy_router.ops.activation_topk_backward import activation_topk_backward
from cupy_router.ops.dense_router import dense_router
from cupy_router.ops.expert_layout import expert_layout
from cupy_router.ops.hash_router import hash_router
from cupy_router.ops.permute import permute
from cupy_router.ops.topk_select import topk_select
from cupy_router.ops.unpermute import unpermute
from cupy_router.ops.update_bias import update_bias
from cupy_router.results import ExpertLayout

Array = NDArray[Any]
M = RoutingMethod

ALL_OF_LAYOUT = ("counts", "offsets", "order", "positions", "block_experts", "row_experts")
SMALL_GPU = replace(tuning.DEFAULT, capability=(8, 0), multiprocessors=2)  # other kernels, for few rows


class Case(NamedTuple):
    """A call of an op. `title` says what it is about; `call` makes the inputs and returns what the op returns."""

    op: str
    title: str
    call: Callable[[], Any]


# -- Inputs ------------------------------------------------------------------------------------------------------------


def random(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def distinct(rows: int, columns: int, dtype: Any = np.float32, seed: int = 0) -> Array:
    """Return rows that permute equally spaced values from -4 to 4."""
    grid = np.linspace(-4, 4, columns).astype(dtype)
    return random(columns, seed).permuted(np.tile(grid, (rows, 1)), axis=1)


def tied(rows: int, columns: int, dtype: Any = np.float32) -> Array:
    """Return rows with many equal values."""
    return (random(rows, columns, 1).integers(-9, 10, (rows, columns)) / 4).astype(dtype)


def eighths(*shape: int, seed: int = 0) -> Array:
    return (random(*shape, seed, 2).integers(-8, 9, shape) / 8).astype(np.float32)


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Array:
    return random(*shape, seed, 3).standard_normal(shape, np.float32).astype(dtype)


def ids(rows: int, columns: int, num_experts: int, dtype: Any = np.int32) -> Array:
    """Return different experts in each row, with a few that are no expert."""
    found = np.argsort(normal(rows, num_experts, seed=4), axis=1)[:, :columns].astype(dtype, "C")
    found[1::5, 0] = -1
    return found


def gate(tokens: int, hidden: int, experts: int, dtype: Any) -> tuple[Array, Array]:
    """Return x and weight of small integers, whose products are exact sums and mostly different."""
    x = random(tokens, hidden, 5).integers(-4, 5, (tokens, hidden)) / 8
    weight = random(experts, hidden, 6).integers(-8, 9, (experts, hidden)) / 16
    return x.astype(dtype), weight.astype(dtype)


def layout_of(indices: Array, num_experts: int, alignment: int) -> ExpertLayout:
    """Return a layout, always by the reference."""
    backend = compiler.BACKENDS.pop("cpu", None)
    try:
        found: ExpertLayout = expert_layout(indices, num_experts, alignment=alignment)
        return found
    finally:
        if backend is not None:
            compiler.BACKENDS["cpu"] = backend


def on_small_gpu(call: Callable[[], Any]) -> Callable[[], Any]:
    def planned() -> Any:
        with tuning.assume(SMALL_GPU):
            return call()

    return planned


# -- Rows of logits ----------------------------------------------------------------------------------------------------

SIGMOID = M(128, 8, "sigmoid", scale=2.5)
GROUPED = M(
    96, 6, "sqrtsoftplus", logit_scale=0.5, logit_softcap=8.0, num_groups=8, top_groups=3, group_score="top2",
    renormalize_eps=1e-3, scale=2.0, num_shared_experts=1, shared_weight=0.25, index_dtype="int64",
)  # fmt: skip
SOFTMAX = M(256, 6, "softmax", renormalize=False)
WIDE = M(1500, 40, "sigmoid", num_groups=12, top_groups=5, group_score="top2", scale=2.0)
WIDE_SOFTMAX = M(1500, 40, "softmax", renormalize=False)
LAST = M(32, 4, "softmax", score_after_topk=True)


def with_load(load: Array, result: Any) -> tuple[Any, Array]:
    return result, load


def _routed(n: int, method: RoutingMethod, logits: Array | None = None, **more: Any) -> Any:
    return activation_topk(distinct(n, method.num_experts) if logits is None else logits, method, **more)


def _backward(n: int, method: RoutingMethod, dtype: Any, repeated: bool = False) -> Any:
    indices = ids(n, method.top_k, method.num_experts)
    if repeated:
        indices[:, 1::2] = indices[:, ::2]
    upstream, logits = normal(n, method.num_columns), distinct(n, method.num_experts, dtype)
    return activation_topk_backward(upstream, indices, logits, method, dtype="float32", repeated=repeated)


ROWS = (
    Case(
        "activation_topk", "sigmoid scores and a bias, renormalised",
        lambda: _routed(9, SIGMOID, bias=eighths(128)),
    ),
    Case(
        "activation_topk", "soft cap, groups, logit bias, expert scale, a shared expert",
        lambda: _routed(5, GROUPED, logit_bias=eighths(96), expert_scale=1 + eighths(96, seed=1) ** 2),
    ),
    Case(
        "activation_topk", "softmax of bfloat16 with ties and padding",
        lambda: _routed(7, SOFTMAX, tied(7, 256, ml_dtypes.bfloat16), num_valid=np.array([5], np.int32)),
    ),
    Case("activation_topk", "softmax after the selection, ties in float32", lambda: _routed(6, LAST, tied(6, 32))),
    Case("activation_topk", "1500 experts in groups, 40 chosen", lambda: _routed(3, WIDE, bias=eighths(1500))),
    Case(
        "activation_topk", "given experts, of which some are unset",
        lambda: _routed(11, SIGMOID, bias=eighths(128), indices=ids(11, 8, 128, np.int16)),
    ),
    Case(
        "activation_topk", "given experts only",
        lambda: _routed(11, SIGMOID, indices=ids(11, 8, 128), unset="empty"),
    ),
    Case("activation_topk", "with a layout, by one block", lambda: _routed(6, SIGMOID, layout=LayoutSpec(4))),
    Case(
        "activation_topk", "with a layout, by a cluster",
        lambda: _routed(40, SIGMOID, layout=LayoutSpec(16, want=ALL_OF_LAYOUT)),
    ),
    Case(
        "activation_topk", "with a layout, by the last block",
        on_small_gpu(lambda: _routed(33, SIGMOID, layout=LayoutSpec(8))),
    ),
    Case("activation_topk_backward", "sigmoid", lambda: _backward(5, SIGMOID, np.float32)),
    Case("activation_topk_backward", "softmax of bfloat16", lambda: _backward(5, SOFTMAX, ml_dtypes.bfloat16)),
    Case("activation_topk_backward", "1500 experts", lambda: _backward(2, WIDE, np.float32)),
    Case(
        "activation_topk_backward", "softmax of 1500 experts, each of them chosen twice",
        lambda: _backward(2, WIDE_SOFTMAX, np.float32, repeated=True),
    ),
)  # fmt: skip


# -- Hidden states -----------------------------------------------------------------------------------------------------


def _dense(n: int, hidden: int, method: RoutingMethod, dtype: Any, **more: Any) -> Any:
    x, weight = gate(n, hidden, method.num_experts, dtype)
    return dense_router(x, weight, method, return_logits=True, **more)


def _replicas() -> Any:
    replicas = random(128).permuted(np.arange(256, dtype=np.int32)).reshape(128, 2)
    maps = {"replicas": replicas, "replica_counts": np.arange(128, dtype=np.int32) % 2 + 1, "num_physical": 256}
    return _dense(70, 64, SIGMOID, ml_dtypes.bfloat16, batch_invariant=True, **maps)


def _to_float32() -> Any:
    """Return rows of float16 as float32, which a gate GEMM of two dtypes needs."""
    source = normal(5, 40, dtype=np.float16)[:, :33]
    target = np.zeros((5, 33), np.float32)
    if compiler.backend("cpu") is None:
        return source.astype(np.float32)
    function = compiler.compile("to_float32", "to_float32", {"DTYPE": 1}, ("cpu", 0))
    fixed = {"num_rows": 5, "num_columns": 33, "source_stride": 40}
    Launch(function, 2, 256, ("source", "target"), fixed)(0, (source.ctypes.data, target.ctypes.data))
    return target


def _slice_counts() -> Any:
    """Return the number of valid rows in each slice of a call with many rows."""
    valid, counts = np.array([300], np.int32), np.zeros(5, np.int32)
    if compiler.backend("cpu") is None:
        return np.clip(300 - 128 * np.arange(5, dtype=np.int32), 0, 128)
    function = compiler.compile("slice_counts", "slice_counts", {}, ("cpu", 0))
    fixed = {"num_slices": 5, "slice_rows": 128}
    Launch(function, 1, 128, ("num_valid", "counts"), fixed)(0, (valid.ctypes.data, counts.ctypes.data))
    return counts


def _hash(n: int, method: RoutingMethod | None = None, **given: Any) -> Any:
    table = ids(50, 6, 64)
    return hash_router(random(n).integers(-1, 51, n).astype(np.int32), table, method, **given)


HASHED = M(64, 6, "sqrtsoftplus", scale=1.5)
HASHED_SOFTMAX = M(64, 6, "softmax", renormalize=False)


def _hash_dots(n: int, method: RoutingMethod = HASHED) -> Any:
    x, weight = gate(n, 128, 64, ml_dtypes.bfloat16)
    return _hash(n, method, x=x, weight=weight)


HIDDEN = (
    Case("dense_router", "decode path in float32", lambda: _dense(3, 72, SIGMOID, np.float32, path="decode")),
    Case(
        "dense_router", "decode path in bfloat16, by tensor cores",
        lambda: _dense(20, 256, SIGMOID, ml_dtypes.bfloat16, path="decode", logit_bias=eighths(128)),
    ),
    Case(
        "dense_router", "many tokens, the same in any batch, without clusters",
        on_small_gpu(lambda: _dense(70, 64, SIGMOID, ml_dtypes.bfloat16, batch_invariant=True)),
    ),
    Case(
        "dense_router", "decode path with a layout",
        lambda: _dense(4, 128, SIGMOID, ml_dtypes.bfloat16, path="decode", layout=LayoutSpec(4)),
    ),
    Case("dense_router", "many tokens, the same in any batch, with replicas", _replicas),
    Case("dense_router", "prefill path", lambda: _dense(9, 64, SIGMOID, np.float32, path="prefill")),
    Case("dense_router", "conversion of the gate to float32", _to_float32),
    Case("dense_router", "valid rows of each slice", _slice_counts),
    Case("hash_router", "uniform weights", lambda: _hash(40)),
    Case("hash_router", "weights of logits", lambda: _hash(9, HASHED, logits=distinct(9, 64, np.float16))),
    Case("hash_router", "weights of hidden states", lambda: _hash_dots(7)),
    Case("hash_router", "softmax of hidden states", lambda: _hash_dots(7, HASHED_SOFTMAX)),
    Case("hash_router", "with a layout", lambda: _hash(7, HASHED, logits=distinct(7, 64), layout=LayoutSpec(4))),
)  # fmt: skip


# -- Layouts and their rows --------------------------------------------------------------------------------------------


def _layout(n: int, k: int, num_experts: int, dtype: Any = np.int32, **options: Any) -> Any:
    load = np.arange(num_experts, dtype=np.int64)
    indices = random(n, k, 7).integers(-1, num_experts, (n, k)).astype(dtype)
    return with_load(load, expert_layout(indices, num_experts, load=load, want=ALL_OF_LAYOUT, **options))


def _weights(layout: ExpertLayout) -> Array:
    return normal(layout.num_tokens, layout.top_k, seed=8)


def _permute(dtype: Any, hidden: int, weighted: bool) -> Any:
    layout = layout_of(ids(7, 4, 12), 12, 4)
    return permute(normal(7, hidden, dtype=dtype), layout, weights=_weights(layout) if weighted else None)


def _unpermute(dtype: Any, hidden: int, residual: bool) -> Any:
    layout = layout_of(ids(7, 4, 12), 12, 4)
    more = {"residual": normal(7, hidden, dtype=dtype), "residual_scale": normal(7)} if residual else {}
    return unpermute(normal(layout.capacity, hidden, dtype=dtype, seed=9), layout, _weights(layout), **more)


def _permute_backward() -> Any:
    layout = layout_of(ids(7, 4, 12), 12, 4)
    rows = normal(layout.capacity, 40, seed=9)
    given = (rows, layout.positions, _weights(layout), normal(7, 40))
    return run(PERMUTE_BACKWARD, GradientOptions(("sums", "dots")), given, None, None)


def _unpermute_backward(hidden: int) -> Any:
    layout = layout_of(ids(7, 4, 12), 12, 4)
    x, y = normal(7, hidden), normal(layout.capacity, hidden, seed=9)
    given = (x, layout.order, layout.positions, _weights(layout), y, normal(7, hidden, seed=10), normal(7))
    want = GradientOptions(("rows", "dots", "scaled", "residual_dots"))
    return run(UNPERMUTE_BACKWARD, want, given, None, None)


LAYOUTS = (
    Case("expert_layout", "14 pairs", lambda: _layout(7, 2, 24, alignment=4)),
    Case("expert_layout", "by one block", lambda: _layout(40, 6, 60, np.int16, alignment=8, num_valid=37)),
    Case("expert_layout", "by a cluster", lambda: _layout(300, 6, 60, np.int64, experts=(20, 40))),
    Case("expert_layout", "by several blocks in one launch", on_small_gpu(lambda: _layout(200, 6, 64, alignment=16))),
    Case("expert_layout", "in three launches", lambda: _layout(40, 6, 2000)),
    Case("permute", "float16, weighted", lambda: _permute(np.float16, 40, True)),
    Case("permute", "an odd number of bytes", lambda: _permute(np.uint8, 37, False)),
    Case("permute", "a block for each row", lambda: _permute(np.float16, 1024, False)),
    Case("permute", "gradients", _permute_backward),
    Case("unpermute", "float32", lambda: _unpermute(np.float32, 40, False)),
    Case("unpermute", "bfloat16 with a scaled residual", lambda: _unpermute(ml_dtypes.bfloat16, 37, True)),
    Case("unpermute", "gradients", lambda: _unpermute_backward(40)),
    Case("unpermute", "gradients, a block for each row", lambda: _unpermute_backward(1000)),
    Case(
        "update_bias", "centred",
        lambda: update_bias(eighths(60), random(11).integers(0, 100, 60).astype(np.int32), rate=0.25, center=True),
    ),
)  # fmt: skip


# -- Scores ------------------------------------------------------------------------------------------------------------


def _lengths(rows: int, columns: int) -> Array:
    return random(rows, columns, 12).integers(-1, columns + 1, rows).astype(np.int32)


def _top(rows: int, columns: int, k: int, dtype: Any = np.float32, **options: Any) -> Any:
    return topk_select(tied(rows, columns, dtype), k, **options)


SCORES = (
    Case(
        "topk_select", "256 columns of float32, lengths",
        lambda: _top(9, 256, 8, lengths=_lengths(9, 256)),
    ),
    Case(
        "topk_select", "100 columns of bfloat16, in the order of columns",
        lambda: _top(40, 100, 6, ml_dtypes.bfloat16, order="column"),
    ),
    Case("topk_select", "64 columns of float16", lambda: _top(9, 64, 7, np.float16)),
    Case("topk_select", "3000 columns, lengths", lambda: _top(2, 3000, 40, lengths=_lengths(2, 3000))),
    Case("topk_select", "33,000 columns of a row", lambda: _top(1, 33_000, 600)),
    Case(
        "topk_select", "4000 columns of many rows, lengths",
        on_small_gpu(lambda: _top(5, 4000, 600, lengths=_lengths(5, 4000))),
    ),
    Case(
        "topk_select", "4000 columns of many rows of bfloat16, lengths",
        on_small_gpu(lambda: _top(5, 4000, 300, ml_dtypes.bfloat16, lengths=_lengths(5, 4000))),
    ),
    Case("topk_select", "20,000 of 30,000 columns", lambda: _top(1, 30_000, 20_000)),
)  # fmt: skip

CASES = (*ROWS, *HIDDEN, *LAYOUTS, *SCORES)
OPS = tuple(dict.fromkeys(case.op for case in CASES))


# -- Results -----------------------------------------------------------------------------------------------------------


def results_of(found: Any, name: str = "") -> dict[str, Array]:
    """Return copies of the arrays in what a case returned, by name."""
    if isinstance(found, np.ndarray):
        return {name or "result": found.copy()}
    if isinstance(found, tuple):
        fields = getattr(found, "_fields", None) or ("result", "load")
        outer = "" if name in ("", "result") else f"{name}."
        nested = [results_of(part, outer + field) for field, part in zip(fields, found, strict=True)]
        return {key: array for part in nested for key, array in part.items()}
    return {}


def run_case(number: int) -> dict[str, Array]:
    """Run a case by its number, as a process with a sanitizer does."""
    return results_of(CASES[number].call())
