// SPDX-License-Identifier: Apache-2.0
// expert_layout for any number of pairs and experts, in three launches.
//
// Pairs are divided into shares, experts into tiles; a block has one of each. `count` counts the pairs of the share by
// expert. `add_up` adds up the counts of all shares, and of those before each share. `place` ranks the pairs of the
// share again, and writes them to their rows.
#include "layout/ids.cuh"
#include "layout/place.cuh"

SPECIALISED int THREADS = 256;
SPECIALISED int MAX_PAIRS = 2048;  // of a share
SPECIALISED int TILE = 256;        // experts

constexpr int TILES = LOCAL_EXPERTS > TILE ? (LOCAL_EXPERTS + TILE - 1) / TILE : 1;
typedef PlaceMemory<THREADS, TILE, MAX_PAIRS> TileMemory;
typedef TileMemory::Share TileShare;
constexpr int TABLE_ROW = TILES * TileShare::COLUMNS;  // words of two experts
constexpr int GROUPS = (TABLE_ROW + 31) / 32;          // of 64 experts
static_assert(TILES == 1 || TileShare::COLUMNS % 32 == 0, "a tile has whole groups");

__shared__ TileMemory memory;

// The pairs of this block's share, by their expert in this block's tile.
struct SharePairs : RankedPairs<TileShare::ROUNDS> {
    int share, first_expert;

    __device__ __forceinline__ explicit SharePairs(const Ids& ids)
        : RankedPairs<TileShare::ROUNDS>(blockIdx.x / TILES * unsigned(MAX_PAIRS)),
          share(blockIdx.x / TILES),
          first_expert(blockIdx.x % TILES * TILE) {
        ids.read(*this);
#pragma unroll
        for (int round = 0; round < TileShare::ROUNDS; ++round) {
            if (expert[round] >= LOCAL_EXPERTS) continue;
            const unsigned in_tile = expert[round] - first_expert;
            expert[round] = in_tile < TILE ? in_tile : ELSEWHERE;
        }
    }
};

// Leave the counts of each share and expert in `table`, two in a word.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    expert_layout_shares_count(const id_t* __restrict__ indices, const int* __restrict__ expert_map, load_t* load,
                               const int* __restrict__ num_valid, unsigned* __restrict__ table, int num_valid_value,
                               int num_pairs, int first_expert, long long indices_stride) {
    const Ids ids =
        ids_of(indices, expert_map, nullptr, num_valid, num_valid_value, num_pairs, first_expert, indices_stride);
    SharePairs pairs(ids);
    rank_share(memory.share, pairs);
    __syncthreads();
    unsigned* row = table + static_cast<int64_t>(blockIdx.x) * TileShare::COLUMNS;
    for (int word = threadIdx.x; word < TileShare::COLUMNS; word += THREADS) row[word] = sum_warps(memory.share, word);
}

