# SPDX-License-Identifier: Apache-2.0
"""Command line: ``cupy-router demo`` and the other commands, also as ``python -m cupy_router``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import cupy_router

from . import check, demo, doctor, info, invariance, warmup


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 for success, 1 for a failure, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="cupy-router", description="Mixture-of-experts routing on CUDA.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {cupy_router.__version__}")
    commands = parser.add_subparsers(metavar="command")
    for command in (demo, info, doctor, check, warmup, invariance):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a path the terminal cannot show must not fail
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, a pager) has closed the pipe. Python flushes stdout again at exit, so discard that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
