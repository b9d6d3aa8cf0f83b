# SPDX-License-Identifier: Apache-2.0
"""Counts in place, `load=`: known to autograd, and each pair counts once where activations are computed again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from cupy_router import ExpertLayout, expert_layout, permute, unpermute
from tests import inputs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.utils.checkpoint import checkpoint  # noqa: E402

from cupy_router.torch import _library  # noqa: E402
from tests.torch_layouts import EXPERTS, IDS, Moe, same  # noqa: E402


def tensor(*shape: int, seed: int = 0) -> Any:
    return torch.from_numpy(inputs.normal(shape, seed=640 + seed))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_load_raises_its_version(dtype: Any) -> None:
    load = torch.zeros(EXPERTS, dtype=dtype)
    expert_layout(IDS, EXPERTS, load=load)
    assert load._version == 1
    assert load.equal(expert_layout(IDS, EXPERTS).counts.to(dtype))
    expert = torch.ones(EXPERTS, requires_grad=True)
    loss = (expert * load).sum()
    expert_layout(IDS, EXPERTS, load=load)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(TypeError, match=r"^expert_layout: load must be int32 or int64, got float32"):
        expert_layout(IDS, EXPERTS, load=torch.ones(EXPERTS, requires_grad=True))


def selective(policy: str) -> Any:
    return {"context_fn": lambda: torch.utils.checkpoint.create_selective_checkpoint_contexts(
        lambda ctx, op, *given, **more: getattr(torch.utils.checkpoint.CheckpointPolicy, policy)
    )}  # fmt: skip


RECOMPUTED: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective, kept": {"use_reentrant": False, **selective("MUST_SAVE")},
    "selective, repeated": {"use_reentrant": False, **selective("MUST_RECOMPUTE")},
}


@pytest.mark.parametrize("how", RECOMPUTED)
def test_recomputation_adds_nothing(how: str) -> None:
    """Of two micro-batches, whose forward passes come before the backward passes."""
    if "selective" in how and not hasattr(torch.utils.checkpoint, "create_selective_checkpoint_contexts"):
        pytest.skip("this PyTorch has no selective checkpoints")
    found = []
    for wrap in (lambda module: module, lambda module: partial(checkpoint, module, **RECOMPUTED[how])):
        module = Moe()
        batches = [tensor(5, 6, seed=10 + i).requires_grad_() for i in range(2)]
        outputs = [wrap(module)(x) for x in batches]
        counted, version = module.load.clone(), module.load._version
        assert counted.sum() == 2 * 5 * 3
        for output in outputs:
            output.square().sum().backward()
        assert module.load.equal(counted)
        assert module.load._version == version
        found.append([*(x.grad for x in batches), module.gate.grad])
    assert all(map(torch.equal, *found))


def test_a_second_forward_pass_counts_again() -> None:
    """Only a backward pass leaves the counts alone."""
    module = Moe()
    x = tensor(5, 6).requires_grad_()
    for steps in range(1, 4):
        checkpoint(module, x, use_reentrant=False).sum().backward()
        assert module.load.sum() == steps * 15


def test_a_load_among_the_arguments_of_a_checkpoint_is_refused_by_pytorch_or_counted_once() -> None:
    """As docs/layout.md says: refused where it is not reentrant."""

    def layer(x: Any, load: Any) -> Any:
        layout = expert_layout(IDS, EXPERTS, load=load)
        return unpermute(permute(x, layout).square(), layout)

    for reentrant in (False, True):
        x, load = tensor(len(IDS), 6).requires_grad_(), torch.zeros(EXPERTS, dtype=torch.int32)
        loss = checkpoint(layer, x, load, use_reentrant=reentrant).sum()
        counted = load.clone()
        if reentrant:
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        assert load.equal(counted)


# -- In graphs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The ops that graphs call, and whether they write."""
    found: list[tuple[str, bool]] = []
    eagerly = _library.run_eagerly

    def watching(op: Any, options: Any, given: Any, number: int) -> Any:
        found.append((op.name, any(given[place] is not None for place in op.written)))
        return eagerly(op, options, given, number)

    monkeypatch.setattr(_library, "run_eagerly", watching)
    return found


def compiled(module: Any, backend: str) -> Any:
    torch.compiler.reset()
    return torch.compile(module, backend=backend, fullgraph=True)


def checkpointed(function: Any, reentrant: bool = False) -> Any:
    return partial(checkpoint, function, use_reentrant=reentrant)


