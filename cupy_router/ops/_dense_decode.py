# SPDX-License-Identifier: Apache-2.0
"""How kernels/dense_router_decode.cu is compiled and launched for a shape: chosen from shapes alone.

The kernel's parameters are INPUTS, the outputs (weights, indices), the scratch memory (counters, partials),
`num_valid_value`, which are together VARYING, and then those of :func:`fixed_arguments`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from cupy_router.method import RoutingMethod
from cupy_router.ops import _layout as layout
from cupy_router.ops._method import method_arguments, method_macros

FILE = FUNCTION = "dense_router_decode"
INPUTS = ("x", "weight", "bias", "logit_bias", "expert_scale", "num_valid")
VARYING = (*INPUTS, "weights", "indices", "counters", "partials", "num_valid_value")
MAX_TOKENS, MAX_EXPERTS, MAX_K = 64, layout.MAX_COLUMNS, layout.MAX_LANES
COUNTERS = 128  # as many as any plan needs, so that partial sums of all plans may lie behind them in one buffer

_MULTIPROCESSORS = 132  # of an H100; blocks beyond them share
_SHARED_BYTES = 46 * 1024  # static; a little is left for the hand-over


class DecodePlan(NamedTuple):
    """A launch of the kernel, and the scratch memory that it needs."""

    macros: dict[str, int]
    grid: int
    block: int
    counters: int  # uint32 words, zero before the first launch and left zero by each
    partials: int  # floats of any value, on a 16-byte boundary


@dataclass(frozen=True)
class Tiling:
    """How the product is divided: see the macros of the same names in the kernel."""

    tokens: int
    slices: int
    experts_per_block: int
    experts_per_warp: int
    warps: int
    share: int = 0
    tensor_cores: bool = True

    def groups(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens)

    def tiles(self, num_experts: int) -> int:
        return -(-num_experts // self.experts_per_block)

    def shared_bytes(self, num_experts: int) -> int:
        layers = self.warps * self.experts_per_warp // self.experts_per_block
        row = 128 * -(-num_experts // 128)
        routed = self.share or self.tokens
        return 4 * (max(layers * self.tokens * (self.experts_per_block + 4), routed * row) + row)


def plan(
    method: RoutingMethod,
    x_dtype: str,
    weight_dtype: str,
    num_tokens: int,
    hidden: int,
    *,
    aligned: bool,
    dense: bool,
    given: Collection[str] = (),
    tiling: Tiling | None = None,
) -> DecodePlan:
    """The launch for 1 to 64 tokens. `aligned`: rows of both start at 16-byte words, hidden is a multiple of 8.
    `dense`: rows of x, weight and the results follow each other. `given`: which of bias, logit_bias, expert_scale and
    num_valid there are."""
    if tiling is None:
        tiling = choose(num_tokens, method.num_logits, hidden, x_dtype, weight_dtype)
    macros = method_macros(method, given) | {
        "HIDDEN": hidden,
        "DTYPE": layout.DTYPE_CODES[x_dtype],
        "WEIGHT_DTYPE": layout.DTYPE_CODES[weight_dtype],
        "ALIGNED": int(aligned),
        "DENSE": int(dense),
        "HAS_NUM_VALID": int("num_valid" in given),
        "TENSOR_CORES": int(tiling.tensor_cores),
        "TOKENS": tiling.tokens,
        "SPLITS": tiling.slices,
        "EXPERTS_PER_BLOCK": tiling.experts_per_block,
        "EXPERTS_PER_WARP": tiling.experts_per_warp,
        "WARPS": tiling.warps,
        "SHARE": tiling.share,
    }
    groups, tiles = tiling.groups(num_tokens), tiling.tiles(method.num_logits)
    blocks = groups * tiles * tiling.slices
    partials = blocks * tiling.tokens * tiling.experts_per_block
    return DecodePlan(macros, blocks, 32 * tiling.warps, COUNTERS, partials)


def fixed_arguments(
    method: RoutingMethod, num_tokens: int, x_stride: int, weight_stride: int, weights_stride: int, indices_stride: int
) -> dict[str, int | float]:
    """The kernel's last parameters, in its order."""
    return {
        "num_tokens": num_tokens,
        **method_arguments(method),
        "x_stride": x_stride,
        "weight_stride": weight_stride,
        "weights_stride": weights_stride,
        "indices_stride": indices_stride,
    }


def tensor_cores(x_dtype: str, weight_dtype: str) -> bool:
    """Tensor cores multiply 16-bit floats of one type; all else is float32 FMA."""
    return x_dtype == weight_dtype != "float32"


def choose(num_tokens: int, num_experts: int, hidden: int, x_dtype: str, weight_dtype: str) -> Tiling:
    """The tiling for a shape; the same for all counts of tokens that it serves as well. Measured by
    `python -m benchmarks.sweep_dense_router`: one group of tokens, so that the gate is read once, a block for each
    multiprocessor, and more warps in it the more each of them would have to do."""
    if not tensor_cores(x_dtype, weight_dtype):
        return _fma(num_tokens, num_experts, hidden)
    tokens = next(tokens for tokens in (1, 2, 4, 8, 16, 32, 64) if tokens >= num_tokens)
    experts = 16 if tokens <= 16 else 32
    slices = max(1, min(_MULTIPROCESSORS // -(-num_experts // experts), 24, hidden // 64))
    steps = -(-hidden // (32 * slices))  # of a block, which its warps divide among them
    if tokens <= 16:
        shapes = [(16, 16), (16, 8), (16, 4)] if steps > 32 else [(16, 8), (16, 16), (16, 4)]
    else:  # two warps that read the same tokens have more loads under way, where there is much to wait for
        shapes = [(16, 8), (32, 4)] if steps > 16 else [(32, 4), (16, 8)]
    for experts_per_warp, warps in shapes:
        tiling = Tiling(tokens, slices, experts, experts_per_warp, warps, share=int(tokens >= 4))
        if tiling.shared_bytes(num_experts) <= _SHARED_BYTES and warps * 32 * 4 >= num_experts:
            return tiling
    # So many experts beside so many tokens: several groups read the gate, each finished by its last block.
    return Tiling(8, slices, 16, 16, 8)


def _fma(num_tokens: int, num_experts: int, hidden: int) -> Tiling:
    """Whole slices for warps with two experts each, in about one block a multiprocessor."""
    tokens = next((tokens for tokens in (1, 2) if tokens >= num_tokens), 4)
    groups, tiles = -(-num_tokens // tokens), -(-num_experts // 16)
    slices = max(1, min(16, -(-hidden // 256), _MULTIPROCESSORS // (groups * tiles)))
    return Tiling(tokens, slices, 16, 2, 8, tensor_cores=False)
