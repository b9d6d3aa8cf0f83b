# SPDX-License-Identifier: Apache-2.0
"""Plot the results of each op, <op>.svg: `python -m benchmarks.plot --output docs`.

`--measure` runs the benchmarks of these ops before, on the GPU at hand: `python -m benchmarks.plot --measure --results
mine --output mine`. Without `--results`, that replaces the results of the repository.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import rows as results
from benchmarks.rows import OURS, Row, select

AXES = {"n": "rows", "E": "columns", "H": "hidden", "k": "k", "alignment": "alignment", "cache": "cache"}
STYLES: dict[str, dict[str, Any]] = {
    OURS: {"color": "#1b6ca8", "linewidth": 2.2, "marker": "o", "zorder": 3},
    "floor": {"color": "#555555", "linestyle": "--", "label": "floor: memory alone"},
    "in order": {"color": "#888888", "linestyle": ":", "label": "rows read once, written k times in order"},
    "Triton": {"color": "#d9822b", "marker": "s"},
    "torch.compile": {"color": "#8c4fb0", "marker": "D", "linestyle": "none"},  # at few sizes
    "PyTorch": {"color": "#b8312f", "marker": "^", "label": "PyTorch, eager"},
    "PyTorch with cuBLAS": {"color": "#b8312f", "marker": "^"},
    "empty kernel": {"color": "#555555", "linestyle": ":"},
    "two launches": {"color": "#3a8f5c", "marker": "v", "label": "two launches: cuBLAS, activation_topk"},
    "torch.topk": {"color": "#b8312f", "marker": "^"},
}


class Panel(NamedTuple):
    """Part of a plot: time over one quantity, the others fixed."""

    over: str
    fixed: dict[str, Any]


_NORMAL = {"what": "gpu", "data": None}
PANELS = {
    "activation_topk": [
        Panel("n", {"E": 256, "k": 6, "dtype": "float32"}),
        Panel("n", {"E": 384, "k": 6, "dtype": "float32"}),
        Panel("E", {"n": 8192, "k": 6, "dtype": "float32"}),
        Panel("k", {"n": 8192, "E": 256, "dtype": "float32"}),
    ],
    "activation_topk_backward": [
        Panel("n", {"E": 256, "k": 6, "dtype": "float32"}),
        Panel("n", {"E": 384, "k": 6, "dtype": "float32"}),
    ],
    "expert_layout": [
        Panel("n", {"E": 256, "k": 8, "alignment": 1}),
        Panel("n", {"E": 384, "k": 8, "alignment": 1}),
        Panel("E", {"n": 8192, "k": 8, "alignment": 1}),
        Panel("k", {"n": 8192, "E": 256, "alignment": 1}),
        Panel("alignment", {"n": 8192, "E": 256, "k": 8}),
    ],
    "topk_select": [
        Panel("n", {"E": 256, "k": 8, "dtype": "float32", "cache": "cold"}),
        Panel("n", {"E": 384, "k": 6, "dtype": "float32", "cache": "cold"}),
        Panel("E", {"n": 8192, "k": 6, "dtype": "float32", "cache": "warm"}),
        Panel("k", {"n": 8192, "E": 256, "dtype": "float32", "cache": "warm"}),
    ],
    "dense_router": [
        Panel("n", {"path": "any", "E": 256, "H": 4096}),
        Panel("n", {"path": "any", "E": 384, "H": 7168}),
    ],
    "permute": [
        Panel("n", {"op": op, "H": hidden, "k": 6, "alignment": 1, "dtype": "bfloat16"})
        for op in ("permute", "unpermute", "permute_backward", "unpermute_backward")
        for hidden in (4096, 7168)
    ],
    "hash_router": [
        Panel("n", {"source": "logits", "E": 256, "dtype": "float32"}),
        Panel("n", {"source": "logits", "E": 384, "dtype": "float32"}),
        Panel("n", {"source": "products", "E": 256}),
        Panel("n", {"source": "products", "E": 384}),
    ],
}


def curves(rows: Sequence[Row], panel: Panel) -> dict[str, list[tuple[int, float]]]:
    """Return the points of each line of a panel."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in select(rows, **_NORMAL, **panel.fixed):
        lines.setdefault(row["by"], []).append((row[panel.over], row["us"]))
    return {by: sorted(points) for by, points in lines.items()}


def draw(op: str, content: dict[str, Any], path: Path) -> bool:
    """Write the plot of an op; False if there is nothing to plot."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    # The same results give the same file.
    with mpl.rc_context({"svg.hashsalt": "cupy_router", "font.size": 9}):
        panels = [(panel, lines) for panel in PANELS[op] if (lines := curves(content["rows"], panel))]
        if not panels:
            return False
        columns = min(2, len(panels))
        figure = Figure(figsize=(4.6 * columns, 3.3 * -(-len(panels) // columns)), layout="constrained")
        all_axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
        for axes, (panel, lines) in zip(all_axes, panels, strict=False):
            for by in sorted(lines, key=lambda by: (by != OURS, by != "floor", by)):
                axes.plot(*zip(*lines[by], strict=True), **({"label": by, "markersize": 4} | STYLES.get(by, {})))
            axes.set_xscale("log", base=10 if panel.over == "n" else 2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
            axes.set(xlabel=AXES[panel.over], ylabel="microseconds")
            shown = {name: value for name, value in panel.fixed.items() if value != "any"}
            axes.set_title(", ".join(f"{AXES[n]} {v}" if n in AXES else str(v) for n, v in shown.items()), fontsize=9)
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7)
        for axes in all_axes[len(panels) :]:
            axes.remove()
        environment = content["environment"]
        gpu = environment.get("gpu", {}).get("name") or "unknown GPU"
        figure.suptitle(f"{op} on {gpu}, {environment.get('date')}, commit {environment.get('commit')}", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of JSON files")
    parser.add_argument("--output", type=Path, required=True, help="folder for the plots")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    parser.add_argument("--measure", action="store_true", help="run the benchmarks first; needs a GPU")
    parser.add_argument("--quick", action="store_true", help="with --measure: only cells with a bar")
    options = parser.parse_args(arguments)
    if options.measure:
        options.results.mkdir(parents=True, exist_ok=True)
        for op in PANELS:
            command = [sys.executable, "-m", f"benchmarks.bench_{op}", "--output", str(options.results)]
            subprocess.run([*command, *(["--quick"] if options.quick else [])], check=True)
    for op in PANELS:
        source = options.results / f"{op}.json"
        path = options.output / f"{op}.{options.format}"
        if not source.is_file():
            print(f"left out: {op}: there is no {source}")
        elif draw(op, results.load(source), path):
            print(f"wrote {path}")
        else:
            print(f"left out: {op}: {source} has only single cells")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
