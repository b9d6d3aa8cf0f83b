# SPDX-License-Identifier: Apache-2.0
"""Rows of a step of a model, whose variants took turns, and tables of them. Needs only Python."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

from benchmarks import rows as results
from benchmarks.bars import BATCHED_RATIO, MODEL_STEPS
from benchmarks.rows import OURS, Row, markdown_table, select

OWN, ROUTERS, EXPERTS = "own code", "routers", "routers and experts"  # swapped


def rows_of(turns: Mapping[str, list[list[float]]], cell: Row) -> list[Row]:
    """Return a row for each variant, from the microseconds of its steps in each turn; OWN is the one compared with."""
    medians = {name: [statistics.median(times) for times in of_turns] for name, of_turns in turns.items()}
    rows = []
    for name, of_turns in turns.items():
        us, spread = results.median_and_spread(of_turns)
        by = {"by": "transformers"} if name == OWN else {"by": OURS, "swapped": name}
        row = cell | by | {"us": round(us, 1), "spread_us": round(spread, 1)}
        if name != OWN:
            pairs = [ours / own for ours, own in zip(medians[name], medians[OWN], strict=True)]
            low, ratio, high = statistics.quantiles(pairs, n=4)
            row |= {"ratio": round(ratio, 3), "spread_ratio": round(high - low, 3)}
            row |= {"pairs": [round(pair, 3) for pair in pairs]}
            row |= _bar(row)
        rows.append(row)
    return rows


def _bar(row: Row) -> Row:
    if row["experts"] == "batched_mm":
        return {"bar_ratio": round(BATCHED_RATIO + row["spread_ratio"], 3)}
    bars = MODEL_STEPS.get((row["model"], row["mode"], row["swapped"]), {})
    return {"bar_ratio": bars[row["n"]]} if row["n"] in bars else {}


def table(rows: Iterable[Row]) -> str:
    """Return the time of each step by the model's own code and with ours, and ratios; bold if one misses its bar."""
    rows = select(rows, what="step")
    lines = []
    for own in select(rows, by="transformers"):
        same = {name: own[name] for name in ("model", "layers", "mode", "n", "experts")}
        ours = {row["swapped"]: row for row in select(rows, by=OURS, **same)}
        step = f"{own['model']}, {own['layers']} layers, {own['mode']}, {own['n']} token{'s' if own['n'] > 1 else ''}"
        words = step if own["experts"] == "grouped_mm" else f"{step}, {own['experts']}"
        lines.append([words, milliseconds(own), *(_ours(ours.get(swapped)) for swapped in (ROUTERS, EXPERTS))])
    heads = ["a step, ms", "own code", f"{ROUTERS} swapped: ms, ratio (bar)", f"{EXPERTS}: ms, ratio (bar)"]
    return markdown_table(heads, lines) if lines else ""


def milliseconds(row: Row) -> str:
    return f"{row['us'] / 1000:.2f}"


def _ours(row: Row | None) -> str:
    if row is None:
        return ""
    ratio = f"{row['ratio']:.2f}"
    if "bar_ratio" not in row:
        return f"{milliseconds(row)}, {ratio}"
    return f"{milliseconds(row)}, {ratio if results.met(row) else f'**{ratio}**'} ({row['bar_ratio']:.2f})"
