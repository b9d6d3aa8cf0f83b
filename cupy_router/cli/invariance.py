# SPDX-License-Identifier: Apache-2.0
"""``cupy-router invariance``: count the tokens whose results depend on the batch that they are in."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cupy_router import RoutingMethod, RoutingWithLogits, compiler, dense_router, presets

from . import demo, terminal

TOKENS, HIDDEN = 2048, 4096
BATCHES = (1, 16, 64, 256, 1024, 8192)
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


class Count(NamedTuple):
    """Numbers of tokens that have other bits in batches of this size than alone."""

    batch: int
    batch_invariant: bool
    logits: int
    weights: int  # or their order
    experts: int  # in any order


def add_parser(commands: Any) -> None:
    about = "Route tokens in batches and alone, and count those with other results: by default, and batch-invariant."
    code = "Exit code: 0 if batch_invariant=True gave every token the same bits in every batch, else 1."
    short = "count tokens that depend on their batch"
    parser = commands.add_parser("invariance", help=short, description=about, epilog=code)
    choices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", choices=choices, default="auto", help="where to route (default: CUDA if usable)")
    parser.add_argument("--preset", metavar="NAME", help="a random gate of this method (default: real tokens)")
    parser.add_argument("--hidden", type=at_least_1, help=f"columns of a random gate (default: {HIDDEN})")
    parser.add_argument("--dtype", choices=[*DTYPES], default="bfloat16", help="of x and gate (default: bfloat16)")
    parser.add_argument(
        "--tokens", type=at_least_1, default=TOKENS, help=f"their number (default: {TOKENS}, the most real ones)"
    )
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.set_defaults(run=run)


def at_least_1(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def run(args: argparse.Namespace) -> int:
    obstacle = compiler.why_no_cuda()
    refusal = None
    if args.device == "cuda":
        refusal = obstacle
    if args.preset and args.preset not in presets():
        refusal = f"--preset must be one of {', '.join(presets())}, got {args.preset!r}"
    if args.hidden and not args.preset:
        refusal = "--hidden is for a random gate: add --preset NAME"
    if not args.preset and args.tokens > TOKENS:
        refusal = f"there are {TOKENS} real tokens, got --tokens {args.tokens}: add --preset NAME for random ones"
    if refusal:
        print(f"cupy-router invariance: {refusal}", file=sys.stderr)
        return 1
    method = presets()[args.preset] if args.preset else RoutingMethod(demo.NUM_EXPERTS, demo.TOP_K)
    make = random_tokens(args.tokens, args.hidden or HIDDEN, method) if args.preset else real_tokens(args.tokens)
    on_gpu = args.device != "cpu" and not obstacle
    x, weight = (upload(array.astype(DTYPES[args.dtype]), on_gpu) for array in make)
    batches = [batch for batch in BATCHES if batch < len(x)] + [len(x)]
    try:
        counts = list(count(x, weight, method, batches))
    except ValueError as error:  # such as of an old GPU
        print(f"cupy-router invariance: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps([one._asdict() for one in counts]))
    else:
        kind = "random" if args.preset else "real"
        terminal.field("input", f"{len(x)} {kind} tokens, hidden states of {x.shape[1]} columns in {args.dtype}")
        terminal.field("router", str(method))
        terminal.field("runs on", demo.device_name() if on_gpu else "the CPU, by the NumPy reference")
        show(counts)
    return int(any(one.batch_invariant and any(one[2:]) for one in counts))


def real_tokens(num_tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return x and the gate of the page of English that ``cupy-router demo`` routes."""
    with (resources.files("cupy_router") / "data" / "minilm_router.npz").open("rb") as file:
        data = np.load(file)
        return data["hidden"][:num_tokens], data["gate_weight"]


def random_tokens(num_tokens: int, hidden: int, method: RoutingMethod) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return normal x and a normal gate, float32, with logits of standard deviation 1."""
    rng = np.random.default_rng(0)
    shapes = (num_tokens, hidden), (method.num_logits, hidden)
    x, weight = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return x, weight * np.float32(hidden**-0.5)


def upload(array: NDArray[Any], on_gpu: bool) -> Any:
    if not on_gpu:
        return array
    import cupy

    return cupy.asarray(array.view(np.uint8)).view(array.dtype)  # also of bfloat16


def count(x: Any, weight: Any, method: RoutingMethod, batches: Sequence[int]) -> Iterator[Count]:
    """Yield how many tokens differ from the same token alone, for each size of batches, by default and invariant."""
    for batch_invariant in (False, True):
        alone = route(x, weight, method, 1, batch_invariant)
        for batch in batches:
            together = route(x, weight, method, batch, batch_invariant)
            logits, weights, order, experts = (
                (a.view(np.uint8) != b.view(np.uint8)).any(axis=1)
                for a, b in zip(_parts(together), _parts(alone), strict=True)
            )
            changed = logits, weights | order, experts
            yield Count(batch, batch_invariant, *(int(tokens.sum()) for tokens in changed))


def route(x: Any, weight: Any, method: RoutingMethod, batch: int, batch_invariant: bool) -> RoutingWithLogits:
    """Route all tokens in batches of this size."""
    numpy_or_cupy = np if isinstance(x, np.ndarray) else sys.modules["cupy"]
    columns = (method.num_columns, method.weight_dtype), (method.num_columns, method.index_dtype)
    shapes = (*columns, (method.num_logits, "float32"))
    whole = RoutingWithLogits(*(numpy_or_cupy.empty((len(x), width), dtype) for width, dtype in shapes))
    for begin in range(0, len(x), batch):
        rows = slice(begin, begin + batch)
        out = RoutingWithLogits(*(array[rows] for array in whole))
        dense_router(x[rows], weight, method, return_logits=True, batch_invariant=batch_invariant, out=out)
    return whole


def _parts(routed: RoutingWithLogits) -> tuple[Any, ...]:
    ids = routed.indices.copy()
    ids.sort(axis=1)
    return routed.logits, routed.weights, routed.indices, ids


def show(counts: Sequence[Count]) -> None:
    print("\nTokens with other bits than alone:\n\n   batch   default                     batch_invariant=True")
    print("  tokens    logits weights experts      logits weights experts")
    by_default = [one for one in counts if not one.batch_invariant]
    invariant = [one for one in counts if one.batch_invariant]
    for plain, fixed in zip(by_default, invariant, strict=True):
        print(f"{plain.batch:>8}  ", *(f"{number:>7}" for number in plain[2:]), end="    ")
        print(*(f"{number:>7}" for number in fixed[2:]))
    bad = any(any(one[2:]) for one in invariant)
    print("\nFAILED: batch_invariant=True" if bad else "\nok: batch_invariant=True gave each token the same bits")
