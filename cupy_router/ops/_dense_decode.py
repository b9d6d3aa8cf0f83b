# SPDX-License-Identifier: Apache-2.0
"""Macros, grid and block of kernels/dense_router_decode.cu, and of dense_router_prefill.cu, for a shape on a GPU.

The parameters of both are VARYING, which are INPUTS, the results (weights, indices, and logits_out or null), the
scratch memory (counters, partials) and `num_valid_value`, and then those of :func:`fixed_arguments`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from cupy_router.method import RoutingMethod
from cupy_router.ops import _dense_clusters as clusters
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._cached import NUMBER
from cupy_router.ops._dense_tiling import INVARIANT_PARTS, INVARIANT_WARP_PARTS, Tiling
from cupy_router.ops._method import method_arguments, method_macros
from cupy_router.ops._routed import LOGITS, ROUTING
from cupy_router.tuning import Gpu

FILE = FUNCTION = "dense_router_decode"
PREFILL = "dense_router_prefill"
INPUTS = (
    "x", "weight", "bias", "bias_index", "logit_bias", "expert_scale", "given_experts", "replicas",
    "replica_counts", "num_valid",
)  # fmt: skip
ARRAYS = (*INPUTS, *ROUTING)
SCRATCH = ("counters", "partials")
VARYING = (*ARRAYS, LOGITS, *SCRATCH, NUMBER)
MAPS = ("x_map", "weight_map")  # after these, of the kernel for many tokens
MAX_TOKENS, MAX_EXPERTS, MAX_K = 64, row_lanes.MAX_COLUMNS, row_lanes.MAX_LANES
# The most counters that a launch needs, for up to MAX_TOKENS and for more tokens, so that the partial sums of every
# launch start at the same offset.
COUNTERS, GROUP_COUNTERS = 128, 1024

_SHARED_BYTES = 46 * 1024  # static; the rest is for the last-block reduction


class DecodeLaunch(NamedTuple):
    """A launch of a kernel, and its scratch memory."""

    file: str
    macros: dict[str, int]
    grid: int
    block: int
    counters: int  # uint32 words, zero before the first launch and left zero by each
    partials: int  # floats, uninitialised, aligned to 16 bytes
    shared_bytes: int = 0
    tile_rows: tuple[int, int] = (0, 0)  # of x and of the gate, that one copy has; 0: they are not copied by tiles


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
        more = with_layout, num_biases, batch_invariant, aligned
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
        **({"WARPS_ALONG_TOKENS": tiling.warps_along_tokens} if tiling.warps_along_tokens > 1 else {}),
        **({"IN_FLIGHT": tiling.in_flight} if tiling.in_flight else {}),
        **({"INVARIANT": 1} if tiling.invariant else {}),
        **(
            {
                "STAGES": tiling.stages,
                "STAGE_COLUMNS": tiling.stage_columns,
                "TOKEN_WARPGROUPS": tiling.token_warpgroups,
                "CLUSTER_PARTS": tiling.cluster_parts,
                "CLUSTER_TILES": tiling.cluster_tiles,
            }
            if tiling.stages
            else {}
        ),
    }
    if logits_dtype is not None:
        macros["LOGITS_OUT"] = row_lanes.DTYPE_CODES[logits_dtype]
    groups, tiles = tiling.groups(num_tokens), tiling.tiles(method.num_logits)
    blocks = groups // tiling.cluster_tiles * tiles * tiling.parts
    partials = groups * tiles * tiling.parts * tiling.tokens * tiling.experts_per_block
    launch = DecodeLaunch(FILE, macros, blocks, 32 * tiling.warps, COUNTERS, partials)
    if not tiling.stages:
        return launch
    shared_bytes = tiling.stages * tiling.stage_bytes + tiling.parked_bytes + clusters.ALIGNMENT
    return launch._replace(file=PREFILL, shared_bytes=shared_bytes, tile_rows=tiling.tile_rows)


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
    aligned: bool = False,
) -> Tiling:
    """Return the tiling for a shape. With tensor cores, only the next power of two of num_tokens matters."""
    if not clusters.tensor_cores(x_dtype, weight_dtype):
        return _fma(gpu, num_tokens, num_experts, hidden, batch_invariant)
    table = gpu.table.decode
    if num_tokens > MAX_TOKENS:  # in a call that is batch-invariant
        if not clusters.by_clusters(gpu, x_dtype, weight_dtype, aligned):
            return _groups(gpu, num_tokens)
        tilings = clusters.of_many(gpu, num_experts, hidden, num_biases)
        return next((tiling for tiling, most in tilings if num_tokens <= most), tilings[-1][0])
    tokens = next(tokens for tokens in (1, 2, 4, 8, 16, 32, 64) if tokens >= num_tokens)
    if batch_invariant:
        if not with_layout and clusters.by_clusters(gpu, x_dtype, weight_dtype, aligned):
            tiling, at_once = clusters.of_few(gpu, num_experts, hidden, num_biases)
            if table.min_tokens_in_cluster <= num_tokens <= at_once:
                return tiling
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
    most = next(most for most, *_ in gpu.table.decode.invariant_shapes if tokens <= most)
    shapes = [shape for up_to, *shape in gpu.table.decode.invariant_shapes if up_to == most]
    blocks = [INVARIANT_PARTS * -(-num_experts // experts) for experts, *_ in shapes]
    at_once = (shape for shape, count in zip(shapes, blocks, strict=True) if count <= gpu.multiprocessors)
    experts, of_warp, along_tokens = next(at_once, shapes[-1])
    warps = INVARIANT_WARP_PARTS * experts // of_warp * along_tokens
    share = int(tokens >= (gpu.table.fused_layout if with_layout else gpu.table.decode).min_shared_tokens)
    tiling = Tiling(
        tokens, INVARIANT_PARTS, experts, of_warp, warps, share, invariant=True, warps_along_tokens=along_tokens,
        in_flight=gpu.table.decode.invariant_loads_in_flight,
    )  # fmt: skip
    fits = tiling.shared_bytes(num_experts, num_biases) <= _SHARED_BYTES
    return tiling if fits else replace(tiling, share=1)


def invariant_rows(
    gpu: Gpu, num_experts: int, hidden: int, x_dtype: str, weight_dtype: str, aligned: bool, num_biases: int
) -> int:
    """Return the most tokens of a launch of a call that is batch-invariant."""
    if clusters.by_clusters(gpu, x_dtype, weight_dtype, aligned):
        return max(MAX_TOKENS, *(most for _, most in clusters.of_many(gpu, num_experts, hidden, num_biases)))
    token_bytes = 4 * INVARIANT_PARTS * 64 * -(-num_experts // 64)
    most = min(gpu.table.decode.max_partial_bytes // token_bytes, gpu.table.decode.fma.max_tokens * GROUP_COUNTERS)
    return max(1, most // MAX_TOKENS) * MAX_TOKENS  # whole groups


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
