# SPDX-License-Identifier: Apache-2.0
"""Examples learn with our router as with a plain one, in every framework; the recorded curves agree."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_router import Routing, update_bias
from examples import plot, tokens

ROOT = Path(__file__).parents[1]
STEPS = 12


def example(name: str) -> tuple[Any, dict[str, Any]]:
    module, options = plot.CURVES[name]
    framework = {"moe_pytorch": "torch", "moe_jax": "jax"}.get(module, "numpy")
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    return importlib.import_module(f"examples.{module}"), options


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """JAX multiplies with fewer bits on a GPU unless told otherwise."""
    try:
        import jax
    except ImportError:
        yield
    else:
        with jax.default_matmul_precision("highest"):
            yield


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("name", plot.CURVES)
def test_an_example_reproduces_the_recorded_run(name: str) -> None:
    module, options = example(name)
    losses = module.train(STEPS, **options)
    recorded = json.loads((ROOT / "docs" / "examples.json").read_text())[name]
    assert losses[-1] < 0.75 * losses[0]
    np.testing.assert_allclose(losses, recorded[:STEPS], rtol=1e-3)


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("framework", ["PyTorch", "JAX", "CuPy or NumPy"])
def test_the_router_is_trained_too(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients of the router the same steps give other losses, so the check above would fail."""
    module, _ = example(framework)
    if framework == "CuPy or NumPy":
        back = module.backward
        monkeypatch.setattr(module, "backward", lambda xp, p, *given: back(xp, p, *given) | {"gate": 0 * p["gate"]})
    elif framework == "PyTorch":
        route = module.Gate.forward
        monkeypatch.setattr(module.Gate, "forward", lambda gate, x: Routing(*(a.detach() for a in route(gate, x))))
    else:
        router, stop = module.dense_router, importlib.import_module("jax").lax.stop_gradient
        monkeypatch.setattr(
            module, "dense_router", lambda x, gate, *given, **options: router(stop(x), stop(gate), *given, **options)
        )
        module.step.clear_cache()
    losses = module.train(STEPS)
    if framework == "JAX":
        module.step.clear_cache()
    recorded = json.loads((ROOT / "docs" / "examples.json").read_text())[framework]
    assert np.abs(np.array(losses) / recorded[:STEPS] - 1).max() > 2e-3


@pytest.mark.slow("seconds")
def test_the_bias_balances_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The busiest expert gets 1.75 of the mean in the last steps without it, and 1.29 with it."""
    module, _ = example("PyTorch")
    loads: list[Any] = []

    def noting(bias: Any, load: Any, **options: Any) -> Any:
        loads.append(load.cpu().numpy().copy())
        return update_bias(bias, load, **options)

    monkeypatch.setattr(module, "update_bias", noting)
    busiest = []
    for balance in (0.0, 0.01):
        loads.clear()
        losses = module.train(60, balance=balance)
        assert {int(load.sum()) for load in loads} == {2 * tokens.BATCH}
        busiest.append(np.mean([load.max() / load.mean() for load in loads[-10:]]))
        assert losses[-1] < 0.25 * losses[0]
    assert busiest[0] > 1.6
    assert busiest[1] < 1.45


COUNTS = (256, 100, 33, 2)  # of tokens


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("plain", [False, True], ids=["ours", "plain"])
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_the_pytorch_layer_exports_for_any_number_of_tokens(plain: bool, strict: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = importlib.import_module("examples.moe_pytorch").MoE(plain)
    x = torch.from_numpy(tokens.load()[0])
    shapes = ({0: torch.export.Dim("num_tokens", max=2**20)},)  # PyTorch 2.4 needs a bound for twice as many rows
    exported = torch.export.export(model, (x[: COUNTS[0]],), dynamic_shapes=shapes, strict=strict).module()
    for count in COUNTS:
        torch.testing.assert_close(exported(x[:count]), model(x[:count]))


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("plain", [False, True], ids=["ours", "plain"])
@pytest.mark.parametrize(("how", "graphs"), [("automatic", 2), ("dynamic", 1), ("marked", 1)])
def test_the_pytorch_layer_compiles_for_any_number_of_tokens(how: str, graphs: int, plain: bool) -> None:
    """One graph, and by default one more for the first number of tokens."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    compiled: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = importlib.import_module("examples.moe_pytorch").MoE(plain)
    layer = torch.compile(model, backend=backend, fullgraph=True, dynamic=True if how == "dynamic" else None)
    for count in COUNTS:
        x = torch.from_numpy(tokens.load()[0][:count])
        if how == "marked":
            torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(layer(x), model(x))
    assert len(compiled) == graphs


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("plain", [False, True], ids=["ours", "plain"])
def test_the_jax_layer_exports_for_any_number_of_tokens(plain: bool) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    moe = importlib.import_module("examples.moe_jax").moe
    parameters, hidden = jax.tree.map(jax.numpy.asarray, (tokens.parameters(), tokens.load()[0]))
    (num_tokens,) = jax.export.symbolic_shape("num_tokens")
    arguments = parameters, jax.ShapeDtypeStruct((num_tokens, 384), np.float32)
    names = ("dense_router", "permute", "unpermute")
    safe = [jax.export.DisabledSafetyCheck.custom_call(f"cupy_router.{name}") for name in names]
    exported = jax.export.export(jax.jit(lambda p, x: moe(p, x, plain)), disabled_checks=safe)(*arguments)
    for count in COUNTS:
        x = hidden[:count]
        np.testing.assert_allclose(exported.call(parameters, x), moe(parameters, x, plain), rtol=1e-4, atol=1e-5)


