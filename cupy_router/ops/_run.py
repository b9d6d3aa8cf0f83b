# SPDX-License-Identifier: Apache-2.0
"""Run an op: pass the call to an interceptor, or find its cached call and launch that.

The first call with given shapes, dtypes, strides and devices is checked, and its kernels are compiled. Later calls only
pass pointers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from cupy_router import compiler
from cupy_router.arrays import (
    FRAMEWORKS,
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
    eager: the call is neither traced nor differentiated. An interceptor makes it, whose graph takes results that share
        memory for aliases, so they share none.
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
        current = framework.current_stream(first)
        handle = current if stream is None else stream_handle(stream)
        if current is None or handle is None:
            results = _run_on_host(op, options, inputs, out, framework, number)
        elif handle == current:
            results = _run_on_device(op, options, inputs, out, framework, current, number, [], eager)
        else:
            with framework.on_stream(handle, first):
                results = _run_on_device(op, options, inputs, out, framework, handle, number, list(inputs), eager)
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
    return results


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
    out: Any,
    framework: Framework,
    stream: int,
    number: int,
    owners: list[object],
    eager: bool,
) -> Any:
    """Return what the caller gets; None if an array is a tracer."""
    arrays = inputs if out is None else (*inputs, *op.leaves(options, out))
    pointers: list[int] = []
    key: list[Hashable] = [op.name, options, framework, eager]
    if not framework.describe_all(arrays, stream, owners, pointers, key):
        if _checked(op, options, inputs, out, stream) is None:  # raises, unless an array is a tracer or of a new type
            return None
        pointers, key = [], key[:4]
        if not framework.describe_all(arrays, stream, owners, pointers, key):
            return None
    known = tuple(key)
    call = _cached.calls.get(known)
    if call is None:
        made = _prepare(op, options, inputs, out, arrays, framework, stream, eager)
        if made is None:
            return None
        call = _cached.keep(known, made)
    num_rows, allocate, work, absent, guards, pack = call
    if number > num_rows:
        check.integer("num_valid", number, 0, num_rows)
    for guard in guards:
        guard(arrays)

    results = allocate(pointers) if out is None else None
    if work is not None:
        for position in absent:
            pointers.insert(position, 0)
        if op.takes_number:
            pointers.append(number)
        work(stream, pointers)
        if owners or in_flight:
            keep_until_done(owners, stream, work.function.device)
    if pack is None:
        return out
    if results is None:
        results = op.flatten(options, out)
    elif framework.delivers:
        results = tuple(framework.deliver(array, inputs[0]) for array in results)
    return pack(*results)


def _prepare(
    op: Op,
    options: Any,
    inputs: tuple[Any, ...],
    out: Any,
    arrays: Sequence[Any],
    framework: Framework,
    stream: int,
    eager: bool,
) -> CachedCall | None:
    """Return the cached call for this call and later ones; None if an array has no memory."""
    checked = _checked(op, options, inputs, out, stream)
    if checked is None:
        return None
    options = op.as_options(options)
    views, out_views, outputs = checked
    work = _cached.work_of(op, options, _cached.arrays_of(op, options, views, out_views, outputs), views)
    num_rows = views[0].shape[0]  # type: ignore[union-attr]  # the first is never left out
    pack = op.packer(options, partial(_sizes, op, options, views))
    existing, passed, written = op.existing(options), op.parameters(options), op.written_names(options, inputs)
    if out is None:
        allocate = (framework.allocator_apart if eager else framework.allocator)(outputs, inputs[0])
        names = [*op.names, *[result.name for result in existing]]
        absent = tuple(i for i, name in enumerate(passed) if name not in names)
        return CachedCall(num_rows, allocate, work, absent, _write_guards(written, arrays), pack)
    rest, leaves = iter(existing), [*enumerate(op.paths(op.returned(options)), len(inputs))]
    for place, path in leaves:
        if arrays[place] is not None and path not in op.numbers:
            written[place] = op.out_name(next(rest))
    guards = _write_guards(written, arrays)
    missing = [path for place, path in leaves if path in op.numbers and arrays[place] is None]
    if not missing:
        return CachedCall(num_rows, _cached.no_allocation, work, (), guards, None)
    results = iter(passed[len(inputs) :])
    pointers = [
        path if path in missing else next(results) for _, path in leaves if path in missing or path not in op.numbers
    ]
    work = work and _cached.Reordered(work, (*op.names, *pointers), passed, op.takes_number)
    return CachedCall(num_rows, _cached.no_allocation, work, (), guards, pack)


def _sizes(op: Op, options: Any, views: Sequence[View | None]) -> dict[str, int]:
    return op.sizes_of(options, [view and view.shape for view in views])


def _write_guards(written: Mapping[int, str], arrays: Sequence[Any]) -> tuple[Callable[[Sequence[Any]], None], ...]:
    """Return what a call does before it writes into some of its arrays, whose names are given by place."""
    names: dict[Framework, dict[int, str]] = {}
    for place, name in written.items():
        names.setdefault(framework_of(name, arrays[place]), {})[place] = name
    guards = [framework.write_guard(found, arrays) for framework, found in names.items()]
    return tuple(guard for guard in guards if guard is not None)


def _run_on_host(
    op: Op,
    options: Any,
    inputs: tuple[Any, ...],
    out: Any,
    framework: Framework,
    number: int,
) -> Any:
    checked = _checked(op, options, inputs, out, None)
    if checked is None:
        return None
    options = op.as_options(options)
    views, out_views, outputs = checked
    first: View = views[0]  # type: ignore[assignment]  # the first is never left out
    if number >= 0:
        check.integer("num_valid", number, 0, first.shape[0])
    outs = () if out is None else op.flatten(options, out)
    given = (*inputs, *outs)
    for guard in _write_guards(op.written_names(options, given), given):
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
    if out is not None and None not in op.numbers_in(options, out):
        return out
    pack = op.packer(options, partial(_sizes, op, options, views))
    return pack(*(outs or [framework.from_host(values, inputs[0]) for values in results]))


def _checked(
    op: Op,
    options: Any,
    inputs: Sequence[Any],
    out: Any,
    stream: int | None,
) -> tuple[list[View | None], list[View], tuple[Output, ...]] | None:
    """Return views of all arrays and the outputs, or raise what is wrong; None if an array is a tracer."""
    options = op.as_options(options)
    outs = () if out is None else op.flatten(options, out)
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
    if out is not None and op.numbers:
        op.check_numbers(op.numbers_in(options, out), _sizes(op, options, views[: len(inputs)]))
    for view in given:
        check.strides(view)
    out_views: list[View] = given[len(given) - len(outs) :]
    outputs = op.outputs_of(options, views[: len(inputs)])
    for view, output, result in zip(out_views, outputs, op.existing(options), strict=False):
        check.result(view, output, result.axes)
        check.writable(view)
    return views[: len(inputs)], out_views, outputs
