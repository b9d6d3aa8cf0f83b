# SPDX-License-Identifier: Apache-2.0
"""The thresholds that a table holds: one family for each kind of launch, each with the command that measures it.

Only what a measurement decides belongs here. A limit of a kernel, such as the most columns that a warp can hold, is
stated in the op's file next to the kernel's name.
"""

from __future__ import annotations

from dataclasses import dataclass

Steps = tuple[tuple[int, int], ...]  # (up to this count, choose this), ascending


@dataclass(frozen=True, kw_only=True)
class Family:
    """Thresholds that one command measures."""

    measured_by: str  # a command, run in the repository root


@dataclass(frozen=True, kw_only=True)
class Rows(Family):
    """Rows that a warp, or a part of one, holds in registers: topk_select and activation_topk.

    Each lane holds adjacent columns, or words at a distance of as many words as there are lanes (interleaved).
    Counts of rows and warps scale with the multiprocessors.
    """

    few_rows: int  # up to here the slowest row decides the time, beyond it the total work
    very_few_rows: int
    adjacent_columns_very_few: int  # very few rows of plain scores: adjacent up to here, else interleaved over a warp
    adjacent_columns_few: int  # the same for few rows, and for very few whose columns are scored as well
    adjacent_columns_16_bits: int  # the same for few and very few rows of 16-bit scores that are compared as they are
    adjacent_columns_many: int  # many rows: adjacent up to here, else interleaved over the fewest lanes that suffice
    lanes_by_results: Steps  # of an interleaved row among many: up to this many results, lanes; a warp beyond
    max_columns_per_lane: int  # of an interleaved row among many; a wider row gets more lanes
    max_group_columns_per_lane: int  # the same where experts are in groups
    adjacent_blocks: Steps  # up to this many warps, threads in a block
    interleaved_blocks: Steps
    largest_block: int  # threads, beyond these steps
    spills_from: tuple[int, int]  # from this capability on, ptxas spills registers unless told how few blocks suffice


@dataclass(frozen=True, kw_only=True)
class Backward(Family):
    """Rows in activation_topk_backward."""

    min_lanes: int  # of a row among many, so that lanes write whole sectors of memory


@dataclass(frozen=True, kw_only=True)
class DecodeTile:
    """How a block of dense_router_decode multiplies on tensor cores."""

    max_tokens: int  # for groups of up to this many tokens
    experts_per_block: int
    few_steps: int  # of 32 columns of hidden for each block
    shapes_few_steps: Steps  # (experts of a warp, warps of a block), most preferred first
    shapes_many_steps: Steps


@dataclass(frozen=True, kw_only=True)
class DecodeFma:
    """How a block of dense_router_decode multiplies without tensor cores."""

    max_tokens: int
    experts_per_block: int
    experts_per_warp: int
    warps: int
    max_parts: int  # split-K parts of hidden
    min_part_columns: int


@dataclass(frozen=True, kw_only=True)
class Decode(Family):
    """dense_router for few tokens, in one launch."""

    max_tokens: int  # up to here one launch is faster than cuBLAS and a second launch
    tiles: tuple[DecodeTile, ...]  # ascending by tokens
    max_parts: int  # split-K parts of hidden
    min_part_columns: int
    min_shared_tokens: int  # from here on, blocks route a token each; fewer tokens are routed by the last block
    # Batch-invariant calls: (for up to this many tokens, experts of a block, experts of a warp, warps along tokens),
    # ascending by tokens, then by experts. Chosen is the first with at most one block for each multiprocessor.
    invariant_shapes: tuple[tuple[int, int, int, int], ...]
    invariant_loads_in_flight: int
    # For more tokens, in groups: (up to this many tokens, tokens of a group, experts of a block, experts of a warp).
    invariant_groups: tuple[tuple[int, int, int, int], ...]
    # Or in clusters, fastest first: (tokens of a tile, most experts of a block, warpgroups that divide the tokens,
    # blocks of a cluster that divide hidden). The first whose clusters all run at the same time is chosen.
    clusters: tuple[tuple[int, int, int, int], ...]
    # The cluster for 64 tokens or fewer, from `min_tokens_in_cluster` on, where one block for each multiprocessor
    # cannot hold all experts.
    cluster_of_few: tuple[int, int, int, int]
    min_tokens_in_cluster: int
    clusters_at_once: tuple[int, ...]  # of 1, 2, ... 8 blocks, of which a multiprocessor holds one
    # (bytes of the gate up to here, tokens up to which the fastest of these is faster than cuBLAS and a second launch).
    fused: tuple[tuple[int, int], ...]
    max_partial_bytes: int  # partial sums of a launch for several groups, which should stay in L2
    fma: DecodeFma


@dataclass(frozen=True, kw_only=True)
class LongRows(Family):
    """topk_select for rows longer than a warp can hold."""

    max_pieces: int  # of a row that several blocks share
    min_piece_bytes: int
    min_saved_bytes: int  # a row is split only if each block is spared so much of it
    few_winners: int  # up to this k
    split_block_few: int  # threads of a block with a piece of a row, for few winners
    split_block_many: int
    shapes: Steps  # of a block with a whole row: (threads, blocks a multiprocessor)
    short_row_bytes: int  # up to here
    many_rows: Steps  # more rows than multiprocessors, few winners: the first with enough rows and shared memory
    many_short_rows: Steps
    many_rows_many_winners: Steps
    many_rows_max_winners: int  # beyond them, rows are selected from as if they were few
    # The longest row that a block holds in shared memory, where there are more rows than multiprocessors: of 16-bit
    # scores, of float32.
    held_row_bytes: tuple[int, int]
    held_block: int  # its threads
    held_most_blocks: int  # on a multiprocessor
    held_most_groups: float  # share of the groups of a row whose best scores are to reach a threshold
    sample_few_winners: int  # scores of a row, where there are more rows than multiprocessors
    sample_many_winners: int