def test_recorded_curves_agree() -> None:
    recorded = json.loads((ROOT / "docs" / "examples.json").read_text())
    assert recorded.keys() == plot.CURVES.keys()
    for curve in recorded.values():
        assert len(curve) == 200
        assert curve[-1] < 0.05 * curve[0]
        np.testing.assert_allclose(curve, recorded[plot.PLAIN], rtol=0, atol=0.01)
    assert (ROOT / "docs" / "examples.svg").stat().st_size > 10_000


@pytest.mark.slow("seconds")
def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "examples.json").write_text(json.dumps({plot.PLAIN: [2.0, 1.0], "JAX": [2.0, 1.001]}))
    assert plot.main(["--only-plot", "--output", str(tmp_path)]) == 0
    assert "plain router" in (tmp_path / "examples.svg").read_text()


def test_an_example_is_short() -> None:
    """A layer and its training take about 60 lines."""
    for path in (ROOT / "examples").glob("moe_*.py"):
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len(lines) <= 75, path.name
    assert tokens.METHOD.score == "sqrtsoftplus"


def test_a_replay_is_near_its_rollout() -> None:
    """Without replay, some tokens have other experts, and the probabilities of their actions are others."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    reports = importlib.import_module("examples.replay").train(2)
    assert all(0 < report.mismatch < 0.1 for report in reports)
    assert max(report.without_replay for report in reports) > 0.2


def test_the_loss_of_a_replay_is_that_of_the_recorded_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a plain router in place of ours, which gathers its scores at the recorded experts."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    module = importlib.import_module("examples.replay")

    def plain_router(x: Any, gate: Any, method: Any, *, indices: Any, unset: str) -> Routing:
        scores = torch.nn.functional.softplus(x @ gate.T).sqrt().gather(1, indices.long())
        return Routing(scores / scores.sum(dim=1, keepdim=True), indices)

    torch.manual_seed(0)
    policy, x = module.Policy(), torch.from_numpy(tokens.load()[0][:64])
    rollout, rewards = module.roll_out(policy, x), torch.arange(64.0) % 3

    def step() -> tuple[Any, Any]:
        logits = policy(x, replay=rollout.experts)
        loss = module.loss_of(module.log_probabilities_of(logits, rollout.actions), rollout, rewards)
        return loss, torch.autograd.grad(loss, [policy.gate, policy.up])

    (loss, gradients), _ = step(), monkeypatch.setattr(module, "dense_router", plain_router)
    want, right = step()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for got, gradient in zip(gradients, right, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)
