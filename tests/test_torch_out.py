# SPDX-License-Identifier: Apache-2.0
"""Autograd knows of every tensor that an op writes: versions are raised, and what cannot have a gradient is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk, topk_select
from cupy_router.ops._op import Op
from cupy_router.ops._run import run
from cupy_router.ops.registry import OPS
from cupy_router.results import Routing
from tests import inputs
from tests.cuda_path import record_launches
from tests.declared import arrays, positional
from tests.tally import OP as TALLY
from tests.tally import add_kernel_file, tally, torch_with_tally

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

EVERY = pytest.mark.parametrize("op", [*OPS.values(), TALLY], ids=str)
METHOD = RoutingMethod(16, 4)
LOGITS = torch.from_numpy(inputs.normal((5, 16), seed=400))
REFUSED = r"^activation_topk: out\.weights must not require grad unless under torch\.no_grad\(\)"


@pytest.fixture(autouse=True)
def _tally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_with_tally()
    add_kernel_file(tmp_path, monkeypatch)


@pytest.fixture
def on_a_stream(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let calls take the way of CUDA tensors, to kernels that do nothing; return the number of launches."""
    launches = record_launches(monkeypatch)
    return lambda: len(launches)


def empty(n: int = 5, **more: Any) -> Routing:
    return Routing(torch.zeros(n, 4, **more), torch.zeros(n, 4, dtype=torch.int32))


def with_out(op: Op, convert: Callable[[np.ndarray], Any] = torch.from_numpy) -> tuple[list[Any], Callable[[], Any]]:
    """Return the tensors that a call of an op writes, `out` and written inputs, and the call; inputs are converted."""
    given, options = arrays(op), op.example()
    results = op.flatten(options, run(op, options, positional(op, given), None, None))
    outs = [torch.from_numpy(np.zeros_like(array)) for array in results]
    loads = {op.names[place]: torch.zeros(op.sizes(options)["num_experts"], dtype=torch.int32) for place in op.written}
    args = positional(op, {name: convert(array) for name, array in given.items()} | loads)
    return [*outs, *loads.values()], lambda: run(op, options, args, op.pack(options, outs), None)


@EVERY
@pytest.mark.parametrize("way", ["the reference", "a stream", "another framework first"])
def test_versions_are_raised(op: Op, way: str, request: pytest.FixtureRequest) -> None:
    """By one in each call, also in those that reuse a cached call."""
    written, call = with_out(op, (lambda array: array) if way == "another framework first" else torch.from_numpy)
    launches = request.getfixturevalue("on_a_stream") if way == "a stream" else lambda: 2
    for calls in (1, 2):
        call()
        assert [tensor._version for tensor in written] == [calls] * len(written)
    assert launches() == 2


def test_versions_are_those_of_memory() -> None:
    """A view shares them with its base, a detached tensor with its origin."""
    weights, indices = torch.zeros(9, 4), torch.zeros(5, 4, dtype=torch.int32)
    activation_topk(LOGITS, METHOD, out=Routing(weights[2:7], indices.detach()))
    assert (weights._version, indices._version) == (1, 1)


@pytest.mark.parametrize("wrong", [{"num_valid": 9}, {"bias": torch.zeros(3)}])
@pytest.mark.parametrize("way", ["the reference", "a stream"])
def test_a_call_that_is_refused_raises_no_version(wrong: Any, way: str, request: pytest.FixtureRequest) -> None:
    if way == "a stream":
        request.getfixturevalue("on_a_stream")
    out = empty()
    activation_topk(LOGITS, METHOD, out=out)
    with pytest.raises(ValueError, match=r"^activation_topk: (num_valid|bias)"):
        activation_topk(LOGITS, METHOD, out=out, **wrong)
    assert [array._version for array in out] == [1, 1]


@pytest.mark.parametrize("buffers", [1, 2], ids=["the same buffers", "buffers of their own"])
def test_two_micro_batches_into_the_same_buffers_before_one_backward(buffers: int) -> None:
    """Gradients of the experts need the weights of both, so autograd has to notice."""
    outs = [empty() for _ in range(buffers)]
    expert = torch.ones(4, requires_grad=True)
    losses = []
    for i, logits in enumerate((LOGITS, LOGITS.flip(0) * 2)):
        out = activation_topk(logits, METHOD, out=outs[i % buffers])
        losses.append((out.weights * expert).sum())
    if buffers == 1:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sum(losses).backward()
    else:
        sum(losses).backward()
        want = sum(activation_topk(logits, METHOD).weights.sum(0) for logits in (LOGITS, LOGITS.flip(0) * 2))
        torch.testing.assert_close(expert.grad, want)