@dataclass(frozen=True, kw_only=True)
class LongRowsCluster(Family):
    """topk_select for a few long rows, each of which a cluster of blocks reads; sm_90 and later.

    The blocks of all rows run at the same time.
    """

    shapes: Steps  # blocks, threads of a block: the first that holds all scores in registers
    min_row_bytes: int
    shapes_one_row: Steps  # preferred for one row of at least min_row_bytes_one_row, with three threads for each winner
    min_row_bytes_one_row: int
    max_winners: int


@dataclass(frozen=True, kw_only=True)
class HashRouter(Family):
    """hash_router with logits or uniform weights."""

    block: int  # threads
    max_tokens_held: int  # up to here a warp reads all logits of its token
    max_logits_held: int  # and up to this many logits of a token
    held_block: int  # threads


@dataclass(frozen=True, kw_only=True)
class HashProducts(Family):
    """hash_router with x and weight."""

    max_warps: int  # of a token, where a warp computes whole dot products
    sharing_warps: int  # of a token, where warps divide hidden, at most
    loads_in_flight: int  # 16-byte words of the gate that a lane waits for at once


@dataclass(frozen=True, kw_only=True)
class HashLayer(Family):
    """A hash layer of Router: only the dot products that are needed, or the whole gate GEMM."""

    max_gates_read: int  # needed dot products only, while they read at most this many times the whole gate


@dataclass(frozen=True, kw_only=True)
class GivenExperts(Family):
    """dense_router with given experts, and its gradient: only the dot products that are needed, or those of all."""

    max_gates_read: int  # needed dot products only, while they read at most this many times the whole gate
    max_elements_read: int  # and while they read at most this many elements
    max_gates_read_backward: int  # the same in the backward pass, also where experts are selected


@dataclass(frozen=True, kw_only=True)
class Layout(Family):
    """expert_layout."""

    few_pairs: int  # up to here every warp compares all pairs; at most 32
    few_threads: int  # of a block
    block_pairs: int  # up to here one block lays out all pairs
    block_threads: Steps  # up to this many pairs, threads of this block
    largest_block: int  # threads, beyond these steps
    padding_rows: int  # one more block for each this many rows of padding
    cluster_share_pairs: int  # up to this many per block, one cluster lays out all pairs
    share_threads: int  # of a block of a cluster
    grid: tuple[tuple[int, int, int], ...]  # (most shares, pairs of a share, threads of a block)
    steps: tuple[tuple[int, int], ...]  # beyond, in three launches: pairs of a share, threads; the first that fits


@dataclass(frozen=True, kw_only=True)
class MoveRows(Family):
    """permute, unpermute and their gradients."""

    teams: tuple[int, ...]  # threads that share a row, or a part of it; ascending multiples of a warp
    permute_unroll: int  # 16-byte words of each row that a thread has in flight
    unpermute_unroll: int
    dots_unroll: int  # the same with dot products
    max_slots: int  # of a token, whose rows are in flight together
    spread_tokens: int  # permute with dot products: up to here, several teams share the slots of a token
    spread_slots: int  # of each of these teams
    permute_read_once: int  # evict rows of y after their use if their bytes are at most this multiple of L2
    unpermute_read_once: int
    shared_order: int  # rows of a layout that each block of permute reads at once, not one by one as it needs them
    much_padding: int  # if more than 1 row in this many is padding in any case, a warp checks one row
    padding_rows: int  # otherwise


@dataclass(frozen=True, kw_only=True)
class FusedLayout(Family):
    """The layout in the launch that routes."""

    max_tokens: int  # beyond them two launches are faster
    threads: int  # of a block that routes rows of logits, and of one of several that route by a table
    max_block_warps: int  # of rows of logits; up to here one block routes them all
    max_block_padding_rows: int  # that this block writes
    max_cluster_warps: int  # up to here the blocks of a cluster route them
    last_block_warps: int  # that route in each of more blocks
    max_padding_rows: int  # that any block writes; beyond them two launches are faster
    max_pairs_looked_at: int  # up to here each thread looks at all pairs
    table_blocks: tuple[int, ...]  # threads of the only block that routes by a table, the fewest that suffice
    min_shared_tokens: int  # of dense_router: as in `Decode`


@dataclass(frozen=True, kw_only=True)
class Chunks(Family):
    """Chunks of tokens in calls whose logits go through memory."""

    bytes: int  # of a chunk's logits, and of its hidden states where they are converted to float32 first


@dataclass(frozen=True, kw_only=True)
class Gemm(Family):
    """The gate GEMM by cuBLAS."""

    workspace_bytes: int  # the algorithm that cuBLAS chooses depends on it
    max_pack_blocks: int  # of the conversion to float32


@dataclass(frozen=True, kw_only=True)
class Table:
    """All thresholds of an architecture."""

    architecture: str  # such as "sm_90"
    gpu: str  # that was measured
    multiprocessors: int  # of that GPU
    rows: Rows
    backward: Backward
    decode: Decode
    long_rows: LongRows
    long_rows_cluster: LongRowsCluster
    hash_router: HashRouter
    hash_products: HashProducts
    hash_layer: HashLayer
    given_experts: GivenExperts
    layout: Layout
    move_rows: MoveRows
    fused_layout: FusedLayout
    chunks: Chunks
    gemm: Gemm
