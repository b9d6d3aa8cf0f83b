// SPDX-License-Identifier: Apache-2.0
// The layout of up to 32 pairs: each warp holds them all, a pair in a lane, and each thread compares them with its
// experts, so that nothing is counted in memory and no warp waits for another.
#pragma once

#include "device/block_scan.cuh"
#include "layout/results.cuh"

// The pairs of the call, a pair in a lane of each warp.
template <int Experts, int MaxPairs>
struct FewPairs {
    static_assert(MaxPairs <= 32, "a lane for each pair");
    unsigned expert;  // of this lane's pair; Experts: none
    int blocks;       // of rows, counted at the first pair of each expert

    // Return the lanes whose pair has an expert.
    __device__ __forceinline__ unsigned lanes_with(unsigned wanted) const {
        unsigned lanes = 0;
#pragma unroll
        for (int pair = 0; pair < MaxPairs; ++pair) {
            lanes |= __shfl_sync(FULL_WARP, expert, pair) == wanted ? 1u << pair : 0;
        }
        return lanes;
    }

    // Return the blocks of rows of the experts before one.
    __device__ __forceinline__ int blocks_before(unsigned wanted) const {
        int sum = 0;
#pragma unroll
        for (int pair = 0; pair < MaxPairs; ++pair) {
            const int more = LAYOUT_ALIGNMENT == 1 ? 1 : __shfl_sync(FULL_WARP, blocks, pair);
            sum += __shfl_sync(FULL_WARP, expert, pair) < wanted ? more : 0;
        }
        return sum;
    }
};

// Lay out pairs as `layout_by_block` does; unless the alignment is 1, all rows have been written as padding.
template <int TopK, int Threads, int Experts, int MaxPairs, typename ExpertOfPair>
__device__ __forceinline__ void layout_few_pairs(int num_pairs, ExpertOfPair expert_of_pair,
                                                 const LayoutResults& results) {
    const int thread = threadIdx.x, lane = thread % 32;
    const unsigned id = static_cast<unsigned>(lane < num_pairs ? expert_of_pair(lane) : -1);
    FewPairs<Experts, MaxPairs> pairs = {min(id, static_cast<unsigned>(Experts)), 0};
    const bool has_expert = pairs.expert < Experts;
    const unsigned same = pairs.lanes_with(pairs.expert), earlier = same & ((1u << lane) - 1u);
    if (has_expert) pairs.blocks = LAYOUT_ALIGNMENT == 1 ? 1 : earlier == 0 ? aligned_blocks(__popc(same)) : 0;

#pragma unroll
    for (int round = 0; round < (Experts + Threads - 1) / Threads; ++round) {
        const unsigned expert = round * Threads + thread;
        const int count = __popc(pairs.lanes_with(expert)), before = pairs.blocks_before(expert);
        if (expert < Experts) write_expert(results, expert, count, rows_of(before, count, results.capacity));
    }
    const int rows_used = first_row(static_cast<int>(warp_sum(pairs.blocks)), results.capacity);
    if (LAYOUT_OFFSETS && thread == 0) results.offsets[Experts] = rows_used;
    fill_tail(results, rows_used, thread, Threads);
    if (thread < Threads - 32) return;
    const int first = first_row(pairs.blocks_before(pairs.expert), results.capacity);
    const int row = has_expert ? row_of(static_cast<unsigned>(first) + __popc(earlier), results.capacity) : -1;
    if (row >= 0) write_row(results, row, lane, pairs.expert);
    if (lane < num_pairs) write_position<TopK>(results, lane, row);
}
