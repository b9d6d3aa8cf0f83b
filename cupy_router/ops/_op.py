# SPDX-License-Identifier: Apache-2.0
"""The declaration of an op, from which the runner and the framework packages derive everything.

Derived from an :class:`Op` are the checks of dtypes and shapes, the shapes of the results, the schema and the fake
implementation of torch.library, the custom-call target and the abstract results of JAX, vmap, sharding, and the lists
of ops in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cupy_router.arrays import Output, View
from cupy_router.ops import _checks as check
from cupy_router.ops._declared import Arrays, Input, Minimum, Result
from cupy_router.ops._options import Options, options_of
from cupy_router.tuning import Gpu

if TYPE_CHECKING:
    from cupy_router.ops._cached import Kernel, Work


class Op:
    """One op: a subclass declares it as class attributes, followed by its methods, and has one instance.

    name: its name in graphs and files.
    label: prefix of its errors; the name by default.
    options: the dataclass of its options.
    inputs, results: in the order of the kernel's parameters. The first input is never left out; a `NUM_VALID` is last.
    returns: the named tuple the caller gets unless `bare`. Its fields are results; one that does not exist is None.
    variants: further named tuples. The caller gets the one whose fields are exactly those that exist, if there is one.
    nested: named tuples by the field in which they stand; the paths of their results are "field.name".
    bare: whether the caller gets and gives the only result itself, not in a tuple.
    numbers: ints in what the caller gets: the name of a size by path.
    symbolic: paths of int options that may be sizes which a graph does not know. The graph has them beside the text.
    rows_independent: whether a row of the results depends on the same row of the inputs alone, so that rows of several
        calls may be merged into one call, and one call may be cut into several. An op for which that depends on the
        options overrides `is_independent`.
    vmap: "merge" calls into one where rows are independent, otherwise "loop" over them; always "loop"; or "refuse".
    gradient: the rule in the gradient modules of the frameworks: "routing" for weights and indices. Needed if a result
        is differentiable.
    no_gradient: of an op that is a gradient itself: the sentence that refuses its own.
    single_kernel: whether every call is the launch of one kernel without scratch memory. An op for which that depends
        on the call overrides `is_single_kernel`.
    """

    name: str
    label: str = ""
    options: Any  # a subclass of Options
    inputs: tuple[Input, ...]
    results: tuple[Result, ...]
    returns: Any
    variants: tuple[Any, ...] = ()
    nested: Mapping[str, Any] = MappingProxyType({})
    numbers: Mapping[str, str] = MappingProxyType({})
    symbolic: tuple[str, ...] = ()
    bare = False
    rows_independent = True
    vmap = "merge"
    gradient = ""
    no_gradient = ""
    single_kernel = False

    # -- Defined by each op --------------------------------------------------------------------------------------------

    def sizes(self, options: Any) -> Mapping[str, int]:
        """Return the sizes of axes that follow from the options alone."""
        return {}

    def result_sizes(self, options: Any, sizes: Mapping[str, Any], minimum: Minimum = min) -> Mapping[str, Any]:
        """Return the sizes of further axes of results, from the known sizes, which may be symbolic.

        `minimum` takes the minimum of two sizes, without a guard if they are symbolic.
        """
        return {}

    def check(self, options: Any, arrays: Arrays) -> None:
        """Check rules beyond the declared dtypes and shapes, on views of the inputs."""

    def check_traced(self, options: Any, arrays: Sequence[Any], label: str) -> None:
        """Check what the text of the options lacks, on the inputs of a call that is traced. Sizes may be symbolic."""

    def kernel(self, options: Any, arrays: Arrays, gpu: Gpu) -> Kernel | Work:
        """Choose the kernel, or several, for views of inputs and results on this GPU."""
        raise NotImplementedError  # every op defines it

    def reference(self, options: Any, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
        """Return the existing results as NumPy arrays. Inputs are host arrays with `num_valid` valid rows."""
        raise NotImplementedError  # every op defines it

    def example(self) -> Any:
        """Return options with which the tests that all ops share call this op."""
        raise NotImplementedError  # every op defines it

    def max_rows(self, options: Any) -> int | None:
        """Return the most rows that a call may have; None: any number."""
        return None

    def is_single_kernel(self, options: Any, arrays: Arrays) -> bool:
        """Return whether this call is one launch without scratch memory."""
        return self.single_kernel

    def writing_options(self, options: Any) -> Any:
        """Return options for a call that is made for what it writes into its inputs alone."""
        return options

    def instead(self, options: Any) -> str:
        """Return the remedy for an input that the op writes into and that cannot be written."""
        return ""

    def is_independent(self, options: Any) -> bool:
        """Return whether the rows of a call with these options are independent."""
        return self.rows_independent

    def mapping(self, options: Any) -> str:
        """Return how vmap maps over calls with these options: "merge", "loop" or "refuse"."""
        return "loop" if self.vmap == "merge" and not self.is_independent(options) else self.vmap

    def __init_subclass__(cls) -> None:
        cls.label = cls.label or getattr(cls, "name", "")  # a base of ops has none

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    # -- Derived from the declaration ----------------------------------------------------------------------------------

    names: tuple[str, ...]  # of the inputs
    result_names: tuple[str, ...]  # of all results, also of those that exist for some options only
    by_row: frozenset[str]  # names of the inputs with an entry for each row
    takes_number: bool  # num_valid may be given; then kernels have an int parameter `num_valid_value`
    differentiable: tuple[int, ...]  # positions of the inputs that a result has a gradient with respect to
    written: tuple[int, ...]  # positions of the inputs that the op writes into
    varies: bool  # some results exist for some options only
    plain: frozenset[Any]  # the named tuples whose fields are results that always exist, in order
    flat: frozenset[Any]  # the named tuples in which no other stands

    def __init__(self) -> None:
        smooth = {name for result in self.results for name in result.differentiable}
        self.names = tuple(declared.name for declared in self.inputs)
        self.result_names = tuple(result.name for result in self.results)
        self.by_row = frozenset(declared.name for declared in self.inputs if declared.kind == "row")
        self.takes_number = any(declared.kind == "count" for declared in self.inputs)
        self.differentiable = tuple(i for i, name in enumerate(self.names) if name in smooth)
        self.written = tuple(i for i, declared in enumerate(self.inputs) if declared.written)
        self.varies = any(result.exists for result in self.results)
        # In the instance too, because torch.compile of PyTorch 2.4 does not read attributes of its class.
        self.inputs, self.results = self.inputs, self.results
        self.options, self.returns, self.variants = self.options, self.returns, self.variants
        self.nested, self.numbers = dict(self.nested), dict(self.numbers)
        always = tuple(result.path for result in self.results if result.exists is None)
        self.plain = frozenset(kind for kind in (self.returns, *self.variants) if kind._fields == always)
        self.flat = frozenset(kind for kind in (self.returns, *self.variants) if kind._fields == self.paths(kind))
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        names, kinds = (*self.names, *self.result_names), [declared.kind for declared in self.inputs]
        if len(set(names)) < len(names):
            raise TypeError(f"op {self.name}: inputs and results need different names, got {names}")
        if "count" in kinds[:-1]:
            raise TypeError(f"op {self.name}: num_valid must be the last input")
        if self.vmap not in ("merge", "loop", "refuse") or (self.vmap == "merge" and not self.rows_independent):
            raise TypeError(f"op {self.name}: vmap must be 'loop' or 'refuse', or 'merge' for independent rows")
        if self.differentiable and not self.gradient:
            raise TypeError(f"op {self.name}: differentiable results need a rule, named by `gradient`")
        for kind in (self.returns, *self.variants):
            declared = [result.path for result in self.results_in(kind)]
            if [path for path in self.paths(kind) if path not in self.numbers] != declared:
                raise TypeError(f"op {self.name}: {kind.__name__} must have the results {declared} in this order")

    def has_rows(self, name: str, length: int, num_rows: int) -> bool:
        """Return whether an input with so long a first axis has an entry for each of the rows of a call."""
        kind = self.inputs[self.names.index(name)].kind
        return kind == "row" or (kind == "row or one" and length == num_rows > 1)

    # -- Results -------------------------------------------------------------------------------------------------------

    def existing(self, options: Any) -> tuple[Result, ...]:
        """Return the results that these options ask for."""
        if not self.varies:
            return self.results
        options = self.as_options(options)
        return tuple(result for result in self.results if result.exists is None or result.exists(options))

    def sizes_of(self, options: Any, shapes: Sequence[Any], minimum: Minimum = min) -> dict[str, Any]:
        """Return the sizes of all axes by name, from the shapes of the inputs (None: left out). Nothing is checked."""
        sizes = dict(self.sizes(options))
        for declared, shape in zip(self.inputs, shapes, strict=True):
            if shape is not None:
                for place, axis in enumerate(declared.axes[: len(shape)]):  # what torch.compile of PyTorch 2.4 traces
                    if axis not in sizes:
                        sizes[axis] = shape[place]
        return {**sizes, **self.result_sizes(options, sizes, minimum)}

    def outputs(
        self, options: Any, shapes: Sequence[Any], dtypes: Sequence[Any], minimum: Minimum = min
    ) -> tuple[Output, ...]:
        """Return shape and dtype of each existing result, from shapes and dtypes of the inputs (None: left out).

        Sizes may be symbolic. Nothing is checked.
        """
        sizes = self.sizes_of(options, shapes, minimum)
        by_name = dict(zip(self.names, dtypes, strict=True))
        outputs = []
        for result in self.existing(options):
            dtype = result.dtype if isinstance(result.dtype, str) else result.dtype(options, by_name)
            outputs.append((tuple([sizes[axis] for axis in result.axis_names]), dtype))
        return tuple(outputs)

    def outputs_of(self, options: Any, views: Sequence[View | None]) -> tuple[Output, ...]:
        """Return shape and dtype of each existing result of a call with these inputs."""
        return self.outputs(
            options, [view and view.shape for view in views], [None if view is None else view.dtype for view in views]
        )

    def returned(self, options: Any) -> Any:
        """Return the named tuple that the caller gets with these options."""
        if not self.variants:
            return self.returns
        fields: list[str] = []
        for result in self.existing(options):
            field = result.path.partition(".")[0]
            if field not in fields:
                fields.append(field)
        for kind in self.variants:
            if list(kind._fields) == fields:
                return kind
        return self.returns

    def paths(self, kind: Any) -> tuple[str, ...]:
        """Return the paths of arrays and ints in a named tuple that the caller gets, in order."""
        inner = {name: [f"{name}.{part}" for part in inner._fields] for name, inner in self.nested.items()}
        return tuple([path for name in kind._fields for path in inner.get(name, [name])])

    def packer(self, options: Any, sizes: Callable[[], Mapping[str, Any]] = dict) -> Callable[..., Any]:
        """Return a function from the existing results to what the caller gets.

        `sizes` returns those of `sizes_of`. It is called if the caller gets ints.
        """
        kind = self.returned(options)
        existing = self.existing(options)
        found = [result.path for result in existing]
        paths = self.paths(kind)
        if tuple(found) == kind._fields:
            return (lambda result: result) if self.bare else kind  # a named tuple
        known = sizes() if self.numbers else {}
        others = [known.get(self.numbers.get(path, "")) for path in paths]  # ints, and None for what does not exist
        places = [found.index(path) if path in found else len(found) + i for i, path in enumerate(paths)]
        nest = None if kind in self.flat else self._nest

        def pack(*arrays: Any) -> Any:
            given = (*arrays, *others)
            leaves = [given[place] for place in places]
            return kind(*leaves) if nest is None else nest(kind, leaves)

        return pack

    def _nest(self, kind: Any, leaves: Sequence[Any]) -> Any:
        """Return a named tuple of arrays and ints, in the order of `paths`."""
        fields, begin = [], 0
        for name in kind._fields:
            if name in self.nested:
                inner = self.nested[name]
                end = begin + len(inner._fields)
                fields.append(inner(*leaves[begin:end]))
            else:
                end = begin + 1
                fields.append(leaves[begin])
            begin = end
        return kind(*fields)

    def pack(self, options: Any, arrays: Sequence[Any], sizes: Callable[[], Mapping[str, Any]] = dict) -> Any:
        """Return what the caller gets, of the results that exist."""
        return self.packer(options, sizes)(*arrays)

    def flatten(self, options: Any, out: Any) -> tuple[Any, ...]:
        """Return the existing results of an `out` of the caller's; TypeError if it has not the right form."""
        if self.bare:
            return (out,)
        if type(out) in self.plain:
            return out  # type: ignore[no-any-return]  # the usual form; `check_out` counts them
        kind = self.returned(options)
        found = dict(zip(self.paths(kind), self.leaves(options, _checked("out", kind, out)), strict=True))
        wanted = [result.path for result in self.existing(options)]
        for path, array in found.items():
            if array is not None and path not in wanted and path not in self.numbers:
                missing = ", ".join([f"out.{path}" for path in wanted if found.get(path) is None])
                others = missing and f", and {missing} must be given, got None"
                given = f"{type(array).__name__}{others}"
                raise TypeError(f"out.{path} must be None where it is not returned, got {given}")
        return tuple(found.get(path) for path in wanted)

    def leaves(self, options: Any, out: Any) -> Sequence[Any]:
        """Return the arrays and ints in an `out` of the caller's, in the order of `paths`.

        TypeError if it is no such tuple. Which of the arrays have to be there is left to :meth:`flatten`.
        """
        kind = type(out)
        if self.bare or kind in self.flat:
            return (out,) if self.bare else out
        if kind not in (self.returns, *self.variants):
            _checked("out", self.returned(options), out)
        leaves: list[Any] = []
        for name, value in zip(kind._fields, out, strict=True):
            inner = self.nested.get(name)
            if inner is None:
                leaves.append(value)
            else:
                leaves.extend([None] * len(inner._fields) if value is None else _checked(f"out.{name}", inner, value))
        return leaves

    def numbers_in(self, options: Any, out: Any) -> tuple[Any, ...]:
        """Return the ints of an `out` that `flatten` accepts, None where the caller left one out; () without any."""
        if not self.numbers or type(out) in self.plain:
            return ()
        found = dict(zip(self.paths(type(out)), self.leaves(options, out), strict=True))
        numbers = tuple([found[path] for path in self.numbers if path in found])  # all of them, or none
        for path, number in zip(self.numbers, numbers, strict=False):
            if type(number) is not int and number is not None and not check.is_int(number):
                raise TypeError(f"out.{path} must be an int or None, got {type(number).__name__}")
        return numbers

    def check_numbers(self, given: Sequence[Any], sizes: Mapping[str, Any]) -> None:
        """Refuse ints of an `out` that are not those of the call."""
        for (path, size), number in zip(self.numbers.items(), given, strict=False):
            if number is not None and number != sizes[size]:
                raise ValueError(f"out.{path} must be {sizes[size]} or None, got {number!r}")

    def check_out(self, options: Any, outs: Sequence[Any]) -> None:
        """Refuse an `out` of fewer arrays than these options ask for."""
        existing = self.existing(options)
        if outs and len(outs) < len(existing):
            kind = self.returned(options)
            raise TypeError(f"out must be {kind.__name__}({', '.join(kind._fields)}), got {type(outs).__name__}")

    def as_options(self, options: Any) -> Any:
        """Return options, given as such, by the tuple of their fields, or by their only field."""
        if isinstance(options, Options):
            return options
        return self.options(*options) if type(options) is tuple else self.options(options)

    def results_in(self, kind: Any) -> tuple[Result, ...]:
        """Return the results that may stand in a named tuple that the caller gets, existing or not."""
        if not self.variants:
            return self.results
        return tuple([result for result in self.results if result.path.partition(".")[0] in kind._fields])

    def parameters(self, options: Any) -> tuple[str, ...]:
        """Return the arrays that a call passes to its kernels: the inputs, and the results in what the caller gets."""
        return (*self.names, *[result.name for result in self.results_in(self.returned(options))])

    # -- Arguments -----------------------------------------------------------------------------------------------------

    def argument(self, position: int, options: Any) -> str:
        """Return the name of an array argument: inputs, then the existing fields of `out`."""
        if position < len(self.names):
            return self.inputs[position].shown
        return self.out_name(self.existing(options)[position - len(self.names)])

    def out_name(self, result: Result) -> str:
        """Return the name of a result in `out`."""
        return "out" if self.bare else f"out.{result.path}"

    def written_names(self, options: Any, arrays: Sequence[Any]) -> dict[int, str]:
        """Return the names of the arrays that a call writes into, by their places in inputs followed by `out`."""
        places = (*self.written, *range(len(self.names), len(arrays)))
        return {place: self.argument(place, options) for place in places if arrays[place] is not None}

    def check_inputs(self, options: Any, views: Sequence[View | None]) -> None:
        """Check the inputs: dtypes and shapes by the declaration, then the further rules of the op."""
        sizes = dict(self.sizes(options))
        for declared, view in zip(self.inputs, views, strict=True):
            if view is None:
                if declared.required or (declared.unless and views[self.names.index(declared.unless)] is None):
                    raise TypeError(f"{declared.shown} must be an array, got None")
                continue
            if declared.dtypes:
                check.dtype(view, declared.dtypes)
            else:
                check.moved(view)
            if declared.kind == "count":
                check.count(view)
                continue
            if declared.written:
                check.writable(view, self.instead(options) if view.readonly else "")
            check.axes(view, declared.axes_of(len(view.shape)), sizes)
        self.check(options, Arrays(self.names, views))

    def options_of(self, text: str) -> Any:
        """Return the options from their text, as a graph contains it."""
        return options_of(self.options, text)


def _checked(path: str, kind: Any, out: Any) -> Any:
    """Return an `out`, or a tuple in it, that is a named tuple of a kind."""
    if not isinstance(out, kind):
        raise TypeError(f"{path} must be {kind.__name__}({', '.join(kind._fields)}), got {type(out).__name__}")
    return out
