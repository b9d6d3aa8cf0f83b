# SPDX-License-Identifier: Apache-2.0
"""Every kernel specialisation in use: what the ops ask to be compiled for the presets, the benchmarks and some corners.

Nothing is listed by its macros. Calls are made, in part by the benchmark scripts themselves, with NumPy's memory in the
place of the GPU's, while a :class:`Recorder` stands in for the device; so the list is what the ops really plan.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from cupy_router import (
    ExpertLayout,
    LayoutSpec,
    Router,
    RoutingMethod,
    activation_topk,
    compiler,
    declarations,
    dense_router,
    expert_layout,
    gemm,
    hash_router,
    permute,
    presets,
    topk_select,
    tuning,
    unpermute,
)
from cupy_router.check.architectures import chosen_on, number
from cupy_router.ops import _dense_decode as decode
from cupy_router.ops._permute_backward import OP as PERMUTE_BACKWARD
from cupy_router.ops._rows import GradientOptions
from cupy_router.ops._run import run
from cupy_router.ops._unpermute_backward import OP as UNPERMUTE_BACKWARD
from cupy_router.ops.activation_topk_backward import activation_topk_backward
from tests.backends import DTYPES
from tests.oracle_layout import NAMES
from tests.recorder import Launch, recording

FLOATS = ("float32", "float16", "bfloat16")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
VOCAB_SIZE, HIDDEN = 1000, 4096
CORNER = "(corner)"


@dataclass(frozen=True, order=True)
class Specialisation:
    """A kernel, its macros, and the largest block and dynamic shared memory that it is launched with."""

    function: str
    macros: tuple[tuple[str, int], ...]
    kernel: str
    block: int = 32
    shared_bytes: int = 0
    is_corner: bool = False  # neither the presets nor the benchmarks use it
    newest: tuple[tuple[str, int], ...] = ()  # its macros from sm_100 on, which tuning may decide otherwise

    def __str__(self) -> str:
        defaults = declarations.constants(compiler.expand(self.kernel))
        macros = (f"{name}={value}" for name, value in self.macros if defaults.get(name) != value)
        return " ".join([self.function, *macros, *([CORNER] if self.is_corner else [])])

    def source(self, architecture: str) -> str:
        """Return what is compiled for an architecture such as "sm_90"."""
        is_newest = number(architecture) >= 100
        return compiler.expand(self.kernel, self.newest if is_newest else self.macros)

    @property
    def architectures(self) -> tuple[str, ...]:
        """Those that it is compiled for."""
        return chosen_on(self.function, by_threshold=bool(dict(self.macros).get("BY_THRESHOLD")))


def specialisations() -> list[Specialisation]:
    """Sorted, without repetitions."""
    return sorted(in_order_of_use())


def in_order_of_use() -> list[Specialisation]:
    """As the ops ask for them, which does not depend on what macros are called."""
    used = _largest(_presets, _benchmarks, _besides, _given, _batch_invariant)
    found = [Specialisation(*key, *sizes, False, newest) for key, (sizes, newest) in used.items()]
    corners = _largest(_corners, _layouts).items()
    return found + [Specialisation(*key, *sizes, True, newest) for key, (sizes, newest) in corners if key not in used]


_Macros = tuple[tuple[str, int], ...]


def _largest(*parts: Callable[[], None]) -> dict[tuple[str, _Macros, str], tuple[tuple[int, int], _Macros]]:
    """Function, macros and kernel of all that is launched, with the largest block and dynamic shared memory, and the
    macros of the same launch on a GPU of compute capability 10.0."""
    found: dict[tuple[str, _Macros, str], tuple[tuple[int, int], _Macros]] = {}
    newest = replace(tuning.DEFAULT, capability=(10, 0))
    with _without_clusters():
        launches = [_launches(gpu, parts) for gpu in (tuning.DEFAULT, newest)]
    pairs = zip(*([launch for launch in part if not _on_some_gpus(launch)] for part in launches), strict=True)
    all_launches = chain(*launches, _launches(tuning.DEFAULT, parts))
    others = ((launch, launch) for launch in all_launches if _on_some_gpus(launch))
    for launch, on_newest in chain(pairs, others):
        assert launch.function == on_newest.function
        key = launch.function, tuple(sorted(launch.macros.items())), launch.kernel
        (block, shared_bytes), _ = found.get(key, ((0, 0), ()))
        sizes = max(block, launch.block[0]), max(shared_bytes, launch.shared_bytes)
        found[key] = sizes, tuple(sorted(on_newest.macros.items()))
    return found


@contextmanager
def _without_clusters() -> Iterator[None]:
    """Let dense_router choose its kernel for many tokens only where a call is batch-invariant and has many tokens."""
    table = tuning.DEFAULT.table
    changed = replace(table, decode=replace(table.decode, fused=(), min_tokens_in_cluster=decode.MAX_TOKENS + 1))
    with mock.patch.object(tuning.Gpu, "table", property(lambda gpu: changed)):
        yield


def _on_some_gpus(launch: Launch) -> bool:
    """Return whether it is one of many tokens of a batch-invariant call, which are other launches on another GPU."""
    return launch.function == "dense_router_prefill" or launch.macros.keys() >= {"INVARIANT", "AT_ONCE"}


def _launches(gpu: tuning.Gpu, parts: Sequence[Callable[[], None]]) -> list[Launch]:
    """Return what the ops launch on a GPU."""
    no_product = mock.patch.object(gemm, "product", return_value=mock.MagicMock(row_bytes=0))
    with recording() as recorder, no_product, tuning.assume(gpu):
        for calls in parts:
            calls()
    return recorder.launches


def _matrix(rows: int, columns: int, dtype: str, misaligned: bool = False) -> Any:
    flat = np.zeros(rows * columns + 8, DTYPES[dtype])
    return flat[misaligned : rows * columns + misaligned].reshape(rows, columns)


def _backward(n: int, method: RoutingMethod, logits_dtype: str, **options: Any) -> None:
    shape = (n, method.num_columns)
    grad_weights, indices = np.zeros(shape, DTYPES[method.weight_dtype]), np.zeros(shape, np.int32)
    activation_topk_backward(grad_weights, indices, _matrix(n, method.num_logits, logits_dtype), method, **options)


FULL = ("deepseek-v4-flash", "deepseek-v4-pro")


def _presets() -> None:
    """Every dtype, few rows and many; few, since that is rare, also misaligned; hash layers. Other families differ from
    that in the method alone: of these it is what the benchmark of methods asks for, and a gate in bfloat16."""
    for name, method in presets().items():
        bias = np.zeros(method.num_experts, np.float32)
        if name not in FULL:
            layer: dict[str, Any] = {"logit_bias" if method.score_after_topk else "bias": bias}
            x, weight = _matrix(16, HIDDEN, "bfloat16"), _matrix(method.num_experts, HIDDEN, "bfloat16")
            dense_router(x, weight, method, **layer, path="decode")
            continue
        table = np.zeros((VOCAB_SIZE, method.top_k), np.int32)
        for dtype in FLOATS:
            weight = _matrix(method.num_experts, HIDDEN, dtype)
            activation_topk(_matrix(64, method.num_experts, dtype, misaligned=True), method, bias=bias)
            for n in (64, 1024, 8192, 65536):
                activation_topk(_matrix(n, method.num_experts, dtype), method, bias=bias)
                hash_router(np.zeros(n, np.int32), table, method, logits=_matrix(n, method.num_experts, dtype))
                if dtype != "float16" and n < 65536:
                    _backward(n, method, dtype)
            x = _matrix(16, HIDDEN, dtype)
            hash_router(np.zeros(16, np.int32), table, method, x=x, weight=weight)
            for rows in (x, _matrix(4096, HIDDEN, dtype)):
                hash_router(np.zeros(len(rows), np.int32), table, method, x=rows, weight=weight, return_logits=True)
            dense_router(x, weight, method, bias=bias, path="decode")
            dense_router(x, weight, method, bias=bias, path="decode", return_logits=True)
        hash_router(np.zeros(65536, np.int64), table)


def _besides() -> None:
    """What else users of the presets meet: limits of rows, wide rows, products that are prepared."""
    older = replace(tuning.DEFAULT, capability=(8, 0))
    for dtype in FLOATS:
        topk_select(_matrix(4096, 256, dtype), 8, lengths=np.zeros(4096, np.int32))
        topk_select(_matrix(4, 40_000, dtype), 512)
        with tuning.assume(older):
            topk_select(_matrix(5000, 256, dtype), 8)  # which compares no two scores at once
            topk_select(_matrix(8, 32_768, dtype), 512)  # without clusters
        gemm._packer(("cpu", 0), gemm.Matrix(dtype, 4096, HIDDEN, HIDDEN))(0, (0, 0, 4096))
    with tuning.assume(older):
        topk_select(_matrix(8, 131_072, "float32"), 2048)
    # So many tokens that the gate product comes in slices, each with its own count of valid rows.
    x, gate = _matrix(100_000, 8, "float32"), _matrix(256, 8, "float32")
    dense_router(x, gate, "deepseek-v4-flash", bias=np.zeros(256, np.float32), num_valid=np.zeros(1, np.int32))
    table, bias = np.zeros((1000, 6), np.int64), np.zeros(256, np.float32)
    given = {"x": x[:4096], "weight": gate, "logit_bias": bias, "return_logits": True}
    hash_router(np.zeros(4096, np.int32), table, "deepseek-v4-flash", num_valid=np.zeros(1, np.int32), **given)
    # A logit bias, or another dtype: logits that the product does not leave finished.
    for preset in ("gpt-oss", "gpt-oss-120b"):
        method = presets()[preset]
        layer = {"logit_bias": np.zeros(method.num_experts, np.float32), "return_logits": True}
        for n, layout in ((1, None), (16, None), (16, LayoutSpec()), (4096, None)):
            x, gate = _matrix(n, 2880, "bfloat16"), _matrix(method.num_experts, 2880, "bfloat16")
            dense_router(x, gate, method, **layer, layout=layout, logits_dtype="bfloat16")


def _given() -> None:
    """Experts as rollouts record them, replayed: for few tokens and many, whose rows of -1 are routed or empty; and
    replicas of experts."""
    method = presets()["deepseek-v4-flash"]
    bias = np.zeros(256, np.float32)
    for n, unset in product((16, 8192), ("route", "empty")):
        replayed: dict[str, Any] = {"indices": np.zeros((n, 6), np.int16), "unset": unset, "bias": bias}
        for dtype in ("float32", "bfloat16"):
            activation_topk(_matrix(n, 256, dtype), method, **replayed)
            dense_router(_matrix(n, HIDDEN, dtype), _matrix(256, HIDDEN, dtype), method, **replayed)
    replayed = {"indices": np.zeros((16, 6), np.uint8), "unset": "empty", "layout": LayoutSpec()}
    x, weight = _matrix(16, HIDDEN, "bfloat16"), _matrix(256, HIDDEN, "bfloat16")
    activation_topk(_matrix(16, 256, "bfloat16"), method, **replayed)
    dense_router(x, weight, method, **replayed)
    maps = {"replicas": np.zeros((256, 4), np.int32), "replica_counts": np.zeros(256, np.int32), "num_physical": 288}
    for layout in (None, LayoutSpec()):
        activation_topk(_matrix(16, 256, "bfloat16"), method, bias=bias, layout=layout, **maps)
        dense_router(x, weight, method, bias=bias, layout=layout, **maps)
    activation_topk(
        _matrix(8192, 256, "bfloat16"), method, **maps, indices=np.zeros((8192, 6), np.int16), unset="empty"
    )
    dense_router(_matrix(300, HIDDEN, "bfloat16"), weight, method, **maps, batch_invariant=True)
    softmax = RoutingMethod(256, 8, "softmax")
    for unset in ("route", "empty"):
        dense_router(x, weight, softmax, indices=np.zeros((16, 8), np.int32), unset=unset, return_logits=True)


def _batch_invariant() -> None:
    """Few tokens and many, selected, given, and of tables, whose given experts keep the others' results."""
    for preset, hidden in (("deepseek-v4-flash", 4096), ("deepseek-v4-pro", 7168)):
        method = presets()[preset]
        layer: dict[str, Any] = {"bias": np.zeros(method.num_experts, np.float32), "batch_invariant": True}
        for dtype in ("bfloat16", "float32"):
            weight = _matrix(method.num_experts, hidden, dtype)
            for n in (1, 8, 64, 128, 300, 640, 896, 1024, 4096, 8192):
                dense_router(_matrix(n, hidden, dtype), weight, method, **layer, return_logits=True)
    method = presets()["deepseek-v4-flash"]
    x, weight = _matrix(16, HIDDEN, "bfloat16"), _matrix(256, HIDDEN, "bfloat16")
    ids, given = np.zeros(16, np.int32), np.zeros((16, 6), np.int16)
    router = Router(method, weight=weight, table=np.zeros((VOCAB_SIZE, 6), np.int32))
    router(x, ids, indices=given, batch_invariant=True)


