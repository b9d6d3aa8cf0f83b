# SPDX-License-Identifier: Apache-2.0
"""docs/expert_parallel.md: its table of rows, and its conversions, on outputs in each engine's format."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.backends("reference")

from benchmarks import expert_parallel_model as model  # noqa: E402
from cupy_router import ExpertLayout, expert_layout, permute, unpermute  # noqa: E402
from tests.pages import ROOT, between  # noqa: E402  # PyTorch may be missing

PATH = ROOT / "docs" / "expert_parallel.md"
P, E, TOKENS, K, HIDDEN, RANK = 3, 6, 7, 2, 4, 1  # ranks, experts, tokens of a rank, ..., the rank that is looked at
NUM_LOCAL, FIRST = E // P, RANK * E // P


@pytest.mark.parametrize(("num_experts", "num_devices"), [(9, 4), (12, 3), (3, 4), (1, 1)])
def test_the_experts_whose_parameters_jax_devices_have(num_experts: int, num_devices: int) -> None:
    names: dict[str, Any] = {"np": np, "E": num_experts, "P": num_devices}
    exec(textwrap.dedent(between(PATH, "own").strip("`")), names)
    own = names["own"].reshape(num_devices, -1).tolist()
    for device, experts in enumerate(own):
        first, end = (d * num_experts // num_devices for d in (device, device + 1))
        assert experts[: end - first] == [*range(first, end)]
        assert len(experts) - (end - first) in (0, 1)


def test_the_table_of_rows_is_that_of_the_model() -> None:
    assert between(PATH, "rows") == model.table(256, 8)


# -- Conversions -------------------------------------------------------------------------------------------------------


def tokens() -> tuple[Any, Any, Any]:
    """Return x [P, n, H], ids and weights [P, n, k] of all ranks."""
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.rand(P, TOKENS, size, generator=generator) for size in (HIDDEN, K))
    ids = torch.rand(P, TOKENS, E, generator=generator).argsort(dim=2)[:, :, :K]
    return x, ids, weights


def is_here(expert: int) -> bool:
    return FIRST <= expert < FIRST + NUM_LOCAL


def by_token() -> tuple[dict[str, Any], Any]:
    """Tokens that have an expert here, once each."""
    x, ids, weights = tokens()
    sent = [(rank, i) for rank in range(P) for i in range(TOKENS) if any(map(is_here, ids[rank, i].tolist()))]
    local = [[e - FIRST if is_here(e) else -1 for e in ids[place].tolist()] for place in sent]
    given = {
        "recv_x": torch.stack([x[place] for place in sent]),
        "recv_ids": torch.tensor(local),
        "recv_weights": torch.stack([weights[place] for place in sent]),
    }
    return given, torch.stack([weighted(*place) for place in sent])


def by_expert() -> tuple[dict[str, Any], Any]:
    """A block of rows for each expert, with garbage after the last token."""
    x, ids, _ = tokens()
    recv_x, counts = torch.full((NUM_LOCAL, P * TOKENS, HIDDEN), torch.nan), [0] * NUM_LOCAL
    back = recv_x.clone()
    for rank, i, slot in pairs():
        expert = int(ids[rank, i, slot]) - FIRST
        recv_x[expert, counts[expert]] = x[rank, i]
        back[expert, counts[expert]] = x[rank, i] * (expert + 1)
        counts[expert] += 1
    recv_count = torch.tensor(counts, dtype=torch.int32)
    return {"recv_x": recv_x, "recv_count": recv_count, "max_rows": P * TOKENS}, back


def by_rank() -> tuple[dict[str, Any], Any]:
    """A block of tokens from each rank, the tokens that have an expert here, then empty rows with garbage."""
    x, ids, weights = tokens()
    recv_x = torch.full((P, TOKENS, HIDDEN), torch.nan)
    recv_ids, recv_weights = torch.full((P, TOKENS, K), E), torch.full((P, TOKENS, K), torch.nan)
    back = torch.zeros(P, TOKENS, HIDDEN)
    for rank in range(P):
        sent = [i for i in range(TOKENS) if any(map(is_here, ids[rank, i].tolist()))]
        for row, i in enumerate(sent):
            recv_x[rank, row], recv_ids[rank, row], recv_weights[rank, row] = x[rank, i], ids[rank, i], weights[rank, i]
            back[rank, row] = weighted(rank, i)
    return {"recv_x": recv_x, "recv_ids": recv_ids, "recv_weights": recv_weights}, back


def by_rank_and_expert() -> tuple[dict[str, Any], Any]:
    """Rows of pairs, ordered by rank, then by expert."""
    x, ids, _ = tokens()
    found = sorted(pairs(), key=lambda pair: (pair[0], int(ids[pair])))
    counts = torch.zeros(P, NUM_LOCAL, dtype=torch.int64)
    for rank, i, slot in found:
        counts[rank, int(ids[rank, i, slot]) - FIRST] += 1
    recv_x = torch.stack([x[rank, i] for rank, i, _ in found])
    back = torch.stack([x[rank, i] * (int(ids[rank, i, slot]) - FIRST + 1) for rank, i, slot in found])
    return {"recv_x": recv_x, "recv_counts": counts}, back


def pairs() -> list[tuple[int, int, int]]:
    """Return rank, token and slot of each pair with an expert here, in order."""
    ids = tokens()[1]
    every = [(rank, i, slot) for rank in range(P) for i in range(TOKENS) for slot in range(K)]
    return [pair for pair in every if is_here(int(ids[pair]))]


def weighted(rank: int, i: int) -> Any:
    """Return the weighted sum of what the experts here return for a token: expert e multiplies by e + 1."""
    x, ids, weights = tokens()
    factor = sum(weights[rank, i, s] * (e - FIRST + 1) for s, e in enumerate(ids[rank, i].tolist()) if is_here(e))
    return x[rank, i] * factor


FORMATS = {
    "DeepEP `dispatch`": by_token,
    "DeepEP `low_lat": by_expert,
    "FlashInfer": by_rank,
    "Megatron": by_rank_and_expert,
}
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in between(PATH, "engines").splitlines()[2:]]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_outputs_of_an_engine_become_a_layout(row: list[str]) -> None:
    engine, returns, code = row
    given, wanted = next(make for start, make in FORMATS.items() if engine.startswith(start))()
    assert all(f"`{name}`" in returns or name == "max_rows" for name in given)
    names = {"torch": torch, "E": E, "P": P, "first": FIRST, "num_local": NUM_LOCAL, "ExpertLayout": ExpertLayout}
    names |= {"expert_layout": expert_layout, "permute": permute, "unpermute": unpermute} | given
    *before, last = re.findall(r"`(.*?)`", code)
    for line in before:
        exec(line, names)
    layout, ids = names["layout"], tokens()[1]
    counts = [sum(int(ids[pair]) == FIRST + expert for pair in pairs()) for expert in range(NUM_LOCAL)]
    assert layout.counts.tolist() == (layout.ends - layout.offsets[:-1]).tolist() == counts
    assert names["rows"].shape == (layout.capacity, HIDDEN)
    y = torch.full_like(names["rows"], torch.nan)  # in rows without a pair, too
    for expert, (start, end) in enumerate(zip(layout.offsets.tolist(), layout.ends.tolist(), strict=False)):
        y[start:end] = names["rows"][start:end] * (expert + 1)
    names["y"] = y
    exec(last, names)
    torch.testing.assert_close(names["back"], wanted, equal_nan=True)
