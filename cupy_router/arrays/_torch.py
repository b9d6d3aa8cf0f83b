# SPDX-License-Identifier: Apache-2.0
"""PyTorch tensors, read by their attributes: about 1 us a tensor, a fifth of DLPack."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import ml_dtypes
import numpy as np
import torch

from cupy_router.arrays import ITEM_SIZES, Allocator, Framework, Output, View

ARRAY_TYPES = (torch.Tensor,)

DTYPES = {name: getattr(torch, name) for name in ITEM_SIZES}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# 0.1 us, where torch.cuda.current_stream() takes 6; absent from builds of PyTorch without CUDA, which hold no CUDA
# tensors.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class PyTorch(Framework):
    name = "torch"

    def current_stream(self, array: Any) -> int | None:
        index = array.get_device()  # -1 on the CPU
        return _raw_stream(index) if index >= 0 and array.is_cuda and _raw_stream is not None else None

    def describe(self, array: Any, stream: int, owners: list[object]) -> tuple[int, Hashable]:
        pointer = array.data_ptr()
        return pointer, (array.dtype, array.shape, array.stride(), array.get_device(), pointer & 15)

    def view(self, name: str, array: Any, stream: int | None) -> View:
        kind, index = array.device.type, array.device.index
        if kind not in ("cpu", "cuda") or array.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor on cpu or cuda, got {array.layout} on {array.device}")
        dtype = NAMES.get(array.dtype, str(array.dtype).removeprefix("torch."))
        return View(
            name=name,
            pointer=array.data_ptr(),
            shape=tuple(array.shape),
            strides=tuple(array.stride()),
            dtype=dtype,
            device=(kind, index or 0),
            readonly=False,
            host=_host(array) if kind == "cpu" and dtype in DTYPES else None,
        )

    def allocator(self, outputs: Sequence[Output], like: Any) -> Allocator:
        # torch.empty_like takes half the time of torch.empty. Its template holds no memory: torch.compile's CUDA graphs
        # refuse a tensor in their pool that is none of the outputs.
        empty_like = torch.empty_like
        templates = [torch.empty(1, dtype=DTYPES[dtype], device=like.device).expand(shape) for shape, dtype in outputs]
        for template in templates:
            template.untyped_storage().resize_(0)

        def allocate(pointers: list[int]) -> tuple[Any, ...]:
            tensors = tuple(map(empty_like, templates))
            for tensor in tensors:
                pointers.append(tensor.data_ptr())
            return tensors

        return allocate

    def on_stream(self, stream: int, like: Any) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.cuda.stream(torch.cuda.ExternalStream(stream, like.device))
        return context

    def from_host(self, values: np.ndarray[Any, Any], like: Any) -> Any:
        if values.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(values)


def _host(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The memory of a CPU tensor; PyTorch has no NumPy dtype for bfloat16, so the bits are reinterpreted."""
    tensor = tensor.detach()
    is_bfloat16 = tensor.dtype == torch.bfloat16
    array: np.ndarray[Any, Any] = (tensor.view(torch.int16) if is_bfloat16 else tensor).numpy()
    return array.view(ml_dtypes.bfloat16) if is_bfloat16 else array


class _OwnDispatch(type):
    """Subclasses of its classes: those of tensors that say by `__torch_dispatch__` what an op does with them."""

    def __subclasscheck__(cls, kind: type) -> bool:
        bases = kind.__mro__[: kind.__mro__.index(torch.Tensor)] if issubclass(kind, torch.Tensor) else ()
        return any("__torch_dispatch__" in vars(base) for base in bases)


class _Wrapper(metaclass=_OwnDispatch):
    pass


class Wrappers(PyTorch):
    """DTensors, fake tensors and others around tensors: their address is none, which PyTorch does not always say."""

    def describe(self, array: Any, stream: int, owners: list[object]) -> tuple[int, Hashable]:
        raise RuntimeError("a tensor without memory of its own")  # `view` then says which

    def view(self, name: str, array: Any, stream: int | None) -> View:
        kind = type(array).__name__
        raise ValueError(f"{name} must be a tensor with memory of its own, got a {kind}: pass the tensor within")


TRACERS = (_Wrapper,)
FRAMEWORK, TRACED = PyTorch(), Wrappers()
