# SPDX-License-Identifier: Apache-2.0
"""Launch kernels with checked arguments. Knows nothing of routing.

The driver takes an array of pointers, one per kernel parameter, and checks neither their number nor their types. So
:class:`Launch` checks names and order once, against the parameters that the kernel file declares. Each call packs its
values with `struct`, which checks types and ranges, into a buffer that the thread reuses.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Mapping, Sequence

from cupy_router.compiler import Function, Signature

MAX_GRID = 2**31 - 1
MAX_BLOCK = 1024
_DEFAULT_SHARED = 48 * 1024


class _Record:
    """Argument buffer of one thread for one signature, with the pointers into it that the driver reads."""

    def __init__(self, signature: Signature) -> None:
        codes = signature.format
        layout = struct.Struct(f"@{codes}")
        self.pack_into = layout.pack_into
        self.buffer = bytearray(layout.size)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        ends = [struct.calcsize(f"@{codes[: i + 1]}") for i in range(len(codes))]
        starts = [base + end - struct.calcsize(f"@{code}") for end, code in zip(ends, codes, strict=True)]
        if signature.members:  # of a struct, which all its members follow, the driver reads the address of the first
            starts = [starts[sum(signature.members[:i])] for i in range(len(signature.members))]
        self._pointers = (ctypes.c_void_p * len(starts))(*starts)
        self.address = ctypes.addressof(self._pointers)


class _Records(threading.local):
    def __init__(self) -> None:
        self.by_format: dict[str, _Record] = {}  # and members


_records = _Records()


class Launch:
    """Kernel with its launch shape and fixed arguments; a call passes the stream and the varying arguments.

    Args:
        function: The compiled kernel.
        grid, block: Number of blocks, and of threads per block.
        varying: Names of the leading parameters, whose values each call passes.
        fixed: Values of all other parameters by name.
        shared_bytes: Bytes of dynamic shared memory per block.

    Raises:
        TypeError: ``varying`` and ``fixed`` are not exactly the parameters of the kernel, in its order.
        ValueError: The grid or the block is out of range.
    """

    def __init__(
        self,
        function: Function,
        grid: int,
        block: int,
        varying: tuple[str, ...],
        fixed: Mapping[str, int | float],
        shared_bytes: int = 0,
    ) -> None:
        signature = function.signature
        names = (*varying, *fixed)
        if names != signature.names:
            raise TypeError(f"{signature.function} takes ({', '.join(signature.names)}), got ({', '.join(names)})")
        if not 1 <= grid <= MAX_GRID or not 1 <= block <= MAX_BLOCK:
            raise ValueError(f"{signature.function}: grid {grid} or block {block} is out of range")
        if shared_bytes > _DEFAULT_SHARED:
            function.backend.allow_shared(function.handle, function.device, shared_bytes)
        self.function = function
        self._fixed = tuple(fixed.values())
        self._grid, self._block, self._shared_bytes = grid, block, shared_bytes
        self._format = f"{signature.format}{signature.members or ''}"
        self._handle, self._device = function.handle, function.device
        self._use, self._enqueue = function.backend.use, function.backend.launch

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        """Enqueue the kernel on `stream` without waiting. TypeError if a value does not fit its parameter."""
        record = _records.by_format.get(self._format)
        if record is None:
            record = _records.by_format[self._format] = _Record(self.function.signature)
        try:
            record.pack_into(record.buffer, 0, *varying, *self._fixed)
        except struct.error as error:
            signature = self.function.signature
            raise TypeError(f"{signature.function}({', '.join(signature.names)}): {error}") from None
        previous = self._use(self._device)
        try:
            self._enqueue(
                self._handle, self._grid, 1, 1, self._block, 1, 1, self._shared_bytes, stream, record.address, 0
            )
        finally:
            if previous is not None:
                self._use(previous)
