# SPDX-License-Identifier: Apache-2.0
"""``cupy-router warmup``: compile the kernels of a model's router, so that the first calls of a server find them."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import cupy_router
from cupy_router.kernel_cache import folder

from . import terminal

_DTYPES = ("bfloat16", "float16", "float32")
_ARRAYS = ("bias", "logit_bias", "expert_scale", "num_valid")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("warmup", help="compile the kernels of a router into CuPy's cache folder")
    parser.add_argument("--preset", required=True, metavar="NAME", help="such as deepseek-v4-flash")
    parser.add_argument("--hidden", type=int, help="columns of x; without it, calls are those on logits")
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["bfloat16"], help="of x, or of logits")
    parser.add_argument("--weight", choices=_DTYPES, help="dtype of the gate, if it is not that of x")
    counts = parser.add_argument("--tokens", nargs=2, type=int, default=[1, 8192], metavar=("LEAST", "MOST"))
    counts.help = "numbers of tokens of a call (default: 1 8192)"
    for name in _ARRAYS:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=f"calls have {name}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    given: dict[str, Any] = {name: True for name in _ARRAYS if getattr(args, name)}
    if args.weight:
        given["weight"] = args.weight
    begin = time.perf_counter()
    try:
        ready = cupy_router.warmup(
            args.preset, hidden=args.hidden, dtypes=args.dtype, num_tokens=tuple(args.tokens), progress=show, **given
        )
    except (TypeError, ValueError, RuntimeError) as error:
        print(f"cupy-router warmup: {str(error).removeprefix('warmup: ')}", file=sys.stderr)
        return 1
    compiled = sum(kernel.compiled for kernel in ready)
    seconds = time.perf_counter() - begin
    print(f"{len(ready)} kernels ready in {seconds:.1f} s, of which {compiled} were compiled; kept in {folder()}")
    return 0


def show(done: int, total: int) -> None:
    """Draw a bar where a person watches."""
    if not sys.stderr.isatty():
        return
    columns = max(10, terminal.width() - 24)
    full = done * columns // max(total, 1)
    bar = terminal.alphabet()[-1] * full + " " * (columns - full)
    sys.stderr.write(f"\r  {bar}  {done} of {total}" + ("\n" if done == total else ""))
    sys.stderr.flush()
