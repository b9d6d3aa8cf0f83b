# SPDX-License-Identifier: Apache-2.0
"""Eager calls with many results: in PyTorch they share a block of memory, and `out` may be any layout of the shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cupy_router import ExpertLayout, LayoutSpec, RoutingMethod, activation_topk, expert_layout, topk_select
from cupy_router.arrays import FRAMEWORKS, MAX_SHARED_BYTES, places_in_block
from cupy_router.arrays import _torch as tensors
from cupy_router.ops import _run
from cupy_router.ops import expert_layout as layouts
from cupy_router.ops.activation_topk import OP as ROUTER
from cupy_router.ops.registry import OPS
from cupy_router.results import RoutingPlan, TopK
from tests.cuda_path import Launches, record_launches

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

METHOD = RoutingMethod(5, 2)
INDICES = torch.tensor([[1, 0], [2, 1], [7, 1]], dtype=torch.int32)
LOGITS = torch.arange(15.0).reshape(3, 5)
ARRAYS = ExpertLayout._fields[:7]
SMALL = (((5,), "int32"), ((6,), "int32"), ((64,), "int32"), ((3, 2), "int32"))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return record_launches(monkeypatch)


def storages(arrays: Any) -> set[int]:
    return {array.untyped_storage().data_ptr() for array in arrays}


def addresses(layout: ExpertLayout) -> dict[str, int]:
    return {name: 0 if array is None else array.data_ptr() for name, array in zip(ARRAYS, layout, strict=False)}


def missing_ints(layout: ExpertLayout) -> ExpertLayout:
    return ExpertLayout(*layout[:7])


# -- Memory of results -------------------------------------------------------------------------------------------------


def test_results_of_one_dtype_share_a_block() -> None:
    pointers: list[int] = []
    arrays = tensors.FRAMEWORK.allocator(SMALL, INDICES)(pointers)
    assert [(tuple(array.shape), array.dtype) for array in arrays] == [(shape, torch.int32) for shape, _ in SMALL]
    assert all(array.is_contiguous() for array in arrays)
    assert len(storages(arrays)) == 1
    assert [array.data_ptr() for array in arrays] == pointers
    assert all((pointer - pointers[0]) % 256 == 0 for pointer in pointers)


def test_arrays_in_a_block_do_not_overlap_and_have_versions_of_their_own() -> None:
    arrays = tensors.FRAMEWORK.allocator(SMALL, INDICES)([])
    for number, array in enumerate(arrays):
        array.fill_(number)
    for number, array in enumerate(arrays):
        assert (array == number).all()
        assert array._version == 1
    kept = arrays[2]
    del arrays, array
    assert (kept == 2).all()


@pytest.mark.parametrize("sizes", [(1, 64, 65, 0, 3), (0, 0, 0), (64, 64, 64)])
def test_blocks_of_any_sizes(sizes: tuple[int, ...]) -> None:
    pointers: list[int] = []
    arrays = tensors.FRAMEWORK.allocator(tuple(((size,), "int32") for size in sizes), INDICES)(pointers)
    assert [array.numel() for array in arrays] == [*sizes]
    offsets, total = places_in_block([4 * size for size in sizes])
    assert [4 * array.storage_offset() for array in arrays] == offsets
    assert arrays[0].untyped_storage().nbytes() == total
    for (one, size), (other, _) in itertools.pairwise(zip(offsets, sizes, strict=True)):
        assert other - one >= 4 * size


def test_other_results_have_memory_of_their_own() -> None:
    large = MAX_SHARED_BYTES // 4
    for outputs, blocks in (
        ((((3, 2), "float32"), *SMALL), 2),
        ((((3, 2), "float32"), ((3, 2), "int32")), 2),
        ((*SMALL, ((3, 2), "float32")), 5),
        ((*SMALL[:3], ((large,), "int32")), 4),
    ):
        pointers: list[int] = []
        arrays = tensors.FRAMEWORK.allocator(outputs, INDICES)(pointers)
        assert len(storages(arrays)) == blocks
        assert [array.data_ptr() for array in arrays] == pointers
        assert [tensors.NAMES[array.dtype] for array in arrays] == [dtype for _, dtype in outputs]
        assert len(storages(tensors.FRAMEWORK.allocator_apart(outputs, INDICES)([]))) == len(outputs)


def test_kernels_get_the_addresses_of_results(launches: Launches) -> None:
    for want in (layouts.DEFAULT_WANT, ("block_experts", "row_experts"), ("order",)):
        layout = expert_layout(INDICES, 5, alignment=4, want=want)
        assert {name: launches[-1][name] for name in ARRAYS} == addresses(layout)
        assert layout[7:] == (3, 2, 4, 20)
    plan = activation_topk(LOGITS, METHOD, layout=LayoutSpec())
    assert {name: launches[-1][name] for name in ARRAYS} == addresses(plan.layout)
    assert (launches[-1]["weights"], launches[-1]["indices"]) == (plan.weights.data_ptr(), plan.indices.data_ptr())


def test_results_in_graphs_share_no_memory(launches: Launches) -> None:
    """Compilers would take them for aliases of each other, which the schemas of the ops rule out."""
    expert_layout(INDICES, 5)  # has a cached call
    from cupy_router.torch import _library

    layout = _library.call(layouts.OP, layouts.LayoutOptions(5), (INDICES, None, None, None), -1, None, ())
    assert len(launches) == 2
    assert len(storages(layout[:5])) == 5


# -- out ---------------------------------------------------------------------------------------------------------------


def test_an_earlier_layout_is_filled_in_place(launches: Launches) -> None:
    layout = expert_layout(INDICES, 5, want=("offsets", "positions"))
    for calls in (1, 2):
        assert expert_layout(INDICES, 5, want=("offsets", "positions"), out=layout) is layout
        assert {name: launches[-1][name] for name in ARRAYS} == addresses(layout)
        assert [array._version for array in layout[:7] if array is not None] == [calls] * 3


def test_a_plan_is_filled_in_place(launches: Launches) -> None:
    plan = activation_topk(LOGITS, METHOD, layout=LayoutSpec())
    for calls in (1, 2):
        assert activation_topk(LOGITS, METHOD, layout=LayoutSpec(), out=plan) is plan
        assert {name: launches[-1][name] for name in ARRAYS} == addresses(plan.layout)
        assert [array._version for array in (*plan[:2], *plan.layout[:5])] == [calls] * 7


def test_ints_that_out_lacks_are_filled_in(launches: Launches) -> None:
    layout = expert_layout(INDICES, 5)
    for _ in range(2):
        got = expert_layout(INDICES, 5, out=missing_ints(layout))
        assert got[7:] == layout[7:]
        assert all(a is b for a, b in zip(got[:7], layout[:7], strict=True))
        assert {name: launches[-1][name] for name in ARRAYS} == addresses(layout)
        assert launches[-1]["number"] == -1
    some = layout._replace(num_tokens=np.int64(3), capacity=None)
    assert expert_layout(INDICES, 5, out=some)[7:] == layout[7:]
    assert launches[-1]["positions"] == layout.positions.data_ptr()
    plan = activation_topk(LOGITS, METHOD, layout=LayoutSpec())
    got = activation_topk(LOGITS, METHOD, layout=LayoutSpec(), out=plan._replace(layout=missing_ints(plan.layout)))
    assert got.layout[7:] == plan.layout[7:]
    assert got.weights is plan.weights


REFUSED: dict[str, tuple[Callable[[ExpertLayout], Any], type[Exception], str]] = {
    "an array too many": (
        lambda a: a._replace(row_experts=a.order), TypeError, "out.row_experts must be None where it is not returned",
    ),
    "an array for another": (
        lambda a: a._replace(row_experts=a.order, order=None), TypeError,
        "out.row_experts must be None where it is not returned, got Tensor, and out.order must be given, got None",
    ),
    "an array too few": (lambda a: a._replace(order=None), TypeError, "out.order must be an array"),
    "another size": (lambda a: a._replace(order=a.order[1:]), ValueError, r"out.order must have shape .* = \[6\]"),
    "another int": (lambda a: a._replace(top_k=3), ValueError, "out.top_k must be 2 or None, got 3"),
    "a bool": (lambda a: a._replace(alignment=True), TypeError, "out.alignment must be an int or None, got bool"),
    "an array as int": (lambda a: a._replace(capacity=a.ends), TypeError, "out.capacity must be an int or None"),
    "an int as array": (lambda a: a._replace(counts=3), TypeError, "out.counts must be an array"),
    "a list": (list, TypeError, r"out must be ExpertLayout\(counts, .* got list"),
    "another tuple": (lambda a: TopK(*a[:2]), TypeError, r"out must be ExpertLayout\(counts, .* got TopK"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_outs_of_another_form_are_refused_before_and_after_a_right_one(name: str, launches: Launches) -> None:
    change, error, message = REFUSED[name]
    layout = expert_layout(INDICES, 5)
    for _ in range(2):
        with pytest.raises(error, match=f"^expert_layout: {message}"):
            expert_layout(INDICES, 5, out=change(layout))
        assert expert_layout(INDICES, 5, out=layout) is layout
    assert len(launches) == 3


def test_plans_of_another_form_are_refused(launches: Launches) -> None:
    plan = activation_topk(LOGITS, METHOD, layout=LayoutSpec())
    for out, message in (
        (plan._replace(layout=None), "out.layout.counts must be an array"),
        (plan._replace(layout=plan[:1]), r"out.layout must be ExpertLayout\(counts, .* got tuple"),
        (activation_topk(LOGITS, METHOD), r"out must be RoutingPlan\(weights, indices, layout\), got Routing"),
    ):
        for _ in range(2):
            with pytest.raises(TypeError, match=f"^activation_topk: {message}"):
                activation_topk(LOGITS, METHOD, layout=LayoutSpec(), out=out)
    with pytest.raises(TypeError, match=r"^activation_topk: out must be Routing\(weights, indices\), got RoutingPlan"):
        activation_topk(LOGITS, METHOD, out=plan)


def test_a_class_derived_from_the_named_tuple_is_an_out(launches: Launches) -> None:
    class Own(ExpertLayout):
        pass

    class OwnPlan(RoutingPlan):
        pass

    layout = Own(*expert_layout(INDICES, 5))
    assert expert_layout(INDICES, 5, out=layout) is layout
    assert {name: launches[-1][name] for name in ARRAYS} == addresses(layout)
    plan = activation_topk(LOGITS, METHOD, layout=LayoutSpec())
    own = OwnPlan(*plan[:2], Own(*plan.layout))
    assert activation_topk(LOGITS, METHOD, layout=LayoutSpec(), out=own) is own
    assert {name: launches[-1][name] for name in ARRAYS} == addresses(plan.layout)


def test_out_may_be_of_another_framework(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its type may be new: then the arrays are described again."""
    layout = expert_layout(INDICES, 5)
    arrays = ExpertLayout(*[None if a is None else np.asarray(a) for a in layout[:7]], *layout[7:])
    got = {name: 0 if a is None else a.ctypes.data for name, a in zip(ARRAYS, arrays, strict=False)}
    monkeypatch.delitem(FRAMEWORKS, np.ndarray, raising=False)
    for _ in range(2):
        assert expert_layout(INDICES, 5, out=arrays) is arrays
        assert {name: launches[-1][name] for name in ARRAYS} == got


