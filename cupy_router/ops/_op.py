# SPDX-License-Identifier: Apache-2.0
"""The declaration of an op, from which the runner and the framework packages derive everything.

Derived from an :class:`Op` are the checks of dtypes and shapes, the shapes of the results, the schema and the fake
implementation of torch.library, the custom-call target and the abstract results of JAX, vmap, sharding, and the lists
of ops in tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from cupy_router.arrays import Output, View
from cupy_router.method import from_text
from cupy_router.ops import _checks as check
from cupy_router.tuning import Gpu

if TYPE_CHECKING:
    from cupy_router.ops._cached import Kernel, Work

FLOATS, INTS, IDS = (
    ("float32", "float16", "bfloat16"),
    ("int32", "int64"),
    ("uint8", "int16", "uint16", "int32", "int64"),
)
ANY: tuple[str, ...] = ()  # any dtype: the op moves bytes


class Options:
    """Base of the options of an op: frozen dataclasses of methods, strings, numbers, bools and None.

    An op with a :class:`RoutingMethod` has it as the field `method`.
    """

    @property
    def text(self) -> str:
        """The options as JSON, which has the same meaning in every process. Graphs contain it."""
        # Plain string operations, because torch.compile traces this.
        names = self.__dataclass_fields__  # type: ignore[attr-defined]  # subclasses are dataclasses
        return "{" + ", ".join([f'"{name}": {_as_json(getattr(self, name))}' for name in names]) + "}"


def _as_json(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return f'"{value}"'
    return value.text  # type: ignore[no-any-return]  # a method, or options within options


@dataclass(frozen=True)
class Input:
    """An array argument.

    kind: "row": an entry of its first axis belongs to each row of the call; "layer": the same for all rows; "count":
        `num_valid`, an int or a one-element int32 array.
    axes: names of its axes. Axes of one name have the same size throughout a call.
    dtypes: the allowed dtypes, or ANY.
    written: the op writes into it.
    """

    name: str
    kind: str
    axes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = FLOATS
    required: bool = False
    written: bool = False


def row(name: str, axes: str, dtypes: tuple[str, ...] = FLOATS, *, required: bool = False) -> Input:
    """Declare an input with one entry for each row of the call."""
    return Input(name, "row", _split(axes), dtypes, required)


def layer(
    name: str, axes: str, dtypes: tuple[str, ...] = FLOATS, *, required: bool = False, written: bool = False
) -> Input:
    """Declare an input that all rows share."""
    return Input(name, "layer", _split(axes), dtypes, required, written)


NUM_VALID = Input("num_valid", "count", (), ("int32",))


@dataclass(frozen=True)
class Result:
    """An array that an op returns.

    axes: names of its axes; their sizes come from inputs, `Op.sizes` or `Op.result_sizes`.
    dtype: its dtype, or a function of the options and the dtypes of the inputs by name.
    fill: value in rows from `num_valid` on.
    exists: function of the options that is true if they ask for it; None: always.
    differentiable: the inputs that it has a gradient with respect to.
    """

    name: str
    axes: str
    dtype: str | Callable[[Any, Mapping[str, str]], str]
    fill: float | int = 0
    exists: Callable[[Any], bool] | None = None
    differentiable: tuple[str, ...] = ()

    @cached_property
    def axis_names(self) -> tuple[str, ...]:
        """Names of the axes as a tuple."""
        return _split(self.axes)


class Arrays:
    """The arrays of one call as attributes: views, or host arrays for the reference. None if left out."""

    def __init__(self, names: Sequence[str], arrays: Sequence[Any]) -> None:
        self.__dict__.update(zip(names, arrays, strict=True))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def given(self, *names: str) -> list[str]:
        """Return the names of the arrays that are not None, among these."""
        return [name for name in names if self.__dict__[name] is not None]

    def named(self, *names: str) -> dict[str, Any]:
        """Return the arrays of these names, None among them."""
        return {name: self.__dict__[name] for name in names}


class Op:
    """One op: a subclass declares it as class attributes, followed by its methods, and has one instance.

    name: its name in graphs and files.
    label: prefix of its errors; the name by default.
    options: the dataclass of its options.
    inputs, results: in the order of the kernel's parameters. The first input is never left out; a `NUM_VALID` is last.
    returns: the named tuple that the caller gets. Its fields are results. A field in its dict `NESTED` is a named tuple
        of the results whose names begin with "field.". A result that does not exist is None.
    rows_independent: True if a row of the results depends only on the same row of the inputs, so that calls may be
        merged into one, and one call may be split.
    vmap: "merge" calls into one, "loop" over them, or "refuse".
    single_kernel: True if every call is one launch without scratch memory. An op for which that depends on the call
        overrides `is_single_kernel`.
    """

    name: str
    label: str = ""
    options: Any  # a subclass of Options
    inputs: tuple[Input, ...]
    results: tuple[Result, ...]
    returns: Any
    rows_independent = True
    vmap = "merge"
    single_kernel = False

    # -- Defined by each op --------------------------------------------------------------------------------------------

    def sizes(self, options: Any) -> Mapping[str, int]:
        """Return the sizes of axes that follow from the options alone."""
        return {}

    def result_sizes(self, options: Any, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the sizes of further axes of results, from the known sizes, which may be symbolic."""
        return {}

    def check(self, options: Any, arrays: Arrays) -> None:
        """Check rules beyond the declared dtypes and shapes, on views of the inputs."""

    def kernel(self, options: Any, arrays: Arrays, gpu: Gpu) -> Kernel | Work:
        """Choose the kernel, or several, for views of inputs and results on this GPU."""
        raise NotImplementedError

    def reference(self, options: Any, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
        """Return the existing results as NumPy arrays. Inputs are host arrays with `num_valid` valid rows."""
        raise NotImplementedError

    def max_rows(self, options: Any) -> int | None:
        """Return the most rows that a call may have; None: any number."""
        return None

    def is_single_kernel(self, options: Any, arrays: Arrays) -> bool:
        """Return whether this call is one launch without scratch memory."""
        return self.single_kernel

    def __init_subclass__(cls) -> None:
        cls.label = cls.label or cls.name

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    # -- Derived from the declaration ----------------------------------------------------------------------------------

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(declared.name for declared in self.inputs)

    @cached_property
    def result_names(self) -> tuple[str, ...]:
        """Names of all results, including those that only exist for some options."""
        return tuple(result.name for result in self.results)

    @cached_property
    def by_row(self) -> frozenset[str]:
        """Names of the inputs with one entry for each row."""
        return frozenset(declared.name for declared in self.inputs if declared.kind == "row")

    @cached_property
    def takes_number(self) -> bool:
        """True if the op has `num_valid`. Then kernels have an int parameter `num_valid_value`."""
        return any(declared.kind == "count" for declared in self.inputs)

    @cached_property
    def differentiable(self) -> tuple[int, ...]:
        """Positions of the inputs that a result has a gradient with respect to."""
        names = {name for result in self.results for name in result.differentiable}
        return tuple(i for i, name in enumerate(self.names) if name in names)

    @cached_property
    def written(self) -> tuple[int, ...]:
        """Positions of the inputs that the op writes into."""
        return tuple(i for i, declared in enumerate(self.inputs) if declared.written)

    @cached_property
    def has_options(self) -> bool:
        """True if some results only exist for some options, or `returns` is nested."""
        return any(result.exists for result in self.results) or self.returns._fields != self.result_names

    # -- Results -------------------------------------------------------------------------------------------------------

    def existing(self, options: Any) -> tuple[Result, ...]:
        """Return the results that these options ask for."""
        if not self.has_options:
            return self.results
        return tuple(result for result in self.results if result.exists is None or result.exists(options))

    def outputs(self, options: Any, shapes: Sequence[Any], dtypes: Sequence[str | None]) -> tuple[Output, ...]:
        """Return shape and dtype of each existing result, from shapes and dtypes of the inputs (None: left out).

        Sizes may be symbolic. Nothing is checked.
        """
        sizes = dict(self.sizes(options))
        for declared, shape in zip(self.inputs, shapes, strict=True):
            if shape is not None:
                for axis, size in zip(declared.axes, shape, strict=False):
                    sizes.setdefault(axis, size)
        sizes |= self.result_sizes(options, sizes)
        by_name = {name: dtype for name, dtype in zip(self.names, dtypes, strict=True) if dtype is not None}
        return tuple([
            (
                tuple([sizes[axis] for axis in result.axis_names]),
                result.dtype if isinstance(result.dtype, str) else result.dtype(options, by_name),
            )
            for result in self.existing(options)
        ])  # fmt: skip

    def outputs_of(self, options: Any, views: Sequence[View | None]) -> tuple[Output, ...]:
        """Return shape and dtype of each existing result of a call with these inputs."""
        return self.outputs(
            options, [view and view.shape for view in views], [None if view is None else view.dtype for view in views]
        )

    def pack(self, options: Any, arrays: Sequence[Any]) -> Any:
        """Return the named tuple for the caller, from the existing results."""
        if not self.has_options:
            return self.returns(*arrays)
        found = dict(zip((result.name for result in self.existing(options)), arrays, strict=True))
        return _packed(self.returns, "", found, frozenset(self.result_names))

    def unpack(self, options: Any, out: Any) -> tuple[Any, ...]:
        """Return the existing results in an `out` of the caller; TypeError if its form is wrong."""
        if not self.has_options:
            if isinstance(out, tuple) and len(out) == len(self.results):
                return out
            count = ("one array", "two arrays")[len(self.results) - 1] if len(self.results) < 3 else "arrays"
            raise TypeError(f"out must be a {self.returns.__name__} of {count}, got {type(out).__name__}")
        found: dict[str, Any] = {}
        _unpack(self.returns, "out", "", out, frozenset(self.result_names), found)
        wanted = [result.name for result in self.existing(options)]
        for name, array in found.items():
            if array is not None and name not in wanted:
                raise TypeError(f"out.{name} must be None where it is not returned, got {type(array).__name__}")
        return tuple(found[name] for name in wanted)

    # -- Arguments -----------------------------------------------------------------------------------------------------

    def argument(self, position: int, options: Any) -> str:
        """Return the name of an array argument: inputs, then the existing fields of `out`."""
        if position < len(self.names):
            return self.names[position]
        return f"out.{self.existing(options)[position - len(self.names)].name}"

    def check_inputs(self, options: Any, views: Sequence[View | None]) -> None:
        """Check the inputs: dtypes and shapes by the declaration, then the further rules of the op."""
        sizes = dict(self.sizes(options))
        for declared, view in zip(self.inputs, views, strict=True):
            if view is None:
                if declared.required:
                    raise TypeError(f"{declared.name} must be an array, got None")
                continue
            if declared.dtypes:
                check.dtype(view, declared.dtypes)
            if declared.kind == "count":
                check.count(view)
                continue
            if declared.written:
                check.writable(view)
            check.axes(view, declared.axes, sizes)
        self.check(options, Arrays(self.names, views))

    def options_of(self, text: str) -> Any:
        """Return the options from their text, as a graph contains it."""
        return _options_of(self.options, text)


def _split(axes: str) -> tuple[str, ...]:
    return tuple(axes.split(", ")) if axes else ()


@lru_cache(maxsize=4096)
def _options_of(kind: Any, text: str) -> Any:
    fields = json.loads(text)
    return kind(**{name: _value(kind, name, value) for name, value in fields.items()})


def _value(kind: type[Options], name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    nested = getattr(kind, "NESTED", {}).get(name)
    text = json.dumps(value)
    return from_text(text) if nested is None else _options_of(nested, text)


def _packed(kind: Any, prefix: str, found: Mapping[str, Any], names: Collection[str]) -> Any:
    if prefix and not any(name.startswith(prefix) for name in found):
        return None
    nested = getattr(kind, "NESTED", {})
    return kind(
        *(
            _packed(nested[field], f"{prefix}{field}.", found, names) if field in nested else found.get(prefix + field)
            for field in kind._fields
        )
    )


def _unpack(kind: Any, path: str, prefix: str, out: Any, names: Collection[str], found: dict[str, Any]) -> None:
    if out is None and prefix:
        found |= {name: None for name in names if name.startswith(prefix)}
        return
    if not (isinstance(out, tuple) and len(out) == len(kind._fields)):
        raise TypeError(f"{path} must be a {kind.__name__} of {len(kind._fields)} arrays, got {type(out).__name__}")
    nested = getattr(kind, "NESTED", {})
    for field, array in zip(kind._fields, out, strict=True):
        if field in nested:
            _unpack(nested[field], f"{path}.{field}", f"{prefix}{field}.", array, names, found)
        else:
            found[prefix + field] = array
