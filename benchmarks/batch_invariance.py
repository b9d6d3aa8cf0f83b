# SPDX-License-Identifier: Apache-2.0
"""How many tokens get other logits, weights or experts in a batch than alone, by default and batch-invariant.

python -m benchmarks.batch_invariance [--output FOLDER]

One gate is real; the others have the sizes of published models and normal weights. Exit code 1 if a token of a
batch-invariant call differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks import harness
from benchmarks import rows as results
from benchmarks.rows import OURS, Row
from cupy_router import RoutingMethod, presets
from cupy_router.cli import invariance

TOKENS, DTYPE = 8192, "bfloat16"
REAL = "all-MiniLM-L6-v2, k-means centroids"
HIDDEN = {"deepseek-v4-flash": 4096, "deepseek-v3": 7168, "qwen3-moe": 2048, "gpt-oss-120b": 2880}  # columns


def rows_of(name: str, batches: tuple[int, ...] = invariance.BATCHES, tokens: int = TOKENS) -> Iterator[Row]:
    """Yield the counts for a gate."""
    if name == REAL:
        method = RoutingMethod(128, 6, "sqrtsoftplus")
        host = invariance.real_tokens(tokens)
        batches = (*(batch for batch in batches if batch < len(host[0])), len(host[0]))
    else:
        method = presets()[name]
        host = invariance.random_tokens(tokens, HIDDEN[name], method)
    x, weight = (invariance.upload(array.astype(invariance.DTYPES[DTYPE]), True) for array in host)
    cell = {"what": "count", "op": "dense_router", "gate": name, "E": method.num_experts, "k": method.top_k}
    cell |= {"hidden": x.shape[1], "dtype": DTYPE, "tokens": len(x)}
    for count in invariance.count(x, weight, method, batches):
        found = {"logits": count.logits, "weights": count.weights, "experts": count.experts}
        yield cell | {"by": OURS, "n": count.batch, "batch_invariant": count.batch_invariant} | found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write batch_invariance.json into this folder")
    options = parser.parse_args()
    found = []
    for name in (REAL, *HIDDEN):
        for row in rows_of(name):
            found.append(row)
            print(*(f"{key}={row[key]}" for key in ("gate", "batch_invariant", "n", "logits", "weights", "experts")))
    if options.output is not None:
        results.save(options.output / "batch_invariance.json", harness.environment(), found)
    return int(any(row["batch_invariant"] and row["logits"] + row["weights"] + row["experts"] for row in found))


if __name__ == "__main__":
    raise SystemExit(main())
