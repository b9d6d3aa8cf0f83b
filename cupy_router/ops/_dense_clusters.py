# SPDX-License-Identifier: Apache-2.0
"""Tilings of kernels/dense_router_prefill.cu, by clusters of blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from cupy_router.compiler_options import SEVERAL_ARCHITECTURES
from cupy_router.ops._dense_tiling import INVARIANT_PARTS, WARPGROUP_EXPERTS, Tiling
from cupy_router.tuning import Gpu
from cupy_router.tuning.schema import Decode

CLUSTER = 8  # blocks, at most
ALIGNMENT = 1024  # bytes, of the ring in shared memory
_ONLY_ON = (9, 0)  # the compute capability that has the instructions
_LEAST_WARPS = 16  # of a block, so that enough of them route
_MAX_STAGES, _MIN_WIDE_STAGES = 7, 4


def by_clusters(gpu: Gpu, x_dtype: str, weight_dtype: str, aligned: bool) -> bool:
    """Return whether a call that is batch-invariant can use this kernel."""
    runs = gpu.capability == _ONLY_ON and gpu.nvrtc >= SEVERAL_ARCHITECTURES
    return runs and aligned and tensor_cores(x_dtype, weight_dtype)


def tensor_cores(x_dtype: str, weight_dtype: str) -> bool:
    """Return whether kernels use tensor cores: for 16-bit floats of one dtype. Others use float32 FMA."""
    return x_dtype == weight_dtype != "float32"


@cache
def of_few(gpu: Gpu, num_experts: int, hidden: int, num_biases: int) -> tuple[Tiling, int]:
    """Return a tiling of the kernel for many tokens, and up to how many of a few tokens it is the faster one."""
    table = gpu.table.decode
    fewest_experts = min(experts for _, experts, *_ in table.invariant_shapes)
    is_faster = INVARIANT_PARTS * -(-num_experts // fewest_experts) > gpu.multiprocessors
    alone = replace(table, clusters=(table.cluster_of_few,))
    ((tiling, at_once),) = tilings(gpu, alone, num_experts, hidden, num_biases)
    return tiling, at_once if is_faster else 0


@cache
def of_many(gpu: Gpu, num_experts: int, hidden: int, num_biases: int) -> list[tuple[Tiling, int]]:
    """Return the tilings of this GPU's table."""
    return tilings(gpu, gpu.table.decode, num_experts, hidden, num_biases)


def tilings(gpu: Gpu, table: Decode, num_experts: int, hidden: int, num_biases: int) -> list[tuple[Tiling, int]]:
    """Return tilings of the kernel for many tokens, the fastest first.

    With each, the most tokens for which all its clusters run at once.
    """
    found = []
    for shape in table.clusters:
        tiling = tiling_of(gpu, num_experts, hidden, *shape, num_biases)
        at_once = table.clusters_at_once[tiling.cluster - 1] * gpu.multiprocessors // gpu.table.multiprocessors
        tiles = at_once * tiling.cluster_tiles // tiling.tiles(num_experts)
        if tiling.fits_ring(num_experts):
            found.append((tiling, tiles * tiling.cluster * tiling.tokens))
    return found


def tiling_of(
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
    room = gpu.shared_bytes - ALIGNMENT - static - tiling.parked_bytes
    wide = replace(tiling, stage_columns=2 * tiling.stage_columns)  # half as many barriers, if few stages do
    if hidden % (2 * INVARIANT_PARTS * wide.stage_columns) == 0 and room // wide.stage_bytes >= _MIN_WIDE_STAGES:
        tiling = wide
    return replace(tiling, stages=min(_MAX_STAGES, room // tiling.stage_bytes))
