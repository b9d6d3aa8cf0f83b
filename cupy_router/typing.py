# SPDX-License-Identifier: Apache-2.0
"""Types of arguments, for annotations. Importing them costs other modules time, so these do it for type checkers only.

The functions are annotated in `__init__.pyi`: an array of PyTorch in gives arrays of PyTorch out.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias, TypedDict


class SupportsDLPack(Protocol):
    """An array of NumPy, CuPy, PyTorch, JAX or another library that exchanges arrays by DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


class SupportsCudaArray(Protocol):
    """An array with the CUDA array interface."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


Array: TypeAlias = SupportsDLPack | SupportsCudaArray

Score = Literal["sqrtsoftplus", "sigmoid", "softmax", "identity"]
BiasTarget = Literal["score", "logits"]
GroupScore = Literal["max", "top2"]
WeightDtype = Literal["float32", "float16", "bfloat16"]
IndexDtype = Literal["int32", "int64", "int16", "uint16", "uint8"]
Order = Literal["value", "column", "any"]
Unset = Literal["route", "empty"]
Path = Literal["decode", "prefill"]
LayoutArray = Literal["counts", "offsets", "ends", "order", "positions", "block_experts", "row_experts"]
Preset = Literal[
    "deepseek-v4-flash", "deepseek-v4-pro", "deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "kimi-k2", "glm-4.5",
    "qwen3-moe", "qwen2-moe", "mixtral", "gpt-oss", "gpt-oss-120b", "llama4", "llama4-maverick", "granite-moe",
    "granite-moe-3b", "minimax-m2", "ernie-4.5", "ernie-4.5-300b", "olmoe",
]  # fmt: skip


# -- Arguments by keyword that several overloads of a function share ---------------------------------------------------


class CallOptions(TypedDict, total=False):
    num_valid: int | Array | None
    out: Any
    stream: Any


class RoutingOptions(CallOptions, total=False):
    bias: Array | None
    bias_index: Array | None
    logit_bias: Array | None
    expert_scale: Array | None


class ActivationOptions(RoutingOptions, total=False):
    indices: Array | None
    unset: Unset
    replicas: Array | None
    replica_counts: Array | None
    replica_offset: int
    num_physical: int | None


class DenseOptions(ActivationOptions, total=False):
    path: Path | None
    logits_dtype: WeightDtype
    batch_invariant: bool


class HashOptions(RoutingOptions, total=False):
    logits: Array | None
    x: Array | None
    weight: Array | None
    batch_invariant: bool


class RouterOptions(CallOptions, total=False):
    indices: Array | None
    unset: Unset
    bias_index: Array | None
    batch_invariant: bool
    replicas: Array | None
    replica_counts: Array | None
    replica_offset: int
    num_physical: int | None


class TopKOptions(TypedDict, total=False):
    lengths: Array | None
    starts: Array | None
    order: Order
    return_values: bool
    index_map: Array | None
    page_size: int
    out: Any
    stream: Any


class LayoutOptions(CallOptions, total=False):
    alignment: int
    capacity: int | None
    experts: tuple[int, int] | None
    expert_map: Array | None
    num_local: int | None
    load: Array | None
    want: tuple[LayoutArray, ...]
    pad: int


class PermuteOptions(TypedDict, total=False):
    weights: Array | None
    out: Any
    stream: Any


class UnpermuteOptions(TypedDict, total=False):
    residual: Array | None
    residual_scale: Array | None
    out: Any
    stream: Any


class UpdateOptions(TypedDict, total=False):
    rate: float
    center: bool
    out: Any
    stream: Any
