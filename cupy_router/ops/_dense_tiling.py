# SPDX-License-Identifier: Apache-2.0
"""How the kernels of dense_router divide the gate GEMM, and the shared memory that takes."""

from __future__ import annotations

from dataclasses import dataclass

# The parts of hidden in calls that are batch-invariant, of blocks, and of the warps of a block. Their sums are added in
# order, first those of a block's warps. Any change changes the bits of results.
INVARIANT_PARTS, INVARIANT_WARP_PARTS = 8, 2

WARPGROUP_EXPERTS = 64  # in the kernel for many tokens
_BIAS_FLOATS = 2048  # in shared memory; several biases of more stay where they are


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
