# SPDX-License-Identifier: Apache-2.0
"""PyTorch tensors, read by their attributes: about 1 us per tensor, a fifth of the time that DLPack takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import takewhile
from operator import itemgetter
from typing import Any

import ml_dtypes
import numpy as np
import torch

from cupy_router.arrays import (
    FRAMEWORKS,
    ITEM_SIZES,
    MAX_SHARED_BYTES,
    Allocator,
    Framework,
    Output,
    View,
    places_in_block,
)

ARRAY_TYPES = (torch.Tensor,)
_Tensor = torch.Tensor

DTYPES = {name: getattr(torch, name) for name in ITEM_SIZES}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Takes 0.1 us, torch.cuda.current_stream() 6. Builds of PyTorch without CUDA lack it and have no CUDA tensors.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

# Private in PyTorch, so they may disappear.
_is_zero: Callable[[Any], bool] = getattr(torch.Tensor, "_is_zerotensor", lambda tensor: False)
_is_functional: Callable[[Any], bool] = getattr(torch, "_is_functional_tensor", lambda tensor: False)
_is_wrapped: Callable[[Any], bool] = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda tensor: False)

# A tensor without memory has its offset as its address. Memory of the CPU, and of most GPUs, has higher addresses.
_LOWEST_ADDRESS = 1 << 40


def _increment_each(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        if not tensor.is_inference():  # has no version, and is never saved for a backward pass
            torch.autograd.graph.increment_version(tensor)


# Takes 0.15 us for two tensors, the public function 1.5 us.
_increment_versions: Callable[[Sequence[torch.Tensor]], None] = getattr(torch._C, "_increment_version", _increment_each)
try:
    _increment_versions(())
except RuntimeError:  # an old PyTorch, where it takes one tensor
    _increment_versions = _increment_each

# Takes half the time of torch.empty_like, because it skips PyTorch's dispatcher; for the current device. Private in
# PyTorch, so it may disappear.
_empty_cuda: Callable[..., torch.Tensor] | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)  # -1: PyTorch has no CUDA

# Tensors that torch.split returns are views with one version in common. These have versions of their own.
_split = torch.unsafe_split_with_sizes


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return a function that returns the entries at these places of a sequence."""
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


