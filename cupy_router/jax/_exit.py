# SPDX-License-Identifier: Apache-2.0
"""The end of a process: XLA's threads finish on CPU devices what the interpreter is needed for, before it goes.

XLA executes on a CPU behind the caller's back. A handler that asks a finalizing interpreter for the GIL never gets it,
and JAX, which waits for the handler, would never end. (On a GPU handlers run while a call is dispatched.)
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

in_use = False  # whether XLA may have calls to make

_QUIET_SECONDS, _MOST_SECONDS = 0.1, 10.0  # the latter because daemon threads may go on calling for ever

_running: set[int] = set()  # threads
_last_seen = 0.0


def watched(execute: Callable[..., None]) -> Callable[..., None]:
    """The same, and we know when it is running."""

    def run(*arguments: Any) -> None:
        global in_use, _last_seen
        in_use = True  # programs that another process exported were not traced here
        thread = threading.get_ident()
        _running.add(thread)
        try:
            execute(*arguments)
        finally:
            _running.discard(thread)
            _last_seen = time.monotonic()

    return run


def wait() -> None:
    """Return when XLA has nothing more to do.

    It tells nobody, so: executions of one thread come one after the other, and one more, waited for, is behind all of
    this thread's. Of other threads' we wait for the results that somebody holds, and then until no handler has been
    seen for a while.
    """
    if not in_use or (_last_seen == 0.0 and jax.default_backend() != "cpu"):
        return
    with suppress(Exception):  # there may be no such backend, and results may be errors
        for device in jax.local_devices(backend="cpu"):
            _wait_for_one_more(device)
        for array in jax.live_arrays("cpu"):
            with suppress(Exception):
                array.block_until_ready()
    give_up = time.monotonic() + _MOST_SECONDS
    while _running or time.monotonic() < _last_seen + _QUIET_SECONDS:
        if time.monotonic() > give_up:
            return
        time.sleep(_QUIET_SECONDS / 10)


def _wait_for_one_more(device: Any) -> None:
    scores = jax.device_put(np.zeros((1, 1), np.float32), device)
    jax.block_until_ready(jax.jit(lambda scores: topk_select(scores, 1))(scores))
