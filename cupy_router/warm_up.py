# SPDX-License-Identifier: Apache-2.0
"""Make the kernels of later calls ready, so that none of those compiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cupy_router import compiler
from cupy_router.arrays import View, dense_strides, view_of
from cupy_router.kernel_log import KernelReady as KernelReady
from cupy_router.kernel_plan import Wanted
from cupy_router.make_ready import Progress as Progress
from cupy_router.make_ready import make_ready
from cupy_router.method import RoutingMethod, resolve
from cupy_router.ops import _checks as check
from cupy_router.ops import _hash_layer, activation_topk, dense_router, hash_router
from cupy_router.ops._declared import FLOATS, Input
from cupy_router.ops._given import EMPTY, ROUTE, as_unset
from cupy_router.ops._invariant import as_batch_invariant
from cupy_router.ops._layout import LayoutSpec, as_spec
from cupy_router.ops._method import MethodOptions, method_sizes
from cupy_router.ops._op import Op
from cupy_router.ops._planned import kernels_of, with_rows
from cupy_router.ops._replicas import as_physical
from cupy_router.ops._routed import as_logits_dtype
from cupy_router.ops.dense_router import DenseOptions
from cupy_router.ops.hash_router import HashOptions
from cupy_router.tuning import Gpu, gpu_of

NUM_TOKENS = (1, 8192)
MAX_TOKENS = 2**20
_LABEL = "warmup"
_ARRAYS = (
    "weight", "bias", "bias_index", "logit_bias", "expert_scale", "indices", "replicas", "replica_counts", "table",
    "token_ids", "num_valid",
)  # fmt: skip
_OPTIONS = {
    "layout": None, "unset": ROUTE, "path": None, "return_logits": False, "logits_dtype": "float32",
    "batch_invariant": False, "num_physical": None, "replica_offset": 0,
}  # fmt: skip
_OF_ROUTER = (
    "token_ids", "bias_index", "indices", "replicas", "replica_counts", "replica_offset", "num_physical", "num_valid",
    "layout", "unset", "return_logits", "batch_invariant",
)  # fmt: skip
_ADDRESS = 1 << 20  # of arrays that do not exist


class Chosen(NamedTuple):
    """The options of calls, checked one by one."""

    layout: LayoutSpec | None
    unset: str
    path: str | None
    logits_dtype: str | None
    batch_invariant: bool
    physical: tuple[int | None, int]


class Calls(NamedTuple):
    """Calls that differ in their number of rows only: the op, its options, and views of its inputs."""

    op: Op
    options: Any
    views: list[View | None]


def warmup(
    method: RoutingMethod | str,
    *,
    hidden: int | None = None,
    dtypes: Sequence[str] = ("bfloat16",),
    num_tokens: tuple[int, int] = NUM_TOKENS,
    device: int | None = None,
    progress: Progress | None = None,
    **arrays_given: Any,
) -> tuple[KernelReady, ...]:
    """Compile all kernels that calls with this method need, for every number of tokens in a range.

    Afterwards no such call compiles anything, if rows are dense, addresses are multiples of 16 bytes, and the calls
    have exactly the arrays and options that are named here. Other calls may compile once;
    :func:`cupy_router.on_compile` reports them. The compiled kernels are also kept in CuPy's cache folder, from which
    other processes load them, within some tens of milliseconds each.

    With `hidden`, the calls are those of :func:`cupy_router.dense_router` and of a :class:`cupy_router.Router`, without
    it those of :func:`cupy_router.activation_topk`; with `table` those of :func:`cupy_router.hash_router` and of a
    Router with a table. A Router and a Gate warm up by their own arrays: :meth:`cupy_router.Router.warmup`.

    Args:
        method: A :class:`RoutingMethod`, or the name of a preset such as "deepseek-v4-flash".
        hidden: Number of columns of x.
        dtypes: The dtypes of x, without `hidden` of logits, by name; each is made ready.
        num_tokens: The least and the greatest number of tokens of a call, from 1 to 2**20.
        device: Number of the GPU; by default the current device of this thread.
        progress: Called as `progress(done, total)` after each kernel, and once before the first.
        **arrays_given: The arguments that the calls have beside x and method, by name. An array (`weight`, `bias`,
            `bias_index`, `logit_bias`, `expert_scale`, `indices`, `replicas`, `replica_counts`, `table`, `token_ids`,
            `num_valid`) is True, the name of its dtype, or an array like it, which is not read. True is float32 or
            int32, for a weight the dtype of x.
            `replicas`, several biases and their table, and `indices` with the columns of shared experts have to be
            arrays, because their shapes matter; the number of rows of `indices` does not. `token_ids` are int64 unless
            they are named. A `num_valid` that is an int need not be named. Options (`layout`, `unset`, `path`,
            `return_logits`, `logits_dtype`, `batch_invariant`, `num_physical`, `replica_offset`) have their values.

    Returns:
        What became ready, one entry for each kernel, as :func:`cupy_router.on_compile` reports it; nothing if all were
        ready before.

    Raises:
        TypeError: An argument is unknown or has a wrong type or dtype.
        ValueError: A value is out of range, or arguments cannot be combined, as in the call itself.
        RuntimeError: CuPy, NVRTC, a driver or a GPU is missing.

    Gradients, :func:`cupy_router.expert_layout`, :func:`cupy_router.permute` and kernels inside of `jax.jit` are not
    made ready: the first step of training, or the compilation of the program, does that.

    >>> import cupy_router
    >>> from cupy_router.compiler import why_no_cuda
    >>> if why_no_cuda() is None:
    ...     ready = cupy_router.warmup("deepseek-v4-flash", hidden=4096, num_tokens=(1, 64), bias=True)
    """
    chosen = _as_chosen(_LABEL, arrays_given, (*_ARRAYS, *_OPTIONS))
    with check.named(_LABEL):
        report = _as_progress(progress)
        if hidden is not None:
            hidden = check.integer("hidden", hidden, 1)
            arrays_given.setdefault("weight", True)
        where = _cuda(device)
        range_ = _as_range(num_tokens)
        calls = calls_of(resolve(method), hidden, _as_dtypes(dtypes), arrays_given, chosen, where)
        check_calls(calls, range_)
        wanted = wanted_by(calls, range_, gpu_of(where))
    return make_ready(wanted, where, report)


def warm_up_layer(
    label: str,
    method: RoutingMethod,
    arrays: Mapping[str, Any],
    follows_inputs: bool,
    dtypes: Sequence[str] | None,
    num_tokens: tuple[int, int],
    progress: Progress | None,
    arrays_given: Mapping[str, Any],
    known: Sequence[str] = _OF_ROUTER,
) -> tuple[KernelReady, ...]:
    """Make the kernels ready of calls of a Router or a Gate with these arrays.

    follows_inputs: the arrays move to the device of x.
    known: the further arguments that the calls may have.
    """
    chosen = _as_chosen(label, arrays_given, known)
    with check.named(label):
        report = _as_progress(progress)
        views = {name: view_of(name, array) for name, array in arrays.items() if array is not None}
        weight = views.get("weight")
        where = next(iter(views.values())).device
        if follows_inputs and compiler.why_no_cuda() is None:
            where = _cuda(None)
        range_ = _as_range(num_tokens)
        default = "float32" if weight is None else weight.dtype
        names = _as_dtypes(default if dtypes is None else dtypes)
        hidden = 1 if weight is None else weight.shape[1]  # without a weight, x is not read
        given = {**arrays, **arrays_given}
        calls = calls_of(method, hidden, names, given, chosen, where, of_layer=True)
        check_calls(calls, range_)
        if compiler.backend(where[0]) is None:  # the reference needs no kernels
            return ()
        wanted = wanted_by(calls, range_, gpu_of(where))
    return make_ready(wanted, where, report)


# -- Calls -------------------------------------------------------------------------------------------------------------


def calls_of(
    method: RoutingMethod,
    hidden: int | None,
    dtypes: Sequence[str],
    given: Mapping[str, Any],
    chosen: Chosen,
    device: tuple[str, int],
    *,
    of_layer: bool = False,
) -> list[Calls]:
    """Return the calls that the arguments of :func:`warmup` describe.

    of_layer: those of a Router; otherwise also those of the function beside it.
    """
    layout, unset, path, logits, invariant, physical = chosen
    arrays = {name: given[name] for name in _ARRAYS if given.get(name) is not None and given.get(name) is not False}
    if hidden is None and (logits is not None or path is not None):
        raise ValueError("return_logits and path need hidden, without which calls are those on logits")
    if isinstance(arrays.get("replicas"), (bool, str)):
        raise ValueError("replicas must be an array, since its number of columns matters")
    if of_layer and "table" not in arrays:
        arrays.pop("token_ids", None)  # such a router ignores them
    listed: list[tuple[Op, Any, dict[str, Any], bool]]
    if "table" not in arrays and hidden is None:
        listed = [(activation_topk.OP, MethodOptions(method, layout, unset, *physical), arrays, True)]
    elif "table" not in arrays:
        if "weight" not in arrays:
            raise TypeError(
                f"weight must be True, the name of its dtype or an array like it, got {given.get('weight')!r}"
            )
        dense = DenseOptions(method, path, layout, logits, unset, invariant, *physical)
        listed = [(dense_router.OP, dense, arrays, True)]
    elif physical != (None, 0) or path is not None:
        raise ValueError("calls with a table have no path, num_physical or replica_offset")
    else:
        listed = list(_hash_calls(method, hidden, arrays, layout, logits, unset, invariant, of_layer))
    found = []
    for dtype in dtypes:
        sizes = {
            **method_sizes(method), "hidden": hidden or 1, "top_k": method.top_k, "num_tokens": 1, "vocab_size": 1,
            "top_k or top_k + shared": method.top_k, "max_replicas": 1,
        }  # fmt: skip
        for op, options, named, scored in listed:
            inputs = {**named, **({("logits" if hidden is None else "x"): dtype} if scored else {})}
            if inputs.get("weight") is True:
                inputs["weight"] = dtype
            shown = [declared.shown for declared in op.inputs]
            if inputs.keys() - set(shown):
                wrong = min(inputs.keys() - set(shown))
                raise ValueError(f"{wrong} is no argument of {op.name}: it has {', '.join(shown)}")
            views = [_outline(declared, inputs.get(declared.shown), sizes, device) for declared in op.inputs]
            found.append(Calls(op, options, views))
    return found


def _hash_calls(
    method: RoutingMethod, hidden: int | None, arrays: dict[str, Any], layout: Any, logits: Any, unset: str,
    invariant: bool, of_layer: bool,
) -> Iterator[tuple[Op, Any, dict[str, Any], bool]]:  # fmt: skip
    """Yield op, options and arrays of calls with a table; whether logits or x are among them."""
    options = HashOptions(method, layout, logits, batch_invariant=invariant)
    by_table = {"token_ids": "int64", **arrays}
    several = isinstance(by_table["table"], (bool, str)) and "bias" in arrays
    if several:
        raise ValueError("table must be an array where there are several biases, since its number of rows matters")
    scored = "weight" in arrays or hidden is None
    if not of_layer and "indices" not in arrays:
        yield hash_router.OP, options, by_table, scored
        if hidden is None and not arrays.keys() & {"bias", "logit_bias", "expert_scale"}:
            yield hash_router.OP, options, by_table, False  # uniform weights
    if hidden is not None:
        yield _hash_layer.OP, HashOptions(method, layout, logits, unset, invariant), by_table, True
        if "indices" in arrays and "weight" in arrays:  # without token ids, the table says nothing
            names = arrays.keys() - {"table", "token_ids", "bias", "bias_index"}
            named = {name: arrays[name] for name in names}
            yield dense_router.OP, DenseOptions(method, None, layout, logits, EMPTY, invariant), named, True


def _outline(declared: Input, value: Any, sizes: Mapping[str, int], device: tuple[str, int]) -> View | None:
    """Return the view of an array that is True, the name of its dtype, or an array like it."""
    if value is None:
        return None
    shape = tuple([sizes[axis] for axis in declared.axes])
    if value is True:
        dtype = "int32" if "int32" in declared.dtypes else declared.dtypes[0]
    elif isinstance(value, str):
        dtype = value
    else:
        seen = view_of(declared.shown, value)
        dtype = seen.dtype
        if declared.kind == "layer" and seen.device == device:
            return seen
        shape = seen.shape
    strides = dense_strides(shape)
    return View(declared.shown, _ADDRESS, shape, strides, dtype, device, False, None)


def _cuda(index: int | None) -> tuple[str, int]:
    """Return a GPU by its number, or the current one of this thread."""
    runtime = compiler.require_cuda().cuda.runtime
    if index is None:
        return "cuda", int(runtime.getDevice())
    return "cuda", check.integer("device", index, 0, int(runtime.getDeviceCount()) - 1)


def _as_chosen(label: str, given: Mapping[str, Any], known: Sequence[str]) -> Chosen:
    """Return the options among the arguments of calls; errors begin with the label."""
    unknown = given.keys() - set(known)
    if unknown:
        raise TypeError(f"{label}: there is no argument {min(unknown)!r}; calls have {', '.join(known)}")
    options = _OPTIONS | {name: value for name, value in given.items() if name in _OPTIONS}
    if options["path"] not in (None, *dense_router.PATHS):
        raise ValueError(f"{label}: path must be None, 'decode' or 'prefill', got {options['path']!r}")
    return Chosen(
        None if options["layout"] is None else as_spec(label, options["layout"]),
        as_unset(label, options["unset"]),
        options["path"],
        as_logits_dtype(label, options["return_logits"], options["logits_dtype"]),
        as_batch_invariant(label, options["batch_invariant"]),
        as_physical(label, options["num_physical"], options["replica_offset"]),
    )


def _as_progress(progress: Any) -> Progress:
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function or None, got {type(progress).__name__}")
    return progress or (lambda done, total: None)


def _as_dtypes(dtypes: Any) -> tuple[str, ...]:
    if not isinstance(dtypes, Iterable):
        raise TypeError(f"dtypes must be names, such as 'bfloat16', got {dtypes!r}")
    names = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
    if not names:
        raise ValueError(f"dtypes must have at least one of {', '.join(FLOATS)}, got {dtypes!r}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"dtypes must be by name, such as 'bfloat16', got {name!r}")
        if name not in FLOATS:
            raise ValueError(f"dtypes must be among {', '.join(FLOATS)}, got {name!r}")
    return names


def _as_range(num_tokens: Any) -> tuple[int, int]:
    if not isinstance(num_tokens, (tuple, list)) or len(num_tokens) != 2:
        raise TypeError(f"num_tokens must be the least and the greatest number, got {num_tokens!r}")
    first = check.integer("num_tokens[0]", num_tokens[0], 1, MAX_TOKENS)
    return first, check.integer("num_tokens[1]", num_tokens[1], first, MAX_TOKENS)


# -- Kernels -----------------------------------------------------------------------------------------------------------


def check_calls(calls: Iterable[Calls], num_tokens: tuple[int, int]) -> None:
    """Refuse arguments that calls with the least or the greatest number of tokens refuse."""
    for op, options, views in calls:
        for number in num_tokens:
            op.check_inputs(options, with_rows(op, views, number))


def wanted_by(calls: Iterable[Calls], num_tokens: tuple[int, int], gpu: Gpu) -> list[Wanted]:
    """Return the kernels of calls with each number of tokens in a range, each once."""
    wanted: dict[Wanted, None] = {}
    for call in calls:
        wanted |= kernels_of(*call, num_tokens, gpu)
    return list(wanted)


class CanWarmUp:
    """Base of a Router."""

    method: RoutingMethod
    follows_inputs: bool

    def arrays(self) -> dict[str, Any]:
        """Return the arrays of the layer by argument name."""
        raise NotImplementedError  # every subclass defines it

    def warmup(
        self,
        *,
        dtypes: Sequence[str] | None = None,
        num_tokens: tuple[int, int] = NUM_TOKENS,
        progress: Progress | None = None,
        **arrays_given: Any,
    ) -> tuple[KernelReady, ...]:
        """Compile all kernels that calls of this router need, for every number of tokens in a range.

        As :func:`cupy_router.warmup`, but the method and the arrays of the layer are those of the router, on their
        device, with their strides. On a CPU there is nothing to compile.

        Args:
            dtypes: The dtypes of x, by name; that of the weight by default.
            num_tokens, progress: As for :func:`cupy_router.warmup`.
            **arrays_given: The further arguments of the calls, as for :func:`cupy_router.warmup`: `token_ids`,
                `bias_index`, `indices`, `replicas`, `replica_counts`, `replica_offset`, `num_physical`, `num_valid`,
                `layout`, `unset`, `return_logits`, `batch_invariant`.

        >>> import numpy as np
        >>> from cupy_router import Router, RoutingMethod
        >>> Router(RoutingMethod(3, 2), weight=np.ones((3, 16), np.float32)).warmup(num_tokens=(1, 64), num_valid=True)
        ()
        """
        return warm_up_layer(
            f"{type(self).__name__}.warmup", self.method, self.arrays(), self.follows_inputs, dtypes, num_tokens,
            progress, arrays_given,
        )  # fmt: skip
