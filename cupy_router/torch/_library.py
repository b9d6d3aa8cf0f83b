# SPDX-License-Identifier: Apache-2.0
"""Derive the ops of torch.library from the declarations: schemas, implementations, fakes and gradients.

A schema has the options as text first, then the inputs, then num_valid as an int if the op has one. Each named tuple
that an op may return has a schema of its own, such as `activation_topk_layout` for the one with a layout. The graph has
all results of the tuple: those that the options leave out are empty tensors there, and None for the caller.

Each has a twin, `<op>_out`, for calls with `out`: it takes the tensors for the results as further arguments that it
mutates, and returns nothing. What a call writes into its inputs, another op does, `<op>_write`, which returns nothing
either: so no graph computes it again for a backward pass, or keeps for that what was written into.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from cupy_router.arrays import View
from cupy_router.arrays import _torch as tensors
from cupy_router.ops import _checks as check
from cupy_router.ops._cached import NUMBER
from cupy_router.ops._declared import Input
from cupy_router.ops._op import Op
from cupy_router.ops._run import run, run_eagerly
from cupy_router.ops.registry import OPS, RESULTS
from cupy_router.torch import _autograd
from cupy_router.torch._state import in_backward, outside_of_graphs

LIBRARY = torch.library.Library("cupy_router", "DEF")


def node(op: Op, kind: Any) -> str:
    """Return the name in graphs of an op that returns a named tuple of this kind."""
    return "_".join([op.name, *[name for name in kind._fields if name not in op.returns._fields]])


class Prepared(NamedTuple):
    """A call of a node, prepared outside of graphs, so that torch.compile has little to trace and few guards."""

    node: str
    text: str  # of the options

    def __call__(self, *arguments: Any) -> Any:
        """Return the tensors of the node. arguments: of its schema, without the text."""
        return getattr(torch.ops.cupy_router, self.node)(self.text, *arguments)


def prepare(op: Op, options: Any) -> Prepared:
    """Return the call of the node of these options."""
    options = op.as_options(options)
    kind = op.returned(options)
    return Prepared(node(op, kind), texts(op, kind, options)[0])


def schema(op: Op, kind: Any, into: bool = False) -> str:
    """Return the schema of an op that returns a tuple of a kind, or of its twin that writes into the caller's."""
    text, *arguments = _arguments(op, [declared for declared in op.inputs if not declared.written])
    arguments = [text, *[f"SymInt? {path.rpartition('.')[2]}" for path in sizes_in(op, kind)], *arguments]
    if into:
        letters = iter("abcdefghijklmnop")
        outs = [
            f"Tensor({next(letters)}!){'?' if result.exists else ''} {result.name}" for result in op.results_in(kind)
        ]
        return f"{node(op, kind)}_out({', '.join([*arguments, *outs])}) -> ()"
    returned = ["Tensor" for _ in op.results_in(kind)]
    results = f"({', '.join(returned)})" if len(returned) > 1 else "Tensor"
    return f"{node(op, kind)}({', '.join(arguments)}) -> {results}"


def writing_schema(op: Op) -> str:
    """Return the schema of an op that writes into inputs."""
    return f"{op.name}_write({', '.join(_arguments(op, op.inputs))}) -> ()"


def sizes_in(op: Op, kind: Any) -> list[str]:
    """Return the paths of the options that the node has beside the text, because they may be symbolic."""
    return [path for path in op.symbolic if "." not in path or path.partition(".")[0] in kind._fields]


def texts(op: Op, kind: Any, options: Any) -> list[Any]:
    """Return the options as a node has them."""
    paths = sizes_in(op, kind)
    text = options.text_without(op.symbolic) if paths else options.text
    return [text, *[options.changed(path) for path in paths]]


def _arguments(op: Op, inputs: Sequence[Input]) -> list[str]:
    found, letters = ["str options"], iter("abcdefghijklmnop")
    for declared in inputs:
        mark = f"({next(letters)}!)" if declared.written else ""
        found.append(f"Tensor{mark}{'' if declared.required else '?'} {declared.name}")
    return [*found, "SymInt num_valid_value"] if op.takes_number else found


