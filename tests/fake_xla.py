# SPDX-License-Identifier: Apache-2.0
"""Call frames and a function table as XLA passes them to a handler, laid out as in its c_api.h."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

DTYPES = {"int32": 4, "int64": 5, "float16": 10, "float32": 11, "float64": 12, "bfloat16": 16}
FUNCTION = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)

size_t, pointer = ctypes.c_size_t, ctypes.c_void_p
HEAD = [("struct_size", size_t), ("extension_start", pointer)]


def struct(name: str, *fields: tuple[str, Any]) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


Buffer = struct(
    "Buffer", *HEAD, ("dtype", ctypes.c_int), ("data", pointer), ("rank", ctypes.c_int64), ("dims", pointer)
)
Args = struct("Args", *HEAD, ("size", ctypes.c_int64), ("types", pointer), ("args", pointer))
Attrs = struct("Attrs", *HEAD, ("size", ctypes.c_int64), ("types", pointer), ("names", pointer), ("attrs", pointer))
Frame = struct(
    "Frame", *HEAD, ("api", pointer), ("ctx", pointer), ("stage", ctypes.c_int), ("args", Args), ("rets", Args),
    ("attrs", Attrs), ("future", pointer),
)  # fmt: skip
Span = struct("Span", ("ptr", ctypes.c_char_p), ("len", size_t))
Version = struct("Version", *HEAD, ("major", ctypes.c_int), ("minor", ctypes.c_int))
Api = struct("Api", *HEAD, ("api_version", Version), ("internal_api", pointer), ("functions", pointer * 19))
ErrorCreate = struct("ErrorCreate", *HEAD, ("message", ctypes.c_char_p), ("errc", ctypes.c_int))
ErrorOf = struct("ErrorOf", *HEAD, ("error", pointer), ("message", ctypes.c_char_p), ("errc", ctypes.c_int))
StreamGet = struct("StreamGet", *HEAD, ("ctx", pointer), ("stream", pointer))
Ordinal = struct("Ordinal", *HEAD, ("ctx", pointer), ("device_ordinal", ctypes.c_int32))
Extension = struct(
    "Extension", ("struct_size", size_t), ("type", ctypes.c_int), ("next", pointer), ("metadata", pointer)
)
Metadata = struct("Metadata", ("struct_size", size_t), ("api_version", Version), ("traits", ctypes.c_uint32))

CONTEXT = 0xC0

_immortal: list[Any] = []  # as the tables of XLA's libraries are


class XLA:
    """A table of functions with one stream and one device that records the errors of handlers."""

    def __init__(self, stream: int = 0x57, device: int = 0, version: tuple[int, int] = (0, 3), size: int = 0) -> None:
        self.errors: list[tuple[str, int]] = []
        self.destroyed: list[int] = []
        self.refusal: bytes | None = None  # what Stream_Get fails with
        self.stream, self.device = stream, device
        places = {0: self._create, 1: self._message, 2: self._destroy, 4: self._get_stream, 17: self._get_device}
        self._functions = {place: FUNCTION(function) for place, function in places.items()}
        table = (pointer * 19)()
        for place, function in self._functions.items():
            table[place] = ctypes.cast(function, pointer)
        head = Version(24, None, *version)
        self.api = Api(size or ctypes.sizeof(Api), None, head, None, table)
        self._kept: list[Any] = []
        _immortal.append(self)

    def _create(self, address: int) -> int:
        args = ErrorCreate.from_address(address)
        assert args.struct_size == 28
        self.errors.append((args.message.decode(), args.errc))
        return 0xE0 + len(self.errors)

    def _message(self, address: int) -> None:
        args = ErrorOf.from_address(address)
        assert args.struct_size >= 32
        assert args.error == 0xBAD
        args.message = self.refusal

    def _destroy(self, address: int) -> None:
        self.destroyed.append(ErrorOf.from_address(address).error)

    def _get_stream(self, address: int) -> int | None:
        args = StreamGet.from_address(address)
        assert (args.struct_size, args.ctx) == (32, CONTEXT)
        args.stream = self.stream
        return None if self.refusal is None else 0xBAD

    def _get_device(self, address: int) -> None:
        args = Ordinal.from_address(address)
        assert (args.struct_size, args.ctx) == (28, CONTEXT)
        args.device_ordinal = self.device

    def _keep(self, value: Any) -> Any:
        self._kept.append(value)
        return value

    def _array(self, kind: Any, values: Any) -> int | None:
        values = list(values)
        return ctypes.addressof(self._keep((kind * len(values))(*values))) if values else None

    def _list(self, arrays: Any, kind: int) -> Any:
        buffers = []
        for array in arrays:
            dims = self._array(ctypes.c_int64, array.shape)
            data = array.ctypes.data if array.size else None
            buffer = self._keep(Buffer(48, None, DTYPES[str(array.dtype)], data, array.ndim, dims))
            buffers.append(ctypes.addressof(buffer))
        types = self._array(ctypes.c_int, [kind] * len(buffers))
        return Args(40, None, len(buffers), types, self._array(pointer, buffers))

    def frame(
        self,
        inputs: list[np.ndarray],
        results: list[np.ndarray],
        attributes: dict[str, str],
        *,
        size: int = 168,
        stage: int = 3,
        kind: int = 1,
        attribute_type: int = 4,
        extension: int | None = None,
    ) -> int:
        """Return the address of a call frame. Everything it points to lives as long as this object."""
        spans = [ctypes.addressof(self._keep(Span(v.encode(), len(v.encode())))) for v in attributes.values()]
        names = [ctypes.addressof(self._keep(Span(k.encode(), len(k)))) for k in attributes]
        types = self._array(ctypes.c_int, [attribute_type] * len(spans))
        attrs = Attrs(48, None, len(spans), types, self._array(pointer, names), self._array(pointer, spans))
        args, rets = self._list(inputs, kind), self._list(results, 1)
        frame = Frame(size, extension, ctypes.addressof(self.api), CONTEXT, stage, args, rets, attrs, None)
        return ctypes.addressof(self._keep(frame))

    def metadata(self, extension_type: int = 1) -> tuple[int, Any]:
        """Return a metadata extension, chained after an unknown one, and the struct that is filled in."""
        asked = self._keep(Metadata(36, Version(24, None, 0, 0), 0xFFFFFFFF))
        wanted = self._keep(Extension(32, extension_type, None, ctypes.addressof(asked)))
        unknown = self._keep(Extension(24, 99, ctypes.addressof(wanted), None))
        return ctypes.addressof(unknown), asked
