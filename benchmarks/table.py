# SPDX-License-Identifier: Apache-2.0
"""Generate the tables in Markdown files from the results: `python -m benchmarks.table --write`.

Under a table stands the run that measured it, and the mark "Older than the kernels" if their code has changed since.

A table is between `<!-- name -->` and `<!-- /name -->`, with a name of TABLES. Without `--write` nothing is written.
The exit code is 1 if a file does not match the results, or if the table of README.md is older than its kernels.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import kernel_sources, steps
from benchmarks import rows as results
from benchmarks.rows import OURS, Row, markdown_table, microseconds, select

ROOT = Path(__file__).parents[1]
FILES = tuple(
    ROOT / name for name in ("README.md", "docs/performance.md", "docs/batch_invariance.md", "benchmarks/README.md")
)
NONE = "Not measured yet."
OLDER = "Older than the kernels"
CURRENT = ("README.md",)  # files whose tables may not be older
CLIFF = 1.5
BY = {  # in this order
    OURS: "**cupy_router**",
    "floor": "floor: memory alone",
    "Triton": "Triton, plainly written",
    "torch.compile": "torch.compile",
    "PyTorch": "PyTorch, eager",
    "torch.topk": "torch.topk",
}
MAIN: list[dict[str, Any]] = [
    {"op": "activation_topk", "E": 256, "k": 6},
    {"op": "activation_topk", "E": 384, "k": 6},
    {"op": "activation_topk_backward", "E": 256, "k": 6},
    {"op": "topk_select", "E": 256, "k": 8, "cache": "cold"},
    {"op": "hash_router", "E": 256, "k": 6, "source": "logits"},
]
OPS = ("activation_topk", "activation_topk_backward", "topk_select", "hash_router")
LAYOUTS = ("expert_layout", "fused_layout", "permute")
GIVEN = ("given_experts", "several_biases")
BARRED = (*OPS, "dense_router", *GIVEN, *LAYOUTS, "expert_parallel", "transformers", "host_profile", "host_calls")
BY_HANDLERS = ", by handlers"
COUNTED = ("logits", "weights", "experts")
NARROW = 1024  # most columns that a warp holds
MAIN_N = (1, 16, 64, 1024, 8192, 65536)

Files = dict[str, dict[str, Any]]  # name of the file without .json -> its content


def _rows(files: Files, *names: str) -> list[Row]:
    return [row for name in names for row in files.get(name, {}).get("rows", [])]


def _ops(files: Files) -> list[Row]:
    return _rows(files, *OPS)


def sources(files: Files, *names: str) -> str:
    """Return the runs that produced these files, each once, and which kernels have changed since."""
    environments = {name: files[name]["environment"] for name in names if name in files}
    now = kernel_sources.digests()
    changed = dict.fromkeys(
        op for name, about in environments.items() for op in kernel_sources.changed(name, about, now)
    )
    mark = ""
    if changed:
        ops = ", ".join(f"`{op}`" for op in changed)
        mark = f" **{OLDER}** of {ops}: their code, or a header of theirs, has changed since."
    return "; ".join(dict.fromkeys(map(results.source, environments.values()))) + "." + mark


def summary(files: Files) -> str:
    """Return the table for the first look: the first one of :func:`speed`."""
    blocks = _narrow_rows(files)[:1]
    return "\n\n".join([*blocks, f"Microseconds on the GPU. {sources(files, OPS[0])}"]) if blocks else NONE


def speed(files: Files) -> str:
    """Return the table for users: time on the GPU and on the host, with the floor and the rivals."""
    blocks = _narrow_rows(files)
    blocks += _long_rows(files)
    calls = select(_rows(files, "activation_topk"), what="host")
    if calls:
        lines = [[_call(row), microseconds(row["us"])] for row in calls]
        blocks.append(markdown_table(["eager call, time on the host", "us"], lines))
    if not blocks:
        return NONE
    head = "Microseconds, float32. Time on the GPU by graph replay; warm, except n = 65536 and tables marked cold."
    return "\n\n".join([head, *blocks, sources(files, *OPS)])


def _narrow_rows(files: Files) -> list[str]:
    """Return a table for each of MAIN, with a line for us, the floor and each rival."""
    blocks = []
    for cell in MAIN:
        rows = select(_ops(files), what="gpu", dtype="float32", data=None, **cell)
        by_n = {by: {row["n"]: row for row in rows if row["by"] == by} for by in BY}
        sizes = [n for n in MAIN_N if n in by_n[OURS]]
        if not sizes:
            continue
        title = f"`{cell['op']}`, {cell['E']} columns, k = {cell['k']}" + (", cold" if "cache" in cell else "")
        lines = [
            [BY[by], *(microseconds(cells[n]["us"]) if n in cells else "" for n in sizes)]
            for by, cells in by_n.items()
            if any(n in cells for n in sizes)
        ]
        blocks.append(markdown_table([title, *(f"n = {n}" for n in sizes)], lines))
    return blocks


def _long_rows(files: Files) -> list[str]:
    """Return the table of topk_select on rows that are too long for a warp, with a line for each shape."""
    rows = select(_rows(files, "topk_select"), what="gpu", dtype="float32", cache="cold", data=None, order=None)
    shapes = dict.fromkeys((row["n"], row["E"], row["k"]) for row in rows if row["E"] > NARROW)
    times = {(row["n"], row["E"], row["k"], row["by"]): microseconds(row["us"]) for row in rows}
    kinds = [by for by in BY if any((*shape, by) in times for shape in shapes)]
    lines = [
        [f"{n} x {columns}, k = {k}", *(times.get((n, columns, k, by), "") for by in kinds)] for n, columns, k in shapes
    ]
    heads = ["`topk_select`, rows x columns, cold", *(BY[by] for by in kinds)]
    return [markdown_table(heads, lines)] if lines else []


def _call(row: Row) -> str:
    name = row.get("call") or row["part"]
    if row["by"] == OURS and "call" in row:
        return f"`{row['op']}` from {name}" if "op" in row else name
    return f"{row['by']}: {name}"


def bars(files: Files) -> str:
    """Return the cells that have a bar, with the measured time; bold if it misses the bar."""
    barred = [row for row in _rows(files, *BARRED) if "bar_us" in row]
    lines: dict[str, dict[int, Row]] = {}
    for row in select(barred, what="gpu"):
        name = results.label({name: value for name, value in row.items() if name not in ("what", "by", "n")})
        lines.setdefault(name, {})[row["n"]] = row
    sizes = sorted({n for cells in lines.values() for n in cells})
    blocks = []
    if lines:
        heads = ["on the GPU: measured (bar), us", *(f"n = {n}" for n in sizes)]
        blocks.append(
            markdown_table(heads, [[name, *map(_against_bar, map(cells.get, sizes))] for name, cells in lines.items()])
        )
    if calls := select(barred, what="host"):
        blocks.append(
            markdown_table(["on the host", "measured (bar), us"], [[_call(row), _against_bar(row)] for row in calls])
        )
    return "\n\n".join([*blocks, sources(files, *BARRED)]) if blocks else NONE


def _against_bar(row: Row | None) -> str:
    if row is None:
        return ""
    measured = microseconds(row["us"])
    return f"{measured if results.met(row) else f'**{measured}**'} ({microseconds(row['bar_us'])})"


def methods(files: Files) -> str:
    """Return the time of every preset, of plain sqrt(softplus) of the same size, and of compiling its kernel."""
    rows = _rows(files, "methods", "compile_methods")
    compiles = {row["part"].removeprefix("compile "): row for row in rows if "part" in row}
    lines = []
    for name in dict.fromkeys(row["preset"] for row in rows if "preset" in row):
        of_preset = select(rows, preset=name)
        sizes = sorted({row["n"] for row in of_preset})
        line = [f"{name} (E {of_preset[0]['E']}, k {of_preset[0]['k']})"]
        for n in sizes:
            (ours,), (plain,) = (
                [row for row in select(of_preset, n=n) if ("method" in row) == is_plain] for is_plain in (False, True)
            )
            ratio = f"{ours['us'] / plain['us']:.2f}"
            line += [
                microseconds(ours["us"]),
                microseconds(plain["us"]),
                ratio if results.met(ours) else f"**{ratio}**",
            ]
        compiled = compiles.get(name)
        lines.append([*line, f"{compiled['us'] / 1000:.0f}" if compiled else ""])
    if not lines:
        return NONE
    heads = [f"n = {n}: {what}" for n in sizes for what in ("us", "plain", "ratio")]
    table = markdown_table(["preset", *heads, "compiled in ms"], lines)
    return "\n\n".join([table, sources(files, "methods", "compile_methods")])


def cliffs(files: Files) -> str:
    """Return the largest ratios between the times of adjacent sizes in the sweeps."""
    lines = []
    for op, over, fixed in (
        ("activation_topk", "E", {"k": 6}),
        ("activation_topk", "k", {"E": 256}),
        ("topk_select", "E", {"k": 6}),
        ("topk_select", "k", {"E": 256}),
    ):
        for n in (64, 8192):
            rows = select(
                _ops(files), op=op, what="gpu", by=OURS, n=n, dtype="float32", cache="warm", data=None, **fixed
            )
            rows.sort(key=lambda row: int(row[over]))
            for small, large in pairwise(rows):
                ratio = max(large["us"] / small["us"], small["us"] / large["us"])
                lines.append((ratio, op, over, n, small, large))
    shown = [
        [f"`{op}`, n = {n}", f"{over} {small[over]} to {large[over]}", microseconds(small["us"]),
         microseconds(large["us"]), f"{ratio:.2f}", "yes" if ratio <= CLIFF else "no"]
        for ratio, op, over, n, small, large in sorted(lines, key=lambda line: -line[0])[:12]
    ]  # fmt: skip
    heads = ["the largest steps", "from, to", "us", "us", "ratio", f"within {CLIFF}"]
    if not shown:
        return NONE
    return f"{markdown_table(heads, shown)}\n\n{sources(files, 'activation_topk', 'topk_select')}"


def models(files: Files) -> str:
    """Return the time of steps of whole models, by their own code and with what replace_routers swaps."""
    table = steps.table(_rows(files, "transformers"))
    return f"{table}\n\n{sources(files, 'transformers')}" if table else NONE


def host(files: Files) -> str:
    """Return the time on the host of each part of a call: host_profile_before.json and host_profile.json."""
    before, after = (
        {row["part"]: row for row in _rows(files, name)} for name in ("host_profile_before", "host_profile")
    )
    lines = [
        [part, *(microseconds(rows[part]["us"]) if part in rows else "" for rows in (before, after))]
        for part in dict.fromkeys([*after, *before])
    ]
    return markdown_table(["microseconds on the host", "before", "after"], lines) if lines else NONE


def frameworks(files: Files) -> str:
    """Return the time of calls inside of frameworks on the host, of JAX also by handlers in Python."""
    lines: dict[str, list[str]] = {}
    for row in select(_rows(files, "frameworks"), what="host"):
        name = row["call"].replace(BY_HANDLERS, "")
        cells = lines.setdefault(name, [name, "", ""])
        cells[2 if BY_HANDLERS in row["call"] else 1] = microseconds(row["us"])
    if not lines:
        return NONE
    table = markdown_table(["call", "us", "by handlers, us"], lines.values())
    return f"{table}\n\n{sources(files, 'frameworks')}"


def batch_invariance(files: Files) -> str:
    """Return how many tokens have other results in a batch than alone."""
    rows = _rows(files, "batch_invariance")
    if not rows:
        return NONE
    sizes = sorted({row["n"] for row in rows if 1 < row["n"] < row["tokens"]})
    header = ["gate", "experts, hidden, top-k", "tokens", "other", *map(str, sizes), "all"]
    lines = []
    for gate in dict.fromkeys(row["gate"] for row in rows):
        found = {row["n"]: row for row in select(rows, gate=gate, batch_invariant=False)}
        last = found[max(found)]
        for what in COUNTED:
            figures = [str(found[n][what]) if n in found else "" for n in (*sizes, last["n"])]
            first = [gate, f"{last['E']}, {last['hidden']}, {last['k']}", str(last["tokens"])]
            lines.append([*(first if what == COUNTED[0] else [""] * 3), what, *figures])
    most = max(row[what] for row in select(rows, batch_invariant=True) for what in COUNTED)
    note = "Tokens with other bits in batches of this size than alone, by default."
    note += f" With `batch_invariant=True`: {most or 'none'}."
    return f"{markdown_table(header, lines)}\n\n{note} {sources(files, 'batch_invariance')}"


def counters(files: Files) -> str:
    """Return the counters that ncu read."""
    rows = _rows(files, "ncu")
    if not rows:
        return NONE
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("what", "op", "by", "cell")))
    table = markdown_table(
        ["kernel", *(name.replace("_", " ") for name in names)],
        [[row["cell"], *(f"{row[name]:,g}" if name in row else "" for name in names)] for row in rows],
    )
    return f"{table}\n\n{sources(files, 'ncu')}"


TABLES: dict[str, Callable[[Files], str]] = {
    "summary": summary,
    "benchmarks": speed,
    "models": models,
    "bars": bars,
    "cliffs": cliffs,
    "methods": methods,
    "host": host,
    "frameworks": frameworks,
    "ncu": counters,
    "batch_invariance": batch_invariance,
}


def filled(text: str, files: Files) -> str:
    """Return the text of a Markdown file with its tables replaced by current ones."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        block = f"{begin}\n\n{table(files)}\n\n{end}"
        text = re.sub(f"{begin}.*?{end}", block.replace("\\", r"\\"), text, flags=re.S)
    return text


def main(arguments: Sequence[str] | None = None, files: Iterable[Path] = FILES) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of JSON files")
    parser.add_argument("--write", action="store_true", help="replace the tables that are out of date")
    options = parser.parse_args(arguments)
    content = {path.stem: results.load(path) for path in sorted(options.results.glob("*.json"))}
    outdated, older = [], []
    for path in files:
        text = path.read_text()
        new = filled(text, content)
        if OLDER in new and path in (ROOT / name for name in CURRENT):
            older.append(path)
        if new != text:
            outdated.append(path)
            if options.write:
                path.write_text(new)
    for path in outdated:
        print(f"{path} {'written' if options.write else 'is out of date: run python -m benchmarks.table --write'}")
    for path in older:
        print(f"{path} is older than the kernels: measure again on a GPU, with --output benchmarks/results")
    return 1 if older or (outdated and not options.write) else 0


if __name__ == "__main__":
    raise SystemExit(main())