def flat(op: Op, options: Any, out: Any) -> tuple[Any, ...]:
    """Return the arrays of `out`, checked as far as they have to be for a graph."""
    if out is None:
        return ()
    # torch.compile of PyTorch 2.11 loses an error that another one is raised from, so it gets the first.
    with nullcontext() if torch.compiler.is_dynamo_compiling() else check.named(op.label):
        outs = op.flatten(options, out)
        op.check_out(options, outs)
    return outs


def can_hold(op: Op, inputs: Sequence[Any], outs: Sequence[Any]) -> bool:
    """Return whether a graph can hold a call with these arrays."""
    for position, array in enumerate(inputs):
        kinds = torch.Tensor if position == 0 or op.inputs[position].written else (torch.Tensor, np.ndarray)
        if array is not None and not isinstance(array, kinds):
            return False
    return not [array for array in outs if array is not None and not isinstance(array, torch.Tensor)]


def call(op: Op, options: Any, inputs: Sequence[Any], number: Any, out: Any, outs: Sequence[Any]) -> Any:
    """Return the results of a call that becomes a node of the graph. `outs` are the arrays of `out`."""
    given = [torch.as_tensor(array) if isinstance(array, np.ndarray) else array for array in inputs]
    numbers = (number,) if op.takes_number else ()
    if op.written and not torch.compiler.is_dynamo_compiling():  # there, the fake of the node that writes checks them
        _check_written(op, options, given)
    results = _call(op, options, inputs, (*_read(op, given), *numbers), out, outs)
    if any(given[place] is not None for place in op.written):
        getattr(torch.ops.cupy_router, f"{op.name}_write")(op.writing_options(options).text, *given, *numbers)
    return results


def _call(op: Op, options: Any, inputs: Sequence[Any], arguments: Sequence[Any], out: Any, outs: Sequence[Any]) -> Any:
    wanted, kind = op.existing(options), op.returned(options)
    declared = op.results_in(kind)
    if out is not None:
        rest = iter(outs)
        places = [next(rest) if result in wanted else None for result in declared]
        numbers = op.numbers_in(options, out)
        if numbers:
            sizes = sizes_of(op, options, inputs)
            op.check_numbers(numbers, sizes)
        getattr(torch.ops.cupy_router, f"{node(op, kind)}_out")(*texts(op, kind, options), *arguments, *places)
        return op.pack(options, outs, lambda: sizes) if any(number is None for number in numbers) else out
    results = getattr(torch.ops.cupy_router, node(op, kind))(*texts(op, kind, options), *arguments)
    results = results if len(declared) > 1 else (results,)
    found = [tensor for tensor, result in zip(results, declared, strict=True) if result in wanted]
    return op.pack(options, found, partial(sizes_of, op, options, inputs))


def _check_written(op: Op, options: Any, inputs: Sequence[Any]) -> None:
    """Check what an op writes into, before another node writes into `out`, and also if no node is left that writes."""
    sizes = dict(op.sizes(options))
    for declared, array in zip(op.inputs, inputs, strict=False):
        if declared.written and array is not None:
            dtype, place = tensors.name_of(array.dtype), (array.device.type, array.device.index or 0)
            with check.named(op.label):
                view = View(declared.shown, 0, tuple(array.shape), tuple(array.stride()), dtype, place, False, None)
                check.dtype(view, declared.dtypes)
                check.axes(view, declared.axes, sizes)
                check.strides(view)


def sizes_of(op: Op, options: Any, inputs: Sequence[Any]) -> dict[str, Any]:
    """Return the sizes of a call by name. They may be symbolic; torch.jit.trace takes them for constants."""
    shapes: list[Any] = [None if array is None else array.shape for array in inputs]
    if torch.compiler.is_dynamo_compiling():  # it takes `min` of symbolic sizes for sym_min, but no sym_min of others
        return op.sizes_of(options, shapes)
    if torch.jit.is_tracing():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            shapes = [None if shape is None else tuple(map(int, shape)) for shape in shapes]
    return op.sizes_of(options, shapes, torch.sym_min)


