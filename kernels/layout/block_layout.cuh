// SPDX-License-Identifier: Apache-2.0
// The layout of some thousand pairs by one block, in three steps between barriers: each warp ranks the pairs of its
// contiguous share by expert, experts add the counts of warps and their rows, pairs go to their rows.
//
// A kernel that has just written the ids of few tokens lays them out with it at its end:
//     __shared__ BlockLayout<THREADS, EXPERTS, MAX_PAIRS> memory;  // or in place of memory that it needs no more
//     __syncthreads();  // ids of other threads are visible
//     layout_by_block<TOP_K>(memory, num_pairs, [&](int pair) { return int(ids[pair]); }, results);
#pragma once

#include "device/block_scan.cuh"
#include "layout/ranks.cuh"
#include "layout/results.cuh"

// Shared memory of a layout by a block of Threads threads, of at most MaxPairs pairs.
template <int Threads, int Experts, int MaxPairs>
struct __align__(16) BlockLayout {
    static_assert(Threads % 32 == 0 && MaxPairs < 65536, "whole warps, counts of 16 bits");
    static constexpr int WARPS = Threads / 32;
    static constexpr int ROUNDS = (MaxPairs + Threads - 1) / Threads;  // of 32 pairs in each warp
    static constexpr int ROW = (Experts + 7) / 8 * 8;                  // whole words of 16 bytes

    unsigned short counts[WARPS][ROW];  // of each warp; later of the warps before it
    int first[ROW];                     // rows of experts
    int end[LAYOUT_ALIGNMENT > 1 ? ROW : 1];
};

// Lay out pairs 0 .. num_pairs - 1, which have TopK slots a token. `expert_of_pair(pair)` returns their experts; a
// number outside 0 .. Experts - 1 is none. Every thread of the block takes part. Of several blocks that lay out the
// same pairs, all write a part of the padding, and the first the rest.
template <int TopK, int Threads, int Experts, int MaxPairs, typename ExpertOfPair>
__device__ __forceinline__ void layout_by_block(BlockLayout<Threads, Experts, MaxPairs>& memory, int num_pairs,
                                                ExpertOfPair expert_of_pair, const LayoutResults& results,
                                                int block = 0, int blocks = 1) {
    typedef BlockLayout<Threads, Experts, MaxPairs> Memory;
    constexpr int WARPS = Memory::WARPS, ROUNDS = Memory::ROUNDS, ROW = Memory::ROW;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int first_pair = warp * (ROUNDS * 32) + lane;

    unsigned expert[ROUNDS];
    int rank[ROUNDS];
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int pair = first_pair + round * 32;
        expert[round] = expert_or_none<Experts>(pair < num_pairs ? expert_of_pair(pair) : -1);
    }
    uint4* row = reinterpret_cast<uint4*>(memory.counts[warp]);
#pragma unroll
    for (int i = lane; i < ROW / 8; i += 32) row[i] = make_uint4(0, 0, 0, 0);
    __syncwarp();
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        rank[round] = rank_and_count<Experts>(expert[round], memory.counts[warp]);
    }
    __syncthreads();

    // Each thread adds two experts at a time, whose counts are the halves of a word.
    constexpr int WORDS = (ROW / 2 + Threads - 1) / Threads;
    int count[2 * WORDS], used = 0;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        const int word = thread * WORDS + i;
        unsigned sum = 0;
        if (word < ROW / 2) {
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                unsigned* cell = reinterpret_cast<unsigned*>(memory.counts[w]) + word;
                const unsigned both = *cell;
                *cell = sum;
                sum += both;
            }
        }
        count[2 * i] = sum & 0xffffu;
        count[2 * i + 1] = sum >> 16;
        used += aligned_blocks(count[2 * i]) + aligned_blocks(count[2 * i + 1]);
    }
    int total_blocks;
    int before = block_prefix<Threads>(used, total_blocks);
#pragma unroll
    for (int i = 0; i < 2 * WORDS; ++i) {
        const int e = thread * (2 * WORDS) + i;
        if (e < Experts) {
            const ExpertRows rows = rows_of(before, count[i], results.capacity);
            memory.first[e] = rows.first;
            if (LAYOUT_ALIGNMENT > 1) memory.end[e] = rows.end;
            if (block == 0) write_expert(results, e, count[i], rows);
        }
        before += aligned_blocks(count[i]);
    }
    const int rows_used = first_row(total_blocks, results.capacity);
    if (LAYOUT_OFFSETS && block == 0 && thread == 0) results.offsets[Experts] = rows_used;
    fill_tail(results, rows_used, block * Threads + thread, blocks * Threads);
    __syncthreads();

    if (block == 0) {
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            const int pair = first_pair + round * 32;
            int target = -1;
            if (expert[round] < Experts) {
                const int at = memory.counts[warp][expert[round]] + rank[round];
                target = row_of(memory.first[expert[round]], at, results.capacity);
                if (target >= 0) write_row(results, target, pair, expert[round]);
            }
            if (pair < num_pairs) write_position<TopK>(results, pair, target);
        }
    }
    if (LAYOUT_ALIGNMENT > 1) {
        for (int e = block * WARPS + warp; e < Experts; e += blocks * WARPS) {
            const int next = e + 1 < Experts ? memory.first[e + 1] : rows_used;
            fill_padding(results, memory.end[e], next, lane, 32);
        }
    }
}
