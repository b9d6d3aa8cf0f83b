# SPDX-License-Identifier: Apache-2.0
"""Types of the public names: arrays of one framework in, arrays of that framework out.

NumPy has overloads of its own, because its types have a dtype, and that of indices is another one.
"""

from typing import Any, Literal, TypeVar, Unpack, overload

from numpy.typing import NDArray

from cupy_router import compiler as compiler
from cupy_router import integrations as integrations
from cupy_router import ops as ops
from cupy_router import router as _router
from cupy_router import typing as _types
from cupy_router import typing as typing
from cupy_router.kernel_log import on_compile
from cupy_router.method import RoutingMethod, presets
from cupy_router.ops._layout import LayoutSpec, layout_capacity
from cupy_router.results import ExpertLayout, Routing, RoutingPlan, RoutingPlanWithLogits, RoutingWithLogits, TopK
from cupy_router.score_comparison import compare_score
from cupy_router.score_function import ScoreFunction
from cupy_router.warm_up import warmup

__version__: str
jax: Any  # importing them takes type checkers long
torch: Any

__all__ = [
    "ExpertLayout",
    "LayoutSpec",
    "Router",
    "Routing",
    "RoutingMethod",
    "RoutingPlan",
    "RoutingPlanWithLogits",
    "RoutingWithLogits",
    "ScoreFunction",
    "TopK",
    "activation_topk",
    "compare_score",
    "dense_router",
    "expert_layout",
    "hash_router",
    "layout_capacity",
    "on_compile",
    "permute",
    "presets",
    "topk_select",
    "unpermute",
    "update_bias",
    "warmup",
]

_A = TypeVar("_A", bound=_types.Array)
_Numpy = NDArray[Any]
_Method = RoutingMethod | _types.Preset

