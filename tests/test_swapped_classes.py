# SPDX-License-Identifier: Apache-2.0
"""Swapped routers whose class or forward others change as well: parametrizations, FSDP, wrappers of the forward."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import pickle
import types
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from tests import frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = frameworks.transformers_with_models()

from cupy_router.torch import replace_routers, restore_routers  # noqa: E402
from cupy_router.torch._swapped import Router, Swapped  # noqa: E402
from tests import moe_configs  # noqa: E402
from tests.test_router_modules import Inline  # noqa: E402
from tests.test_swapped_routers import logits_of, mixtral  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with moe_configs.seeded_on_one_thread(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return moe_configs.counted_calls(monkeypatch)


class Halved(torch.nn.Module):
    def forward(self, weight: Any) -> Any:
        return weight / 2


PARAMETRIZATIONS = {
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
    "registered": lambda gate: torch.nn.utils.parametrize.register_parametrization(gate, "weight", Halved()),
}


def remove(gate: Any) -> None:
    torch.nn.utils.parametrize.remove_parametrizations(gate, "weight")


# Every order in which a model may be parametrized (p), swapped (s), restored (r), and the parametrization removed (u).
ORDERS = [
    "".join(order)
    for order in itertools.permutations("psru")
    if order.index("p") < order.index("u") and order.index("s") < order.index("r")
]


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_parametrizations(order: str, name: str, calls: list[str]) -> None:
    model = mixtral()
    gate = model.model.layers[0].mlp.gate
    original = type(gate)
    expected: dict[bool, Any] = {False: logits_of(model)}
    done: set[str] = set()
    for step in order:
        if step == "p":
            PARAMETRIZATIONS[name](gate)
        elif step == "u":
            remove(gate)
        else:
            assert {"s": replace_routers, "r": restore_routers}[step](model) == 2
        done.add(step)
        changed, swapped = "p" in done, "s" in done and "r" not in done  # removing it keeps what it made of the weight
        calls.clear()
        got = logits_of(model)
        torch.testing.assert_close(got, expected.setdefault(changed, got), rtol=1e-4, atol=1e-5)
        assert calls == ["dense_router"] * 2 * swapped
        assert isinstance(gate, Router) == swapped
        assert isinstance(gate, original)
        assert type(gate).__name__ == ("Parametrized" if changed and "u" not in done else "") + original.__name__
    assert type(gate) is original
    assert gate.weight is dict(gate.named_parameters())["weight"]


def test_copies_and_pickles_of_parametrized_routers(calls: list[str]) -> None:
    model = mixtral()
    replace_routers(model)
    PARAMETRIZATIONS["registered"](model.model.layers[0].mlp.gate)
    other = copy.deepcopy(model)
    assert torch.equal(logits_of(other), logits_of(model))
    assert calls == ["dense_router"] * 4
    assert restore_routers(other) == 2
    assert isinstance(model.model.layers[0].mlp.gate, Router)
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules is only supported through state"):
        pickle.dumps(model)  # as without us, where it was pickled without its parametrization


def test_copies_share_a_class_that_one_of_them_changes() -> None:
    model = mixtral()
    PARAMETRIZATIONS["registered"](model.model.layers[0].mlp.gate)
    expected, other = logits_of(model), copy.deepcopy(model)
    replace_routers(model)
    remove(model.model.layers[0].mlp.gate)
    assert replace_routers(other) == 2
    for each in (model, other):
        torch.testing.assert_close(logits_of(each), expected, rtol=1e-4, atol=1e-5)
        assert restore_routers(each) == 2


def test_classes_of_dropped_models_are_dropped() -> None:
    model = mixtral()
    gate = model.model.layers[0].mlp.gate
    replace_routers(model)
    PARAMETRIZATIONS["registered"](gate)
    restore_routers(model)
    replace_routers(model)
    made = weakref.ref(type(gate))
    del model, gate
    for _ in range(4):  # one after the other, since each is remembered for the one before
        gc.collect()
    assert made() is None


class Stateful(torch.nn.Linear):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pickled": True}


def test_modules_that_say_what_is_pickled() -> None:
    block = Inline()
    block.anything = Stateful(64, moe_configs.NUM_EXPERTS, bias=False)
    assert replace_routers(block) == 1
    other = pickle.loads(pickle.dumps(block))
    assert other.anything.pickled
    assert restore_routers(other) == 1
    assert type(other.anything) is Stateful


@pytest.fixture
def sharded() -> Iterator[Any]:
    """Return `fully_shard` for one process on the CPU."""
    distributed = pytest.importorskip("torch.distributed")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("fully_shard is not public before PyTorch 2.6")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    yield lambda module: fsdp.fully_shard(module, mesh=mesh)
    distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["swap", "shard"])
def test_fully_shard(first: str, sharded: Any, calls: list[str]) -> None:
    model = mixtral().train()
    gates = [layer.mlp.gate for layer in model.model.layers]
    original, expected = type(gates[0]), logits_of(model)
    for step in ("swap", "shard") if first == "swap" else ("shard", "swap"):
        if step == "swap":
            assert replace_routers(model) == 2
        else:
            for module in (*gates, model):
                sharded(module)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    assert calls == ["dense_router"] * 2
    assert restore_routers(model) == 2
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
    for gate in gates:
        assert isinstance(gate, torch.distributed.fsdp.FSDPModule)
        assert isinstance(gate, original)
        assert not isinstance(gate, Swapped)
    assert type(gates[0]) is type(gates[1]), "code is compiled once for each class"
    model(torch.arange(6, 36)[None]).logits.sum().backward()
    assert isinstance(gates[0].weight.grad, torch.distributed.tensor.DTensor)


def test_replicate(sharded: Any) -> None:
    """Its class, too, is one of PyTorch's."""
    replicate = pytest.importorskip("torch.distributed._composable.replicate").replicate
    model = mixtral()
    replace_routers(model)
    gate, expected = model.model.layers[0].mlp.gate, logits_of(model)
    original = gate.original
    replicate(gate)
    made = type(gate).__mro__[1]
    assert restore_routers(model) == 2
    assert isinstance(gate, made)
    assert isinstance(gate, original)
    assert not isinstance(gate, Swapped)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