def _template(output: Output, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor to pass to torch.empty_like.

    It has no memory, because the CUDA graphs of torch.compile refuse tensors in their pool that are not outputs.
    """
    shape, name = output
    if 0 in shape:  # it would have strides of 0
        return torch.empty(shape, dtype=dtype_of(name), device=like.device)
    template = torch.empty(1, dtype=dtype_of(name), device=like.device).expand(shape)
    template.untyped_storage().resize_(0)
    return template


class PyTorch(Framework):
    name = "torch"

    def current_stream(self, array: Any) -> int | None:
        index = array.get_device()  # -1 on the CPU
        return _raw_stream(index) if index >= 0 and array.is_cuda and _raw_stream is not None else None

    def describe(self, array: Any, stream: int, owners: list[object]) -> tuple[int, Hashable] | None:
        pointers: list[int] = []
        facts: list[Hashable] = []
        return (pointers[0], facts[0]) if self.describe_all((array,), stream, owners, pointers, facts) else None

    def describe_all(
        self, arrays: Sequence[Any], stream: int, owners: list[object], pointers: list[int], facts: list[Hashable]
    ) -> bool:
        rest = iter(arrays)
        try:
            for array in rest:
                if array is None:
                    pointers.append(0)
                    facts.append(None)
                    continue
                kind = type(array)
                if kind is _Tensor or (kind is not int and FRAMEWORKS.get(kind) is self):
                    pointer = array.data_ptr()
                    if array.is_neg() or (pointer < _LOWEST_ADDRESS and not _has_memory(array)):  # takes 0.1 us
                        return False
                    pointers.append(pointer)
                    facts.append((array.dtype, array.shape, array.stride(), array.get_device(), pointer & 15))
                elif kind is int:
                    facts.append(array)
                else:
                    break
            else:
                return True
        except (RuntimeError, ValueError):  # such as a sparse tensor, or a lazy parameter
            return False
        return super().describe_all((array, *rest), stream, owners, pointers, facts)

    def view(self, name: str, array: Any, stream: int | None) -> View:
        refuse_without_memory(name, array)
        kind, index = array.device.type, array.device.index
        dtype = name_of(array.dtype)
        return View(
            name=name,
            pointer=array.data_ptr(),
            shape=tuple(array.shape),
            strides=tuple(array.stride()),
            dtype=dtype,
            device=(kind, index or 0),
            readonly=False,
            host=_host(array, dtype) if kind == "cpu" else None,
        )

    def allocator(self, outputs: Sequence[Output], like: Any) -> Allocator:
        """Return an allocator that takes one block for the last results if three or more have the same dtype."""
        shared = [*takewhile(lambda output: output[1] == outputs[-1][1], reversed(outputs))][::-1]
        sizes = [math.prod(shape) for shape, _ in shared]
        if len(shared) < 3:
            return self.allocator_apart(outputs, like)
        dtype = shared[0][1]
        item_size = dtype_of(dtype).itemsize
        offsets, total = places_in_block([size * item_size for size in sizes])
        if total > MAX_SHARED_BYTES:
            return self.allocator_apart(outputs, like)
        lengths: list[int] = []
        places = []
        for (shape, _), size, begin, end in zip(shared, sizes, offsets, (*offsets[1:], total), strict=True):
            places.append((len(lengths), shape))
            gap = (end - begin) // item_size - size
            lengths += (size, gap) if gap else (size,)
        allocate_own = self.allocator_apart(outputs[: -len(shared)], like)
        empty_like, split, template = torch.empty_like, _split, _template(((total // item_size,), dtype), like)

        def allocate(pointers: list[int]) -> tuple[Any, ...]:
            tensors = allocate_own(pointers)
            block = empty_like(template)
            address = block.data_ptr()
            for offset in offsets:
                pointers.append(address + offset)
            pieces = split(block, lengths)
            return *tensors, *[pieces[i] if len(shape) == 1 else pieces[i].view(*shape) for i, shape in places]

        return allocate

    def allocator_apart(self, outputs: Sequence[Output], like: Any) -> Allocator:
        empty_like = torch.empty_like  # takes half the time of torch.empty
        templates = [_template(output, like) for output in outputs]

        def allocate(pointers: list[int]) -> tuple[Any, ...]:
            tensors = tuple(map(empty_like, templates))
            pointers += [tensor.data_ptr() for tensor in tensors]
            return tensors

        if _empty_cuda is None or not like.is_cuda:
            return allocate
        index, empty_cuda = like.get_device(), _empty_cuda
        outlines = [(shape, torch.empty(shape, device="meta").stride(), dtype_of(name)) for shape, name in outputs]

        def allocate_here(pointers: list[int]) -> tuple[Any, ...]:
            if _current_device() != index:
                return allocate(pointers)
            tensors = tuple([empty_cuda(*outline) for outline in outlines])
            pointers += [tensor.data_ptr() for tensor in tensors]
            return tensors

        return allocate_here

    def on_stream(self, stream: int, like: Any) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.cuda.stream(torch.cuda.ExternalStream(stream, like.device))
        return context

    def write_guard(self, names: Mapping[int, str], arrays: Sequence[Any]) -> Callable[[Sequence[Any]], None]:
        pick = _picker([*names])
        smooth = [place for place in names if arrays[place].is_floating_point() or arrays[place].is_complex()]

        def begin(arrays: Sequence[Any]) -> None:
            for place in smooth:
                if arrays[place].requires_grad:
                    refuse_gradient(names, arrays)
            _increment_versions(pick(arrays))

        return begin

    def stack(self, arrays: Sequence[Any]) -> Any:
        return torch.stack(tuple(arrays))

    def from_host(self, values: np.ndarray[Any, Any], like: Any) -> Any:
        if values.dtype.type.__module__ == "numpy":
            tensor = torch.from_numpy(values)
        else:
            tensor = torch.from_numpy(values.view(f"i{values.itemsize}")).view(dtype_of(str(values.dtype)))
        if values.size:
            return tensor
        # Strides of empty NumPy arrays are 0, which some functions of PyTorch refuse.
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.numel() == 0 or bool(tensor.untyped_storage().data_ptr())


def is_lazy(array: Any) -> bool:
    """Return whether an array is a tensor that PyTorch negates lazily, or one of its zeros without memory."""
    return isinstance(array, torch.Tensor) and (array.is_neg() or _is_zero(array))


def resolved(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with memory for one that is lazy, any other as it is."""
    return torch.zeros_like(tensor) if _is_zero(tensor) else tensor.resolve_neg()


def refuse_without_memory(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor whose values do not lie, as they are, at its address."""
    if torch.nn.parameter.is_lazy(tensor):
        raise ValueError(f"{name} must be a dense tensor, got a lazy parameter without a shape: initialize it first")
    if tensor.is_nested:
        raise ValueError(
            f"{name} must be a dense tensor, got a nested one: pass its parts, {name}.unbind(), one by one or joined"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {tensor.layout}: pass {_copy(name, '.to_dense()')}")
    kind = tensor.device.type
    if kind == "meta":
        raise ValueError(
            f"{name} must be a tensor on cpu or cuda, got one on meta, which has no values: give its module some with "
            "load_state_dict(assign=True), or with to_empty and load_state_dict"
        )
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be a tensor on cpu or cuda, got one on {tensor.device}: move it with .to")
    if _is_functional(tensor) or _is_wrapped(tensor):
        raise ValueError(
            f"{name} must be a tensor with its own memory, got a wrapper of torch.func: use it where it was made"
        )
    if tensor.is_quantized:
        raise ValueError(f"{name} must be a plain tensor, got a quantized one: pass {_copy(name, '.dequantize()')}")
    if _is_zero(tensor):
        raise ValueError(
            f"{name} must be a tensor with its own memory, got zeros for which PyTorch keeps none: pass "
            f"{_copy(name, ' + 0')}"
        )
    if tensor.is_neg():
        raise ValueError(
            f"{name} must be a plain tensor, got one that PyTorch negates lazily, such as the imaginary part of a "
            f"conjugated one: pass {_copy(name, '.resolve_neg()')}"
        )
    if tensor.is_conj():
        raise ValueError(f"{name} must be a plain tensor, got a conjugated one: pass {_copy(name, '.resolve_conj()')}")
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + length) * tensor.element_size() if tensor.numel() else 0
    held = tensor.untyped_storage().nbytes()
    if needed > held or not _has_memory(tensor):
        raise ValueError(
            f"{name} must be a tensor with its own memory, got one with {held} of {needed} bytes: its storage was "
            "freed, as FSDP does with parameters between their uses: call the module that FSDP wraps, or unshard it"
        )


def _copy(name: str, how: str) -> str:
    """Return what to pass instead of a tensor. A copy of one to write into would get the results in its place."""
    is_result = name.split(": ")[-1].partition(".")[0] == "out"
    return "a tensor made for it, as by torch.empty" if is_result else f"{name}{how}"


def refuse_gradient(names: Mapping[int, str], arrays: Sequence[Any]) -> None:
    """Refuse to write into tensors that require grad in grad mode, as PyTorch's own functions with `out` do."""
    for place, name in names.items():
        if arrays[place].requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require grad unless under torch.no_grad(), because it gets no gradient")


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a PyTorch dtype."""
    return NAMES.get(dtype) or str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the PyTorch dtype of a name, also of a dtype that only ops which move bytes accept."""
    found: torch.dtype = DTYPES.get(name) or getattr(torch, name)
    return found


def _host(tensor: torch.Tensor, dtype: str) -> np.ndarray[Any, Any] | None:
    """Return the memory of a CPU tensor, None if NumPy has no such dtype.

    `Tensor.numpy` would also fix the size of its storage for ever, which FSDP changes with every forward pass.
    """
    try:
        found = np.dtype(getattr(ml_dtypes, dtype, dtype))
        if not tensor.numel():  # and no address, which NumPy 2.1 takes for no memory
            return np.empty(tuple(tensor.shape), found)
        return np.asarray(_Memory(tensor, found.itemsize)).view(found)
    except (RuntimeError, TypeError):
        return None


class _Memory:
    """The memory of a tensor as NumPy's array interface, which keeps the tensor alive."""

    def __init__(self, tensor: torch.Tensor, item_size: int) -> None:
        self.tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * item_size for stride in tensor.stride()),
            "typestr": f"|V{item_size}",
        }


class _OwnDispatch(type):
    """Metaclass whose classes have all tensor classes with a `__torch_dispatch__` as subclasses."""

    def __subclasscheck__(cls, kind: type) -> bool:
        bases = kind.__mro__[: kind.__mro__.index(torch.Tensor)] if issubclass(kind, torch.Tensor) else ()
        return any("__torch_dispatch__" in vars(base) for base in bases)


class _Wrapper(metaclass=_OwnDispatch):
    pass


class Wrappers(PyTorch):
    """DTensors, fake tensors and other wrappers. They have no address, and PyTorch does not always raise for it."""

    def describe_all(self, *call: Any) -> bool:
        return False

    def view(self, name: str, array: Any, stream: int | None) -> View:
        kind, inner = type(array).__name__, f"{name}.values()" if array.is_nested else "the tensor that it wraps"
        raise ValueError(f"{name} must be a tensor with its own memory, got a {kind}: pass {inner}")


TRACERS = (_Wrapper,)
FRAMEWORK, TRACED = PyTorch(), Wrappers()