WRAPPED: dict[str, Callable[[Any, str], Any]] = {
    "compiled": compiled,
    "a checkpoint, compiled": lambda module, backend: compiled(checkpointed(module), backend),
    "a reentrant checkpoint, compiled": lambda module, backend: compiled(checkpointed(module, True), backend),
    "checkpoint of a compiled layer": lambda module, backend: checkpointed(compiled(module, backend)),
    "reentrant checkpoint of a compiled layer": lambda module, backend: checkpointed(compiled(module, backend), True),
}


@pytest.mark.slow("seconds", every=5)
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition", "inductor"])
@pytest.mark.parametrize("name", WRAPPED)
def test_graphs_count_each_pair_once(name: str, backend: str, calls: list[tuple[str, bool]]) -> None:
    """Of two micro-batches, both forward passes first. No graph calls the op that writes in a backward pass."""
    if name.startswith("checkpoint of") and torch.__version__ < "2.5":
        pytest.skip("PyTorch 2.4 compiles nothing inside such a checkpoint")
    found = []
    for wrap in (lambda module: module, lambda module: WRAPPED[name](module, backend)):
        module, batches = Moe(), [tensor(5, 6, seed=10 + i).requires_grad_() for i in range(2)]
        wrapped = wrap(module)
        outputs = [wrapped(x) for x in batches]
        counted = module.load.clone()
        assert counted.sum() == 2 * 5 * 3
        forwards, calls[:] = calls[:], []
        for output in outputs:
            output.square().sum().backward()
        assert module.load.equal(counted)
        assert ("expert_layout", True) not in calls
        found.append((counted, [x.grad for x in batches], module.gate.grad))
    assert forwards.count(("expert_layout", True)) == 2
    same(*found)


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("setting", [{"aggressive_recomputation": True}, {"activation_memory_budget": 0.0}])
def test_a_partitioner_that_recomputes_what_it_can(setting: dict[str, Any], calls: list[tuple[str, bool]]) -> None:
    config = torch._functorch.config
    if not all(hasattr(config, name) for name in setting):
        pytest.skip("this PyTorch has no such setting")
    module, x = Moe(), tensor(5, 6).requires_grad_()
    with config.patch(**setting):
        output = compiled(module, "inductor")(x)
        calls.clear()
        output.square().sum().backward()
    assert module.load.sum() == 15
    assert calls  # the backward pass
    assert ("expert_layout", True) not in calls


@pytest.mark.slow("seconds")
def test_counts_are_known_to_autograd_in_graphs() -> None:
    load, expert = torch.zeros(EXPERTS, dtype=torch.int32), torch.ones(EXPERTS, requires_grad=True)
    count = compiled(lambda ids, load: expert_layout(ids, EXPERTS, want=("counts",), load=load).counts + 0, "aot_eager")
    counts = count(IDS, load)
    assert load.equal(counts)
    loss = (expert * load).sum()
    count(IDS, load)
    assert load.equal(2 * counts)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


BAD_LOADS = {
    "must be int32 or int64, got float32": lambda: torch.zeros(EXPERTS),
    r"must have shape \[num_experts\]": lambda: torch.zeros(EXPERTS + 1, dtype=torch.int32),
    "must be contiguous": lambda: torch.zeros(2 * EXPERTS, dtype=torch.int32)[::2],
}


@pytest.mark.parametrize("error", BAD_LOADS)
def test_a_bad_load_is_refused_before_anything_is_written(error: str) -> None:
    """While a graph is made, and also if the load is dropped from it."""
    want = expert_layout(IDS, EXPERTS, want=("counts",))
    out, load = want._replace(counts=-want.counts), BAD_LOADS[error]()
    match = f"expert_layout: load {error}"
    with pytest.raises(Exception, match=match):
        compiled(lambda ids, out, load: expert_layout(ids, EXPERTS, want="counts", out=out, load=load)[0], "eager")(
            IDS, out, load
        )
    with pytest.raises(Exception, match=match):
        compiled(lambda ids: expert_layout(ids, EXPERTS, load=BAD_LOADS[error]()).counts, "aot_eager")(IDS)
    with pytest.raises(Exception, match=match):
        torch.fx.experimental.proxy_tensor.make_fx(
            lambda ids, counts: (
                expert_layout(
                    ids, EXPERTS, want="counts", out=ExpertLayout(counts=counts), load=BAD_LOADS[error]()
                ).counts
            )
        )(IDS, out.counts)
    assert out.counts.equal(-want.counts)