def _corners() -> None:
    """The widest rows and most winners that a warp takes, every score and step, the kernels for any size."""
    topk_select(_matrix(4096, 1000, "float32"), 32)
    topk_select(_matrix(1, 140_000, "float32"), 8192)
    topk_select(_matrix(2, 40_000, "float32"), 20_000)
    topk_select(_matrix(64, 256, "float32"), 8, order="column", return_values=False)
    topk_select(_matrix(4096, 1000, "float32"), 15)
    topk_select(_matrix(4096, 700, "bfloat16"), 12)
    activation_topk(_matrix(4096, 1000, "float32"), RoutingMethod(1000, 15), bias=np.zeros(1000, np.float32))
    for score in ("sigmoid", "softmax", "identity"):
        activation_topk(_matrix(4096, 256, "float32"), RoutingMethod(256, 8, score))
    activation_topk(_matrix(4096, 1000, "float32"), RoutingMethod(1000, 32, "softmax"))
    activation_topk(_matrix(4, 2000, "float32"), RoutingMethod(2000, 40, "softmax"))
    x, weight = _matrix(4, HIDDEN, "float32"), _matrix(2000, HIDDEN, "float32")
    dense_router(x, weight, RoutingMethod(2000, 40), return_logits=True, logits_dtype="float16")
    x, weight = _matrix(64, HIDDEN, "float16"), _matrix(1000, HIDDEN, "float16")
    spec = LayoutSpec(16, want=NAMES)
    dense_router(x, weight, RoutingMethod(1000, 32, "softmax"), return_logits=True, num_valid=3, layout=spec)
    activation_topk(_matrix(4096, 256, "float32"), RoutingMethod(256, 8, logit_scale=0.5, logit_softcap=30.0))
    shared = RoutingMethod(256, 6, "sigmoid", num_shared_experts=2, shared_in_normalizer=True, weight_dtype="bfloat16")
    activation_topk(_matrix(4096, 258, "bfloat16"), shared, expert_scale=np.zeros(256, np.float32))
    widest = RoutingMethod(1024, 32, "sigmoid", num_groups=32, top_groups=4, group_score="top2")
    activation_topk(_matrix(4096, 1024, "float32"), widest, bias=np.zeros(1024, np.float32))
    grouped = RoutingMethod(4096, 64, "sigmoid", num_groups=8, top_groups=4, group_score="top2", index_dtype="int64")
    activation_topk(_matrix(4, 4096, "bfloat16"), grouped)
    _backward(4096, RoutingMethod(256, 6), "bfloat16", dtype="float32", repeated=True)
    _backward(4096, shared, "bfloat16")
    _backward(4096, RoutingMethod(1000, 32, "softmax"), "float32")
    _backward(4, RoutingMethod(2000, 40, "softmax"), "float32")
    ids, table = np.zeros(4096, np.int64), np.zeros((VOCAB_SIZE, 8), np.int64)
    softmax = RoutingMethod(256, 8, "softmax")
    hash_router(ids, table, softmax, logits=_matrix(4096, 256, "float32"))
    weight = _matrix(256, HIDDEN, "float32", misaligned=True)
    hash_router(ids[:4], table, softmax, x=_matrix(4, HIDDEN, "bfloat16"), weight=weight)
    layer = {"logit_bias": np.zeros(256, np.float32), "return_logits": True}
    hash_router(ids, table, softmax, x=_matrix(4096, HIDDEN, "bfloat16"), weight=weight, **layer)


