# SPDX-License-Identifier: Apache-2.0
"""Picture of ``cupy-router demo --plot``: the load of each expert, and the part of the text that each one processes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOKENS_PER_LINE = 16
BLUE, ORANGE = "#1b6ca8", "#d9822b"


def obstacle() -> str | None:
    """Return why nothing can be plotted, or None."""
    return None if find_spec("matplotlib") else "--plot needs matplotlib: pip install matplotlib"


def entropy(load: NDArray[Any]) -> float:
    """Return the entropy of the shares of the load, in bits.

    >>> entropy(np.array([5, 5, 5, 5, 0]))
    2.0
    """
    shares = load[load > 0] / load.sum()
    return float(-(shares * np.log2(shares)).sum())


def tokens_by_experts(indices: NDArray[Any], num_experts: int) -> NDArray[np.int64]:
    """Return how many of each TOKENS_PER_LINE tokens in turn have each expert, [lines, num_experts]."""
    lines = -(-len(indices) // TOKENS_PER_LINE)
    line = np.arange(len(indices)) // TOKENS_PER_LINE
    flat = line[:, None] * num_experts + indices
    return np.bincount(flat.ravel(), minlength=lines * num_experts).reshape(lines, num_experts)


def draw(indices: NDArray[Any], num_experts: int, path: Path) -> None:
    """Plot experts [num_tokens, top_k] by their load; ValueError for an ending that matplotlib cannot write."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    load = np.bincount(indices.ravel(), minlength=num_experts)
    order = np.argsort(-load, kind="stable")
    counts = tokens_by_experts(indices, num_experts)[:, order]
    mean, most = load.mean(), np.log2(num_experts)
    with mpl.rc_context({"svg.hashsalt": "cupy_router", "font.size": 9}):  # the same routing gives the same file
        figure = Figure(figsize=(8.4, 5.0), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
        upper.bar(range(num_experts), load[order], width=1.0, color=BLUE)
        upper.axhline(mean, color=ORANGE, linestyle="--")
        upper.text(num_experts - 1, mean, f"mean {mean:.0f}", color=ORANGE, ha="right", va="bottom")
        skew = f"busiest {load.max() / mean:.1f} times the mean"
        upper.set_title(f"{len(indices)} tokens to {indices.shape[1]} of {num_experts} experts each: {skew}, "
                        f"entropy {entropy(load):.2f} of {most:.0f} bits")  # fmt: skip
        upper.set(ylabel="tokens of the expert")
        extent = (-0.5, num_experts - 0.5, len(indices), 0)
        image = lower.imshow(counts, aspect="auto", cmap="Blues", extent=extent, interpolation="nearest")
        lower.set(xlabel="experts, busiest first", ylabel="token of the text")
        figure.colorbar(image, ax=lower, label=f"tokens of {TOKENS_PER_LINE}", pad=0.01)
        figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)
