// SPDX-License-Identifier: Apache-2.0
// The layout of up to 32 pairs: every warp holds them all, a pair in a lane, and compares with one after the other, so
// that nothing is counted in memory and no warp waits for another.
#pragma once

#include "layout/results.cuh"

// Lay out pairs 0 .. num_pairs - 1, at most MaxPairs, of TopK slots a token, by threads `thread` of `threads`, which may
// be those of several blocks; the first warp writes the pairs. A thread has `Rounds` experts. `own` is the expert of the
// pair of this lane; a number outside 0 .. Experts - 1 is none.
template <int TopK, int Experts, int MaxPairs, int Rounds>
__device__ __forceinline__ void layout_few_pairs(unsigned num_pairs, unsigned own, const LayoutResults& results,
                                                 int thread, int threads) {
    static_assert(MaxPairs <= 32, "a lane for each pair");
    const int lane = thread % 32, expert = static_cast<int>(min(own, static_cast<unsigned>(Experts)));
    const int capacity = results.capacity;
    __syncwarp();  // shuffles are slow where lanes have not met again
    int rank = 0;
#pragma unroll
    for (int j = 0; j < MaxPairs; ++j) rank += __shfl_sync(FULL_WARP, expert, j) == expert && j < lane;
    // The pairs that begin a block of rows.
    const unsigned begins = __ballot_sync(FULL_WARP, expert < Experts && rank % LAYOUT_ALIGNMENT == 0);
    const int used = first_row(__popc(begins), capacity);
#pragma unroll
    for (int round = 0; round < Rounds; ++round) {
        const int mine = thread + round * threads;
        int count = 0, block = 0, block_of_pair = 0;
#pragma unroll
        for (int j = 0; j < MaxPairs; ++j) {
            const int other = __shfl_sync(FULL_WARP, expert, j), begun = begins >> j & 1u;
            count += other == mine;
            block += other < mine ? begun : 0;
            block_of_pair += other < expert ? begun : 0;
        }
        const Rows rows = rows_of(block, count, capacity);
        if (mine < Experts) write_expert(results, mine, count, rows);
        if (round == 0 && thread < 32) {
            const unsigned sum = static_cast<unsigned>(first_row(block_of_pair, capacity)) + rank;
            const int row = expert < Experts ? row_of(sum, capacity) : -1;
            if (row >= 0) write_row(results, row, lane, expert);
            if (lane < num_pairs) write_position<TopK>(results, lane, row);
            if (LAYOUT_OFFSETS && lane == 0) results.offsets[Experts] = used;
        }
        __syncwarp();
        if (LAYOUT_ALIGNMENT > 1 && !LAYOUT_PREFILLED) {
            const int next = first_row(block + aligned_blocks(count), capacity);
            fill_by_warp(results, {rows.end, mine < Experts ? next : 0});
        }
    }
    fill_tail(results, used, thread, threads);
}
