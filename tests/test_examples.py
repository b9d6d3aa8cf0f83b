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
    else:
        router = module.dense_router
        stop = (lambda a: a.detach()) if framework == "PyTorch" else importlib.import_module("jax").lax.stop_gradient
        monkeypatch.setattr(module, "dense_router", lambda x, gate, method: router(stop(x), stop(gate), method))
        if framework == "JAX":
            module.step.clear_cache()
    losses = module.train(STEPS)
    if framework == "JAX":
        module.step.clear_cache()
    recorded = json.loads((ROOT / "docs" / "examples.json").read_text())[framework]
    assert np.abs(np.array(losses) / recorded[:STEPS] - 1).max() > 2e-3


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
