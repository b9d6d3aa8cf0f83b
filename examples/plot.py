# SPDX-License-Identifier: Apache-2.0
"""Train all examples and plot their losses: `python -m examples.plot --output docs`.

Writes examples.json and examples.svg into that folder. `--only-plot` plots the losses of the examples.json there.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLAIN = "PyTorch, plain router"
# Module and options of train() for each curve.
CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    PLAIN: ("moe_pytorch", {"plain": True}),
    "PyTorch": ("moe_pytorch", {}),
    "JAX, plain router": ("moe_jax", {"plain": True}),
    "JAX": ("moe_jax", {}),
    "CuPy or NumPy": ("moe_cupy", {}),
}
STYLES: dict[str, dict[str, Any]] = {
    PLAIN: {"color": "#555555", "linewidth": 5, "alpha": 0.35},
    "PyTorch": {"color": "#b8312f"},
    "JAX, plain router": {"color": "#d9822b", "linestyle": (0, (1, 2)), "linewidth": 2.5},
    "JAX": {"color": "#1b6ca8", "linestyle": (0, (6, 6))},
    "CuPy or NumPy": {"color": "#3a8a4d", "linestyle": (0, (2, 10)), "linewidth": 2.5},
}


def losses(steps: int) -> dict[str, list[float]]:
    """Return the losses of each curve, leaving out frameworks that are not installed."""
    found = {}
    for name, (module, options) in CURVES.items():
        try:
            example = importlib.import_module(f"examples.{module}")
        except ImportError as error:
            print(f"left out: {name}: {error}")
            continue
        found[name] = [float(f"{loss:.8g}") for loss in example.train(steps, **options)]
        print(f"{name}: from {found[name][0]:.3f} to {found[name][-1]:.3f}")
    return found


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Plot the curves, and beside them the distance of each from that of the plain router in PyTorch."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "cupy_router", "font.size": 9}):  # the same losses give the same file
        figure = Figure(figsize=(9.2, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        plain = found.get(PLAIN) or next(iter(found.values()))
        for name, curve in found.items():
            left.plot(range(1, len(curve) + 1), curve, label=name, **STYLES[name])
            if curve is not plain:
                apart = [max(abs(a - b), 1e-9) for a, b in zip(curve, plain, strict=True)]
                right.plot(range(1, len(curve) + 1), apart, label=name, color=STYLES[name]["color"])
        right.set_yscale("log")
        left.set(xlabel="step", ylabel="loss", title="Loss: next token's cluster, 16 experts, 2 chosen")
        right.set(xlabel="step", ylabel="difference of losses", title=f"Distance from {PLAIN}")
        for axes in (left, right):
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7)
        figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only-plot", action="store_true")
    parser.add_argument("--output", type=Path, required=True, help="folder for examples.json and examples.svg")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    source, path = options.output / "examples.json", options.output / "examples.svg"
    if not options.only_plot:
        source.write_text(json.dumps(losses(options.steps)) + "\n")
    draw(json.loads(source.read_text()), path)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
