# SPDX-License-Identifier: Apache-2.0
"""Shared by the ops that route: their results, and the layout of the indices if the options ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from types import MappingProxyType
from typing import Any

from cupy_router import compiler
from cupy_router.ops import _fused_layout as fused_layout
from cupy_router.ops import expert_layout
from cupy_router.ops._cached import Kernel, Work, launch_of
from cupy_router.ops._declared import FLOATS, Arrays, Minimum, Result
from cupy_router.ops._layout import check_rows, layout_numbers, layout_results, layout_sizes
from cupy_router.ops._op import Op
from cupy_router.ops._replicas import has_replicas, num_counted
from cupy_router.results import ExpertLayout, Routing, RoutingPlan, RoutingPlanWithLogits, RoutingWithLogits
from cupy_router.tuning import Gpu, gpu_of

ROUTING = ("weights", "indices")
LOGITS = "logits_out"  # the parameter of kernels for the logits that are returned
VARIANTS_WITH_LOGITS = (RoutingPlan, RoutingWithLogits, RoutingPlanWithLogits)
_COLUMNS = "top_k (+ shared)"
_LAYOUT = layout_results(lambda options: () if options.layout is None else options.layout.want, "layout.", _COLUMNS)


def routing_results(*differentiable: str, logits: tuple[str, ...] = ()) -> tuple[Result, ...]:
    """Declare weights, which are differentiable with respect to these inputs, indices, and the layout of these.

    With `logits`, the inputs that logits are differentiable with respect to, the op also returns those if its options
    have a `logits_dtype`. Its `variants` are then VARIANTS_WITH_LOGITS.
    """
    axes = f"num_tokens, {_COLUMNS}"
    weights = Result("weights", axes, _weight_dtype, 0, differentiable=differentiable)
    return weights, Result("indices", axes, _index_dtype, -1), *([_logits(logits)] if logits else []), *_LAYOUT


def _logits(differentiable: tuple[str, ...]) -> Result:
    return Result(
        "logits",
        "num_tokens, num_experts (+ shared)",
        lambda options, dtypes: str(options.logits_dtype),
        exists=lambda options: options.logits_dtype is not None,
        differentiable=differentiable,
        parameter=LOGITS,
    )


def as_logits_dtype(label: str, return_logits: bool, logits_dtype: str) -> str | None:
    """Return the dtype of the logits that a call returns; None if it returns none."""
    if not isinstance(return_logits, bool):
        raise TypeError(f"{label}: return_logits must be a bool, got {return_logits!r}")
    if logits_dtype not in FLOATS:
        raise ValueError(f"{label}: logits_dtype must be {' or '.join(map(repr, FLOATS))}, got {logits_dtype!r}")
    return logits_dtype if return_logits else None


def _weight_dtype(options: Any, dtypes: Mapping[str, str]) -> str:
    return "float32" if options.method is None else str(options.method.weight_dtype)


def _index_dtype(options: Any, dtypes: Mapping[str, str]) -> str:
    return "int32" if options.method is None else str(options.method.index_dtype)


class RoutedOp(Op):
    """An op that routes. Its options have a `method` and a `layout`, a :class:`LayoutSpec` or None; if it can return
    logits, also a `logits_dtype`, None if it shall not.

    A subclass defines `route` and `route_reference` in place of `kernel` and `reference`. Both get options and arrays
    without a layout. It may define `fused`, too.
    """

    returns = Routing
    variants: tuple[Any, ...] = (RoutingPlan,)
    nested = MappingProxyType({"layout": ExpertLayout})
    numbers = layout_numbers("layout.", _COLUMNS)
    symbolic = ("layout.capacity",)
    gradient = "routing"

    def route(self, options: Any, arrays: Arrays, gpu: Gpu) -> Kernel | Work:
        """Choose the kernels for weights, indices and logits."""
        raise NotImplementedError  # every op that routes defines it

    def route_reference(self, options: Any, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
        """Return weights, indices and, if the options ask for them, logits as NumPy arrays."""
        raise NotImplementedError  # every op that routes defines it

    def is_independent(self, options: Any) -> bool:
        return options.layout is None and not has_replicas(options)

    def is_single_kernel(self, options: Any, arrays: Arrays) -> bool:
        if options.layout is None or not self.single_kernel:
            return self.single_kernel
        kernel = self.fused(options, arrays, gpu_of(arrays.indices.device))
        return isinstance(kernel, Kernel) and not fused_layout.counts(kernel)

    def result_sizes(self, options: Any, sizes: Mapping[str, Any], minimum: Minimum = min) -> Mapping[str, Any]:
        if options.layout is None:
            return {}
        return layout_sizes(options.layout, num_counted(options), sizes["num_tokens"], sizes[_COLUMNS], minimum)

    def check(self, options: Any, arrays: Arrays) -> None:
        if options.layout is not None:
            first = getattr(arrays, self.names[0])
            check_rows(options.layout, num_counted(options), first.shape[0], options.method.num_columns)

    def reference(self, options: Any, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
        routed = self.route_reference(options, arrays, num_valid)
        if options.layout is None:
            return routed
        given = Arrays(expert_layout.OP.names, (routed[1], None, None, None))
        return *routed, *expert_layout.OP.reference(layout_options(options), given, len(routed[1]))

    def kernel(self, options: Any, arrays: Arrays, gpu: Gpu) -> Kernel | Work:
        if options.layout is None:
            return self.route(options, arrays, gpu)
        fused = self.fused(options, arrays, gpu)
        if fused is None:
            return _RouteThenLayout(self, options, arrays, gpu)
        return fused_layout.with_counter(self, options, fused, arrays) if isinstance(fused, Kernel) else fused

    def fused(self, options: Any, arrays: Arrays, gpu: Gpu) -> Kernel | Work | None:
        """Choose one launch that routes and lays out; None if two are faster, or one cannot do it."""
        return None


def layout_options(options: Any) -> expert_layout.LayoutOptions:
    """Return the options of `expert_layout` for the indices of a router."""
    spec = options.layout
    return expert_layout.LayoutOptions(num_counted(options), spec.alignment, spec.capacity, spec.want)


class _RouteThenLayout:
    """The kernels of a router, followed by those of `expert_layout` on its indices."""

    def __init__(self, op: RoutedOp, options: Any, arrays: Arrays, gpu: Gpu) -> None:
        inner, device = expert_layout.OP, arrays.indices.device
        own = layout_options(options)
        names = op.parameters(options)
        self._routed: Work | None = None
        if arrays.indices.shape[0]:
            plain = replace(options, layout=None)
            left_out = dict.fromkeys(inner.result_names)
            routed = op.route(plain, arrays.replaced(**left_out), gpu)
            self._routed = launch_of(op, plain, routed, device) if isinstance(routed, Kernel) else routed
        self._num_routed = len(names) - len(inner.result_names)
        taken = {name: getattr(arrays, name) for name in inner.result_names}
        given = Arrays((*inner.names, *taken), (arrays.indices, None, None, None, *taken.values()))
        layout = inner.kernel(own, given, gpu)
        self._layout = launch_of(inner, own, layout, device) if isinstance(layout, Kernel) else layout
        self._pick = itemgetter(names.index("indices"), *(names.index(name) for name in inner.result_names))
        self.function: compiler.Function = self._layout.function

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        if self._routed is not None:
            self._routed(stream, (*varying[: self._num_routed], varying[-1]))
        indices, *results = self._pick(varying)
        self._layout(stream, (indices, 0, 0, 0, *results, -1))
