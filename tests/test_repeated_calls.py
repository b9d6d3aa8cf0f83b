# SPDX-License-Identifier: Apache-2.0
"""A call is not taken for an earlier one that differs in anything that its checks and its kernels depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cupy_router import ExpertLayout, expert_layout, permute, unpermute
from cupy_router.ops import _cached, _run
from cupy_router.ops.expert_layout import OP as LAYOUT_OP
from cupy_router.ops.expert_layout import LayoutOptions
from tests.cuda_path import Launches, record_launches

torch = pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return record_launches(monkeypatch)


def aligned(*shape: int, dtype: Any = torch.float32) -> Any:
    """Return a tensor at a multiple of 16, as all memory on a GPU begins."""
    flat = torch.zeros(64 + int(np.prod(shape)), dtype=dtype)
    begin = -flat.data_ptr() % 16 // flat.element_size()
    return flat[begin : begin + int(np.prod(shape))].view(*shape)


LAYOUT = ExpertLayout(
    order=aligned(8, dtype=torch.int32), positions=aligned(4, 2, dtype=torch.int32),
    num_tokens=4, top_k=2, alignment=1, capacity=8,
)  # fmt: skip
X, WEIGHTS, Y, OUT = aligned(4, 8), aligned(4, 2), aligned(8, 8), aligned(8, 8)


def repeat(call: Callable[[], Any], times: int = 3) -> None:
    for _ in range(times):
        call()


def not_aligned(a: Any) -> Any:
    flat = aligned(a.numel() + 1)
    return flat[1:].view(a.shape)


OTHERS: dict[str, Callable[[Any], Any]] = {
    "rows apart": lambda a: aligned(a.shape[0], a.shape[1] + 4)[:, : a.shape[1]],
    "another dtype": lambda a: aligned(*a.shape, dtype=torch.bfloat16),
    "another alignment": not_aligned,
    "a parameter": lambda a: torch.nn.Parameter(a, requires_grad=False),
    "NumPy": lambda a: a.numpy(),
}


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name in OTHERS for argument in ("x", "weights", "out") if (name, argument) != ("NumPy", "x")],
)
def test_other_properties_are_seen(name: str, argument: str, launches: Launches) -> None:
    arguments = {"x": X, "weights": WEIGHTS, "out": OUT}
    other = OTHERS[name](arguments[argument])
    repeat(lambda: permute(layout=LAYOUT, **arguments))
    changed = arguments | {argument: other}
    if name == "another dtype" and argument in ("x", "out"):
        with pytest.raises(TypeError, match=r"^permute: out must be"):
            permute(layout=LAYOUT, **changed)
    else:
        permute(layout=LAYOUT, **changed)
        address = other.ctypes.data if name == "NumPy" else other.data_ptr()
        assert launches[-1]["rows" if argument == "out" else argument] == address
    permute(layout=LAYOUT, **arguments)
    assert launches[-1]["x"] == X.data_ptr()


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another shape": (lambda a: aligned(a.shape[0], a.shape[1] + 4), "must have shape"),
    "columns apart": (lambda a: aligned(a.shape[0], 2 * a.shape[1])[:, ::2], "must be contiguous"),
    "lazily negated": (torch._neg_view, "must be a plain tensor"),
    "zeros without memory": (lambda a: torch._efficientzerotensor(a.shape), "must be a tensor with its own memory"),
    "freed": (lambda a: _freed(a.clone()), "must be a tensor with its own memory"),
    "meta": (lambda a: a.to("meta"), "must be a tensor on cpu or cuda"),
    "sparse": (lambda a: a.to_sparse(), "must be a dense tensor"),
    "nested": (lambda a: torch.nested.nested_tensor([a, a]), "must be a dense tensor"),
}


def _freed(tensor: Any) -> Any:
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("argument", ["weights", "out"])
def test_wrong_arrays_are_refused_after_right_ones(name: str, argument: str, launches: Launches) -> None:
    change, message = REFUSED[name]
    arguments = {"x": X, "weights": WEIGHTS, "out": OUT}
    repeat(lambda: permute(layout=LAYOUT, **arguments))
    for _ in range(3):
        with pytest.raises(ValueError, match=f"^permute: {argument} {message}"):
            permute(layout=LAYOUT, **arguments | {argument: change(arguments[argument])})
    assert len(launches) == 3


@pytest.mark.parametrize("wrong", [{"capacity": 9}, {"num_tokens": 5}, {"top_k": 1}])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_other_ints_of_a_layout_are_refused_after_right_ones(
    wrong: dict[str, int], with_gradient: bool, launches: Launches
) -> None:
    x, y = X.clone().requires_grad_(with_gradient), Y.clone().requires_grad_(with_gradient)
    for function, array in ((permute, x), (unpermute, y)):
        repeat(lambda: function(array, LAYOUT))  # noqa: B023
        for _ in range(3):
            with pytest.raises(ValueError, match=rf"^{function.__name__}: layout\.(order|positions) must have shape "):
                function(array, LAYOUT._replace(**wrong))
    assert len(launches) == 6


def test_a_tensor_turned_in_place_is_seen(launches: Launches) -> None:
    x, out = aligned(8, 8), aligned(8, 8)
    layout = LAYOUT._replace(positions=aligned(8, 1, dtype=torch.int32), num_tokens=8, top_k=1)
    repeat(lambda: permute(x, layout, out=out))
    x.t_()
    assert x.stride() == (1, 8)
    with pytest.raises(ValueError, match=r"^permute: x must be contiguous along its last axis, got strides \[1, 8\]"):
        permute(x, layout, out=out)


def test_the_place_of_an_argument_left_out_is_seen(launches: Launches) -> None:
    """`weights` and `residual` have one shape here."""
    y, one = aligned(8, 2), aligned(4, 2)
    repeat(lambda: unpermute(y, LAYOUT, one))
    unpermute(y, LAYOUT, residual=one)
    assert (launches[-1]["weights"], launches[-1]["residual"]) == (0, one.data_ptr())


def test_out_is_seen(launches: Launches) -> None:
    repeat(lambda: permute(X, LAYOUT, weights=WEIGHTS))
    assert permute(X, LAYOUT, weights=WEIGHTS, out=OUT) is OUT
    assert launches[-1]["rows"] == OUT.data_ptr()
    repeat(lambda: permute(X, LAYOUT, weights=WEIGHTS, out=OUT))
    assert permute(X, LAYOUT, weights=WEIGHTS) is not OUT
    assert launches[-1]["rows"] != OUT.data_ptr()


def test_calls_for_graphs_are_told_apart(launches: Launches) -> None:
    options, shared = LayoutOptions(5, num_local=5), []
    given = aligned(4, 2, dtype=torch.int32), aligned(5, dtype=torch.int32), aligned(5, dtype=torch.int32), None
    for eager in (False, True, False):
        for _ in range(3):
            layout = _run.run(LAYOUT_OP, options, given, None, None, eager=eager)
            shared.append(len({array.untyped_storage().data_ptr() for array in layout[:5]}) == 1)
    assert shared == [True] * 3 + [False] * 3 + [True] * 3


def test_other_options_are_seen(launches: Launches) -> None:
    indices, experts, load = (aligned(*shape, dtype=torch.int32) for shape in ((4, 2), (5,), (5,)))
    for want in (("counts",), ("offsets",)):
        repeat(lambda want=want: expert_layout(indices, 5, expert_map=experts, num_local=5, load=load, want=want))
        assert [name for name in ("counts", "offsets", "ends") if launches[-1][name]] == (
            ["counts"] if want == ("counts",) else ["offsets", "ends"]
        )


def test_ints_of_out_are_seen(launches: Launches) -> None:
    indices = aligned(4, 2, dtype=torch.int32)
    layout = expert_layout(indices, 5)
    repeat(lambda: expert_layout(indices, 5, out=layout))
    for top_k, error in ((3, ValueError), (True, TypeError), (2.0, TypeError), (torch.tensor(2), TypeError)):
        with pytest.raises(error, match=r"^expert_layout: out.top_k must be"):
            expert_layout(indices, 5, out=layout._replace(top_k=top_k))
    assert expert_layout(indices, 5, out=layout._replace(top_k=None)).top_k == 2
    assert expert_layout(indices, 5, out=layout) is layout


def test_a_forgotten_call_is_prepared_again(launches: Launches) -> None:
    repeat(lambda: permute(X, LAYOUT, weights=WEIGHTS))
    _cached.forget()
    permute(X, LAYOUT, weights=WEIGHTS)
