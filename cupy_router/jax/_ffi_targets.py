# SPDX-License-Identifier: Apache-2.0
"""Custom-call targets, one for each op and platform (CUDA, CPU), and their handlers."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

import jax

from cupy_router import compiler
from cupy_router.arrays import View
from cupy_router.jax import _call_text, _exit, _ffi
from cupy_router.jax._call_text import CallText
from cupy_router.ops import _cached
from cupy_router.ops._cached import dense_view
from cupy_router.ops._op import Op
from cupy_router.ops.registry import OPS

_handlers: list[Any] = []  # XLA keeps their addresses


def target(op: str) -> str:
    return f"cupy_router.{op}"


@cache
def why_not() -> str | None:
    """Return the reason why this JAX cannot trace ops, with the remedy; None if it can."""
    if jax.__version_info__ < (0, 8):
        return f"calls inside jax.jit need JAX 0.8 or later, this is {jax.__version__}"
    return None


def register() -> None:
    """Register the targets with XLA. This does not initialise any platform."""
    if why_not() is not None:
        return
    for op in OPS.values():
        register_op(op)
    atexit.register(_exit.wait)  # runs before JAX's own, which was registered earlier


def register_op(op: Op) -> None:
    """Tell XLA the targets of an op.

    XLA may capture a handler in a command buffer only if it takes no memory of `scratch`: that is one piece more for
    each capture, never freed, and XLA captures anew whenever buffers move.
    """
    for platform, run, on_cuda in (("cpu", _exit.watched(execute), False), ("CUDA", execute, True)):
        function = _ffi.handler(op.label, partial(run, op), on_cuda, op.single_kernel)
        _handlers.append(function)
        jax.ffi.register_ffi_target(target(op.name), jax.ffi.pycapsule(function), platform=platform)


Buffer = tuple[tuple[int, ...], str]  # shape and dtype


def views_of(op: Op, text: CallText, inputs: Sequence[Buffer], device: tuple[str, int]) -> list[View | None]:
    """Return the inputs of a call at address 0, because XLA aligns all buffers for vector loads."""
    views: list[View | None] = [None] * len(op.inputs)
    for position, (shape, dtype) in zip(text.given, inputs, strict=True):
        views[position] = dense_view(op.names[position], 0, shape, dtype, device)
    return views


def gpus() -> list[Any]:
    """Return the CUDA devices that JAX has in this process."""
    try:
        return list(jax.local_devices(backend="cuda"))
    except RuntimeError:  # none
        return []


def load(name: str, call: str, inputs: Sequence[Buffer], results: Sequence[Buffer]) -> None:
    """Load the kernels of a call on all GPUs if there are several, as XLA does with its kernels before a program runs.

    Loading one later could deadlock: the driver may wait for other GPUs, which may run a collective that waits for this
    GPU.
    """
    op = OPS[name]
    text, devices = _call_text.decode(op, call), gpus()
    if len(devices) < 2 or compiler.why_no_cuda() is not None:
        return
    for device in [("cuda", gpu.local_hardware_id) for gpu in devices]:
        views = views_of(op, text, inputs, device)
        with suppress(TypeError, ValueError, RuntimeError):  # the handler will raise it again
            _cached.work_of(op, text.options, _cached.arrays_of(op, text.options, views, (), results), views)


def execute(op: Op, execution: _ffi.Execution) -> None:
    """Enqueue a call of an op on XLA's stream, or run it immediately on CPU memory."""
    text = _call_text.decode(op, execution.call)
    device, inputs = execution.device, execution.num_inputs
    key = ("xla", op.name, execution.call, execution.facts, device, compiler.backend(device[0]))
    work = _cached.work_for(key, op, partial(_describe, op, text, execution))
    if work is None:
        return
    pointers: list[int] = [0] * len(op.inputs)
    for position, pointer in zip(text.given, execution.pointers, strict=False):
        pointers[position] = pointer
    existing = [result.name for result in op.existing(text.options)]
    results = dict(zip(existing, execution.pointers[inputs:], strict=True))
    pointers += [results.get(name, 0) for name in op.parameters(text.options)[len(op.names) :]]
    if op.takes_number:
        pointers.append(text.number)
    work(execution.stream, pointers)


def _describe(op: Op, text: CallText, execution: _ffi.Execution) -> tuple[Any, Sequence[View | None], Sequence[View]]:
    names = [op.names[position] for position in text.given]
    names += [op.out_name(declared) for declared in op.existing(text.options)]
    if len(names) != len(execution.pointers) or len(text.given) != execution.num_inputs:
        raise RuntimeError(f"{op.label} got {len(execution.pointers)} buffers from XLA, not {', '.join(names)}")
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