def derive(module: Any, how: str = "super") -> type:
    """Give a module a class derived from its own whose forward calls that of the latter, and return it."""
    base: Any = type(module)

    class Mine(base):
        pass

    class Super(base):
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    class Decorated(base):
        @torch.no_grad()
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    class Wrapped(base):
        @functools.wraps(base.forward)
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    class Partial(base):
        forward = functools.partialmethod(lambda self, *args: base.forward(self, *args))

    made: dict[str, Any] = {each.__name__.lower(): each for each in (Mine, Super, Decorated, Wrapped, Partial)}
    made["assigned"] = type("Mine", (base,), {})
    made["assigned"].forward = lambda self, *args: super(made["assigned"], self).forward(*args)
    made["by name"] = type("Mine", (base,), {"forward": lambda self, *args: base.forward(self, *args)})
    made["empty"] = type("Mine", (base,), {"__module__": "transformers.models"})
    module.__class__ = made[how]
    return made[how]


WAYS = ["mine", "super", "decorated", "wrapped", "partial", "assigned", "by name", "empty"]


@pytest.mark.parametrize("above", ["", "parametrized"])
@pytest.mark.parametrize("how", WAYS)
def test_a_class_that_others_derive_stays(how: str, above: str, calls: list[str]) -> None:
    model = mixtral()
    replace_routers(model)
    gate = model.model.layers[1].mlp.gate
    swapped = type(gate)
    mine = derive(gate, how)
    if above:
        PARAMETRIZATIONS["registered"](gate)
    expected = logits_of(model)
    left = (
        rf"left (Parametrized)?{mine.__name__} \(model.layers.1.mlp.gate\) as it is: .*{mine.__name__} is not a class"
    )
    with pytest.warns(UserWarning, match=left):
        assert restore_routers(model) == 1
    assert isinstance(gate, mine)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    assert calls == ["dense_router"] * 3
    if above:
        remove(gate)
    gate.__class__ = swapped  # as the docstring says
    assert restore_routers(model) == 1
    gate.__class__ = mine  # somebody may put it back
    without = logits_of(model)
    gate.__class__ = mine.__mro__[1].original
    assert torch.equal(without, logits_of(model))
    assert len(calls) == 3


