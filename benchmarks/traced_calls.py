# SPDX-License-Identifier: Apache-2.0
"""Count the Python functions of the package that one call inside jax.jit runs while it is traced. Needs no GPU.

    python -m benchmarks.traced_calls              # this checkout
    python -m benchmarks.traced_calls OTHER_TREE   # and another one beside it

"first": the first call with a method; "again": a later one with the same method and shapes, as in the next layer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.rows import text_table

ROOT = Path(__file__).parents[1]

_COUNT = """
import json, sys
import jax, numpy as np
import cupy_router, cupy_router.jax
from cupy_router import RoutingMethod

def array(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

logits, vector, count = array(64, 256), array(256), array(1, dtype=np.int32)
CALLS = {
    "activation_topk, bias": lambda m: (lambda l, b: cupy_router.activation_topk(l, m, bias=b), logits, vector),
    "activation_topk, all arrays": lambda m: (
        lambda l, b, c, s, n: cupy_router.activation_topk(l, m, bias=b, logit_bias=c, expert_scale=s, num_valid=n),
        logits, vector, vector, vector, count,
    ),
    "dense_router, bias": lambda m: (
        lambda x, w, b: cupy_router.dense_router(x, w, m, bias=b), array(64, 128), array(256, 128), vector
    ),
    "hash_router, logits": lambda m: (
        lambda i, t, l: cupy_router.hash_router(i, t, m, logits=l),
        array(64, dtype=np.int32), array(100, 6, dtype=np.int32), logits,
    ),
    "topk_select": lambda m: (lambda s: cupy_router.topk_select(s, 6), logits),
    "activation_topk, jax.grad": lambda m: (
        jax.grad(lambda l, b: cupy_router.activation_topk(l, m, bias=b).weights.sum()), logits, vector
    ),
    "activation_topk, jax.vmap": lambda m: (
        jax.vmap(lambda l: cupy_router.activation_topk(l, m)), array(4, 64, 256)
    ),
}

def calls(function, *arrays):
    found = 0
    def seen(frame, event, _):
        nonlocal found
        found += event == "call" and "cupy_router" in frame.f_globals.get("__name__", "").split(".")[0]
    sys.setprofile(seen)
    try:
        jax.make_jaxpr(function)(*arrays)
    finally:
        sys.setprofile(None)
    return found

rows = {}
for name, make in CALLS.items():
    calls(*make(RoutingMethod(256, 6)))  # imports and first arrays
    method = RoutingMethod(256, 6, scale=2.5 + len(rows))
    rows[name] = [calls(*make(method)), calls(*make(method))]
print(json.dumps(rows))
"""


def count(tree: Path) -> dict[str, list[int]]:
    """Return first and later counts of each kind of call in a checkout."""
    environment = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", _COUNT], cwd=tree, env=environment, capture_output=True, check=True)
    found: dict[str, list[int]] = json.loads(done.stdout)
    return found


def main() -> None:
    trees = [*(Path(argument).resolve() for argument in sys.argv[1:]), ROOT]
    found = [count(tree) for tree in trees]
    lines = [(name, *(str(number) for rows in found for number in rows[name])) for name in found[-1]]
    print(
        text_table(
            ("Python calls", *(f"{tree.name}, {which}" for tree in trees for which in ("first", "again"))), lines
        )
    )


if __name__ == "__main__":
    main()
