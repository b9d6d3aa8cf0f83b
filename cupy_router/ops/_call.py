# SPDX-License-Identifier: Apache-2.0
"""How every op runs: a kind of call is checked and planned once, then a call is pointers and a launch.

A plan depends on all that the checks looked at (shapes, strides, dtypes, devices, options) but not on addresses beyond
their alignment, so a call whose key is known needs no check but that of `num_valid`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from cupy_router import compiler, scratch
from cupy_router.arrays import (
    FRAMEWORKS,
    Allocator,
    Framework,
    Output,
    Traced,
    View,
    framework_of,
    in_flight,
    keep_until_done,
    stream_handle,
)
from cupy_router.arrays._numpy import DTYPES, host_memory
from cupy_router.launcher import Launch
from cupy_router.ops import _checks as check


class Kernel(NamedTuple):
    """The kernel for one kind of call. Its parameters are inputs, outputs, `num_valid_value` if the op has one, then
    `fixed`."""

    file: str
    function: str
    macros: dict[str, int]
    grid: int
    block: int
    fixed: dict[str, int | float]
    headers: Mapping[str, str] = MappingProxyType({})  # texts that take the place of kernel files
    shared_bytes: int = 0


class Work(Protocol):
    """What a call enqueues, if not one kernel: called as a `Launch` is, with `function` for one of its kernels."""

    function: compiler.Function

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        """Enqueue on `stream`: addresses of inputs and outputs, then `num_valid_value` if the op has one."""


@dataclass(frozen=True)
class Op:
    """What the runner needs to know of an op. Views come in the order of `inputs`, None for those left out."""

    name: str
    inputs: tuple[str, ...]
    result: Any  # the named tuple that is returned, of one array or two
    check: Callable[..., tuple[Output, ...]]  # (options, *views) -> what the results are to look like
    kernel: Callable[..., Kernel | Work]  # (options, output row strides, *views) -> what to enqueue
    reference: Callable[..., tuple[Any, ...]]  # (options, number, *host arrays) -> the results
    takes_number: bool  # whether num_valid may be an int; then the kernel has an int parameter num_valid_value
    smooth: tuple[int, ...] = ()  # the inputs by which the first result has a gradient

    def argument(self, position: int) -> str:
        """The name of an array argument: inputs, then the fields of `out`."""
        if position < len(self.inputs):
            return self.inputs[position]
        return f"out.{self.result._fields[position - len(self.inputs)]}"


class _Plan(NamedTuple):
    num_rows: int
    allocate: Allocator  # the results
    launch: Work | None  # None: no rows, nothing to do


# What the axes of results are called, by the name of the first.
_AXES = {
    "values": "num_rows, k",
    "indices": "num_rows, k",
    "weights": "num_tokens, top_k",
    "grad_logits": "num_tokens, num_experts",
}

_OF_OTHERS: Any = None  # no allocator: results go into the memory of others

_MAX_PLANS = 4096
_plans: dict[Hashable, _Plan] = {}


# Set by cupy_router.torch: whether a call is being traced into a graph or wants a gradient, and what is done then.
tracer: Any = None

# Set by cupy_router.jax: how a call of which an argument is a tracer is put into JAX's graph.
traced: Any = None


def run(
    op: Op, options: Hashable, inputs: tuple[Any, ...], out: Any, stream: Any, number: int = -1, eager: bool = False
) -> Any:
    """One call of an op; `number` is num_valid as an int, -1 for all rows; `eager` calls are just that: neither traced
    nor differentiated."""
    if tracer is None and type(inputs[0]) not in FRAMEWORKS:
        _meet(op, inputs[0])
    if tracer is not None and not eager:
        if tracer.is_tracing():
            return tracer.run(op, options, inputs, out, stream, number)
        if tracer.is_grad_enabled() and tracer.wants_gradient(op, inputs):
            return tracer.run_with_gradient(op, options, inputs, out, stream, number)
    try:
        if compiler.WATCHING and compiler.changed():
            _plans.clear()
        first = inputs[0]
        framework = FRAMEWORKS.get(type(first)) or framework_of(op.inputs[0], first)
        current = framework.current_stream(first)
        if out is not None and not (isinstance(out, tuple) and len(out) == len(op.result._fields)):
            count = ("one array", "two arrays")[len(op.result._fields) - 1]
            raise TypeError(f"out must be a {op.result.__name__} of {count}, got {type(out).__name__}")
        if stream is not None:
            handle = stream_handle(stream)
            if current is not None and handle != current:
                with framework.on_stream(handle, first):
                    return _run_on_device(op, options, inputs, out, framework, handle, number, list(inputs))
        if current is None:
            return _run_on_host(op, options, inputs, out, framework, number)
        return _run_on_device(op, options, inputs, out, framework, current, number, [])
    except Traced:
        pass  # goes on below, where errors do not name this one as their context
    except compiler.CompileError:
        raise
    except RuntimeError:
        if compiler.why_no_cuda() is not None:
            raise
        # A framework may refuse to describe an array, such as a sparse one; the checks know the better sentence.
        try:
            _checked(op, options, inputs, out, None)
        except ValueError as error:
            raise ValueError(f"{op.name}: {error}") from error
        raise
    except TypeError as error:
        raise TypeError(f"{op.name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{op.name}: {error}") from error
    return traced.run(op, options, inputs, out, stream, number)


def _meet(op: Op, array: Any) -> None:
    """The first array of a kind in this process: the first tensor brings cupy_router.torch, which is to be asked."""
    with suppress(TypeError):  # if it is no array, the call says so
        framework_of(op.inputs[0], array)


def _run_on_device(
    op: Op,
    options: Hashable,
    inputs: tuple[Any, ...],
    out: Any,
    framework: Framework,
    stream: int,
    number: int,
    owners: list[object],
) -> Any:
    key: list[Hashable] = [op.name, options, framework]
    pointers: list[int] = []
    for array in inputs if out is None else (*inputs, *out):
        if array is None:
            key.append(None)
            pointers.append(0)
        else:
            kind = FRAMEWORKS.get(type(array)) or framework_of(op.argument(len(pointers)), array)
            pointer, facts = kind.describe(array, stream, owners)
            key.append(facts)
            pointers.append(pointer)
    plan_key = tuple(key)
    plan = _plans.get(plan_key)
    if plan is None:
        views, out_views, outputs = _checked(op, options, inputs, out, stream)
        allocate = framework.allocator(outputs, inputs[0])
        launch = _planned(op, options, views, out_views, outputs)
        plan = _keep(plan_key, _Plan(outputs[0][0][0], allocate, launch))
    num_rows, allocate, launch = plan
    if number > num_rows:
        check.integer("num_valid", number, 0, num_rows)

    if out is None:
        results = allocate(pointers)
    if launch is not None:
        if op.takes_number:
            pointers.append(number)
        launch(stream, pointers)
        if owners or in_flight:
            keep_until_done(owners, stream, launch.function.device)
    if out is not None:
        return out
    if framework.delivers:
        results = tuple(framework.deliver(array, inputs[0]) for array in results)
    return op.result(*results)


def _keep(key: Hashable, plan: _Plan) -> _Plan:
    if len(_plans) >= _MAX_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def work_for(
    key: Hashable, op: Op, describe: Callable[[], tuple[Hashable, Sequence[View | None], Sequence[View]]]
) -> Work | None:
    """What a call enqueues that reads and writes the memory of others; None if there are no rows.

    The key holds all that this depends on. If it is new, `describe` gives the options and the views of inputs and
    results, whose pointers count for their alignment alone.
    """
    if compiler.WATCHING and compiler.changed():
        _plans.clear()
    plan = _plans.get(key)
    if plan is None:
        options, views, out_views = describe()
        outputs = op.check(options, *views)
        for view, (shape, dtype) in zip(out_views, outputs, strict=True):
            check.dtype(view, (dtype,))
            check.shape(view, shape, _AXES[op.result._fields[0]])
        kind = out_views[0].device[0]
        if compiler.backend(kind) is None:
            work: Work | None = _Reference(op, options, views, out_views)
        else:
            with scratch.relaxed() if kind == "cuda" else nullcontext():  # others may be capturing the stream
                work = _planned(op, options, views, out_views, outputs)
        plan = _keep(key, _Plan(outputs[0][0][0], _OF_OTHERS, work))
    return plan.launch


class _Reference:
    """The reference on CPU memory that is known by its addresses."""

    function: compiler.Function  # there is none

    def __init__(self, op: Op, options: Hashable, views: Sequence[View | None], out_views: Sequence[View]) -> None:
        self._op, self._options = op, options
        self._views, self._num_inputs = (*views, *out_views), len(views)

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        *pointers, number = varying if self._op.takes_number else (*varying, -1)
        arrays = [
            None if view is None else host_memory(int(at), view) for at, view in zip(pointers, self._views, strict=True)
        ]
        inputs, results = arrays[: self._num_inputs], arrays[self._num_inputs :]
        for array in inputs:
            if array is not None:
                array.flags.writeable = False
        for array, values in zip(results, self._op.reference(self._options, number, *inputs), strict=True):
            array[...] = values  # type: ignore[index]  # there are always results


def _run_on_host(
    op: Op, options: Hashable, inputs: tuple[Any, ...], out: Any, framework: Framework, number: int
) -> Any:
    views, out_views, outputs = _checked(op, options, inputs, out, None)
    if number >= 0:
        check.integer("num_valid", number, 0, outputs[0][0][0])
    if compiler.backend(views[0].device[0]) is None:  # type: ignore[union-attr]  # the first array is never left out
        results = op.reference(options, number, *(view and view.host for view in views))
        for view, values in zip(out_views, results, strict=False):
            view.host[...] = values  # type: ignore[index]  # views of CPU arrays of allowed dtypes have it
    else:
        results = tuple(np.empty(shape, DTYPES[dtype]) for shape, dtype in outputs)
        launch = _planned(op, options, views, out_views, outputs)
        targets = [view.pointer for view in out_views] or [array.ctypes.data for array in results]
        if launch is not None:
            pointers = [view.pointer if view else 0 for view in views] + targets
            launch(0, [*pointers, number] if op.takes_number else pointers)
    return out if out_views else op.result(*(framework.from_host(values, inputs[0]) for values in results))


def _checked(
    op: Op, options: Hashable, inputs: Sequence[Any], out: Any, stream: int | None
) -> tuple[list[View | None], list[View], tuple[Output, ...]]:
    """Views of all arrays and what the results look like, or the error that the arguments deserve."""
    views: list[View | None] = []
    for position, array in enumerate((*inputs, *(out or ()))):
        name = op.argument(position)
        if array is None and position < len(inputs):
            views.append(None)
        else:
            views.append(framework_of(name, array).view(name, array, stream))
    given = [view for view in views if view is not None]
    check.one_device(given)
    outputs = op.check(options, *views[: len(inputs)])
    for view in given:
        check.strides(view)
    out_views = [view for view in views[len(inputs) :] if view is not None]
    for view, (shape, dtype) in zip(out_views, outputs, strict=False):
        check.dtype(view, (dtype,))
        check.shape(view, shape, _AXES[op.result._fields[0]])
        check.writable(view)
    return views[: len(inputs)], out_views, outputs


def _planned(
    op: Op,
    options: Hashable,
    views: Sequence[View | None],
    out_views: Sequence[View],
    outputs: tuple[Output, ...],
) -> Work | None:
    if outputs[0][0][0] == 0:
        return None
    row_strides = [view.row_stride for view in out_views] or [shape[-1] for shape, _ in outputs]
    device = views[0].device  # type: ignore[union-attr]  # the first array is never left out
    work = op.kernel(options, row_strides, *views)
    if not isinstance(work, Kernel):
        return work
    varying = (*op.inputs, *op.result._fields, *(("num_valid_value",) if op.takes_number else ()))
    return launch_of(work, varying, device)


def launch_of(kernel: Kernel, varying: tuple[str, ...], device: tuple[str, int]) -> Launch:
    """The compiled kernel with all but its leading arguments."""
    function = compiler.compile(kernel.file, kernel.function, kernel.macros, device, kernel.headers)
    return Launch(function, kernel.grid, kernel.block, varying, kernel.fixed, kernel.shared_bytes)