def test_values_that_topk_select_leaves_out(launches: Launches) -> None:
    _, indices = topk_select(LOGITS, 2, return_values=False)
    out = TopK(None, indices)
    for _ in range(2):
        assert topk_select(LOGITS, 2, return_values=False, out=out) is out
        assert (launches[-1]["values"], launches[-1]["indices"]) == (0, indices.data_ptr())
    with pytest.raises(TypeError, match=r"^topk_select: out.values must be an array"):
        topk_select(LOGITS, 2, out=out)


# -- Declarations ------------------------------------------------------------------------------------------------------


def test_kernels_take_results_in_the_order_of_out() -> None:
    """So the arrays in `out` can be passed as they stand there."""
    for op in OPS.values():
        for kind in (op.returns, *op.variants):
            declared = [result.path for result in op.results_in(kind)]
            assert [path for path in op.paths(kind) if path not in op.numbers] == declared

    class Turned(type(ROUTER)):  # type: ignore[misc]  # the class of an instance
        name = "turned"
        results = (ROUTER.results[1], ROUTER.results[0], *ROUTER.results[2:])

    with pytest.raises(TypeError, match=r"op turned: Routing must have the results .* in this order"):
        Turned()


def test_calls_for_graphs_are_cached_apart(launches: Launches) -> None:
    fields = (5, 1, None, layouts.DEFAULT_WANT, None, None, -1)
    inputs = (INDICES, None, None, None)
    shared = _run.run(layouts.OP, fields, inputs, None, None)
    apart = _run.run_eagerly(layouts.OP, fields, inputs)
    again = _run.run(layouts.OP, fields, inputs, None, None)
    assert [len(storages(layout[:5])) for layout in (shared, apart, again)] == [1, 5, 1]


