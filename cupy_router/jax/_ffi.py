# SPDX-License-Identifier: Apache-2.0
"""XLA's typed FFI from Python, without a compiler: C callbacks by ctypes; knows nothing of routing.

XLA calls a handler with a call frame: buffers, attributes, and a table of functions that return more, such as the CUDA
stream. The C layout follows `xla/ffi/api/c_api.h`, which jaxlib ships (`jax.ffi.include_dir()`). The parts used here
are the same in versions 0.1 to 0.4. Every struct begins with its size, which tells the reader which fields it has.

ctypes takes the GIL before a callback runs and releases it afterwards. XLA never holds the GIL while it executes, so
there is no deadlock.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

_MAJOR = 0
_EXECUTE = 3  # XLA_FFI_ExecutionStage
_METADATA = 1  # XLA_FFI_Extension_Type
_BUFFER = 1  # XLA_FFI_ArgType and XLA_FFI_RetType
_STRING = 4  # XLA_FFI_AttrType
_COMMAND_BUFFER_COMPATIBLE = 1  # XLA_FFI_Handler_TraitsBits
_INVALID_ARGUMENT, _INTERNAL = 3, 13  # XLA_FFI_Error_Code

# XLA_FFI_DataType of the dtypes that ops take or return.
DTYPES = {
    1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "uint8", 7: "uint16", 8: "uint32", 9: "uint64",
    10: "float16", 11: "float32", 12: "float64", 15: "complex64", 16: "bfloat16", 18: "complex128",
    19: "float8_e5m2", 20: "float8_e4m3fn", 23: "float8_e4m3b11fnuz", 24: "float8_e5m2fnuz", 25: "float8_e4m3fnuz",
    28: "float8_e4m3", 29: "float8_e3m4", 33: "float8_e8m0fnu",
}  # fmt: skip

# Positions in the table of functions.
_ERROR_CREATE, _ERROR_GET_MESSAGE, _ERROR_DESTROY, _STREAM_GET, _DEVICE_ORDINAL_GET, _NUM_FUNCTIONS = 0, 1, 2, 4, 17, 18

ATTRIBUTE = "call"  # the only one that a handler reads, a string

_pointer, _size = ctypes.c_void_p, ctypes.c_size_t


# -- The C layout ------------------------------------------------------------------------------------------------------

# Structs that every execution reads are unpacked by `struct`, which is faster than the fields of ctypes. N is a size_t,
# P a pointer. XLA_FFI_CallFrame: struct_size, extension, api, context, stage; then arguments, results and attributes,
# each struct_size, extension, size, types, (names of attributes,) items.
_FRAME = "@NP PPi NPqPP NPqPP NPqPPP"
_BUFFER_FIELDS = "@NP iPqP"  # XLA_FFI_Buffer: struct_size, extension, dtype, data, rank, dims
_SPAN = "@PN"  # XLA_FFI_ByteSpan: start, size
_FRAME_BYTES = struct.calcsize(_FRAME)

# All memory as one buffer, read at an address. This takes half the time of a new buffer for each read.
_memory = (ctypes.c_char * (1 << 62)).from_address(0)

_Reader = Callable[[Any, int], tuple[Any, ...]]


def _reader(format: str) -> _Reader:
    """Return a function that reads C fields of `_memory` at an address."""
    return struct.Struct(format).unpack_from


_read_frame, _read_buffer, _read_span = map(_reader, (_FRAME, _BUFFER_FIELDS, _SPAN))

# Readers of arrays by length: as many buffers or axes as there may be.
_MAX_LENGTH = 16
_read_ints, _read_pointers, _read_bytes = (
    [_reader(format.format(n, 8 * n)) for n in range(_MAX_LENGTH + 1)] for format in ("{0}i", "{0}P", "{1}s")
)
_ALL_BUFFERS = [(_BUFFER,) * n for n in range(_MAX_LENGTH + 1)]


class _Sized(ctypes.Structure):
    """First fields of all structs except the smallest."""

    _fields_ = [("struct_size", _size), ("extension", _pointer)]


class _Version(_Sized):
    _fields_ = [("major", ctypes.c_int), ("minor", ctypes.c_int)]


class _Table(_Sized):
    """XLA_FFI_Api."""

    _fields_ = [("version", _Version), ("internal", _pointer), ("functions", _pointer * _NUM_FUNCTIONS)]


class _Extension(ctypes.Structure):
    _fields_ = [("struct_size", _size), ("type", ctypes.c_int), ("next", _pointer), ("metadata", _pointer)]


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", _size), ("version", _Version), ("traits", ctypes.c_uint32)]


class _ErrorCreate(_Sized):
    _fields_ = [("message", ctypes.c_char_p), ("code", ctypes.c_int)]


class _ErrorDetails(_Sized):
    _fields_ = [("error", _pointer), ("message", ctypes.c_char_p), ("code", ctypes.c_int)]


# XLA_FFI_Stream_Get_Args and XLA_FFI_DeviceOrdinal_Get_Args: struct_size, extension, ctx, then the result.
_STREAM_GET_ARGS, _DEVICE_ORDINAL_GET_ARGS = struct.Struct("@NPPP"), struct.Struct("@NPPi")


class _Scratch(threading.local):
    """Memory of a thread for the arguments of one XLA function at a time."""

    def __init__(self) -> None:
        self.buffer = bytearray(_STREAM_GET_ARGS.size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))


_scratch = _Scratch()

# These are called with the GIL held: they take a microsecond at most, and releasing it would let other threads run.
_FUNCTION = ctypes.PYFUNCTYPE(_pointer, _pointer)
_HANDLER = ctypes.CFUNCTYPE(_pointer, _pointer)


# -- Handlers ----------------------------------------------------------------------------------------------------------


class Execution(NamedTuple):
    """The content of a call frame. Buffers are dense, inputs come before results."""

    call: bytes  # the attribute
    num_inputs: int
    pointers: list[int]
    facts: tuple[tuple[int, bytes, int], ...]  # for each buffer: XLA's dtype, dimensions, address modulo 16
    device: tuple[str, int]
    stream: int


def shape_and_dtype(fact: tuple[int, bytes, int]) -> tuple[tuple[int, ...], str]:
    code, dims, _ = fact
    return struct.unpack(f"{len(dims) // 8}q", dims), DTYPES.get(code, f"XLA type {code}")


def handler(name: str, execute: Callable[[Execution], None], on_cuda: bool, command_buffers: bool) -> Any:
    """Return a C function that XLA may call from any thread; the caller keeps it alive for ever.

    Args:
        execute: errors that it raises become XLA errors with their message after the name.
        command_buffers: `execute` only enqueues work on the stream, the same work for the same buffers. Then XLA may
            capture it in a command buffer and replay that.
    """

    def handle(address: int) -> int | None:
        size, extension, api, context, stage, *lists = _read_frame(_memory, address)
        try:
            if size < _FRAME_BYTES:
                raise RuntimeError(f"XLA's call frame has {size} bytes, fewer than in version 0.1")
            if extension and _answer_metadata(extension, api, command_buffers):
                return None
            if stage == _EXECUTE:
                functions = _known.get(api) or _load_functions(api)
                device = ("cuda", functions.device(context)) if on_cuda else ("cpu", 0)
                stream = functions.stream(context) if on_cuda else 0
                execute(_read(lists, device, stream))
        # Also KeyboardInterrupt: ctypes ignores exceptions, and XLA would use results that were never written.
        except BaseException as error:
            is_callers = isinstance(error, (TypeError, ValueError))
            message = str(error) if is_callers else f"{type(error).__name__}: {error}"
            return _make_error(api, f"{name}: {message}", _INVALID_ARGUMENT if is_callers else _INTERNAL)
        return None

    return _HANDLER(handle)


def _answer_metadata(address: int, api: int, command_buffers: bool) -> bool:
    """Tell XLA the version and traits of a handler, if the call asks for them, as it does at registration.

    The version returned is always XLA's, because a failed registration disables the whole backend of JAX. If the
    version is unknown, executions raise.
    """
    while address:
        extension = _Extension.from_address(address)
        if extension.type == _METADATA:
            metadata = _Metadata.from_address(extension.metadata)
            version = _Table.from_address(api).version if api else _Version(major=0, minor=1)
            metadata.version.major, metadata.version.minor = version.major, version.minor
            metadata.traits = _COMMAND_BUFFER_COMPATIBLE if command_buffers else 0
            return True
        address = extension.next
    return False


def _read(lists: list[int], device: tuple[str, int], stream: int) -> Execution:
    _, _, num_inputs, input_types, inputs, _, _, num_results, result_types, results, _, _, *attributes = lists
    addresses: list[int] = []
    pointers: list[int] = []
    facts: list[tuple[int, bytes, int]] = []
    for size, types, items in ((num_inputs, input_types, inputs), (num_results, result_types, results)):
        if size:
            if size > _MAX_LENGTH or _read_ints[size](_memory, types) != _ALL_BUFFERS[size]:
                raise RuntimeError(f"XLA passes more than {_MAX_LENGTH} arguments, or one that is no buffer")
            addresses += _read_pointers[size](_memory, items)
    for address in addresses:
        _, _, dtype, pointer, rank, dims = _read_buffer(_memory, address)
        pointers.append(pointer)
        if rank > _MAX_LENGTH:
            raise RuntimeError(f"XLA passes an array of {rank} axes")
        facts.append((dtype, _read_bytes[rank](_memory, dims)[0] if rank else b"", pointer & 15))
    return Execution(_attribute(*attributes), num_inputs, pointers, tuple(facts), device, stream)


def _attribute(size: int, types: int, names: int, items: int) -> bytes:
    if size != 1 or _read_ints[1](_memory, types) != (_STRING,):
        raise RuntimeError(f"a call needs the attribute {ATTRIBUTE!r}, a string, and no other one")
    (span,) = _read_pointers[1](_memory, items)
    start, length = _read_span(_memory, span)
    return ctypes.string_at(start, length)


# -- XLA's functions ---------------------------------------------------------------------------------------------------


class _Functions:
    """XLA's functions; RuntimeError if the version of the table is unknown."""

    def __init__(self, address: int) -> None:
        table = _Table.from_address(address)
        version = table.version
        if version.major != _MAJOR or table.struct_size < ctypes.sizeof(_Table):
            raise RuntimeError(
                f"XLA's FFI has version {version.major}.{version.minor} and a table of {table.struct_size} bytes, "
                f"but cupy_router knows versions {_MAJOR}.x with {ctypes.sizeof(_Table)} bytes or more: "
                "install another release of JAX or of cupy_router"
            )
        self._table = table
        self._get_stream = _FUNCTION(table.functions[_STREAM_GET])
        self._get_ordinal = _FUNCTION(table.functions[_DEVICE_ORDINAL_GET])

    def stream(self, context: int) -> int:
        """Return the CUDA stream of an execution."""
        return self._ask(self._get_stream, _STREAM_GET_ARGS, context)

    def device(self, context: int) -> int:
        """Return the CUDA ordinal of its device."""
        return self._ask(self._get_ordinal, _DEVICE_ORDINAL_GET_ARGS, context)

    def _ask(self, function: Any, layout: struct.Struct, context: int) -> int:
        buffer = _scratch.buffer
        layout.pack_into(buffer, 0, layout.size, 0, context, 0)
        error = function(_scratch.address)
        if error:
            self._raise(error)
        return int(layout.unpack_from(buffer)[3])

    def _raise(self, error: int) -> None:
        # Version 0.4 renamed GetMessage to GetDetails, which also returns a code. This struct serves both.
        args = _ErrorDetails(_used(_ErrorDetails), None, error)
        _FUNCTION(self._table.functions[_ERROR_GET_MESSAGE])(ctypes.addressof(args))
        message = (args.message or b"").decode()
        _FUNCTION(self._table.functions[_ERROR_DESTROY])(ctypes.addressof(args))  # only its `error` is read
        raise RuntimeError(f"XLA: {message}")


_known: dict[int, _Functions] = {}  # by the address of the table; each library that contains XLA has one


def _load_functions(address: int) -> _Functions:
    found = _known[address] = _Functions(address)
    return found


def _make_error(api: int, message: str, code: int) -> int:
    """Return an XLA error. It is the first entry of the table in every version, so any mismatch can be reported."""
    args = _ErrorCreate(_used(_ErrorCreate), None, message.encode(errors="replace"), code)
    create = _FUNCTION(_Table.from_address(api).functions[_ERROR_CREATE])
    return create(ctypes.addressof(args)) or 0


def _used(kind: type[ctypes.Structure]) -> int:
    """Return the size of a struct as XLA counts it: up to the end of its last field, without trailing padding."""
    name, field_type = kind._fields_[-1][:2]
    return int(getattr(kind, name).offset) + ctypes.sizeof(field_type)
