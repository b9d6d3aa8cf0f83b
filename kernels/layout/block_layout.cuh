// SPDX-License-Identifier: Apache-2.0
// The layout of some thousand pairs by one block, in three steps between barriers: each warp ranks the pairs of its
// contiguous share by expert, experts add the counts of warps and their rows, pairs go to their rows.
//
// A kernel that has just written the ids of few tokens lays them out with it at its end:
//     __shared__ BlockLayout<THREADS, EXPERTS, MAX_PAIRS> memory;  // or in place of memory that it needs no more
//     __syncthreads();  // ids of other threads are visible
//     layout_by_block<TOP_K>(memory, num_pairs, [&](unsigned pair) { return int(ids[pair]); }, results);
#pragma once

#include "device/block_scan.cuh"
#include "layout/ranks.cuh"
#include "layout/results.cuh"

// Shared memory of a layout by a block of Threads threads, of at most MaxPairs pairs.
template <int Threads, int Experts, int MaxPairs>
struct BlockLayout {
    typedef ShareCounts<Threads, Experts, MaxPairs> Share;
    Share share;
    int first[Share::ROW];                             // rows of experts
    Rows padding[LAYOUT_ALIGNMENT > 1 ? Experts : 1];  // behind an expert's
};

// Lay out pairs 0 .. num_pairs - 1, whose experts are known. Of several blocks that lay out the same pairs, all write a
// part of the padding, and the first the rest.
template <int TopK, int Threads, int Experts, int MaxPairs, int Rounds>
__device__ __forceinline__ void layout_by_block(BlockLayout<Threads, Experts, MaxPairs>& memory, unsigned num_pairs,
                                                RankedPairs<Rounds>& pairs, const LayoutResults& results, int block,
                                                int blocks) {
    constexpr int WORDS = ShareCounts<Threads, Experts, MaxPairs>::WORDS;
    const int thread = threadIdx.x;
    rank_share(memory.share, pairs);
    __syncthreads();

    int count[2 * WORDS], needed = 0, total;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        const int word = thread * WORDS + i;
        const unsigned both = without_none<Experts>(add_warps(memory.share, word, 0), word);
        count[2 * i] = both & 0xffffu;
        count[2 * i + 1] = both >> 16;
        needed += aligned_blocks(count[2 * i]) + aligned_blocks(count[2 * i + 1]);
    }
    int before = block_prefix<Threads>(needed, total);
#pragma unroll
    for (int i = 0; i < 2 * WORDS; ++i) {
        const int expert = thread * (2 * WORDS) + i;
        if (expert < Experts) {
            const Rows rows = rows_of(before, count[i], results.capacity);
            before += aligned_blocks(count[i]);
            memory.first[expert] = rows.begin;
            if (LAYOUT_ALIGNMENT > 1) memory.padding[expert] = {rows.end, first_row(before, results.capacity)};
            if (block == 0) write_expert(results, expert, count[i], rows);
        }
    }
    const int used = first_row(total, results.capacity);
    if (LAYOUT_OFFSETS && block == 0 && thread == 0) results.offsets[Experts] = used;
    fill_tail(results, used, block * Threads + thread, blocks * Threads);
    __syncthreads();
    if (block == 0) {
#pragma unroll
        for (int round = 0; round < Rounds; ++round) {
            const unsigned pair = pairs.first + round * 32, expert = pairs.expert[round];
            int row = -1;
            if (expert < Experts) {
                const unsigned rank = memory.share.counts[thread / 32][expert] + pairs.rank[round];
                row = row_of(memory.first[expert] + rank, results.capacity);
                if (row >= 0) write_row(results, row, pair, expert);
            }
            if (pair < num_pairs) write_position<TopK>(results, pair, row);
        }
    }
    fill_experts<Threads>(results, memory.padding, Experts, block, blocks);
}

// The same by one block for pairs of TopK slots a token. `expert_of_pair(pair)` returns their experts; a
// number outside 0 .. Experts - 1 is none. Every thread of the block takes part.
template <int TopK, int Threads, int Experts, int MaxPairs, typename ExpertOfPair>
__device__ __forceinline__ void layout_by_block(BlockLayout<Threads, Experts, MaxPairs>& memory, unsigned num_pairs,
                                                ExpertOfPair expert_of_pair, const LayoutResults& results) {
    constexpr int ROUNDS = ShareCounts<Threads, Experts, MaxPairs>::ROUNDS;
    RankedPairs<ROUNDS> pairs(0);
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const unsigned pair = pairs.first + round * 32;
        pairs.expert[round] = pair < num_pairs ? expert_of_pair(pair) : -1;
    }
    layout_by_block<TopK>(memory, num_pairs, pairs, results, 0, 1);
}