def _layouts() -> None:
    """All results and inputs of layouts, by one block and by several; rows of any dtype, and with every array."""
    ids, load = np.zeros((9000, 8), np.uint8), np.zeros(256, np.int64)
    for n in (20, 9000):
        given: dict[str, Any] = {"expert_map": np.zeros(256, np.int32), "num_local": 200, "load": load}
        expert_layout(ids[:n, :7], 256, alignment=16, num_valid=np.zeros(1, np.int32), want=NAMES, **given)
        expert_layout(np.zeros((n, 1), np.int64), 1000, experts=(900, 100), load=np.zeros(1000, np.int32))
    expert_layout(np.zeros((64, 8), np.uint16), 40_000)
    made = ExpertLayout(order=np.zeros(9000, np.int32), positions=np.zeros((300, 22), np.int32))
    permute(_matrix(300, 1999, "uint8", misaligned=True), made)
    for dtype, hidden, misaligned in (("float32", 7168, False), ("float16", 1000, True)):
        x, y = (_matrix(rows, hidden, dtype, misaligned) for rows in (300, 9000))
        weights, scale = np.zeros((300, 22), np.float32), np.zeros(300, np.float32)
        permute(x, made, weights=weights)
        unpermute(y, made, weights, residual=x, residual_scale=scale)
        given_rows = (x, made.order, made.positions, weights, y, x, scale)
        run(UNPERMUTE_BACKWARD, GradientOptions(("rows", "dots", "scaled", "residual_dots")), given_rows, None, None)
        run(PERMUTE_BACKWARD, GradientOptions(("sums", "dots")), (y, made.positions, weights, x), None, None)


