# SPDX-License-Identifier: Apache-2.0
"""docs/layout.md: its drawing is that of the function, and its table of consumers gives each of them the arrays that
its own rules build."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from cupy_router import expert_layout, permute
from tests.backends import Backend
from tests.consumers import RULES
from tests.pages import ROOT, between

PATH = ROOT / "docs" / "layout.md"


# -- The drawing -------------------------------------------------------------------------------------------------------


def drawing() -> str:
    """Return the layout of the page's first example as text."""
    indices = np.array([[2, 0], [2, 1], [0, 2], [2, -1]], np.int32)
    layout = expert_layout(indices, 3, alignment=2, want=("counts", "offsets", "order", "positions", "block_experts"))
    pairs, rows = range(indices.size), range(layout.capacity)
    first = layout.offsets.tolist()

    def line(name: str, cells: Mapping[int, Any], count: int, breaks: Sequence[int]) -> str:
        bars = ("  |" if i in breaks else "   " for i in range(1, count + 1))
        return f"{name:<14}" + "".join(f"{cells.get(i, ''):>3}{bar}" for i, bar in zip(range(count), bars, strict=True))

    def of_pairs(name: str, values: Any) -> str:
        return line(name, dict(zip(pairs, values, strict=True)), len(pairs), range(2, len(pairs), 2))

    def of_rows(name: str, cells: Mapping[int, Any]) -> str:
        return line(name, cells, len(rows), first[1:])

    order = layout.order.tolist()
    lines = [
        of_pairs("token", [pair // 2 if pair % 2 == 0 else "" for pair in pairs]),
        of_pairs("pair", pairs),
        of_pairs("indices", indices.reshape(-1)),
        of_pairs("positions", layout.positions.reshape(-1)),
        "",
        of_rows("expert", dict(zip(first, range(3), strict=False))),
        of_rows("counts", dict(zip(first, layout.counts, strict=False))),
        of_rows("offsets", dict(zip(first, first, strict=True))),
        of_rows("ends", dict(zip(layout.ends.tolist(), layout.ends, strict=True))),
        of_rows("row", dict(enumerate(rows))),
        of_rows("order", dict(enumerate(order))),
        of_rows("token", {row: "" if pair < 0 else pair // 2 for row, pair in enumerate(order)}),
        of_rows("block_experts", dict(zip(rows[::2], layout.block_experts, strict=True))),
    ]
    return "\n".join(line.rstrip() for line in lines)


@pytest.mark.backends("reference")
def test_the_drawing_is_that_of_the_function() -> None:
    assert between(PATH, "drawing") == f"```text\n{drawing()}\n```"


# -- Consumers ---------------------------------------------------------------------------------------------------------

ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in between(PATH, "consumers").splitlines()[2:]]
LONGER = {  # than the entries in use
    "m_indices", "sorted_token_ids", "expert_ids", "tile_idx_to_expert_idx", "tile_idx_to_mn_limit",
    "permuted_idx_to_expanded_idx", "y",
}  # fmt: skip
E, K, TOKENS, HIDDEN = 6, 3, 50, 16


def ids_of(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((TOKENS, E)), axis=1)[:, :K]
    return {"spread": ids, "an expert without tokens": np.where(ids == 2, 4, ids), "one expert": 0 * ids + 3}[kind]


@pytest.mark.backends("reference")
def test_every_consumer_of_the_table_has_a_rule() -> None:
    assert [row[0] for row in ROWS] == sorted(RULES, key=[row[0] for row in ROWS].index)


def names_of(code: str, ids: np.ndarray, on_gpu: bool) -> dict[str, Any]:
    """Return what the code of a row may use, as arrays of its framework."""
    rng = np.random.default_rng(1)
    arrays = {"indices": ids.astype(np.int32), "x": rng.standard_normal((TOKENS, HIDDEN), np.float32)}
    arrays["w"] = rng.standard_normal((E, HIDDEN, 8), np.float32)
    names: dict[str, Any] = {"E": E, "k": K, "m": ids.size, "expert_layout": expert_layout, "permute": permute}
    if "ragged_dot" in code:
        jax = pytest.importorskip("jax")
        ragged_dot = partial(jax.lax.ragged_dot, precision="highest")
        return names | {name: jax.numpy.asarray(array) for name, array in arrays.items()} | {"ragged_dot": ragged_dot}
    torch = pytest.importorskip("torch")
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)
    if "grouped_mm(" in code and grouped_mm is None:
        pytest.skip("this PyTorch has no grouped_mm")
    tensors = {name: torch.from_numpy(array).to("cuda" if on_gpu else "cpu") for name, array in arrays.items()}
    tensors |= {name: tensors[name].bfloat16() for name in ("x", "w") if on_gpu}
    return names | tensors | {"grouped_mm": grouped_mm, "torch": torch}


def host(array: Any) -> np.ndarray:
    """Return an array of any framework as NumPy's, bfloat16 as float32."""
    if hasattr(array, "cpu"):
        array = array.float().cpu() if array.is_floating_point() else array.cpu()
    return np.asarray(array)


@pytest.mark.backends("reference", "gpu")
@pytest.mark.parametrize("kind", ["spread", "an expert without tokens", "one expert"])
@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_consumer_gets_the_arrays_of_its_own_rules(row: list[str], kind: str, backend: Backend) -> None:
    consumer, options, cell = row
    ids, lines = ids_of(kind), re.findall(r"`(.*?)`", cell)
    names = names_of(cell, ids, backend.name == "gpu")
    names["layout"] = eval(f"expert_layout(indices, E, {options.strip('`')})", names)
    for line in lines:
        exec(line, names)
    inputs = {name: host(names[name]) for name in ("x", "w")}
    wanted = RULES[consumer]({"ids": ids.reshape(-1), "E": E, "k": K, **inputs})
    assert wanted.keys() == {name for line in lines for name in line.partition(" = ")[0].split(", ")}
    for name, want in wanted.items():
        got, want = host(names[name]), np.asarray(want)
        if name in LONGER:
            got = got[: len(want)]
        if name == "y":
            np.testing.assert_allclose(got, want, rtol=1e-2 if backend.name == "gpu" else 1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(got, want, err_msg=name)
            assert got.dtype == (np.int64 if name == "expert_first_token_offset" else np.int32), name


@pytest.mark.backends("reference")
def test_masked_rows_of_ids_that_are_no_experts_are_negative() -> None:
    ids = ids_of("spread")
    ids[::3, 0], ids[1::3, 1] = -1, E + 3
    (row,) = [row for row in ROWS if row[0].startswith("DeepGEMM masked")]
    names = names_of(row[2], ids, False)
    names["layout"] = eval(f"expert_layout(indices, E, {row[1].strip('`')})", names)
    exec(row[2].strip("`"), names)
    got = host(names["row"]).reshape(-1)
    for pair, expert in enumerate(ids.reshape(-1)):
        assert got[pair] == (ids.reshape(-1)[:pair] == expert).sum() if 0 <= expert < E else got[pair] < 0


if __name__ == "__main__":  # writes the drawing
    PATH.write_text(PATH.read_text().replace(between(PATH, "drawing"), f"```text\n{drawing()}\n```"))
