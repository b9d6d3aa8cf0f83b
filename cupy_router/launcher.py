# SPDX-License-Identifier: Apache-2.0
"""Launch kernels with checked arguments. Knows nothing of routing.

The driver takes an array of pointers, one per kernel parameter, and checks neither their number nor their types. So
:class:`Launch` checks names and order once, against the parameters that the kernel file declares. Each call packs its
values with `struct`, which checks types and ranges, into a buffer of its thread that holds the fixed ones already.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from cupy_router.compiler import Function, Signature
from cupy_router.declarations import TENSOR_MAP

MAX_GRID = 2**31 - 1
MAX_BLOCK = 1024
_DEFAULT_SHARED = 48 * 1024


class _Arguments(threading.local):
    """Argument buffer of one launch in each thread, and the address of the pointers into it that the driver reads."""

    def __init__(self, content: bytes, starts: Sequence[int], prepare: Callable[[], Any]) -> None:
        prepare()
        buffer = bytearray(content)
        base = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        self._pointers = (ctypes.c_void_p * len(starts))(*[base + start for start in starts])
        self.parts = buffer, ctypes.addressof(self._pointers)


def _packed(codes: str) -> str:
    """Return the format of `struct` for these codes."""
    return f"@{codes.replace(TENSOR_MAP, '128s')}"


def _starts(signature: Signature) -> list[int]:
    """Return where the parameters begin in the buffer."""
    codes = signature.format
    sizes = [struct.calcsize(_packed(code)) for code in codes]
    starts = [struct.calcsize(_packed(codes[: i + 1])) - size for i, size in enumerate(sizes)]
    if signature.members:  # of a struct, which all its members follow, the driver reads the address of the first
        starts = [starts[sum(signature.members[:i])] for i in range(len(signature.members))]
    return starts


def _nothing() -> None:
    pass


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return a function that returns the entries at these places of a sequence."""
    if len(places) > 1:
        return itemgetter(*places)
    begin = places[0] if places else 0
    return itemgetter(slice(begin, begin + len(places)))


class Launch:
    """Kernel with its launch shape and fixed arguments; a call passes the stream and the varying arguments.

    Args:
        function: The compiled kernel.
        grid, block: Number of blocks, and of threads per block.
        varying: Names of the leading parameters, whose values each call passes.
        fixed: Values of all other parameters by name.
        shared_bytes: Bytes of dynamic shared memory per block.
        passed: Names of the values that each call passes, in its order, if they are not those of ``varying``. The
            kernel gets null for a parameter that is not among them.

    Raises:
        TypeError: ``varying`` and ``fixed`` are not exactly the parameters of the kernel, in its order, or a fixed
            value does not fit its parameter.
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
        passed: tuple[str, ...] | None = None,
    ) -> None:
        signature, backend = function.signature, function.backend
        names = (*varying, *fixed)
        if names != signature.names:
            raise TypeError(f"{signature.function} takes ({', '.join(signature.names)}), got ({', '.join(names)})")
        if not 1 <= grid <= MAX_GRID or not 1 <= block <= MAX_BLOCK:
            raise ValueError(f"{signature.function}: grid {grid} or block {block} is out of range")
        if shared_bytes > _DEFAULT_SHARED:
            backend.allow_shared(function.handle, function.device, shared_bytes)
        self.function = function
        codes, self._pick = signature.format[: len(varying)], None
        if passed is not None:
            places = [passed.index(name) for name in varying if name in passed]
            if places != [*range(len(passed))]:
                self._pick = picker(places)
            # Pads, which are packed as zeros, take the places of the others. Their alignment comes before them.
            codes = "".join(
                code if name in passed else f"0{code}{struct.calcsize(code)}x"
                for name, code in zip(varying, codes, strict=True)
            )
        self._pack_into = struct.Struct(_packed(codes)).pack_into
        try:
            unknown = [b"" if code == TENSOR_MAP else 0 for code in signature.format[: len(varying)]]
            content = struct.pack(_packed(signature.format), *unknown, *fixed.values())
        except struct.error as error:
            raise self._unfit(error) from None
        use = partial(backend.use, function.device)
        self._use = use if backend.switches else None
        self._arguments = _Arguments(content, _starts(signature), _nothing if backend.switches else use)
        self._enqueue = partial(backend.launch, function.handle, grid, 1, 1, block, 1, 1, shared_bytes)

    def _unfit(self, error: struct.error) -> TypeError:
        signature = self.function.signature
        return TypeError(f"{signature.function}({', '.join(signature.names)}): {error}")

    def __call__(self, stream: int, varying: Sequence[int | float | bytes]) -> None:
        """Enqueue the kernel on `stream` without waiting. TypeError if a value does not fit its parameter."""
        buffer, pointers = self._arguments.parts
        pick = self._pick
        try:
            self._pack_into(buffer, 0, *(varying if pick is None else pick(varying)))
        except struct.error as error:
            raise self._unfit(error) from None
        if self._use is None:
            self._enqueue(stream, pointers, 0)
            return
        previous = self._use()
        try:
            self._enqueue(stream, pointers, 0)
        finally:
            if previous is not None:
                self.function.backend.use(previous)