@overload
def activation_topk(
    logits: _Numpy, method: _Method, *, layout: None = None, **options: Unpack[_types.ActivationOptions]
) -> Routing[_Numpy]: ...
@overload
def activation_topk(
    logits: _A, method: _Method, *, layout: None = None, **options: Unpack[_types.ActivationOptions]
) -> Routing[_A]: ...
@overload
def activation_topk(
    logits: _Numpy, method: _Method, *, layout: LayoutSpec, **options: Unpack[_types.ActivationOptions]
) -> RoutingPlan[_Numpy]: ...
@overload
def activation_topk(
    logits: _A, method: _Method, *, layout: LayoutSpec, **options: Unpack[_types.ActivationOptions]
) -> RoutingPlan[_A]: ...
@overload
def dense_router(
    x: _Numpy,
    weight: _types.Array,
    method: _Method,
    *,
    layout: None = None,
    return_logits: Literal[False] = False,
    **options: Unpack[_types.DenseOptions],
) -> Routing[_Numpy]: ...
@overload
def dense_router(
    x: _A,
    weight: _types.Array,
    method: _Method,
    *,
    layout: None = None,
    return_logits: Literal[False] = False,
    **options: Unpack[_types.DenseOptions],
) -> Routing[_A]: ...
@overload
def dense_router(
    x: _Numpy,
    weight: _types.Array,
    method: _Method,
    *,
    layout: None = None,
    return_logits: Literal[True],
    **options: Unpack[_types.DenseOptions],
) -> RoutingWithLogits[_Numpy]: ...
@overload
def dense_router(
    x: _A,
    weight: _types.Array,
    method: _Method,
    *,
    layout: None = None,
    return_logits: Literal[True],
    **options: Unpack[_types.DenseOptions],
) -> RoutingWithLogits[_A]: ...
@overload
def dense_router(
    x: _Numpy,
    weight: _types.Array,
    method: _Method,
    *,
    layout: LayoutSpec,
    return_logits: Literal[False] = False,
    **options: Unpack[_types.DenseOptions],
) -> RoutingPlan[_Numpy]: ...
@overload
def dense_router(
    x: _A,
    weight: _types.Array,
    method: _Method,
    *,
    layout: LayoutSpec,
    return_logits: Literal[False] = False,
    **options: Unpack[_types.DenseOptions],
) -> RoutingPlan[_A]: ...
@overload
def dense_router(
    x: _Numpy,
    weight: _types.Array,
    method: _Method,
    *,
    layout: LayoutSpec,
    return_logits: Literal[True],
    **options: Unpack[_types.DenseOptions],
) -> RoutingPlanWithLogits[_Numpy]: ...
@overload
def dense_router(
    x: _A,
    weight: _types.Array,
    method: _Method,
    *,
    layout: LayoutSpec,
    return_logits: Literal[True],
    **options: Unpack[_types.DenseOptions],
) -> RoutingPlanWithLogits[_A]: ...
@overload
def dense_router(
    x: _A,
    weight: _types.Array,
    method: _Method,
    *,
    layout: LayoutSpec | None = None,
    return_logits: bool,
    **options: Unpack[_types.DenseOptions],
) -> Any: ...
@overload
def hash_router(
    token_ids: _Numpy,
    table: _types.Array,
    method: _Method | None = None,
    *,
    layout: None = None,
    return_logits: Literal[False] = False,
    **options: Unpack[_types.HashOptions],
) -> Routing[_Numpy]: ...
@overload
def hash_router(
    token_ids: _A,
    table: _types.Array,
    method: _Method | None = None,
    *,
    layout: None = None,
    return_logits: Literal[False] = False,
    **options: Unpack[_types.HashOptions],
) -> Routing[_A]: ...
@overload
def hash_router(
    token_ids: _Numpy,
    table: _types.Array,
    method: _Method | None = None,
    *,
    layout: None = None,
    return_logits: Literal[True],
    **options: Unpack[_types.HashOptions],
) -> RoutingWithLogits[_Numpy]: ...
@overload
def hash_router(
    token_ids: _A,
    table: _types.Array,
    method: _Method | None = None,
    *,
    layout: None = None,
    return_logits: Literal[True],
    **options: Unpack[_types.HashOptions],
) -> RoutingWithLogits[_A]: ...
@overload
def hash_router(
    token_ids: _Numpy,
    table: _types.Array,
    method: _Method | None = None,
    *,
    layout: LayoutSpec,
    return_logits: Literal[False] = False,
    **options: Unpack[_types.HashOptions],
) -> RoutingPlan[_Numpy]: ...
@overload
def hash_router(
    token_ids: _A,
    table: _types.Array,
    method: _Method | None = None,
    *,
    layout: LayoutSpec,
    return_logits: Literal[False] = False,
    **options: Unpack[_types.HashOptions],
) -> RoutingPlan[_A]: ...
@overload
def hash_router(
    token_ids: _Numpy,
    table: _types.Array,
    method: _Method | None = None,
    *,
    layout: LayoutSpec,
    return_logits: Literal[True],
    **options: Unpack[_types.HashOptions],
) -> RoutingPlanWithLogits[_Numpy]: ...
@overload
def hash_router(
    token_ids: _A,
    table: _types.Array,
    method: _Method | None = None,
    *,
    layout: LayoutSpec,
    return_logits: Literal[True],
    **options: Unpack[_types.HashOptions],
) -> RoutingPlanWithLogits[_A]: ...
@overload
def hash_router(
    token_ids: _A,
    table: _types.Array,
    method: _Method | None = None,
    *,
    layout: LayoutSpec | None = None,
    return_logits: bool,
    **options: Unpack[_types.HashOptions],
) -> Any: ...
@overload
def topk_select(scores: _Numpy, k: int, **options: Unpack[_types.TopKOptions]) -> TopK[_Numpy]: ...
@overload
def topk_select(scores: _A, k: int, **options: Unpack[_types.TopKOptions]) -> TopK[_A]: ...
@overload
def expert_layout(
    indices: _Numpy, num_experts: int, **options: Unpack[_types.LayoutOptions]
) -> ExpertLayout[_Numpy]: ...
@overload
def expert_layout(indices: _A, num_experts: int, **options: Unpack[_types.LayoutOptions]) -> ExpertLayout[_A]: ...
@overload
def permute(x: _Numpy, layout: ExpertLayout[Any], **options: Unpack[_types.PermuteOptions]) -> _Numpy: ...
@overload
def permute(x: _A, layout: ExpertLayout[Any], **options: Unpack[_types.PermuteOptions]) -> _A: ...
@overload
def unpermute(
    y: _Numpy,
    layout: ExpertLayout[Any],
    weights: _types.Array | None = None,
    **options: Unpack[_types.UnpermuteOptions],
) -> _Numpy: ...
@overload
def unpermute(
    y: _A, layout: ExpertLayout[Any], weights: _types.Array | None = None, **options: Unpack[_types.UnpermuteOptions]
) -> _A: ...
@overload
def update_bias(bias: _Numpy, counts: _types.Array, **options: Unpack[_types.UpdateOptions]) -> _Numpy: ...
@overload
def update_bias(bias: _A, counts: _types.Array, **options: Unpack[_types.UpdateOptions]) -> _A: ...

