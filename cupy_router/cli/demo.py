# SPDX-License-Identifier: Apache-2.0
"""``cupy-router demo``: route a page of English with three ops, show where the tokens go, check every result."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import cupy_router
from cupy_router import compiler
from cupy_router.results import Routing, TopK

from . import load_plot, terminal

Array = NDArray[Any]

VOCAB_SIZE, NUM_EXPERTS, TOP_K = 30_522, 128, 6
SENTENCE = slice(182, 194)  # the dozen tokens shown one by one; "we" is in it twice
SHOWN_EXPERTS = (65, 67, 0, 50, 35, 45, 119, 70)  # experts whose words have an obvious theme
WEIGHT_TOLERANCE = 1e-5  # relative; float32 with fast special functions has a much smaller error


class Passage(NamedTuple):
    """2048 tokens of text with their logits."""

    token_ids: Array  # [2048] int32
    tokens: list[str]  # pieces of words, as text
    words: list[str]  # the whole word of each token
    logits: Array  # [2048, 128] float32


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("demo", help="route real tokens, show where they go, check the results")
    choices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", choices=choices, default="auto", help="where to route (default: CUDA if usable)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of the load: .png, .svg")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    obstacle = "as --device cpu asks." if args.device == "cpu" else compiler.why_no_cuda()
    if args.device == "cuda" and obstacle:
        print(f"cupy-router demo: {obstacle}", file=sys.stderr)
        return 1
    if args.plot and (missing := load_plot.obstacle()):
        print(f"cupy-router demo: {missing}", file=sys.stderr)
        return 1
    on_gpu = obstacle is None
    passage, table = load_passage(), hash_table()
    method = cupy_router.RoutingMethod(NUM_EXPERTS, TOP_K, "sqrtsoftplus")
    tokens, experts = passage.logits.shape

    print("Tokens in, experts and weights out: a router for a mixture of experts.\n")
    terminal.field("input", f"{tokens} tokens of English prose, as hidden states of the model all-MiniLM-L6-v2")
    terminal.field("router", f"{experts} experts, the best {TOP_K} for each token, scored by sqrt(softplus(logit))")
    if on_gpu:
        terminal.field("runs on", f"{device_name()}, by the CUDA kernels")
    else:
        terminal.field("runs on", f"the CPU, by the NumPy reference: {obstacle}")

    upload, download = transfers(on_gpu)
    token_ids, logits = upload(passage.token_ids), upload(passage.logits)
    hashed = download(cupy_router.hash_router(token_ids, upload(table), method, logits=logits))
    top = download(cupy_router.topk_select(logits, TOP_K))
    routed = download(cupy_router.activation_topk(logits, method))

    show_tokens(passage, routed, hashed)
    show_words(passage, routed)
    show_load(routed, hashed)
    good = check(passage, table, hashed, top, routed)
    return 0 if (args.plot is None or plot(routed, args.plot)) and good else 1


def plot(routed: Routing, path: Path) -> bool:
    """Write the picture, or print why that is not possible and return False."""
    try:
        load_plot.draw(routed.indices, NUM_EXPERTS, path)
    except (OSError, ValueError) as error:
        print(f"cupy-router demo: --plot {path}: {error}", file=sys.stderr)
        return False
    print(f"\nWrote {path}")
    return True


def load_passage() -> Passage:
    with (resources.files("cupy_router") / "data" / "minilm_router.npz").open("rb") as file:
        data = np.load(file)
        token_ids, tokens = data["token_ids"], [str(token) for token in data["tokens"]]
        # float64, so that every machine rounds to the same float32 logits.
        logits = data["hidden"].astype(np.float64) @ data["gate_weight"].astype(np.float64).T
    return Passage(token_ids, tokens, whole_words(tokens), logits.astype(np.float32))


def whole_words(tokens: list[str]) -> list[str]:
    """Return the whole word of each token, joined from its pieces.

    >>> whole_words(["a", "copy", "##le", "##ft", "license"])
    ['a', 'copyleft', 'copyleft', 'copyleft', 'license']
    """
    words: list[str] = []
    start = 0
    for i, token in enumerate(tokens):
        if not token.startswith("##"):
            start = i
        word = "".join(piece.removeprefix("##") for piece in tokens[start : i + 1])
        words[start:] = [word] * (i + 1 - start)
    return words


def hash_table() -> Array:
    """Return a table [vocab_size, top_k] int32 of six different experts per token id, by double hashing."""
    ids = np.arange(VOCAB_SIZE, dtype=np.uint32)[:, None]
    first = (ids * np.uint32(0x9E3779B1)) >> np.uint32(25)
    step = (ids * np.uint32(0x85EBCA77)) >> np.uint32(25) | np.uint32(1)  # odd, so that 128 steps reach every expert
    return ((first + step * np.arange(TOP_K, dtype=np.uint32)) % NUM_EXPERTS).astype(np.int32)


def transfers(on_gpu: bool) -> tuple[Callable[[Array], Any], Callable[[Any], Any]]:
    """Return two functions: one moves an array to the device, one moves a named tuple of arrays back."""
    if not on_gpu:
        return (lambda array: array), (lambda result: result)
    import cupy

    return cupy.asarray, lambda result: type(result)(*map(cupy.asnumpy, result))


def device_name() -> str:
    import cupy

    return str(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode())


def show_tokens(passage: Passage, routed: Routing, hashed: Routing) -> None:
    tokens, words = range(*SENTENCE.indices(len(passage.tokens))), passage.words

    def show(token: int, routing: Routing) -> None:
        pairs = zip(routing.indices[token], routing.weights[token], strict=True)
        print(f"  {passage.tokens[token]:<10}" + "".join(f"{expert:>5} {weight:.2f}" for expert, weight in pairs))

    print("\nactivation_topk: each token's experts and weights, best first")
    for token in tokens:
        show(token, routed)
    print("\nhash_router: experts by token id, the same each time; the logits only determine the weights")
    for token in tokens:
        if words[SENTENCE].count(words[token]) > 1:
            show(token, hashed)


def show_words(passage: Passage, routed: Routing) -> None:
    print("\nWords whose first choice is expert")
    for expert in SHOWN_EXPERTS:
        chosen = np.nonzero(routed.indices[:, 0] == expert)[0]
        words = Counter(passage.words[token] for token in chosen)
        terminal.field(f"{expert:>7}", ", ".join(word for word, _ in words.most_common(8)))


def show_load(routed: Routing, hashed: Routing) -> None:
    load = np.bincount(routed.indices.ravel(), minlength=NUM_EXPERTS)
    mean = load.mean()
    per_line = next(n for n in (128, 64, 32) if n + 8 <= terminal.width())
    print(f"\nLoad: how many tokens each of the {NUM_EXPERTS} experts gets")
    for first in range(0, NUM_EXPERTS, per_line):
        bars = terminal.columns(load[first : first + per_line].tolist(), 5, load.max(), terminal.alphabet())
        for i, line in enumerate(bars):
            print(f"  {load.max() if i == 0 else '':>4} {line}".rstrip())
        print("       " + "".join(f"{expert:<8}" for expert in range(first, first + per_line, 8)).rstrip())
    skew, hashed_skew = load.max() / mean, np.bincount(hashed.indices.ravel()).max() / mean
    terminal.field("busiest", f"expert {load.argmax()}: {load.max()} tokens, {skew:.1f} times the mean of {mean:.0f}")
    terminal.field("", f"(with hash_router {hashed_skew:.1f} times)")


def check(passage: Passage, table: Array, hashed: Routing, top: TopK, routed: Routing) -> bool:
    """Compare all results with a plain sort in Python, print the outcome and return True if all agree."""
    logits = passage.logits
    scores = np.sqrt(np.logaddexp(0.0, logits.astype(np.float64))).astype(np.float32)
    by_logit, by_score, by_table = sort_rows(logits), sort_rows(scores), table[passage.token_ids]
    print("\nChecked against a plain sort in Python")
    return all(
        [
            report("hash_router", "experts", hashed.indices, by_table, weight_error(hashed, scores, by_table)),
            report("topk_select", "indices", top.indices, by_logit),
            report("topk_select", "values", top.values, np.take_along_axis(logits, by_logit, axis=1)),
            report("activation_topk", "experts", routed.indices, by_score, weight_error(routed, scores, by_score)),
        ]
    )


def sort_rows(values: Array) -> Array:
    """Return the indices [n, top_k] of the largest values of each row, largest first; of equal values, lower index."""
    return np.array([sorted(range(len(row)), key=lambda i: (-row[i], i))[:TOP_K] for row in values.tolist()])


def weight_error(routing: Routing, scores: Array, indices: Array) -> float:
    """Return the largest relative error of the weights."""
    exact = np.take_along_axis(scores, indices, axis=1).astype(np.float64)
    exact /= exact.sum(axis=1, keepdims=True)
    return float(np.max(np.abs(routing.weights - exact) / exact))


def report(op: str, name: str, found: Array, expected: Array, error: float | None = None) -> bool:
    exact = np.array_equal(found, expected)
    good = exact and (error is None or error <= WEIGHT_TOLERANCE)  # False for NaN
    weights = "" if error is None else f", weights within {error:.1e}"
    print(f"  {'ok    ' if good else 'FAILED'}  {op:<16} {name} {'exact' if exact else 'DIFFER'}{weights}")
    return good
