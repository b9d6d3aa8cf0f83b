# SPDX-License-Identifier: Apache-2.0
"""Let a first call work inside of a graph capture; imports nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@contextmanager
def relaxed() -> Iterator[None]:
    """Let this thread allocate memory and load kernels and libraries while a stream is being captured.

    In the modes that frameworks capture in, the driver refuses these calls, even on other streams and in other threads,
    and invalidates the capture. What this thread does with its own streams within is not captured.
    """
    mode = ctypes.c_int(_RELAXED)
    driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@cache
def driver() -> ctypes.CDLL:
    """Return the library of the driver."""
    return ctypes.CDLL("libcuda.so.1")
