# SPDX-License-Identifier: Apache-2.0
"""Macros, grid and block of kernels/dense_router_decode.cu, and of dense_router_prefill.cu, for a shape on a GPU.

The parameters of both are VARYING, which are INPUTS, the results (weights, indices, and logits_out or null), the
scratch memory (counters, partials) and `num_valid_value`, and then those of :func:`fixed_arguments`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

from cupy_router.compiler_options import SEVERAL_ARCHITECTURES
from cupy_router.method import RoutingMethod
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._cached import NUMBER
from cupy_router.ops._method import method_arguments, method_macros
from cupy_router.ops._routed import LOGITS, ROUTING
from cupy_router.tuning import Gpu
from cupy_router.tuning.schema import Decode

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

# The parts of hidden in calls that are batch-invariant, of blocks, and of the warps of a block. Their sums are added in
# order, first those of a block's warps. Any change changes the bits of results.
INVARIANT_PARTS, INVARIANT_WARP_PARTS = 8, 2

CLUSTER, WARPGROUP_EXPERTS = 8, 64  # in the kernel for many tokens: blocks of a cluster, experts of a warpgroup
_ONLY_ON = (9, 0)  # the compute capability that has its instructions

_BIAS_FLOATS = 2048  # in shared memory; several biases of more stay where they are
_SHARED_BYTES = 46 * 1024  # static; the rest is for the last-block reduction
_LEAST_WARPS = 16  # of its blocks, so that enough of them route
_MAX_STAGES, _MIN_WIDE_STAGES, _ALIGNMENT = 7, 4, 1024  # of the ring in shared memory


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


@dataclass(frozen=True)
class Tiling:
    """Tiling of the gate GEMM: see the constants of the same names in the kernel (`parts`: SPLITS).

    warps_along_tokens: warps that divide the tokens of a block.
    in_flight: loads of a thread before their first use; 0: the default of the kernel.
    stages: of the kernel for many tokens, which has clusters of blocks; 0: that for few.
    cluster_parts, cluster_tiles: how a cluster divides hidden and experts.
    """

    tokens: int
    parts: int
    experts_per_block: int
    experts_per_warp: int
    warps: int
    share: int = 0
    at_once: int = 0
    tensor_cores: bool = True
    invariant: bool = False
    warps_along_tokens: int = 1
    in_flight: int = 0
    stages: int = 0
    stage_columns: int = 64
    token_warpgroups: int = 1
    cluster_parts: int = 1
    cluster_tiles: int = 1

    @property
    def cluster(self) -> int:
        return self.cluster_parts * self.cluster_tiles

    def groups(self, num_tokens: int) -> int:
        return -(-num_tokens // (self.cluster * self.tokens)) * self.cluster

    def tiles(self, num_experts: int) -> int:
        return -(-num_experts // self.experts_per_block)

    def shared_bytes(self, num_experts: int, num_biases: int = 1) -> int:
        layers = self.warps * self.experts_per_warp // (self.experts_per_block * self.warps_along_tokens)
        row = 128 * -(-num_experts // 128)
        routed = self.share or self.at_once or self.tokens
        biases = num_biases * row if num_biases * row <= _BIAS_FLOATS else 0
        floats = max(layers * self.tokens * (self.experts_per_block + 4), routed * row)
        return 4 * (biases if self.stages else floats + biases)

    @property
    def token_rows(self) -> int:
        return 8 * -(-self.cluster * self.tokens // 8)

    @property
    def tile_rows(self) -> tuple[int, int]:
        """Return the rows of x and of the gate that a block copies at once."""
        return self.token_rows, self.experts_per_block

    @property
    def stage_bytes(self) -> int:
        return 2 * self.stage_columns * (self.token_rows + self.experts_per_block)

    @property
    def parked_bytes(self) -> int:
        """Return the bytes of sums for which registers are too few: see gate/gemm_wgmma.cuh."""
        warpgroups = self.experts_per_block // WARPGROUP_EXPERTS * self.token_warpgroups  # that multiply
        sums = self.token_rows // self.token_warpgroups // 2
        registers = min(512 // (self.warps // 4) // 8 * 8, 248)  # of a thread
        left = registers * (self.warps // 4) - 24 * (self.warps // 4 - warpgroups)
        parks = self.cluster_parts == 1 and 3 * sums + 32 > max(registers, min(left // warpgroups // 8 * 8, 240))
        return 512 * warpgroups * sums if parks else 0

    def fits_ring(self, num_experts: int) -> bool:
        """Return whether there are enough stages, and sums and then scores fit where they were."""
        sets = INVARIANT_PARTS // self.cluster_parts if self.cluster_parts > 1 else 1
        sums = sets * self.cluster * self.tokens * (self.experts_per_block + 4)
        scores = self.tokens * 128 * -(-num_experts // 128)
        return self.stages >= 2 and 4 * (sums + scores) <= self.stages * self.stage_bytes + self.parked_bytes


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
    shared_bytes = tiling.stages * tiling.stage_bytes + tiling.parked_bytes + _ALIGNMENT
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
    aligned: bool = False,
) -> Tiling:
    """Return the tiling for a shape. With tensor cores, only the next power of two of num_tokens matters."""
    if not tensor_cores(x_dtype, weight_dtype):
        return _fma(gpu, num_tokens, num_experts, hidden, batch_invariant)
    table = gpu.table.decode
    if num_tokens > MAX_TOKENS:  # in a call that is batch-invariant
        if not by_clusters(gpu, x_dtype, weight_dtype, aligned):
            return _groups(gpu, num_tokens)
        tilings = _clusters(gpu, num_experts, hidden, num_biases)
        return next((tiling for tiling, most in tilings if num_tokens <= most), tilings[-1][0])
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


def by_clusters(gpu: Gpu, x_dtype: str, weight_dtype: str, aligned: bool) -> bool:
    """Return whether a call that is batch-invariant uses the kernel for many tokens for more than MAX_TOKENS."""
    runs = gpu.capability == _ONLY_ON and gpu.nvrtc >= SEVERAL_ARCHITECTURES
    return runs and aligned and tensor_cores(x_dtype, weight_dtype)


def invariant_rows(
    gpu: Gpu, num_experts: int, hidden: int, x_dtype: str, weight_dtype: str, aligned: bool, num_biases: int
) -> int:
    """Return the most tokens of a launch of a call that is batch-invariant."""
    if by_clusters(gpu, x_dtype, weight_dtype, aligned):
        return max(MAX_TOKENS, _clusters(gpu, num_experts, hidden, num_biases)[-1][1])
    token_bytes = 4 * INVARIANT_PARTS * 64 * -(-num_experts // 64)
    most = min(gpu.table.decode.max_partial_bytes // token_bytes, gpu.table.decode.fma.max_tokens * GROUP_COUNTERS)
    return max(1, most // MAX_TOKENS) * MAX_TOKENS  # whole groups


def _groups(gpu: Gpu, num_tokens: int) -> Tiling:
    """Return a tiling for many tokens, like that of :func:`_invariant` in all that the order of sums depends on."""
    shapes = gpu.table.decode.invariant_groups
    tokens, experts, of_warp = next(shape for most, *shape in shapes if num_tokens <= most)
    warps = INVARIANT_WARP_PARTS * experts // of_warp
    return Tiling(tokens, INVARIANT_PARTS, experts, of_warp, warps, at_once=min(tokens, warps), invariant=True)


@cache
def _clusters(gpu: Gpu, num_experts: int, hidden: int, num_biases: int) -> list[tuple[Tiling, int]]:
    return clusters(gpu, gpu.table.decode, num_experts, hidden, num_biases)


def clusters(gpu: Gpu, table: Decode, num_experts: int, hidden: int, num_biases: int) -> list[tuple[Tiling, int]]:
    """Return tilings of the kernel for many tokens, the fastest first.

    With each, the most tokens for which all its clusters run at once.
    """
    found = []
    for shape in table.clusters:
        tiling = _cluster_tiling(gpu, num_experts, hidden, *shape, num_biases)
        at_once = table.clusters_at_once[tiling.cluster - 1] * gpu.multiprocessors // gpu.table.multiprocessors
        tiles = at_once * tiling.cluster_tiles // tiling.tiles(num_experts)
        if tiling.fits_ring(num_experts):
            found.append((tiling, tiles * tiling.cluster * tiling.tokens))
    return found


def _cluster_tiling(
    gpu: Gpu,
    num_experts: int,
    hidden: int,
    tokens: int,
    experts: int,
    along_tokens: int,
    cluster_parts: int,
    num_biases: int,
) -> Tiling:
    """Return a tiling of the kernel for many tokens.

    tokens: of a tile, at most.
    experts: of a block, at most.
    along_tokens: warpgroups that divide the tokens of a tile.
    cluster_parts: blocks that divide hidden.
    """
    needed = -(-num_experts // -(-num_experts // experts))
    along_experts = -(-needed // WARPGROUP_EXPERTS)  # warpgroups
    experts = along_experts * WARPGROUP_EXPERTS
    tiles = -(-num_experts // experts)
    cluster_tiles = tiles if tiles * cluster_parts <= CLUSTER else 1
    warps = max(4 * (along_experts * along_tokens + 1), _LEAST_WARPS)  # one warpgroup copies
    routed = tokens // (cluster_parts * cluster_tiles)
    tiling = Tiling(routed, 1, experts, experts, warps, stages=_MAX_STAGES, token_warpgroups=along_tokens,
                    cluster_parts=cluster_parts, cluster_tiles=cluster_tiles)  # fmt: skip
    static = tiling.shared_bytes(num_experts, num_biases) + 1024  # biases, their indices, and barriers
    room = gpu.shared_bytes - _ALIGNMENT - static - tiling.parked_bytes
    wide = replace(tiling, stage_columns=2 * tiling.stage_columns)  # half as many barriers, if few stages do
    if hidden % (2 * INVARIANT_PARTS * wide.stage_columns) == 0 and room // wide.stage_bytes >= _MIN_WIDE_STAGES:
        tiling = wide
    return replace(tiling, stages=min(_MAX_STAGES, room // tiling.stage_bytes))


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
