# SPDX-License-Identifier: Apache-2.0
"""Estimate the communication of ExpertParallel: `python -m benchmarks.expert_parallel_model --output docs`.

It measures nothing. Bytes and launches of a forward pass follow from the sizes; the rates are arguments. Experts are
chosen uniformly and lie in contiguous shards. NVLink and network work at the same time, so the slower one counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import NamedTuple

RANKS = (2, 4, 8, 16, 32, 64)
METHODS = ("gather", "gather, exact", "exchange", "exchange, exact")


class Rows(NamedTuple):
    """Rows that a rank receives for each token that a rank has, before the experts and after them."""

    before: float
    after: float


def rows_of(method: str, num_ranks: int, num_experts: int, top_k: int) -> Rows:
    """Return what moves in a forward pass."""
    others = num_ranks - 1
    if method.startswith("gather"):
        return Rows(others, others * (top_k if "exact" in method else 1))
    elsewhere = num_experts - num_experts // num_ranks  # experts that a given rank does not have
    reached = others * (1 - comb(elsewhere, top_k) / comb(num_experts, top_k))  # other ranks that a token goes to
    return Rows(reached, top_k * others / num_ranks if "exact" in method else reached)


def microseconds(method: str, num_ranks: int, options: argparse.Namespace) -> float:
    """Return the estimated time of a forward pass."""
    rows = sum(rows_of(method, num_ranks, options.num_experts, options.top_k)) * options.num_tokens
    in_node = min(num_ranks, options.gpus_per_node)
    if method.startswith("gather"):  # each row enters a node once, over one of its network cards, then NVLink
        network = rows * (num_ranks - in_node) / (num_ranks - 1) / in_node
        nvlink = rows
    else:
        network = rows * (num_ranks - in_node) / (num_ranks - 1)
        nvlink = rows - network
    size = 2 * options.hidden
    moving = max(nvlink * size / (options.nvlink * 1e3), network * size / (options.network * 1e3))
    collectives = 3 if method.startswith("gather") else 4  # ids and weights, x, sums; the sizes
    latency = options.latency if num_ranks <= options.gpus_per_node else options.network_latency
    return float(moving + collectives * latency + (options.wait if method.startswith("exchange") else 0))


def table(num_experts: int, top_k: int) -> str:
    """Return the rows of all methods as a table in Markdown."""
    lines = [f"| P | {' | '.join(METHODS)} |", "|---:" * (1 + len(METHODS)) + "|"]
    for num_ranks in RANKS:
        cells = [f"{sum(rows_of(method, num_ranks, num_experts, top_k)):.1f}" for method in METHODS]
        lines.append(f"| {num_ranks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(options: argparse.Namespace, path: Path) -> None:
    """Plot the times over the number of GPUs."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "cupy_router", "font.size": 9}):
        figure = Figure(figsize=(5.4, 3.3), layout="constrained")
        axes = figure.subplots()
        for method, color in zip(METHODS, ("#1b6ca8", "#7fb2d9", "#b8312f", "#e0938f"), strict=True):
            times = [microseconds(method, num_ranks, options) / 1e3 for num_ranks in RANKS]
            axes.plot(RANKS, times, marker="o", color=color, label=method)
        axes.set(xscale="log", yscale="log", xticks=RANKS, xticklabels=RANKS, xlabel="GPUs", ylabel="milliseconds")
        axes.set_title(f"{options.num_tokens} tokens a rank, hidden {options.hidden}, estimated")
        axes.minorticks_off()
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value, meaning in (
        ("num-tokens", 4096, "of a rank"),
        ("hidden", 7168, "in bfloat16"),
        ("num-experts", 256, ""),
        ("top-k", 8, ""),
        ("gpus-per-node", 8, ""),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=meaning)
    for name, value, meaning in (
        ("nvlink", 360.0, "GB/s that a GPU receives"),
        ("network", 45.0, "GB/s that a GPU receives from other nodes"),
        ("latency", 15.0, "microseconds of a collective within a node"),
        ("network-latency", 40.0, "microseconds of a collective across nodes"),
        ("wait", 30.0, "microseconds that the GPU idles while the host reads sizes"),
    ):
        parser.add_argument(f"--{name}", type=float, default=value, help=meaning)
    parser.add_argument("--output", type=Path, help="folder for expert_parallel.svg")
    options = parser.parse_args(arguments)
    print(table(options.num_experts, options.top_k))
    print(f"\nmilliseconds of a forward pass, {options.num_tokens} tokens a rank, hidden {options.hidden}:\n")
    for method in METHODS:
        times = [f"{microseconds(method, num_ranks, options) / 1e3:8.2f}" for num_ranks in RANKS]
        print(f"{method:16}", *times)
    if options.output is not None:
        draw(options, options.output / "expert_parallel.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
