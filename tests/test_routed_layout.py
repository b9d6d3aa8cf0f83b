# SPDX-License-Identifier: Apache-2.0
"""Layouts in the results of routers, in one launch and in two: always what `expert_layout` says of their indices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from cupy_router import (
    ExpertLayout,
    LayoutSpec,
    Router,
    RoutingMethod,
    RoutingPlan,
    activation_topk,
    compiler,
    dense_router,
    hash_router,
    tuning,
)
from cupy_router.ops import _cached
from cupy_router.ops._routed import RoutedOp
from tests import compare, inputs, oracle_layout
from tests.backends import Backend
from tests.canvas import Canvas

ALL = oracle_layout.NAMES
ONE_BLOCK, LAST_BLOCK, CLUSTER, TWO = "one block", "last block", "cluster", "two launches"
_LAYOUT_BY = (ONE_BLOCK, LAST_BLOCK, CLUSTER)
WITH_ROWS = ("weights", "indices", "positions")
BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class Case:
    """A call: how many tokens, by what method, laid out how, and by which launch that is expected."""

    op: str
    n: int
    experts: int
    k: int
    launch: str
    alignment: int = 1
    capacity: int | None = None
    want: tuple[str, ...] = ALL
    num_valid: int | None = None
    on_device: bool = False  # num_valid is an array
    method: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    given: tuple[str, ...] = ()  # bias and others
    hidden: int = 64

    def __str__(self) -> str:
        default = Case(self.op, self.n, self.experts, self.k, self.launch)
        named = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return f"{self.op}-{self.n}x{self.experts}-{self.k}-{self.launch.replace(' ', '_')}" + "".join(
            f"-{name}={'+'.join(value) if isinstance(value, tuple) else value}" for name, value in named.items()
        )


SHARED = {"num_shared_experts": 2, "index_dtype": "int64"}
ACTIVATION = [
    Case("activation", 1, 256, 8, ONE_BLOCK),
    Case("activation", 1, 256, 8, ONE_BLOCK, 128, given=("bias",)),
    Case("activation", 1, 64, 6, ONE_BLOCK, 1, 4),
    Case("activation", 1, 64, 6, ONE_BLOCK, num_valid=0),
    Case("activation", 2, 256, 8, ONE_BLOCK, 3, method={"score": "softmax"}),
    Case("activation", 2, 60, 4, ONE_BLOCK, 4, 8),
    Case("activation", 2, 8, 6, ONE_BLOCK),  # tokens share experts
    Case("activation", 2, 8, 6, ONE_BLOCK, 2),
    Case("activation", 5, 128, 6, ONE_BLOCK, num_valid=3, on_device=True),
    Case("activation", 7, 128, 6, CLUSTER, 128),
    Case("activation", 8, 256, 8, ONE_BLOCK, want=("offsets",)),
    Case("activation", 9, 256, 8, CLUSTER, want=("ends", "positions")),
    Case("activation", 16, 256, 8, CLUSTER, 128, given=("bias",), dtype=BFLOAT16),
    Case("activation", 33, 72, 6, CLUSTER, 16, 64, method=SHARED),
    Case("activation", 33, 72, 6, CLUSTER, num_valid=20),
    Case("activation", 33, 72, 6, CLUSTER, 7, num_valid=20, on_device=True, method=SHARED),
    Case("activation", 64, 256, 8, CLUSTER, given=("bias",)),
    Case("activation", 64, 384, 6, CLUSTER, want=oracle_layout.DEFAULT_WANT),
    Case("activation", 64, 1024, 2, CLUSTER, want=("row_experts", "block_experts")),
    Case("activation", 64, 256, 8, CLUSTER, 16, method={"num_groups": 8, "top_groups": 4, "group_score": "top2"}),
    Case("activation", 65, 256, 6, LAST_BLOCK),
    Case("activation", 128, 256, 8, LAST_BLOCK, 16),
    Case("activation", 128, 160, 6, LAST_BLOCK, 1, 0),
    Case("activation", 20, 60, 4, CLUSTER, 1, 10_000),
    Case("activation", 20, 60, 4, TWO, 1, 100_000),
    Case("activation", 129, 60, 4, TWO, 16),
    Case("activation", 5, 2000, 4, TWO),
    Case("activation", 5, 64, 40, TWO),
    Case("activation", 0, 64, 6, TWO, 16),
]
HASH = [
    Case("hash", 1, 256, 6, ONE_BLOCK),
    Case("hash", 16, 64, 6, ONE_BLOCK, 16, given=("logits",), num_valid=11, on_device=True),
    Case("hash", 16, 64, 6, TWO, 128, given=("logits",)),
    Case("hash", 40, 64, 6, ONE_BLOCK, 1, 60, given=("logits",), num_valid=30),
    Case("hash", 64, 128, 6, ONE_BLOCK, method=SHARED, given=("logits",)),
    Case("hash", 64, 128, 8, LAST_BLOCK, method=SHARED, given=("logits",)),
    Case("hash", 90, 128, 8, LAST_BLOCK, 4, given=("logits",)),
    Case("hash", 20, 64, 6, LAST_BLOCK, given=("logits",), method={"score": "softmax"}),
    Case("hash", 1, 64, 6, ONE_BLOCK, 4, given=("x",)),
    Case("hash", 5, 64, 6, LAST_BLOCK, 4, given=("x",)),
    Case("hash", 3, 64, 6, LAST_BLOCK, given=("x",), method={"score": "softmax"}),
    Case("hash", 5, 2000, 4, TWO),
    Case("hash", 0, 64, 6, TWO),
]
DENSE = [
    Case("dense", 1, 64, 6, ONE_BLOCK),
    Case("dense", 3, 64, 6, ONE_BLOCK, 128, dtype=BFLOAT16, given=("bias",)),
    Case("dense", 8, 128, 6, ONE_BLOCK, 7, dtype=BFLOAT16, num_valid=5),
    Case("dense", 9, 64, 6, LAST_BLOCK, 1, 20),
    Case("dense", 16, 64, 6, LAST_BLOCK, 16, dtype=BFLOAT16, num_valid=7, on_device=True),
    Case("dense", 64, 64, 6, LAST_BLOCK, dtype=BFLOAT16, method=SHARED, want=("order",)),
    Case("dense", 9, 1024, 2, LAST_BLOCK, 16, dtype=BFLOAT16),
]
ROUTER = [Case("router", 1, 64, 6, ONE_BLOCK, 4), Case("router", 5, 64, 6, LAST_BLOCK, given=("x",))]


class Call:
    """The arrays of a case on a backend, and the call."""

    def __init__(self, backend: Backend, case: Case) -> None:
        self.backend, self.case = backend, case
        self.method = RoutingMethod(case.experts, case.k, **case.method)
        n, experts = case.n, case.experts
        self.arguments, keywords = self._arguments(np.random.default_rng(n + experts))
        count = case.num_valid
        if case.on_device:
            keywords["num_valid"] = np.array([count], np.int32)
        self.keywords = {name: backend.array(array) for name, array in keywords.items()}
        if not case.on_device and count is not None:
            self.keywords["num_valid"] = count

    def _arguments(self, random: np.random.Generator) -> tuple[tuple[Any, ...], dict[str, np.ndarray]]:
        case, array = self.case, self.backend.array
        n, experts = case.n, case.experts
        keywords: dict[str, np.ndarray] = {}
        if "bias" in case.given:
            keywords["bias"] = inputs.normal((experts,), seed=2)
        logits = inputs.normal((n, experts), case.dtype, seed=1)
        if case.op == "activation":
            return (array(logits, row_pad=3), self.method), keywords
        x, weight = (inputs.normal((size, case.hidden), case.dtype, seed=size) for size in (n, experts))
        if case.op == "dense":
            return (array(x), array(weight), self.method), {**keywords}
        ids = random.integers(-1, 30, n).astype(np.int32)
        table = random.integers(0, experts, (29, case.k)).astype(np.int32)
        table[7, -1] = experts  # no expert; neither are ids 29 and -1
        table[8] = table[8, 0]  # the same expert k times
        ids[: n // 4] = 8
        keywords |= {"logits": logits} if "logits" in case.given else {}
        keywords |= {"x": x, "weight": weight} if "x" in case.given else {}
        return (array(ids), array(table), self.method), keywords

    def __call__(self, layout: LayoutSpec | None, out: Any = None) -> Any:
        keywords = dict(self.keywords)
        if self.case.op == "router":
            ids, table, method = self.arguments
            weight, x = keywords.get("weight"), keywords.get("x")
            x = self.backend.array(np.zeros((self.case.n, 1), np.float32)) if x is None else x
            return Router(method, weight=weight, table=table)(x, ids, layout=layout, out=out)
        if self.case.op == "dense":
            keywords["path"] = "decode"
        op: Any = {"activation": activation_topk, "hash": hash_router, "dense": dense_router}[self.case.op]
        return op(*self.arguments, **keywords, layout=layout, out=out)


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """Names of the kernels that are compiled or found in the cache, and how each hands over."""
    found: list[str] = []

    def spy(kernel: str, function: str, macros: Any, *rest: Any) -> Any:
        layout_by = dict(macros).get("LAYOUT_BY")
        found.append(function if layout_by is None else _LAYOUT_BY[layout_by])
        return compile_(kernel, function, macros, *rest)

    compile_ = compiler.compile
    with mock.patch.object(compiler, "compile", spy):
        yield found


def check(backend: Backend, call: Call, launches: list[str], launch: str | None = None) -> None:
    """Compare a call with one without layout, with the oracle, and with two launches."""
    case = call.case
    spec = LayoutSpec(case.alignment, case.capacity, case.want)
    launches.clear()
    plan = call(spec)
    if backend.runs_kernels:
        used = list(launches)
        assert (used[0] if len(used) == 1 and case.n else TWO) == (launch or case.launch)
    assert type(plan) is RoutingPlan
    assert type(plan.layout) is ExpertLayout
    plain = call(None)
    for name in ("weights", "indices"):
        compare.assert_same_bits(backend.numpy(getattr(plan, name)), backend.numpy(getattr(plain, name)))
    indices = backend.numpy(plain.indices)
    experts = call.method.num_experts + call.method.num_shared_experts
    options = {"alignment": case.alignment, "capacity": case.capacity, "want": case.want}
    right = oracle_layout.expert_layout(indices, experts, **options)
    arrays = {name: getattr(plan.layout, name) for name in ALL}
    assert {name for name, array in arrays.items() if array is not None} == right.keys()
    for name, array in right.items():
        np.testing.assert_array_equal(backend.numpy(arrays[name]), array, err_msg=name)
    with two_launches():
        two = call(spec)
    _cached.forget()
    for name, array in right.items():
        np.testing.assert_array_equal(backend.numpy(getattr(two.layout, name)), array, err_msg=f"two launches: {name}")
    for name in ("weights", "indices"):
        compare.assert_same_bits(backend.numpy(getattr(two, name)), backend.numpy(getattr(plain, name)))


@contextmanager
def two_launches() -> Iterator[None]:
    """Let no launch both route and lay out."""
    _cached.forget()
    with ExitStack() as patches:
        for kind in RoutedOp.__subclasses__():
            patches.enter_context(mock.patch.object(kind, "fused", return_value=None))
        yield


@pytest.mark.slow("compiler", every=6)
@pytest.mark.parametrize("case", [*ACTIVATION, *HASH, *DENSE, *ROUTER], ids=str)
def test_layout_of_a_router(backend: Backend, case: Case, launches: list[str]) -> None:
    _cached.forget()
    check(backend, Call(backend, case), launches)


@pytest.mark.needs_kernels
@pytest.mark.slow("compiler", every=2)
@pytest.mark.parametrize("case", [ACTIVATION[11], ACTIVATION[13], ACTIVATION[15]], ids=str)
def test_gpus_without_clusters(backend: Backend, case: Case, launches: list[str]) -> None:
    older = replace(tuning.DEFAULT, capability=(8, 0))
    _cached.forget()
    with tuning.assume(older):
        check(backend, Call(backend, case), launches, LAST_BLOCK)


@pytest.mark.slow("compiler", every=3)
@pytest.mark.parametrize("case", [ACTIVATION[0], ACTIVATION[15], ACTIVATION[20], HASH[3], DENSE[4]], ids=str)
def test_out_with_gaps_between_rows_and_marks_around_each_array(backend: Backend, case: Case) -> None:
    call = Call(backend, replace(case, want=ALL))
    spec = LayoutSpec(case.alignment, case.capacity, ALL)
    _cached.forget()
    plan = call(spec)
    canvases = {}
    for name, array in (*plan._asdict().items(), *plan.layout._asdict().items()):
        if hasattr(array, "shape"):
            shape = array.shape if len(array.shape) == 2 else (1, array.shape[0])
            canvases[name] = Canvas(shape, 2 * (len(array.shape) == 2), np.dtype(str(array.dtype)), backend)
    made = {name: canvas.array if name in WITH_ROWS else canvas.array[0] for name, canvas in canvases.items()}
    layout = ExpertLayout(*(made[name] for name in ALL))
    out = RoutingPlan(made["weights"], made["indices"], layout)
    filled = call(spec, out)
    assert filled.weights is out.weights
    assert filled.layout.order is layout.order
    for name, canvas in canvases.items():
        before = getattr(plan, name, None) if name in ("weights", "indices") else getattr(plan.layout, name)
        np.testing.assert_array_equal(backend.numpy(made[name]), backend.numpy(before), err_msg=name)
        assert canvas.is_clean(), f"something beside {name} was written"
