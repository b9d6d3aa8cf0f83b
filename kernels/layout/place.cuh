// SPDX-License-Identifier: Apache-2.0
// From the ranks of a share to the rows of its pairs. First the pairs are sorted by expert in shared memory, which needs
// nothing of other shares; then, with the counts of the shares before and of all, the pairs of an expert are written
// together.
#pragma once

#include "device/block_scan.cuh"
#include "device/warp.cuh"
#include "layout/ranks.cuh"
#include "layout/results.cuh"

// Shared memory of a block that ranks and places a share; spare bytes as in `ShareCounts`.
template <int Threads, int Experts, int MaxPairs, int SpareBytes = 1>
struct PlaceMemory {
    typedef ShareCounts<Threads, Experts, MaxPairs, SpareBytes> Share;
    Share share;
    unsigned sorted[MaxPairs];                         // expert in the upper half, pair of the share in the lower
    unsigned shift[Share::ROW];                        // from the place among the sorted pairs to the row
    Rows padding[LAYOUT_ALIGNMENT > 1 ? Experts : 1];  // behind the rows of an expert
};

// Adjacent experts, of which a block places the pairs.
struct Tile {
    int first;  // expert
    int count;
    int num_experts;    // of all tiles
    int blocks_before;  // blocks of rows of the experts before
    int all_blocks;     // of all experts; -1: this is the only tile
};

// A share of the pairs. Every share writes a part of the padding; the first what is there once.
struct Part {
    int share;
    int shares;
    unsigned first_pair;
    unsigned num_pairs;  // of all shares
};

// What a thread knows of its 2 * Words adjacent experts.
template <int Words>
struct ExpertSums {
    unsigned mine[Words];   // pairs of this share, of two experts in a word
    int place[2 * Words];   // of the first of them among the sorted pairs
    int before[2 * Words];  // pairs of the shares before
    int all[2 * Words];
};

// An expert of another tile, whose block writes the pair's position.
constexpr unsigned ELSEWHERE = 0x7fffffffu;

// Sort the pairs of a share, once ranks and `mine` are known; the ranks become places among the sorted pairs. Return how
// many there are. A barrier has to follow.
template <int Threads, int Experts, int MaxPairs, int Spare, int Rounds, int Words>
__device__ __forceinline__ int sort_share(PlaceMemory<Threads, Experts, MaxPairs, Spare>& memory,
                                          RankedPairs<Rounds>& pairs, ExpertSums<Words>& sums, unsigned first_pair) {
    int num_mine = 0, num_sorted;
#pragma unroll
    for (int i = 0; i < Words; ++i) num_mine += (sums.mine[i] & 0xffffu) + (sums.mine[i] >> 16);
    int place = block_prefix<Threads>(num_mine, num_sorted);
#pragma unroll
    for (int i = 0; i < Words; ++i) {
        sums.place[2 * i] = place;
        sums.place[2 * i + 1] = place + (sums.mine[i] & 0xffffu);
        add_warps(memory.share, threadIdx.x * Words + i, sums.place[2 * i] | sums.place[2 * i + 1] << 16);
        place = sums.place[2 * i + 1] + (sums.mine[i] >> 16);
    }
    __syncthreads();
#pragma unroll
    for (int round = 0; round < Rounds; ++round) {
        const unsigned expert = pairs.expert[round];
        if (expert < Experts) {
            pairs.rank[round] += memory.share.counts[threadIdx.x / 32][expert];
            memory.sorted[pairs.rank[round]] = expert << 16 | (pairs.first + round * 32 - first_pair);
        }
    }
    return num_sorted;
}

// Write the part of the results that belongs to a share and a tile.
template <int TopK, int Threads, int Experts, int MaxPairs, int Spare, int Rounds, int Words>
__device__ __forceinline__ void write_share(PlaceMemory<Threads, Experts, MaxPairs, Spare>& memory,
                                            const RankedPairs<Rounds>& pairs, const ExpertSums<Words>& sums,
                                            int num_sorted, const Tile& tile, const Part& part,
                                            const LayoutResults& results) {
    const int thread = threadIdx.x;
    int blocks = 0, tile_blocks;
#pragma unroll
    for (int i = 0; i < 2 * Words; ++i) blocks += aligned_blocks(sums.all[i]);
    int block = tile.blocks_before + block_prefix<Threads>(blocks, tile_blocks);
#pragma unroll
    for (int i = 0; i < 2 * Words; ++i) {
        const int expert = thread * (2 * Words) + i, count = sums.all[i];
        if (expert < tile.count) {
            const Rows rows = rows_of(block, count, results.capacity);
            block += aligned_blocks(count);
            memory.shift[expert] = unsigned(rows.begin) + unsigned(sums.before[i]) - unsigned(sums.place[i]);
            if (LAYOUT_ALIGNMENT > 1) memory.padding[expert] = {rows.end, first_row(block, results.capacity)};
            if (part.share == 0) write_expert(results, tile.first + expert, count, rows);
        }
    }
    if (tile.first == 0) {
        const int used = first_row(tile.all_blocks < 0 ? tile_blocks : tile.all_blocks, results.capacity);
        if (LAYOUT_OFFSETS && part.share == 0 && thread == 0) results.offsets[tile.num_experts] = used;
        fill_tail(results, used, part.share * Threads + thread, part.shares * Threads);
    }
    __syncthreads();
    if (LAYOUT_POSITIONS) {
#pragma unroll
        for (int round = 0; round < Rounds; ++round) {
            const unsigned pair = pairs.first + round * 32, expert = pairs.expert[round];
            const int row =
                expert < Experts ? row_of(memory.shift[expert] + unsigned(pairs.rank[round]), results.capacity) : -1;
            if (pair < part.num_pairs && expert != ELSEWHERE) write_position<TopK>(results, pair, row);
        }
    }
    if (LAYOUT_BY_ROW) {
#pragma unroll 4
        for (int i = thread; i < num_sorted; i += Threads) {
            const unsigned both = memory.sorted[i], expert = both >> 16;
            const int row = row_of(memory.shift[expert] + unsigned(i), results.capacity);
            if (row >= 0) write_row(results, row, part.first_pair + (both & 0xffffu), tile.first + expert);
        }
    }
    fill_experts<Threads>(results, memory.padding, tile.count, part.share, part.shares);
}