def _read(op: Op, inputs: Sequence[Any]) -> Sequence[Any]:
    """Return the inputs that are not written.

    Without a search in `op.written`, which torch.compile may take for symbolic numbers and then finds nothing in.
    """
    return [array for declared, array in zip(op.inputs, inputs, strict=True) if not declared.written]


def _given(op: Op, kind: Any, text: str, arguments: Sequence[Any]) -> tuple[Any, tuple[Any, ...], int, Sequence[Any]]:
    """Return options, all inputs of an op, None for those that are written, num_valid as an int, and what follows."""
    options = op.options_of(text)
    paths = sizes_in(op, kind)
    for path, size in zip(paths, arguments, strict=False):
        options = options if size is None else options.replaced(path, size)
    number = len(op.inputs) - len(op.written)
    given = arguments[len(paths) :]
    inputs, others = list(given[:number]), given[number:]
    for place in op.written:
        inputs.insert(place, None)
    return (options, tuple(inputs), others[0], others[1:]) if op.takes_number else (options, tuple(inputs), -1, others)


def _implementation(op: Op, kind: Any, text: str, *arguments: Any) -> Any:
    """Run an op that a graph calls."""
    options, inputs, number, _ = _given(op, kind, text, arguments)
    found = outside_of_graphs(run_eagerly, op, options, inputs, number)
    return _with_absent(op, kind, options, op.flatten(options, found), inputs[0])


def _implementation_into(op: Op, kind: Any, text: str, *arguments: Any) -> None:
    """Run an op that a graph calls to write into tensors of the caller."""
    options, inputs, number, places = _given(op, kind, text, arguments)
    wanted, declared = op.existing(options), op.results_in(kind)
    outs = [array for array, result in zip(places, declared, strict=True) if result in wanted]
    outside_of_graphs(run, op, options, inputs, op.pack(options, outs), None, number, True)


def _implementation_of_writing(op: Op, text: str, *arguments: Any) -> None:
    """Run an op that a graph calls for what it writes into its inputs; not if a backward pass repeats it."""
    if not in_backward():
        inputs, number = (arguments[:-1], arguments[-1]) if op.takes_number else (arguments, -1)
        outside_of_graphs(run_eagerly, op, op.options_of(text), inputs, number)


def _fake(op: Op, kind: Any, text: str, *arguments: Any) -> Any:
    """Return fake results, whose sizes may be symbolic."""
    options, inputs, _, _ = _given(op, kind, text, arguments)
    shapes = [None if tensor is None else tensor.shape for tensor in inputs]
    dtypes = [None if tensor is None else tensors.name_of(tensor.dtype) for tensor in inputs]
    found = [
        inputs[0].new_empty(shape, dtype=tensors.dtype_of(dtype))
        for shape, dtype in op.outputs(options, shapes, dtypes, torch.sym_min)
    ]
    return _with_absent(op, kind, options, found, inputs[0])


def _fake_of_writing(op: Op, text: str, *arguments: Any) -> None:
    """Check what is written, of which there are no results."""
    _check_written(op, op.options_of(text), arguments)


def _with_absent(op: Op, kind: Any, options: Any, found: Sequence[Any], like: Any) -> Any:
    """Return one tensor for each result of the tuple, an empty one if the result does not exist."""
    rest, wanted = iter(found), op.existing(options)
    results = tuple(next(rest) if result in wanted else like.new_empty((0,)) for result in op.results_in(kind))
    return results if len(results) > 1 else results[0]


