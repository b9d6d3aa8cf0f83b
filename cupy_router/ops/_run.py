# SPDX-License-Identifier: Apache-2.0
"""Run an op: pass the call to an interceptor, or find its cached call and launch that.

The first call with given shapes, dtypes, strides and devices is checked, and its kernels are compiled. Later calls only
pass pointers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from cupy_router import compiler
from cupy_router.arrays import (
    FRAMEWORKS,
    Allocator,
    Framework,
    Output,
    View,
    framework_of,
    in_flight,
    keep_until_done,
    stream_handle,
)
from cupy_router.arrays._numpy import dtype_of
from cupy_router.ops import _cached
from cupy_router.ops import _checks as check
from cupy_router.ops._cached import CachedCall
from cupy_router.ops._op import Op


class Interceptor(Protocol):
    """Hook of a framework that takes over calls, to trace them into a graph or to make them differentiable."""

    def wants(self, op: Any, inputs: tuple[Any, ...]) -> bool:
        """Return whether `run` takes over this call. Every call asks, so this takes a fraction of a microsecond."""

    def run(self, op: Any, options: Any, inputs: tuple[Any, ...], out: Any, stream: Any, number: int) -> Any:
        """Return the results of a call that :meth:`wants` accepts. It may call :func:`run_eagerly`."""


# Framework packages add themselves when they are imported.
interceptors: list[Interceptor] = []


def run(
    op: Op, options: Any, inputs: tuple[Any, ...], out: Any, stream: Any, number: int = -1, eager: bool = False
) -> Any:
    """Return the results of one call of an op.

    options: or the tuple of their fields, or their only field. Options are made of them when somebody needs them.
    number: num_valid as an int, -1 for all rows.
    eager: the call is neither traced nor differentiated.
    """
    if not eager:
        for interceptor in interceptors:
            if interceptor.wants(op, inputs):
                return interceptor.run(op, op.as_options(options), inputs, out, stream, number)
    first = inputs[0]
    framework = FRAMEWORKS.get(type(first))
    if framework is None:  # the first array of its type
        with check.named(op.label):
            framework_of(op.names[0], first)
        return run(op, options, inputs, out, stream, number, eager)  # its framework may have brought an interceptor
    try:
        if compiler.WATCHING and compiler.changed():
            _cached.forget()
        outs: tuple[Any, ...] = ()
        numbers: tuple[Any, ...] = ()
        if out is not None:
            outs = op.flatten(options, out)
            if op.numbers:
                numbers = op.numbers_in(out)
        current = framework.current_stream(first)
        handle = current if stream is None else stream_handle(stream)
        if current is None or handle is None:
            results = _run_on_host(op, options, inputs, outs, framework, number, numbers)
        elif handle == current:
            results = _run_on_device(op, options, inputs, outs, framework, current, number, [], numbers)
        else:
            with framework.on_stream(handle, first):
                results = _run_on_device(op, options, inputs, outs, framework, handle, number, list(inputs), numbers)
    except compiler.CompileError:
        raise
    except TypeError as error:
        raise TypeError(f"{op.label}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{op.label}: {error}") from error
    except RuntimeError as error:
        if compiler.is_of_a_fork(error):
            raise compiler.no_cuda(compiler.FORKED) from error
        raise
    if results is None:
        return _run_traced(op, op.as_options(options), inputs, out, stream, number)
    return results if out is None or None in numbers else out


def run_eagerly(op: Op, options: Any, inputs: tuple[Any, ...], number: int = -1) -> Any:
    """Return the results of a call that is neither traced nor differentiated, on the current stream."""
    return run(op, options, inputs, None, None, number, eager=True)


def _run_traced(op: Op, options: Any, inputs: tuple[Any, ...], out: Any, stream: Any, number: int) -> Any:
    """Return the results of a call with tracers of a type that was still unknown when interceptors were asked."""
    for interceptor in interceptors:
        if interceptor.wants(op, inputs):
            return interceptor.run(op, options, inputs, out, stream, number)
    raise RuntimeError(f"{op.label}: got a traced array outside of its trace")


def _run_on_device(
    op: Op,
    options: Any,
    inputs: tuple[Any, ...],
    outs: tuple[Any, ...],
    framework: Framework,
    stream: int,
    number: int,
    owners: list[object],
    numbers: tuple[Any, ...],
) -> Any:
    """Return what the caller gets, or anything if it gave a complete `out`; None if an array has no memory."""
    key: list[Hashable] = [op.name, options, framework, numbers] if numbers else [op.name, options, framework]
    pointers: list[int] = []
    arrays = (*inputs, *outs) if outs else inputs
    for array in arrays:
        if array is None:
            key.append(None)
            pointers.append(0)
        else:
            kind = FRAMEWORKS.get(type(array)) or framework_of(op.argument(len(pointers), options), array)
            described = kind.describe(array, stream, owners)
            if described is None:
                _checked(op, options, inputs, outs, stream, numbers)  # raises, unless the array is a tracer
                return None
            pointer, facts = described
            key.append(facts)
            pointers.append(pointer)
    known = tuple(key)
    call = _cached.calls.get(known)
    if call is None:
        made = _prepare(op, options, inputs, outs, framework, stream, numbers)
        if made is None:
            return None
        call = _cached.keep(known, made)
    num_rows, allocate, work, absent, guards, pack = call
    if number > num_rows:
        check.integer("num_valid", number, 0, num_rows)
    for guard in guards:
        guard(arrays)

    results = outs or allocate(pointers)
    if work is not None:
        for position in absent:
            pointers.insert(position, 0)
        if op.takes_number:
            pointers.append(number)
        work(stream, pointers)
        if owners or in_flight:
            keep_until_done(owners, stream, work.function.device)
    if outs:
        return pack(*results) if None in numbers else results
    if framework.delivers:
        results = tuple(framework.deliver(array, inputs[0]) for array in results)
    return pack(*results)


def _prepare(
    op: Op,
    options: Any,
    inputs: tuple[Any, ...],
    outs: tuple[Any, ...],
    framework: Framework,
    stream: int,
    numbers: tuple[Any, ...],
) -> CachedCall | None:
    """Return the cached call for this call and later ones; None if an array has no memory."""
    checked = _checked(op, options, inputs, outs, stream, numbers)
    if checked is None:
        return None
    options = op.as_options(options)
    views, out_views, outputs = checked
    work = _cached.work_of(op, options, _cached.arrays_of(op, options, views, out_views, outputs), views)
    allocate: Allocator = framework.allocator(outputs, inputs[0])
    existing = op.existing(options)
    names = [result.name for result in existing]
    passed = op.parameters(options)
    absent = tuple(i for i, name in enumerate(passed) if i >= len(op.names) and name not in names)
    num_rows = views[0].shape[0]  # type: ignore[union-attr]  # the first is never left out
    guards = _write_guards(op, options, (*inputs, *outs))
    pack = op.packer(options, partial(_sizes, op, options, views))
    return CachedCall(num_rows, allocate, work, absent, guards, pack)


def _sizes(op: Op, options: Any, views: Sequence[View | None]) -> dict[str, int]:
    return op.sizes_of(options, [view and view.shape for view in views])


def _write_guards(op: Op, options: Any, arrays: Sequence[Any]) -> tuple[Callable[[Sequence[Any]], None], ...]:
    """Return what a call does before it writes into its arrays, the inputs followed by those of `out`."""
    names: dict[Framework, dict[int, str]] = {}
    for place, name in op.written_names(options, arrays).items():
        names.setdefault(framework_of(name, arrays[place]), {})[place] = name
    guards = [framework.write_guard(found) for framework, found in names.items()]
    return tuple(guard for guard in guards if guard is not None)


def _run_on_host(
    op: Op,
    options: Any,
    inputs: tuple[Any, ...],
    outs: tuple[Any, ...],
    framework: Framework,
    number: int,
    numbers: tuple[Any, ...],
) -> Any:
    checked = _checked(op, options, inputs, outs, None, numbers)
    if checked is None:
        return None
    options = op.as_options(options)
    views, out_views, outputs = checked
    first: View = views[0]  # type: ignore[assignment]  # the first is never left out
    if number >= 0:
        check.integer("num_valid", number, 0, first.shape[0])
    given = (*inputs, *outs)
    for guard in _write_guards(op, options, given):
        guard(given)
    hosts: Sequence[Any] = [view.host for view in out_views]
    if compiler.backend(first.device[0]) is None:
        results = _cached.run_reference(op, options, check.hosts(views), number, hosts)
    else:
        results = hosts or tuple(np.empty(shape, dtype_of(dtype)) for shape, dtype in outputs)
        arrays = _cached.arrays_of(op, options, views, out_views, outputs)
        work = _cached.work_of(op, options, arrays, views)
        if work is not None:
            found = {output.name: array for output, array in zip(op.existing(options), results, strict=True)}
            pointers = [view.pointer if view else 0 for view in views]
            passed = op.parameters(options)[len(pointers) :]
            pointers += [found[name].ctypes.data if name in found else 0 for name in passed]
            work(0, [*pointers, number] if op.takes_number else pointers)
    if outs and None not in numbers:
        return outs
    pack = op.packer(options, partial(_sizes, op, options, views))
    return pack(*(outs or [framework.from_host(values, inputs[0]) for values in results]))


def _checked(
    op: Op,
    options: Any,
    inputs: Sequence[Any],
    outs: Sequence[Any],
    stream: int | None,
    numbers: Sequence[Any] = (),
) -> tuple[list[View | None], list[View], tuple[Output, ...]] | None:
    """Return views of all arrays and the outputs, or raise what is wrong; None if an array is a tracer."""
    options = op.as_options(options)
    op.check_out(options, outs)
    views: list[View | None] = []
    for position, array in enumerate((*inputs, *outs)):
        name = op.argument(position, options)
        if array is None and position < len(inputs):
            views.append(None)
        else:
            framework = framework_of(name, array)
            if framework.traced and position < len(inputs):
                return None
            views.append(framework.view(name, array, stream))
    given = [view for view in views if view is not None]
    check.one_device(given)
    op.check_inputs(options, views[: len(inputs)])
    if numbers:
        op.check_numbers(numbers, _sizes(op, options, views[: len(inputs)]))
    for view in given:
        check.strides(view)
    out_views: list[View] = given[len(given) - len(outs) :]
    outputs = op.outputs_of(options, views[: len(inputs)])
    for view, output, result in zip(out_views, outputs, op.existing(options), strict=False):
        check.result(view, output, result.axes)
        check.writable(view)
    return views[: len(inputs)], out_views, outputs
