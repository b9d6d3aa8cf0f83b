# SPDX-License-Identifier: Apache-2.0
"""Macros, grid and block of kernels/dense_router_decode.cu for a shape on a GPU.

The kernel's parameters are VARYING, which are INPUTS, the results (weights, indices, and logits_out or null), the
scratch memory (counters, partials) and `num_valid_value`, and then those of :func:`fixed_arguments`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from cupy_router.method import RoutingMethod
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._cached import NUMBER
from cupy_router.ops._method import method_arguments, method_macros
from cupy_router.ops._routed import LOGITS, ROUTING
from cupy_router.tuning import Gpu

FILE = FUNCTION = "dense_router_decode"
INPUTS = (
    "x", "weight", "bias", "bias_index", "logit_bias", "expert_scale", "given_experts", "replicas",
    "replica_counts", "num_valid",
)  # fmt: skip
ARRAYS = (*INPUTS, *ROUTING)
SCRATCH = ("counters", "partials")
VARYING = (*ARRAYS, LOGITS, *SCRATCH, NUMBER)
MAX_TOKENS, MAX_EXPERTS, MAX_K = 64, row_lanes.MAX_COLUMNS, row_lanes.MAX_LANES
# The most counters that a launch needs, for up to MAX_TOKENS and for more tokens, so that the partial sums of every
# launch start at the same offset.
COUNTERS, GROUP_COUNTERS = 128, 1024

# The parts of hidden in calls that are batch-invariant, of blocks, and of the warps of a block. Their sums are added in
# order, first those of a block's warps. Any change changes the bits of results.
INVARIANT_PARTS, INVARIANT_WARP_PARTS = 8, 2

_BIAS_FLOATS = 2048  # in shared memory; several biases of more stay where they are
_SHARED_BYTES = 46 * 1024  # static; the rest is for the last-block reduction


class DecodeLaunch(NamedTuple):
    """A launch of the kernel, and its scratch memory."""

    macros: dict[str, int]
    grid: int
    block: int
    counters: int  # uint32 words, zero before the first launch and left zero by each
    partials: int  # floats, uninitialised, aligned to 16 bytes


@dataclass(frozen=True)
class Tiling:
    """Tiling of the gate GEMM: see the constants of the same names in the kernel (`parts`: SPLITS)."""

    tokens: int
    parts: int
    experts_per_block: int
    experts_per_warp: int
    warps: int
    share: int = 0
    at_once: int = 0
    tensor_cores: bool = True
    invariant: bool = False

    def groups(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens)

    def tiles(self, num_experts: int) -> int:
        return -(-num_experts // self.experts_per_block)

    def shared_bytes(self, num_experts: int, num_biases: int = 1) -> int:
        layers = self.warps * self.experts_per_warp // self.experts_per_block
        row = 128 * -(-num_experts // 128)
        routed = self.share or self.at_once or self.tokens
        biases = num_biases * row if num_biases * row <= _BIAS_FLOATS else 0
        return 4 * (max(layers * self.tokens * (self.experts_per_block + 4), routed * row) + biases)


def launch_for(
    gpu: Gpu,
    method: RoutingMethod,
    x_dtype: str,
    weight_dtype: str,
    num_tokens: int,
    hidden: int,
    *,
    aligned: bool,
    dense: bool,
    given: Collection[str] = (),
    logits_dtype: str | None = None,
    biases: Mapping[str, int] = MappingProxyType({}),
    tiling: Tiling | None = None,
    with_layout: bool = False,
    batch_invariant: bool = False,
) -> DecodeLaunch:
    """Return the launch for 1 to 64 tokens; if `batch_invariant`, for up to :func:`invariant_rows`.

    Args:
        aligned: rows of x and weight are aligned to 16 bytes, and hidden is a multiple of 8.
        dense: rows of x, weight, weights and indices have no gaps between them.
        given: the names of bias, logit_bias, expert_scale and num_valid that are passed.
        logits_dtype: dtype of the logits that are returned; None: they are not.
        biases: the macros of several biases.
        tiling: replaces the one that `choose` returns.
        with_layout: the launch lays out, too.
        batch_invariant: sums have the same order for any number of tokens.
    """
    if tiling is None:
        num_biases = biases.get("NUM_BIASES", 1)
        more = with_layout, num_biases, batch_invariant
        tiling = choose(gpu, num_tokens, method.num_logits, hidden, x_dtype, weight_dtype, *more)
    macros = {
        **method_macros(method, given),
        **biases,
        "HIDDEN": hidden,
        "DTYPE": row_lanes.DTYPE_CODES[x_dtype],
        "WEIGHT_DTYPE": row_lanes.DTYPE_CODES[weight_dtype],
        "ALIGNED": int(aligned),
        "DENSE": int(dense),
        "HAS_NUM_VALID": int("num_valid" in given),
        "TENSOR_CORES": int(tiling.tensor_cores),
        "TOKENS": tiling.tokens,
        "SPLITS": tiling.parts,
        "EXPERTS_PER_BLOCK": tiling.experts_per_block,
        "EXPERTS_PER_WARP": tiling.experts_per_warp,
        "WARPS": tiling.warps,
        "SHARE": tiling.share,
        **({"AT_ONCE": tiling.at_once} if tiling.at_once else {}),
        **({"INVARIANT": 1} if tiling.invariant else {}),
    }
    if logits_dtype is not None:
        macros["LOGITS_OUT"] = row_lanes.DTYPE_CODES[logits_dtype]
    groups, tiles = tiling.groups(num_tokens), tiling.tiles(method.num_logits)
    blocks = groups * tiles * tiling.parts
    partials = blocks * tiling.tokens * tiling.experts_per_block
    return DecodeLaunch(macros, blocks, 32 * tiling.warps, COUNTERS, partials)


def fixed_arguments(
    method: RoutingMethod,
    num_tokens: int,
    x_stride: int,
    weight_stride: int,
    weights_stride: int,
    indices_stride: int,
    given_stride: int = 0,
    logits_stride: int = 0,
) -> dict[str, int | float]:
    """Return the last parameters of the kernel, in its order."""
    return {
        "token_ids": 0,
        "replica_offset": 0,
        "num_tokens": num_tokens,
        **method_arguments(method),
        "x_stride": x_stride,
        "weight_stride": weight_stride,
        "weights_stride": weights_stride,
        "indices_stride": indices_stride,
        "given_stride": given_stride,
        "logits_out_stride": logits_stride,
    }


def tensor_cores(x_dtype: str, weight_dtype: str) -> bool:
    """Return whether the kernel uses tensor cores: for 16-bit floats of one dtype. Others use float32 FMA."""
    return x_dtype == weight_dtype != "float32"


def choose(
    gpu: Gpu,
    num_tokens: int,
    num_experts: int,
    hidden: int,
    x_dtype: str,
    weight_dtype: str,
    with_layout: bool = False,
    num_biases: int = 1,
    batch_invariant: bool = False,
) -> Tiling:
    """Return the tiling for a shape. With tensor cores, only the next power of two of num_tokens matters."""
    if not tensor_cores(x_dtype, weight_dtype):
        return _fma(gpu, num_tokens, num_experts, hidden, batch_invariant)
    table = gpu.table.decode
    if num_tokens > MAX_TOKENS:  # in a call that is batch-invariant
        return _groups(gpu, num_tokens)
    tokens = next(tokens for tokens in (1, 2, 4, 8, 16, 32, 64) if tokens >= num_tokens)
    if batch_invariant:
        return _invariant(gpu, tokens, num_experts, with_layout, num_biases)
    tokens = 8 if tokens == 4 else tokens  # a kernel more would save nothing
    tile = next((tile for tile in table.tiles if tokens <= tile.max_tokens), table.tiles[-1])
    experts = tile.experts_per_block
    tiles = -(-num_experts // experts)
    parts = max(1, min(gpu.multiprocessors // tiles, table.max_parts, hidden // table.min_part_columns))
    steps = -(-hidden // (32 * parts))  # of a block, divided among its warps
    for experts_per_warp, warps in tile.shapes_few_steps if steps <= tile.few_steps else tile.shapes_many_steps:
        share = int(tokens >= (gpu.table.fused_layout if with_layout else table).min_shared_tokens)
        tiling = Tiling(tokens, parts, experts, experts_per_warp, warps, share)
        if tiling.shared_bytes(num_experts, num_biases) <= _SHARED_BYTES and warps * 32 * 4 >= num_experts:
            return tiling
    # Too many experts for this number of tokens: several groups of tokens read the gate, each with its own last block.
    return Tiling(8, parts, 16, 16, 8)


def _invariant(gpu: Gpu, tokens: int, num_experts: int, with_layout: bool, num_biases: int) -> Tiling:
    """Return a tiling that divides hidden into the same parts for any number of tokens."""
    experts, of_warp = next(shape for most, *shape in gpu.table.decode.invariant_shapes if tokens <= most)
    warps = INVARIANT_WARP_PARTS * experts // of_warp
    share = int(tokens >= (gpu.table.fused_layout if with_layout else gpu.table.decode).min_shared_tokens)
    tiling = Tiling(tokens, INVARIANT_PARTS, experts, of_warp, warps, share, invariant=True)
    fits = tiling.shared_bytes(num_experts, num_biases) <= _SHARED_BYTES
    return tiling if fits else replace(tiling, share=1)


def invariant_rows(gpu: Gpu, num_logits: int) -> int:
    """Return the most tokens of a launch of a call that is batch-invariant, in whole groups."""
    token_bytes = 4 * INVARIANT_PARTS * 64 * -(-num_logits // 64)
    most = min(gpu.table.decode.max_partial_bytes // token_bytes, gpu.table.decode.fma.max_tokens * GROUP_COUNTERS)
    return max(1, most // MAX_TOKENS) * MAX_TOKENS


def _groups(gpu: Gpu, num_tokens: int) -> Tiling:
    """Return a tiling for many tokens, like that of :func:`_invariant` in all that the order of sums depends on."""
    shapes = gpu.table.decode.invariant_groups
    tokens, experts, of_warp = next(shape for most, *shape in shapes if num_tokens <= most)
    warps = INVARIANT_WARP_PARTS * experts // of_warp
    return Tiling(tokens, INVARIANT_PARTS, experts, of_warp, warps, at_once=min(tokens, warps), invariant=True)


def _fma(gpu: Gpu, num_tokens: int, num_experts: int, hidden: int, batch_invariant: bool) -> Tiling:
    """Return a tiling with about one block per multiprocessor."""
    fma = gpu.table.decode.fma
    tokens = next(tokens for tokens in (1, 2, 4) if tokens >= min(num_tokens, fma.max_tokens))
    blocks = -(-num_tokens // tokens) * -(-num_experts // fma.experts_per_block)  # for each split-K part
    parts = max(1, min(fma.max_parts, -(-hidden // fma.min_part_columns), gpu.multiprocessors // blocks))
    if batch_invariant:
        parts = INVARIANT_PARTS
    shape = fma.experts_per_block, fma.experts_per_warp, fma.warps
    return Tiling(tokens, parts, *shape, tensor_cores=False, invariant=batch_invariant)