class Router(_router.Router):  # its call is typed here, the rest there
    @overload  # type: ignore[override]  # some arguments have narrower types
    def __call__(
        self,
        x: _Numpy,
        token_ids: _types.Array | None = None,
        *,
        layout: None = None,
        return_logits: Literal[False] = False,
        **options: Unpack[_types.RouterOptions],
    ) -> Routing[_Numpy]: ...
    @overload
    def __call__(
        self,
        x: _A,
        token_ids: _types.Array | None = None,
        *,
        layout: None = None,
        return_logits: Literal[False] = False,
        **options: Unpack[_types.RouterOptions],
    ) -> Routing[_A]: ...
    @overload
    def __call__(
        self,
        x: _Numpy,
        token_ids: _types.Array | None = None,
        *,
        layout: None = None,
        return_logits: Literal[True],
        **options: Unpack[_types.RouterOptions],
    ) -> RoutingWithLogits[_Numpy]: ...
    @overload
    def __call__(
        self,
        x: _A,
        token_ids: _types.Array | None = None,
        *,
        layout: None = None,
        return_logits: Literal[True],
        **options: Unpack[_types.RouterOptions],
    ) -> RoutingWithLogits[_A]: ...
    @overload
    def __call__(
        self,
        x: _Numpy,
        token_ids: _types.Array | None = None,
        *,
        layout: LayoutSpec,
        return_logits: Literal[False] = False,
        **options: Unpack[_types.RouterOptions],
    ) -> RoutingPlan[_Numpy]: ...
    @overload
    def __call__(
        self,
        x: _A,
        token_ids: _types.Array | None = None,
        *,
        layout: LayoutSpec,
        return_logits: Literal[False] = False,
        **options: Unpack[_types.RouterOptions],
    ) -> RoutingPlan[_A]: ...
    @overload
    def __call__(
        self,
        x: _Numpy,
        token_ids: _types.Array | None = None,
        *,
        layout: LayoutSpec,
        return_logits: Literal[True],
        **options: Unpack[_types.RouterOptions],
    ) -> RoutingPlanWithLogits[_Numpy]: ...
    @overload
    def __call__(
        self,
        x: _A,
        token_ids: _types.Array | None = None,
        *,
        layout: LayoutSpec,
        return_logits: Literal[True],
        **options: Unpack[_types.RouterOptions],
    ) -> RoutingPlanWithLogits[_A]: ...
    @overload
    def __call__(
        self,
        x: _A,
        token_ids: _types.Array | None = None,
        *,
        layout: LayoutSpec | None = None,
        return_logits: bool,
        **options: Unpack[_types.RouterOptions],
    ) -> Any: ...
