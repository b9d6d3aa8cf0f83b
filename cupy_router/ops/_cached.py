# SPDX-License-Identifier: Apache-2.0
"""Cached calls: checked and prepared once, reused by later calls with the same shapes, strides, dtypes and options.

The key contains everything that the checks depend on; of addresses, only their alignment. So a later call with a known
key needs no check except that of `num_valid`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from cupy_router import compiler, scratch
from cupy_router.arrays import Allocator, Output, View, dense_strides
from cupy_router.arrays._numpy import host_memory
from cupy_router.launcher import Launch, picker
from cupy_router.ops import _checks as check
from cupy_router.ops._declared import Arrays
from cupy_router.ops._op import Op
from cupy_router.tuning import Gpu, gpu_of

NUMBER = "num_valid_value"  # the parameter of kernels for num_valid as an int, after the arrays


class Kernel(NamedTuple):
    """A kernel, chosen for given shapes, dtypes and options.

    takes: names of its array parameters, in order; None: `Op.parameters`. Those that are left out in the call, or named
        in `nulls`, get null pointers. After them come `num_valid_value` if the op has a num_valid, and then `fixed`.
    nulls: array parameters that the op does not know.
    headers: texts that take the place of kernel files.
    """

    file: str
    function: str
    macros: dict[str, int]
    grid: int
    block: int
    fixed: dict[str, int | float]
    headers: Mapping[str, str] = MappingProxyType({})
    shared_bytes: int = 0
    takes: tuple[str, ...] | None = None
    nulls: tuple[str, ...] = ()


class Work(Protocol):
    """The kernels that a call enqueues, called like a `Launch`; `function` is one of them."""

    function: compiler.Function

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        """Enqueue on `stream`.

        `varying` are the addresses of `Op.parameters`, 0 for those left out, then `num_valid_value` if the op has a
        num_valid.
        """


class CachedCall(NamedTuple):
    """A checked and prepared call."""

    num_rows: int
    allocate: Allocator  # the results
    work: Work | None  # None: there is nothing to do
    absent: tuple[int, ...]  # positions of the results that these options do not ask for
    guards: tuple[Callable[[Sequence[Any]], None], ...]  # called with all arrays before any is written
    pack: Callable[..., Any] | None  # from existing results to what the caller gets; None: that is `out` as it is


_MAX_CALLS = 4096
calls: dict[Hashable, CachedCall] = {}  # by all that the checks looked at


def found(key: Hashable) -> CachedCall | None:
    """Return the cached call of a key, None if there is none or kernel files have changed."""
    if compiler.WATCHING and compiler.changed():
        forget()
    return calls.get(key)


def keep(key: Hashable, call: CachedCall) -> CachedCall:
    """Add a call to the cache."""
    if len(calls) >= _MAX_CALLS:
        calls.clear()
    calls[key] = call
    return call


def forget() -> None:
    """Empty the cache, because kernel files have changed or the process was forked."""
    calls.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)  # CUDA does not work in the child: what is prepared anew finds that out


# -- From arrays to work -----------------------------------------------------------------------------------------------


def arrays_of(
    op: Op, options: Any, views: Sequence[View | None], out_views: Sequence[View], outputs: Sequence[Output]
) -> Arrays:
    """Return inputs and results of a call by name. Results that are not allocated yet are dense views at address 0."""
    device = next(view.device for view in views if view is not None)
    results: list[View | None] = [None] * len(op.results)
    for i, result in enumerate(op.existing(options)):
        view = out_views[i] if out_views else dense_view(op.out_name(result), 0, *outputs[i], device)
        results[op.result_names.index(result.name)] = view
    return Arrays((*op.names, *op.result_names), (*views, *results))


def dense_view(name: str, pointer: int, shape: tuple[int, ...], dtype: str, device: tuple[str, int]) -> View:
    """Return a view of dense memory; what is no result is read-only."""
    return View(name, pointer, shape, dense_strides(shape), dtype, device, not name.startswith("out"), None)


def work_of(op: Op, options: Any, arrays: Arrays, views: Sequence[View | None], gpu: Gpu | None = None) -> Work | None:
    """Choose and compile the kernels of a call; None if there is nothing to do because it has no rows.

    gpu: to plan for; by default that of the arrays.
    """
    device, num_rows = views[0].device, views[0].shape[0]  # type: ignore[union-attr]  # the first is never left out
    if num_rows == 0 and not works_without_rows(op, options, arrays):
        return None
    work = op.kernel(options, arrays, gpu_of(device) if gpu is None else gpu)
    return launch_of(op, options, work, device) if isinstance(work, Kernel) else work


def works_without_rows(op: Op, options: Any, arrays: Arrays) -> bool:
    """Return whether a call without rows has something to do: a result with an element."""
    if op.is_independent(options):
        return False
    return any(0 not in getattr(arrays, result.name).shape for result in op.existing(options))


def launch_of(op: Op, options: Any, kernel: Kernel, device: tuple[str, int]) -> Work:
    """Compile a kernel, and return its launch, which takes the arrays of a call with these options."""
    names = op.parameters(options)
    takes = names if kernel.takes is None else kernel.takes
    unknown = set(takes) - {*names, *kernel.nulls}
    if unknown:
        raise TypeError(f"op {op.name} has no arrays {sorted(unknown)} for {kernel.function}")
    number = (NUMBER,) if op.takes_number else ()
    return launch_with((*takes, *number), kernel, device, (*names, *number))


def launch_with(
    varying: tuple[str, ...], kernel: Kernel, device: tuple[str, int], passed: tuple[str, ...] | None = None
) -> Launch:
    """Compile a kernel, and return its launch, which takes the values of these parameters, or of those in `passed`."""
    function = compiler.compile(kernel.file, kernel.function, kernel.macros, device, kernel.headers)
    return Launch(function, kernel.grid, kernel.block, varying, kernel.fixed, kernel.shared_bytes, passed)


class Reordered:
    """Kernels that take other arrays than a call passes, or in another order."""

    def __init__(self, launch: Work, names: Sequence[str], takes: Sequence[str], takes_number: bool) -> None:
        null = len(names) + takes_number
        places = [names.index(name) if name in names else null for name in takes]
        places += [len(names)] if takes_number else []
        self._has_nulls = null in places
        self._pick = picker(places)
        self._launch = launch
        self.function = launch.function

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        self._launch(stream, self._pick((*varying, 0) if self._has_nulls else varying))


# -- Calls on memory of the caller -------------------------------------------------------------------------------------


def work_for(
    key: Hashable, op: Op, describe: Callable[[], tuple[Any, Sequence[View | None], Sequence[View]]]
) -> Work | None:
    """Return the kernels of a call on memory that the caller owns; None if there is nothing to do.

    The key contains everything that they depend on. If it is new, `describe` returns the options and the views of
    inputs and existing results. Only the alignment of their pointers is used.
    """
    call = found(key)
    if call is None:
        options, views, out_views = describe()
        op.check_inputs(options, views)
        outputs = op.outputs_of(options, views)
        for view, output, result in zip(out_views, outputs, op.existing(options), strict=True):
            check.result(view, output, result.axes)
        arrays = arrays_of(op, options, views, out_views, outputs)
        kind = views[0].device[0]  # type: ignore[union-attr]  # the first is never left out
        if compiler.backend(kind) is None:
            work: Work | None = _Reference(op, options, arrays)
        else:
            with scratch.relaxed() if kind == "cuda" else nullcontext():  # the caller may be capturing the stream
                work = work_of(op, options, arrays, views)
        call = keep(key, CachedCall(0, no_allocation, work, (), (), None))
    return call.work


def no_allocation(pointers: list[int]) -> tuple[Any, ...]:
    """Stand in for the allocator of a call whose results go into memory of the caller."""
    raise AssertionError("results go into the memory of others")


class _Reference:
    """The reference, called like a `Launch` with addresses of CPU memory."""

    function: compiler.Function  # never set

    def __init__(self, op: Op, options: Any, arrays: Arrays) -> None:
        self._op, self._options = op, options
        self._views = [getattr(arrays, name) for name in op.parameters(options)]

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        op = self._op
        *pointers, number = varying if op.takes_number else (*varying, -1)
        arrays = [
            None if view is None else host_memory(int(at), view) for at, view in zip(pointers, self._views, strict=True)
        ]
        inputs, results = arrays[: len(op.names)], arrays[len(op.names) :]
        for array in inputs:
            if array is not None:
                array.flags.writeable = False
        run_reference(op, self._options, inputs, int(number), [array for array in results if array is not None])


def run_reference(op: Op, options: Any, inputs: Sequence[Any], number: int, into: Sequence[Any] = ()) -> Sequence[Any]:
    """Run the reference on host arrays; return the existing results, and write them into the arrays `into`."""
    count = inputs[-1] if op.takes_number else None
    results = op.reference(options, Arrays(op.names, inputs), check.valid_rows(number, count, len(inputs[0])))
    for array, values in zip(into, results, strict=False):
        array[...] = values
    return results
