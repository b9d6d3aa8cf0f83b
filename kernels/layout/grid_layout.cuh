// SPDX-License-Identifier: Apache-2.0
// The layout by several blocks in one launch. A block ranks the pairs of its share by expert and publishes their counts.
// While the other blocks do the same, it sorts its pairs by expert. Once all have arrived, it adds up the counts of all
// shares and of those before its own, and writes its pairs to their rows.
//
// In a cluster of blocks, counts lie in shared memory. Otherwise they lie in global memory, and a block that has waited
// too long for the others leaves, and the last block to arrive does its share as well.
#pragma once

#include "device/cluster.cuh"
#include "device/last_block.cuh"
#include "layout/ids.cuh"
#include "layout/place.cuh"

SPECIALISED int THREADS = 256;
SPECIALISED int MAX_PAIRS = 1024;  // of a share

constexpr int CLUSTER_BLOCKS = 8;
constexpr int QUADS = (LOCAL_EXPERTS + 7) / 8 * 2;            // of experts, whose counts are read together
constexpr int TEAMS = THREADS > QUADS ? THREADS / QUADS : 1;  // of threads that add up every so many shares

// Counts of four experts: of the pairs of the shares before this one, and of all.
struct TeamSums {
    int4 before[TEAMS][QUADS];
    int4 all[TEAMS][QUADS];
};

typedef PlaceMemory<THREADS, LOCAL_EXPERTS, MAX_PAIRS, sizeof(TeamSums)> GridMemory;
typedef GridMemory::Share GridShare;
constexpr int WORDS = GridShare::WORDS;

// Counts of 16 bits of a share, for the other blocks: in global memory, or in that of the blocks of a cluster.
template <bool IN_CLUSTER>
struct Counts {
    uint2* table;

    __device__ __forceinline__ unsigned* row(int share) const {
        return reinterpret_cast<unsigned*>(IN_CLUSTER ? table : table + share * QUADS);
    }
    __device__ __forceinline__ uint2 read(int share, int quad) const {
        return IN_CLUSTER ? cluster_map(table, share)[quad] : __ldcg(table + share * QUADS + quad);
    }
};

__device__ __forceinline__ void add_halves(int4& sum, uint2 halves) {
    sum.x += halves.x & 0xffffu;
    sum.y += halves.x >> 16;
    sum.z += halves.y & 0xffffu;
    sum.w += halves.y >> 16;
}

// Add up the counts of the shares, of this thread's experts.
template <bool IN_CLUSTER>
__device__ __forceinline__ void add_shares(GridMemory& memory, const Counts<IN_CLUSTER>& counts, int share, int shares,
                                           ExpertSums<WORDS>& sums) {
    constexpr int READ_AHEAD = IN_CLUSTER ? (CLUSTER_BLOCKS + TEAMS - 1) / TEAMS : 16;  // all loads in flight
    constexpr int ADDED = min_int(READ_AHEAD, 65535 / MAX_PAIRS);                       // without a carry from 16 bits
    TeamSums& teams = *reinterpret_cast<TeamSums*>(memory.share.spare);
    for (int i = threadIdx.x; i < TEAMS * QUADS; i += THREADS) {
        const int team = i / QUADS, quad = i % QUADS;
        int4 before = make_int4(0, 0, 0, 0), all = before;
        for (int first = team; first < shares; first += READ_AHEAD * TEAMS) {
            uint2 read[READ_AHEAD];
#pragma unroll
            for (int j = 0; j < READ_AHEAD; ++j) {
                const int other = first + j * TEAMS;
                read[j] = other < shares ? counts.read(other, quad) : make_uint2(0, 0);
            }
#pragma unroll
            for (int begin = 0; begin < READ_AHEAD; begin += ADDED) {
                uint2 some = make_uint2(0, 0), some_before = some;
#pragma unroll
                for (int j = begin; j < min_int(begin + ADDED, READ_AHEAD); ++j) {
                    const bool is_before = first + j * TEAMS < share;
                    some.x += read[j].x;
                    some.y += read[j].y;
                    some_before.x += is_before ? read[j].x : 0;
                    some_before.y += is_before ? read[j].y : 0;
                }
                add_halves(all, some);
                add_halves(before, some_before);
            }
        }
        teams.before[team][quad] = before;
        teams.all[team][quad] = all;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        const int column = threadIdx.x * WORDS + i;
        int2 before = make_int2(0, 0), all = make_int2(0, 0);
        if (column < 2 * QUADS) {
#pragma unroll
            for (int team = 0; team < TEAMS; ++team) {
                const int2 a = reinterpret_cast<const int2*>(teams.before[team])[column];
                const int2 b = reinterpret_cast<const int2*>(teams.all[team])[column];
                before = make_int2(before.x + a.x, before.y + a.y);
                all = make_int2(all.x + b.x, all.y + b.y);
            }
        }
        sums.before[2 * i] = before.x;
        sums.before[2 * i + 1] = before.y;
        sums.all[2 * i] = all.x;
        sums.all[2 * i + 1] = all.y;
    }
}

// Read, rank and publish a share, and sort it. `arrive()` tells the other blocks; `wait()` waits for them, and may return
// false to leave. Then place the pairs.
template <bool IN_CLUSTER, typename Arrive, typename Wait>
__device__ __forceinline__ bool lay_out_share(GridMemory& memory, const Ids& ids, const Counts<IN_CLUSTER>& counts,
                                              int share, unsigned num_pairs, const LayoutResults& results,
                                              ExpertSums<WORDS>& sums, Arrive arrive, Wait wait) {
    const unsigned first_pair = share * static_cast<unsigned>(MAX_PAIRS);
    RankedPairs<GridShare::ROUNDS> pairs(first_pair);
    ids.read(pairs);
    rank_share(memory.share, pairs);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        const int column = threadIdx.x * WORDS + i;
        sums.mine[i] = sum_warps(memory.share, column);
        if (column < GridShare::COLUMNS) counts.row(share)[column] = sums.mine[i];
    }
    arrive();
    const int num_sorted = sort_share(memory, pairs, sums, first_pair);
    if (!wait()) return false;
    add_shares(memory, counts, share, gridDim.x, sums);
    if (IN_CLUSTER) cluster_arrive();
    const Tile tile = {0, LOCAL_EXPERTS, LOCAL_EXPERTS, 0, -1};
    write_share<TOP_K>(memory, pairs, sums, num_sorted, tile,
                       {share, static_cast<int>(gridDim.x), first_pair, num_pairs}, results);
    return true;
}

// Add the pairs of each expert to the load, unless it is counted by pair.
__device__ __forceinline__ void add_load(load_t* load, int first_expert, const ExpertSums<WORDS>& sums) {
    if (LAYOUT_LOAD_BYTES == 0 || LOAD_BY_PAIR) return;
#pragma unroll
    for (int i = 0; i < 2 * WORDS; ++i) {
        const int expert = threadIdx.x * (2 * WORDS) + i;
        if (expert < LOCAL_EXPERTS) load[first_expert + expert] += sums.all[i];
    }
}
