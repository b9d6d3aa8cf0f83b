# SPDX-License-Identifier: Apache-2.0
"""Keep the locale of a thread: NVRTC before 12.6 leaves it that of C, where Python reads text files as ASCII."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_uselocale: Any = getattr(ctypes.pythonapi, "uselocale", None)  # Windows has none
if _uselocale is not None:
    _uselocale.restype, _uselocale.argtypes = ctypes.c_void_p, [ctypes.c_void_p]


@contextmanager
def kept() -> Iterator[None]:
    """Restore the locale of this thread afterwards; a context or a decorator."""
    if _uselocale is None:
        yield
        return
    before = _uselocale(None)
    try:
        yield
    finally:
        _uselocale(before)
