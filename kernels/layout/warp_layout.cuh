// SPDX-License-Identifier: Apache-2.0
// The layout of a few pairs, at most 32. Every warp holds all of them, a lane each, and compares with one after the
// other, so that nothing crosses warps: no shared memory, no barrier.
#pragma once

#include "layout/results.cuh"

// Lay out pairs 0 .. num_pairs - 1, at most MaxPairs, of TopK slots a token. `own` is the expert of the pair of this
// lane, a number outside 0 .. Experts - 1 if it has none. There is a thread for each expert: `thread`, which may be of
// several blocks. The first warp has the pairs.
template <int TopK, int Experts, int MaxPairs>
__device__ __forceinline__ void layout_by_warps(unsigned num_pairs, unsigned own, const LayoutResults& results,
                                                int thread, int threads) {
    static_assert(MaxPairs <= 32, "a lane for each pair");
    const int lane = thread % 32, pair_expert = static_cast<int>(min(own, static_cast<unsigned>(Experts)));
    const int capacity = results.capacity;
    __syncwarp();
    int rank = 0;
#pragma unroll
    for (int j = 0; j < MaxPairs; ++j) rank += __shfl_sync(FULL_WARP, pair_expert, j) == pair_expert && j < lane;
    const unsigned begins = __ballot_sync(FULL_WARP, pair_expert < Experts && rank % LAYOUT_ALIGNMENT == 0);  // a block
    int count = 0, block = 0, pair_block = 0;
#pragma unroll
    for (int j = 0; j < MaxPairs; ++j) {
        const int other = __shfl_sync(FULL_WARP, pair_expert, j), one = begins >> j & 1u;
        count += other == thread;
        block += other < thread ? one : 0;
        pair_block += other < pair_expert ? one : 0;
    }
    const Rows rows = rows_of(block, count, capacity);
    if (thread < Experts) write_expert(results, thread, count, rows);
    const int used = first_row(__popc(begins), capacity);
    if (thread < 32) {
        const int row = pair_expert < Experts ? row_of(first_row(pair_block, capacity) + unsigned(rank), capacity) : -1;
        if (row >= 0) write_row(results, row, lane, pair_expert);
        if (lane < num_pairs) write_position<TopK>(results, lane, row);
        if (LAYOUT_OFFSETS && lane == 0) results.offsets[Experts] = used;
    }
    fill_tail(results, used, thread, threads);
    if (LAYOUT_ALIGNMENT > 1) {
        __syncwarp();
        const int next = first_row(block + aligned_blocks(count), capacity);
        fill_by_warp(results, {rows.end, thread < Experts ? next : 0});
    }
}