@pytest.mark.parametrize("below", ["", "parametrized"])
@pytest.mark.parametrize("how", WAYS)
def test_a_class_that_others_derived_before(how: str, below: str, calls: list[str]) -> None:
    model = mixtral()
    gate = model.model.layers[1].mlp.gate
    if below:
        PARAMETRIZATIONS["registered"](gate)
    mine, expected = derive(gate, how), logits_of(model)
    assert replace_routers(model) == 2
    assert isinstance(gate, mine)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    assert calls == ["dense_router"] * 2
    assert restore_routers(model) == 2
    assert type(gate) is mine
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("member", ["forward", "weight"])
@pytest.mark.parametrize("first", ["swap", "parametrize"])
def test_a_class_of_pytorch_that_others_change_stays(first: str, member: str) -> None:
    model = mixtral()
    gate = model.model.layers[1].mlp.gate
    if first == "swap":
        replace_routers(model)
    PARAMETRIZATIONS["registered"](gate)
    made: Any = type(gate)
    if member == "forward":
        made.forward = torch.no_grad()(lambda self, *args: super(made, self).forward(*args))
    else:
        made.weight = property(made.weight.fget, lambda self, value: None)
    expected = logits_of(model)
    function = {"swap": restore_routers, "parametrize": replace_routers}[first]
    with pytest.warns(UserWarning, match=rf"{member} is not what PyTorch put there"):
        assert function(model) == 1
    assert type(gate) is made
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("derived", ["block", "gate"])
def test_a_block_and_its_gate_are_restored_together(derived: str) -> None:
    block, x = Inline(), torch.randn(5, 64)
    replace_routers(block)
    derive(block if derived == "block" else block.anything)
    expected = block(x)
    with pytest.warns(UserWarning, match="restore_routers left Super|restore_routers left Inline"):
        assert restore_routers(block) == 0
    assert isinstance(block, Swapped)
    assert isinstance(block.anything, Swapped)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(block(x), expected, strict=True))


# -- The forward on the instance ---------------------------------------------------------------------------------------


def wrap(gate: Any) -> Any:
    """Put a function on the instance that calls the forward that was there, and return the latter."""
    bound = gate.forward
    gate.forward = lambda *args, **kwargs: bound(*args, **kwargs)
    return bound


@pytest.mark.parametrize("asked", ["before", "after"])
def test_a_bound_forward_that_is_put_back(asked: str, calls: list[str]) -> None:
    """Models of transformers 5.0 leave it there after they were asked for the logits of routers."""
    model = mixtral()
    gate, expected = model.model.layers[0].mlp.gate, logits_of(model)
    if asked == "before":
        gate.forward = wrap(gate)
    assert replace_routers(model) == 2
    if asked == "after":
        gate.forward = wrap(gate)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    assert calls == ["dense_router"] * 2
    assert restore_routers(model) == 2
    assert "forward" not in vars(gate)
    assert torch.equal(logits_of(model), expected)
    assert len(calls) == 2


def test_a_wrapper_may_keep_our_forward(calls: list[str]) -> None:
    """It then runs the model's code once routers are restored, and ours again after the next swap."""
    model = mixtral()
    gate, expected = model.model.layers[0].mlp.gate, logits_of(model)
    replace_routers(model)
    wrap(gate)
    assert restore_routers(model) == 2
    assert torch.equal(logits_of(model), expected)
    assert calls == []


@pytest.mark.parametrize("name", ["forward", "route_tokens_to_experts"])
def test_our_method_may_be_called_from_a_class_that_is_not_ours(name: str) -> None:
    """Without what `replace_routers` put on the module it runs the model's code, once."""
    block, x = Inline(), torch.randn(5, 64)
    expected = block(x)
    replace_routers(block)
    module = block if name != "forward" else block.anything
    base = type(module)
    restore_routers(block)
    mine = type("Mine", (type(module),), {name: lambda self, *args: getattr(base, name)(self, *args)})
    module.__class__ = mine
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(block(x), expected, strict=True))


@pytest.mark.parametrize("name", ["route_tokens_to_experts", "forward"])
def test_methods_of_blocks_that_are_replaced_on_the_instance(name: str) -> None:
    block = Inline()
    setattr(block, name, types.MethodType(lambda self, *args: None, block))
    with pytest.warns(UserWarning, match="left Inline as it is: .*"):
        assert replace_routers(block) == 0
    assert type(block) is Inline
    assert type(block.anything) is torch.nn.Linear


def test_compiled_modules(calls: list[str]) -> None:
    model = mixtral()
    expected = logits_of(model)
    model.model.layers[0].mlp.gate.compile(backend="eager")
    compiled = torch.compile(model.model.layers[1].mlp, backend="eager")
    logits_of(model)
    assert replace_routers(model) == 2
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    x = torch.randn(1, 9, 64)
    torch.testing.assert_close(compiled(x), model.model.layers[1].mlp(x), rtol=1e-4, atol=1e-5)
    assert restore_routers(model) == 2
    assert torch.equal(logits_of(model), expected)