# -- Benchmarks --------------------------------------------------------------------------------------------------------


class _Zeros(np.ndarray):
    """Memory that nobody touches, whatever is computed with it."""

    def astype(self, dtype: Any, *_: Any, **__: Any) -> Any:
        return np.zeros(self.shape, dtype).view(_Zeros)

    def copy(self, *_: Any, **__: Any) -> Any:
        return self.astype(self.dtype)

    def __mul__(self, other: object) -> _Zeros:
        return self

    __truediv__ = __mul__


class _NumPyAsCuPy:
    """NumPy under CuPy's name; "random" numbers are zeros."""

    random = SimpleNamespace(
        standard_normal=lambda shape, dtype: np.zeros(shape, dtype).view(_Zeros),
        randint=lambda low, high, shape: np.zeros(shape, np.int64).view(_Zeros),
    )
    RawKernel = mock.MagicMock()

    full_like = maximum = round = staticmethod(lambda array, *_: array)  # values do not matter

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _benchmarks() -> None:
    """What the benchmark scripts measure of ours when they are quick, each call made once."""
    with _imported_anew("benchmarks", cupy=_NumPyAsCuPy()):
        harness = importlib.import_module("benchmarks.harness")
        harness.gpu_row, harness.host_rows = _gpu_row, _host_rows  # type: ignore[attr-defined]
        harness.cold_inputs = lambda make, *_, **__: [make()]  # type: ignore[attr-defined]
        harness.graph_microseconds = _graph_microseconds  # type: ignore[attr-defined]  # a module's function
        harness.attempt = lambda what, function: None  # type: ignore[attr-defined]  # rivals
        for path in sorted(BENCHMARKS.glob("bench_*.py")):
            module = importlib.import_module(f"benchmarks.{path.stem}")
            if hasattr(module, "measure"):  # the others measure whole models
                module.measure(True)


@contextmanager
def _imported_anew(package: str, **modules: Any) -> Iterator[None]:
    """Within it, a package is imported as if for the first time, with these modules; afterwards it is as it was."""

    def taken() -> dict[str, Any]:
        names = [name for name in sys.modules if name.partition(".")[0] == package or name in modules]
        return {name: sys.modules.pop(name) for name in names}

    before = taken()
    sys.modules.update(modules)
    try:
        yield
    finally:
        taken()
        sys.modules.update(before)


def _gpu_row(call: Callable[[int], Any], cell: dict[str, Any], by: str = "cupy_router", **_: Any) -> dict[str, Any]:
    if by == "cupy_router":
        call(0)
    return {"what": "gpu"} | cell | {"by": by, "us": 1.0, "spread_us": 0.0}


def _graph_microseconds(call: Callable[[int], Any], *_: Any, **__: Any) -> tuple[float, float]:
    call(0)
    return 1.0, 0.0


def _host_rows(calls: Mapping[tuple[str, str], Callable[[], Any]], cell: dict[str, Any], **_: Any) -> list[Any]:
    for (by, _name), call in calls.items():
        if by == "cupy_router":
            call()
    return []