def _remember(op: Op, kind: Any, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    names = (*[None] * (1 + len(sizes_in(op, kind))), *_read(op, op.names), *[NUMBER] * op.takes_number)
    results = output if isinstance(output, tuple) else (output,)
    _autograd.remember(ctx, op, op.options_of(inputs[0]), names, inputs, results)


def define(op: Op) -> None:
    """Add an op and its twin to the library, once for each named tuple that it may return, and what it writes."""
    if op.written:
        written = {1 + place: f"{op.label}: {op.inputs[place].shown}" for place in op.written}
        register(writing_schema(op), partial(_implementation_of_writing, op), partial(_fake_of_writing, op), written)
        register_without_gradient(f"{op.name}_write")
    for kind in (op.returns, *op.variants):
        name = node(op, kind)
        register(schema(op, kind), partial(_implementation, op, kind), partial(_fake, op, kind))
        if op.differentiable:
            register_gradient(name, _autograd.backward, partial(_remember, op, kind))
        elif op.no_gradient:
            register_gradient(name, partial(_autograd.no_second_derivative, op), None)
        else:
            register_without_gradient(name)
        first = 1 + len(sizes_in(op, kind)) + len(_read(op, op.names)) + op.takes_number
        outs = {first + i: f"{op.label}: {op.out_name(result)}" for i, result in enumerate(op.results_in(kind))}
        register(schema(op, kind, into=True), partial(_implementation_into, op, kind), no_results, outs)
        register_without_gradient(f"{name}_out")  # calls are checked by `refuse_writing` before


def register(schema: str, implementation: Any, fake: Any, written: Mapping[int, str] = MappingProxyType({})) -> None:
    """Add an op to the library. `written` has names of the arguments that it writes into, by their places."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, device)
    op = getattr(torch.ops.cupy_router, name).default
    arguments = op._schema.arguments
    names = [argument.name for argument in arguments]
    torch.library.register_fake(f"cupy_router::{name}", partial(_checked_fake, name, names, fake), lib=LIBRARY)
    for kind in ("Negative", "ZeroTensor"):  # by themselves, they fail for ops that write, or have strides of 0
        LIBRARY.impl(name, partial(_with_plain_tensors, name, written), kind)
    places = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    if places:
        LIBRARY.impl(name, partial(_raise_versions, op, places), "ADInplaceOrView", with_keyset=True)


def _checked_fake(op: str, names: Sequence[str], fake: Any, *arguments: Any) -> Any:
    """Return fake results. PyTorch asks for them also where one tensor is on "meta" and the others are not."""
    given = {name: value for name, value in zip(names, arguments, strict=True) if isinstance(value, torch.Tensor)}
    if len({tensor.device for tensor in given.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(f"{op}: all arrays must lie on one device, got {places}")
    return fake(*arguments)


def _raise_versions(op: Any, written: Sequence[int], keys: Any, *arguments: Any) -> None:
    """Tell autograd of writes while it traces an op; the op that a graph calls raises the versions again."""
    for position in written:
        if arguments[position] is not None:
            torch.autograd.graph.increment_version(arguments[position])
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)  # type: ignore[no-any-return]


def _with_plain_tensors(name: str, written: Mapping[int, str], *arguments: Any) -> Any:
    """Run an op that got lazily negated tensors, or zeros without memory."""
    for place, argument in written.items():
        if tensors.is_lazy(arguments[place]):
            tensors.refuse_without_memory(argument, arguments[place])
    plain = [tensors.resolved(argument) if tensors.is_lazy(argument) else argument for argument in arguments]
    return getattr(torch.ops.cupy_router, name)(*plain)


def no_results(*arguments: Any) -> None:
    """Fake of an op that returns nothing."""


def register_gradient(name: str, backward: Any, setup_context: Any) -> None:
    """Give an op of the library a gradient."""
    torch.library.register_autograd(f"cupy_router::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def register_without_gradient(name: str) -> None:
    """Let autograd pass over an op of the library."""
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


for _op in OPS.values():
    define(_op)

# torch.export.save and AOTInductor write the types of results. Private in PyTorch, so it may disappear.
_register_namedtuple = getattr(torch.utils._pytree, "_register_namedtuple", None)
if _register_namedtuple is not None:
    for _name, _kind in RESULTS.items():
        _register_namedtuple(_kind, serialized_type_name=f"cupy_router.{_name}")
torch.serialization.add_safe_globals([*RESULTS.values()])  # programs that were exported with such arguments have them