def test_a_load_that_was_saved_for_a_backward_pass() -> None:
    load, factor = torch.zeros(3, dtype=torch.int32), torch.ones(3, requires_grad=True)
    loss = (factor * load).sum()
    tally(torch.zeros(2, 1, dtype=torch.int32), torch.zeros(1), 3, load=load)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


TAPED: dict[str, Callable[[Any], Any]] = {
    "a leaf": lambda leaf: leaf,
    "a Parameter": torch.nn.Parameter,
    "a result": lambda leaf: leaf * 1,
    "a view of a leaf": lambda leaf: leaf[:],
}


@pytest.mark.parametrize("kind", TAPED)
@pytest.mark.parametrize("way", ["the reference", "a stream", "another framework first"])
def test_tensors_that_require_grad_are_refused_as_by_pytorch(
    kind: str, way: str, request: pytest.FixtureRequest
) -> None:
    if way == "a stream":
        request.getfixturevalue("on_a_stream")
    logits = LOGITS.numpy() if way == "another framework first" else LOGITS
    weights = TAPED[kind](torch.zeros(5, 4, requires_grad=True))
    out = Routing(weights, torch.zeros(5, 4, dtype=torch.int32))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
            torch.topk(LOGITS, 4, out=(weights, torch.zeros(5, 4, dtype=torch.int64)))
        with pytest.raises(ValueError, match=REFUSED):
            activation_topk(logits, METHOD, out=out)
        assert (weights._version, out.indices._version) == (0, 0)
        assert not weights.any()


@EVERY
def test_every_op_refuses_outs_that_require_grad(op: Op) -> None:
    written, call = with_out(op)
    for tensor, result in zip(written, op.existing(op.example()), strict=False):
        if tensor.is_floating_point():
            tensor.requires_grad_()
            with pytest.raises(ValueError, match=rf"^{op.label}: {op.out_name(result)} must not require grad"):
                call()
            tensor.requires_grad_(False)
    assert not any(tensor._version for tensor in written)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", TAPED)
def test_they_are_written_without_grad_mode(kind: str, mode: Any) -> None:
    out = Routing(TAPED[kind](torch.zeros(5, 4, requires_grad=True)), torch.zeros(5, 4, dtype=torch.int32))
    with mode():
        assert activation_topk(LOGITS, METHOD, out=out) is out
    assert torch.equal(out.weights, activation_topk(LOGITS, METHOD).weights)
    assert (out.weights._version, out.indices._version) == (1, 1)
    assert out.weights.requires_grad


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", ["the reference", "a stream"])
def test_inference_tensors_are_written(mode: Any, way: str, request: pytest.FixtureRequest) -> None:
    """They have no version, and need none, because PyTorch saves none for a backward pass."""
    with torch.inference_mode():
        out = Routing(torch.zeros(5, 4), torch.zeros(5, 4, dtype=torch.int32))
    if way == "a stream":
        request.getfixturevalue("on_a_stream")
    with mode():
        assert activation_topk(LOGITS, METHOD, out=out) is out
    if way == "the reference":
        assert torch.equal(out.weights, activation_topk(LOGITS, METHOD).weights)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        torch.ones(4, requires_grad=True) * out.weights


def test_a_subclass_of_tensors_as_out() -> None:
    class Named(torch.Tensor):  # type: ignore[misc]
        pass

    out = Routing(torch.zeros(5, 4).as_subclass(Named), torch.zeros(5, 4, dtype=torch.int32))
    activation_topk(LOGITS, METHOD, out=out)
    assert (out.weights._version, out.indices._version) == (1, 1)
    with pytest.raises(ValueError, match=REFUSED):
        activation_topk(LOGITS, METHOD, out=out._replace(weights=out.weights.requires_grad_()))


def test_scores_that_require_grad_may_be_selected_into_out() -> None:
    """The results of topk_select have no gradient."""
    scores = LOGITS.clone().requires_grad_()
    out = topk_select(scores, 2)
    assert topk_select(scores, 2, out=out) is out
    assert (out.values._version, out.values.requires_grad) == (1, False)


def test_dual_tensors_and_transforms_are_refused() -> None:
    from torch.autograd import forward_ad

    out = empty()
    with forward_ad.dual_level():
        dual = Routing(forward_ad.make_dual(out.weights, torch.ones(5, 4)), out.indices)
        with pytest.raises(ValueError, match=r"^activation_topk: out and stream cannot be given inside torch"):
            activation_topk(LOGITS, METHOD, out=dual)
        activation_topk(LOGITS, METHOD, out=out)
    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(ValueError, match=r"^activation_topk: out and stream cannot be given inside torch"):
            transform(lambda logits: activation_topk(logits, METHOD, out=empty()).weights.sum())(LOGITS[None])
    assert (out.weights._version, out.indices._version) == (1, 1)
