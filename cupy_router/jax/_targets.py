# SPDX-License-Identifier: Apache-2.0
"""The custom-call targets: an op each, for CUDA and for CPU memory, and what runs when XLA calls one."""

from __future__ import annotations

import atexit
import math
from collections.abc import Hashable, Sequence
from contextlib import suppress
from functools import cache, lru_cache, partial
from typing import Any

import jax

from cupy_router import compiler
from cupy_router.arrays import View
from cupy_router.jax import _exit, _ffi, _text
from cupy_router.ops import (
    _call,
    _hash_layer,
    _layout,
    activation_topk,
    activation_topk_backward,
    dense_router,
    hash_router,
    topk_select,
)

_MODULES = (topk_select, activation_topk, hash_router, dense_router, _hash_layer, activation_topk_backward)
OPS: dict[str, _call.Op] = {module._OP.name: module._OP for module in _MODULES}

# One kernel and nothing else. The others use memory of `scratch`, which is one piece more for each capture and never
# freed: XLA captures anew whenever buffers move.
_ONE_KERNEL = ("activation_topk", "hash_router", "activation_topk_backward")

_handlers: list[Any] = []  # XLA keeps their addresses


def target(op: str) -> str:
    return f"cupy_router.{op}"


@cache
def why_not() -> str | None:
    """Why ops cannot be traced by this JAX, with the remedy; None if they can."""
    if jax.__version_info__ < (0, 8):
        return f"calls inside jax.jit need JAX 0.8 or later, this is {jax.__version__}"
    return None


def register() -> None:
    """Tell XLA the targets. Platforms that JAX has not started yet, or never will, cost nothing."""
    if why_not() is not None:
        return
    for op in OPS:
        for platform, run, on_cuda in (("cpu", _exit.watched(execute), False), ("CUDA", execute, True)):
            function = _ffi.handler(op, partial(run, op), on_cuda, op in _ONE_KERNEL)
            _handlers.append(function)
            jax.ffi.register_ffi_target(target(op), jax.ffi.pycapsule(function), platform=platform)
    atexit.register(_exit.wait)  # runs before JAX's own, which was registered earlier


def is_one_kernel(op: _call.Op, options: Any, views: Sequence[View | None]) -> bool:
    """Whether a call is the launch of one kernel without memory of its own."""
    if op.name == "topk_select":
        return _layout.fits(views[0].shape[1], options)  # type: ignore[union-attr]  # the first is never left out
    return op.name in _ONE_KERNEL


Buffer = tuple[tuple[int, ...], str]  # shape and dtype


def views_of(op: _call.Op, text: _text.Text, inputs: Sequence[Buffer], device: tuple[str, int]) -> list[View | None]:
    """A call's inputs at address 0, for XLA aligns all buffers as its own vector loads need it."""
    views: list[View | None] = [None] * len(op.inputs)
    for position, (shape, dtype) in zip(text.given, inputs, strict=True):
        views[position] = dense_view(op.inputs[position], 0, shape, dtype, device)
    return views


def gpus() -> list[Any]:
    """JAX's CUDA devices of this process."""
    try:
        return list(jax.local_devices(backend="cuda"))
    except RuntimeError:  # it has none
        return []


def load(name: str, call: str, inputs: Sequence[Buffer], results: Sequence[Buffer]) -> None:
    """Load a call's kernels on all GPUs, where there are several, as XLA does with its own before a program runs.

    To load one the driver may wait for what runs on other GPUs, and that may be a collective that waits for this one.
    """
    op, text = OPS[name], _text.decode(call)
    devices = gpus()
    if len(devices) < 2 or compiler.why_no_cuda() is not None:
        return
    for device in [("cuda", gpu.local_hardware_id) for gpu in devices]:
        names = (f"out.{name}" for name in op.result._fields)
        outs = [dense_view(name, 0, *result, device) for name, result in zip(names, results, strict=True)]
        with suppress(TypeError, ValueError, RuntimeError):  # the handler will say so
            _call._planned(op, text.options, views_of(op, text, inputs, device), outs, tuple(results))


_decoded = lru_cache(maxsize=4096)(_text.decode)


def execute(name: str, execution: _ffi.Execution) -> None:
    """Enqueue a call of an op on XLA's stream, or run it at once on CPU memory."""
    op, text = OPS[name], _decoded(execution.call)
    device, inputs = execution.device, execution.num_inputs
    key = ("xla", name, execution.call, execution.facts, device, compiler.backend(device[0]))
    work = _call.work_for(key, op, partial(_describe, op, text, execution))
    if work is None:
        return
    pointers: list[int] = [0] * len(op.inputs)
    for position, pointer in zip(text.given, execution.pointers, strict=False):
        pointers[position] = pointer
    pointers += execution.pointers[inputs:]
    if op.takes_number:
        pointers.append(text.number)
    work(execution.stream, pointers)


def _describe(
    op: _call.Op, text: _text.Text, execution: _ffi.Execution
) -> tuple[Hashable, Sequence[View | None], Sequence[View]]:
    names = [op.inputs[position] for position in text.given] + [f"out.{name}" for name in op.result._fields]
    if len(names) != len(execution.pointers) or len(text.given) != execution.num_inputs:
        raise RuntimeError(f"{op.name} got {len(execution.pointers)} buffers from XLA, not {', '.join(names)}")
    buffers = [
        _view(name, pointer, fact, execution.device)
        for name, pointer, fact in zip(names, execution.pointers, execution.facts, strict=True)
    ]
    views: list[View | None] = [None] * len(op.inputs)
    for position, view in zip(text.given, buffers, strict=False):
        views[position] = view
    return text.options, views, buffers[len(text.given) :]


def _view(name: str, pointer: int, fact: tuple[int, bytes, int], device: tuple[str, int]) -> View:
    return dense_view(name, pointer, *_ffi.shape_and_dtype(fact), device)


def dense_view(name: str, pointer: int, shape: tuple[int, ...], dtype: str, device: tuple[str, int]) -> View:
    """A buffer of XLA's."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return View(name, pointer, shape, strides, dtype, device, not name.startswith("out."), None)
