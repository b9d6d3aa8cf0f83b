// SPDX-License-Identifier: Apache-2.0
// The layout of some thousand pairs by one block, in three steps between barriers: each warp ranks the pairs of its
// contiguous share by expert, experts add the counts of warps and their rows, pairs go to their rows.
//
// A kernel that has just written the ids of few tokens lays them out with it at its end:
//     __shared__ BlockLayout<THREADS, EXPERTS, MAX_PAIRS> memory;  // or in place of memory that it needs no more
//     __syncthreads();  // ids of other threads are visible
//     layout_by_block<TOP_K>(memory, num_pairs, [&](unsigned pair) { return int(ids[pair]); }, results);
#pragma once

#include "layout/place.cuh"

template <int Threads, int Experts, int MaxPairs>
using BlockLayout = PlaceMemory<Threads, Experts, MaxPairs, false>;

// Lay out pairs 0 .. num_pairs - 1, which have TopK slots a token. `expert_of_pair(pair)` returns their experts; a
// number outside 0 .. Experts - 1 is none. Every thread of the block takes part. Of several blocks that lay out the
// same pairs, all write a part of the padding, and the first the rest.
template <int TopK, int Threads, int Experts, int MaxPairs, typename ExpertOfPair>
__device__ __forceinline__ void layout_by_block(BlockLayout<Threads, Experts, MaxPairs>& memory, int num_pairs,
                                                ExpertOfPair expert_of_pair, const LayoutResults& results,
                                                int block = 0, int blocks = 1) {
    typedef ShareCounts<Threads, Experts, MaxPairs> Share;
    RankedPairs<Share::ROUNDS> pairs;
    rank_share(memory.share, 0, num_pairs, expert_of_pair, pairs);
    __syncthreads();
    unsigned mine[Share::WORDS];
    int all[2 * Share::WORDS], before[2 * Share::WORDS];
#pragma unroll
    for (int i = 0; i < Share::WORDS; ++i) {
        mine[i] = add_warps(memory.share, threadIdx.x * Share::WORDS + i);
        all[2 * i] = mine[i] & 0xffffu;
        all[2 * i + 1] = mine[i] >> 16;
        before[2 * i] = before[2 * i + 1] = 0;
    }
    const Tile tile = {0, Experts, Experts, 0, -1};
    const Part part = {block, blocks, 0, static_cast<unsigned>(num_pairs), block == 0};
    place_share<TopK>(memory, pairs, all, before, mine, tile, part, results);
}
