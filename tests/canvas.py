# SPDX-License-Identifier: Apache-2.0
"""Memory of results whose surroundings are watched."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.backends import Backend


class Canvas:
    """Memory for a result with every byte marked, so that writes outside the result are seen."""

    MARK = 0x5A
    BEFORE = 3  # elements in front of the result

    def __init__(self, shape: tuple[int, ...], padding: int, dtype: Any, backend: Backend) -> None:
        self.backend = backend
        self.shape = shape
        self.stride = shape[-1] + (padding if len(shape) == 2 else 0)
        size = (shape[0] if len(shape) == 2 else 1) * self.stride + 2 * self.BEFORE
        self.memory = backend.upload(np.full(size * np.dtype(dtype).itemsize, self.MARK, np.uint8).view(dtype))
        self.array = self._result(self.memory)

    def _result(self, memory: Any) -> Any:
        if len(self.shape) == 1:
            return memory[self.BEFORE : self.BEFORE + self.shape[0]]
        rows, width = self.shape
        return memory[self.BEFORE : self.BEFORE + rows * self.stride].reshape(rows, self.stride)[:, :width]

    def is_clean(self) -> bool:
        """Return True if all bytes outside the result are unchanged."""
        now = self.backend.numpy(self.memory)
        beside = np.ones(now.shape, bool)
        self._result(beside)[...] = False
        return bool((now[beside].view(np.uint8) == self.MARK).all())
