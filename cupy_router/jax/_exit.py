# SPDX-License-Identifier: Apache-2.0
"""Wait at exit until XLA has finished all calls on CPU devices, because their handlers need the interpreter.

XLA executes CPU programs asynchronously. A handler that asks a finalizing interpreter for the GIL never gets it, so
JAX, which waits for the handler, would never exit. On a GPU, handlers run while a call is dispatched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax
import numpy as np

from cupy_router.ops.topk_select import topk_select

in_use = False  # True: XLA may still call handlers

_QUIET_SECONDS, _MAX_SECONDS = 0.1, 10.0  # the limit is for daemon threads, which may call for ever

_running: set[int] = set()  # threads
_last_seen = 0.0


def watched(execute: Callable[..., None]) -> Callable[..., None]:
    """Return a function that runs `execute` and records that it is running."""

    def run(*arguments: Any) -> None:
        global in_use, _last_seen
        in_use = True  # not set yet if another process traced and exported the program
        thread = threading.get_ident()
        _running.add(thread)
        try:
            execute(*arguments)
        finally:
            _running.discard(thread)
            _last_seen = time.monotonic()

    return run


def wait() -> None:
    """Return when XLA has no more calls to execute.

    XLA cannot be asked. But the executions of one thread run in order, so waiting for one more waits for all calls of
    this thread. For calls of other threads, wait for the arrays that are still alive, and then until no handler has run
    for a short time.
    """
    if not in_use or (_last_seen == 0.0 and jax.default_backend() != "cpu"):
        return
    with suppress(Exception):  # there may be no such backend, and results may be errors
        for device in jax.local_devices(backend="cpu"):
            _wait_for_one_more(device)
        for array in jax.live_arrays("cpu"):
            with suppress(Exception):
                array.block_until_ready()
    give_up = time.monotonic() + _MAX_SECONDS
    while _running or time.monotonic() < _last_seen + _QUIET_SECONDS:
        if time.monotonic() > give_up:
            return
        time.sleep(_QUIET_SECONDS / 10)


def _wait_for_one_more(device: Any) -> None:
    scores = jax.device_put(np.zeros((1, 1), np.float32), device)
    jax.block_until_ready(jax.jit(lambda scores: topk_select(scores, 1))(scores))