@pytest.mark.parametrize(("current", "expected"), [(0, "empty_strided"), (1, "empty_like")])
def test_results_on_the_current_gpu_skip_the_dispatcher(
    current: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tensor that pretends to be on the first GPU, with the function's twin for the CPU."""
    called: list[str] = []
    of_the_cpu, empty_like = torch._C._dynamo.guards._empty_strided_cpu, torch.empty_like

    def empty_strided(*outline: Any) -> Any:
        called.append("empty_strided")
        return of_the_cpu(*outline)

    def likewise(*like: Any) -> Any:
        called.append("empty_like")
        return empty_like(*like)

    monkeypatch.setattr(tensors, "_empty_cuda", empty_strided)
    monkeypatch.setattr(tensors, "_current_device", lambda: current)
    monkeypatch.setattr(torch, "empty_like", likewise)
    like = SimpleNamespace(device=torch.device("cpu"), is_cuda=True, get_device=lambda: 0)
    outputs = (((3, 2), "float32"), ((2, 4), "bfloat16"), ((0, 4), "int64"), ((5,), "int32"))
    pointers: list[int] = []
    results = tensors.FRAMEWORK.allocator(outputs, like)(pointers)
    assert called == [expected] * 4
    assert pointers == [result.data_ptr() for result in results]
    for result, (shape, name) in zip(results, outputs, strict=True):
        want = torch.empty(shape, dtype=tensors.dtype_of(name))
        assert (result.shape, result.stride(), result.dtype) == (want.shape, want.stride(), want.dtype)