// Replace the counts of each share by those of the shares before it, and add up the counts of all: 64 experts by a
// block, each of eight warps takes some adjacent shares. Add up the blocks of rows of the 64 experts.
extern "C" __global__ void __launch_bounds__(256, 1)
    expert_layout_shares_add_up(const unsigned* __restrict__ table, int2* __restrict__ before, int2* __restrict__ all,
                                int* __restrict__ group_blocks, int num_shares) {
    __shared__ int2 sums[8][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, word = blockIdx.x * 32 + lane;
    const int per_warp = (num_shares + 7) / 8, first = warp * per_warp, end = min(first + per_warp, num_shares);
    const bool exists = word < TABLE_ROW;
    int2 sum = make_int2(0, 0);
#pragma unroll 8
    for (int share = first; share < end; ++share) {
        const unsigned both = exists ? __ldg(table + static_cast<int64_t>(share) * TABLE_ROW + word) : 0;
        sum.x += both & 0xffffu;
        sum.y += both >> 16;
    }
    sums[warp][lane] = sum;
    __syncthreads();
    int2 earlier = make_int2(0, 0), total = make_int2(0, 0);
#pragma unroll
    for (int other = 0; other < 8; ++other) {
        if (other == warp) earlier = total;
        total.x += sums[other][lane].x;
        total.y += sums[other][lane].y;
    }
#pragma unroll 4
    for (int share = first; share < end && exists; ++share) {
        const int64_t at = static_cast<int64_t>(share) * TABLE_ROW + word;
        const unsigned both = __ldg(table + at);
        before[at] = earlier;
        earlier.x += both & 0xffffu;
        earlier.y += both >> 16;
    }
    if (warp > 0) return;
    if (exists) all[word] = total;
    const unsigned blocks = warp_sum(aligned_blocks(total.x) + aligned_blocks(total.y));
    if (lane == 0) group_blocks[blockIdx.x] = static_cast<int>(blocks);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    expert_layout_shares_place(const id_t* __restrict__ indices, const int* __restrict__ expert_map, load_t* load,
                               const int* __restrict__ num_valid, int* __restrict__ counts, int* __restrict__ offsets,
                               int* __restrict__ ends, int* __restrict__ order, int* __restrict__ positions,
                               int* __restrict__ block_experts, int* __restrict__ row_experts,
                               const int2* __restrict__ before, const int2* __restrict__ all,
                               const int* __restrict__ group_blocks, int num_valid_value, int num_pairs,
                               int first_expert, int capacity, int pad, long long indices_stride,
                               long long positions_stride) {
    constexpr int WORDS = TileShare::WORDS;
    const Ids ids = ids_of(indices, expert_map, blockIdx.x % TILES == 0 ? load : nullptr, num_valid, num_valid_value,
                           num_pairs, first_expert, indices_stride);
    SharePairs pairs(ids);
    const LayoutResults results = {counts,
                                   offsets,
                                   ends,
                                   order,
                                   positions,
                                   block_experts,
                                   row_experts,
                                   capacity,
                                   pad,
                                   positions_stride,
                                   LOAD_BY_PAIR || !load ? nullptr : load + first_expert};
    ExpertSums<WORDS> sums;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        const int word = threadIdx.x * WORDS + i;
        int2 a = make_int2(0, 0), b = make_int2(0, 0);
        if (word < TileShare::COLUMNS) {
            a = __ldg(all + blockIdx.x % TILES * TileShare::COLUMNS + word);
            b = __ldg(before + static_cast<int64_t>(blockIdx.x) * TileShare::COLUMNS + word);
        }
        sums.all[2 * i] = a.x, sums.all[2 * i + 1] = a.y;
        sums.before[2 * i] = b.x, sums.before[2 * i + 1] = b.y;
    }
    Tile tile = {pairs.first_expert, min(TILE, LOCAL_EXPERTS - pairs.first_expert), LOCAL_EXPERTS, 0, -1};
    if (TILES > 1) {
        int earlier = 0, blocks = 0;
        for (int group = threadIdx.x; group < GROUPS; group += THREADS) {
            const int more = __ldg(group_blocks + group);
            blocks += more;
            earlier += group * 64 < tile.first ? more : 0;
        }
        block_prefix<THREADS>(earlier, tile.blocks_before);
        block_prefix<THREADS>(blocks, tile.all_blocks);
    }

    rank_share(memory.share, pairs);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WORDS; ++i) sums.mine[i] = sum_warps(memory.share, threadIdx.x * WORDS + i);
    const unsigned first_pair = pairs.share * unsigned(MAX_PAIRS);
    const int num_sorted = sort_share(memory, pairs, sums, first_pair);
    const Part part = {pairs.share, static_cast<int>(gridDim.x) / TILES, first_pair, static_cast<unsigned>(num_pairs)};
    write_share<TOP_K>(memory, pairs, sums, num_sorted, tile, part, results);
}
