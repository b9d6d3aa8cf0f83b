// SPDX-License-Identifier: Apache-2.0
// From the counts of a share, of the shares before it and of all, to the rows of its pairs.
#pragma once

#include "device/block_scan.cuh"
#include "layout/ranks.cuh"
#include "layout/results.cuh"

// Shared memory of a block that ranks and places a share. `Sorted`: pairs are first sorted in shared memory, so that
// those of an expert are written together.
template <int Threads, int Experts, int MaxPairs, bool Sorted>
struct PlaceMemory {
    typedef ShareCounts<Threads, Experts, MaxPairs> Share;
    Share share;
    unsigned base[Share::ROW];                         // row of the first pair of an expert
    int place[Sorted ? Share::ROW : 1];                // of this pair among the sorted ones
    unsigned sorted[Sorted ? MaxPairs : 1];            // expert in the upper half, pair of the share in the lower
    Rows padding[LAYOUT_ALIGNMENT > 1 ? Experts : 1];  // behind the rows of an expert
};

// Adjacent experts, of which a block places the pairs.
struct Tile {
    int first;  // expert
    int count;
    int num_experts;    // of all tiles
    int blocks_before;  // blocks of rows of the experts before; below, of all experts, or -1 if this is the only tile
    int all_blocks;
};

// A share of the pairs, the only one or one of several. Every share writes a part of the padding; the first what is
// there once.
struct Part {
    int share;
    int shares;
    unsigned first_pair;
    unsigned num_pairs;  // of all shares
    bool places_pairs;
};

// An expert of another tile, whose block writes the pair's position.
constexpr unsigned ELSEWHERE = 0x7fffffffu;

// Write the part of the results that belongs to a share and a tile. A thread knows of its 2 * Words adjacent experts the
// pairs of `all` shares, of those `before` this one, and of this one, two in a word.
template <int TopK, int Threads, int Experts, int MaxPairs, bool Sorted, int Rounds, int Words>
__device__ __forceinline__ void place_share(PlaceMemory<Threads, Experts, MaxPairs, Sorted>& memory,
                                            const RankedPairs<Rounds>& pairs, const int (&all)[2 * Words],
                                            const int (&before)[2 * Words], const unsigned (&mine)[Words],
                                            const Tile& tile, const Part& part, const LayoutResults& results) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    int blocks = 0, tile_blocks, num_mine = 0, num_sorted = 0;
#pragma unroll
    for (int i = 0; i < 2 * Words; ++i) blocks += aligned_blocks(all[i]);
#pragma unroll
    for (int i = 0; i < Words; ++i) num_mine += (mine[i] & 0xffffu) + (mine[i] >> 16);
    int block = tile.blocks_before + block_prefix<Threads>(blocks, tile_blocks);
    int place = Sorted ? block_prefix<Threads>(num_mine, num_sorted) : 0;
#pragma unroll
    for (int i = 0; i < 2 * Words; ++i) {
        const int expert = thread * (2 * Words) + i;
        if (expert < tile.count) {
            const Rows rows = rows_of(block, all[i], results.capacity);
            block += aligned_blocks(all[i]);
            memory.base[expert] = static_cast<unsigned>(rows.begin) + static_cast<unsigned>(before[i]);
            if (Sorted) memory.place[expert] = place;
            place += i % 2 == 0 ? mine[i / 2] & 0xffffu : mine[i / 2] >> 16;
            if (LAYOUT_ALIGNMENT > 1) memory.padding[expert] = {rows.end, first_row(block, results.capacity)};
            if (part.share == 0) write_expert(results, tile.first + expert, all[i], rows);
        }
    }
    if (tile.first == 0) {
        const int used = first_row(tile.all_blocks < 0 ? tile_blocks : tile.all_blocks, results.capacity);
        if (LAYOUT_OFFSETS && part.share == 0 && thread == 0) results.offsets[tile.num_experts] = used;
        fill_tail(results, used, part.share * Threads + thread, part.shares * Threads);
    }
    __syncthreads();

    if (part.places_pairs) {
#pragma unroll
        for (int round = 0; round < Rounds; ++round) {
            const unsigned pair = pairs.first + round * 32, expert = pairs.expert[round];
            int row = -1;
            if (expert < Experts) {
                const unsigned rank = memory.share.counts[warp][expert] + pairs.rank[round];
                row = row_of(memory.base[expert], rank, results.capacity);
                if (Sorted) {
                    memory.sorted[memory.place[expert] + rank] = expert << 16 | (pair - part.first_pair);
                } else if (row >= 0) {
                    write_row(results, row, pair, tile.first + expert);
                }
            }
            if (pair < part.num_pairs && expert != ELSEWHERE) write_position<TopK>(results, pair, row);
        }
    }
    if (Sorted) {
        __syncthreads();
#pragma unroll 4
        for (int i = thread; i < num_sorted; i += Threads) {
            const unsigned both = memory.sorted[i], expert = both >> 16;
            const int row = row_of(memory.base[expert], i - memory.place[expert], results.capacity);
            if (row >= 0) write_row(results, row, part.first_pair + (both & 0xffffu), tile.first + expert);
        }
    }
    if (LAYOUT_ALIGNMENT > 1) {
        for (int expert = part.share * (Threads / 32) + warp; expert < tile.count;
             expert += part.shares * (Threads / 32)) {
            fill_padding(results, memory.padding[expert], lane, 32);
        }
    }
}
