// SPDX-License-Identifier: Apache-2.0
// The TopK best of a row whose keys lie in the registers of Lanes threads, PerLane adjacent columns in each.
//
// Each lane first sorts its best few keys ("heads"). A round compares one head per lane: it takes the maximum, and
// among lanes that have it the lowest, which also has the lowest columns. A few heads per lane are enough for almost
// all rows; if a lane turns out to hold more winners than heads, the row is selected again from all keys, which is
// slower and exact. The code has selects instead of branches, since divergent lanes would cost more than they save.
#pragma once

#include "select/heads_per_lane.cuh"
#include "select/order_key.cuh"
#include "device/warp.cuh"

struct Winner {
    unsigned key;  // NO_KEY: the row has no such entry
    int column;
};

// The best Heads keys of a lane in order, and their positions among its columns.
template <int Heads>
struct LaneHeads {
    unsigned key[Heads];
    int slot[Heads];

    // Insert the j-th key. It goes after equal ones, so that lower columns come first.
    __device__ __forceinline__ void insert(int j, unsigned value) {
        bool above[Heads];
#pragma unroll
        for (int h = 0; h < Heads; ++h) above[h] = h >= j || value > key[h];  // place j and later ones are still empty
#pragma unroll
        for (int h = Heads - 1; h >= 0; --h) {
            if (h > j) continue;
            const bool shifts = h > 0 && above[h > 0 ? h - 1 : 0];
            slot[h] = above[h] ? (shifts ? slot[h > 0 ? h - 1 : 0] : j) : slot[h];
            key[h] = above[h] ? (shifts ? key[h > 0 ? h - 1 : 0] : value) : key[h];
        }
    }

    __device__ __forceinline__ void pop(bool yes) {
#pragma unroll
        for (int h = 0; h + 1 < Heads; ++h) {
            key[h] = yes ? key[h + 1] : key[h];
            slot[h] = yes ? slot[h + 1] : slot[h];
        }
        key[Heads - 1] = yes ? NO_KEY : key[Heads - 1];
    }
};

// Find the best head of the row, which becomes the winner in lane `round`. Return whether it is this lane's.
template <int Lanes, int PerLane>
__device__ __forceinline__ bool select_round(unsigned key, int slot, int lane, int round, Winner& winner) {
    const unsigned best = lanes_max<Lanes>(key);
    const unsigned owners = lanes_ballot<Lanes>(key == best);
    const int column = __shfl_sync(FULL_WARP, lane * PerLane + slot, __ffs(static_cast<int>(owners)) - 1, Lanes);
    winner.key = lane == round ? best : winner.key;
    winner.column = lane == round ? column : winner.column;
    return (key == best) & ((owners & ((1u << lane) - 1u)) == 0u);  // the next round waits for this alone
}

// Select from all keys: in each round, each lane looks for its best key after the last one it gave.
template <int TopK, int Lanes, int PerLane>
__device__ __forceinline__ Winner select_exactly(const unsigned (&keys)[PerLane], int lane) {
    Winner winner = {NO_KEY, 0};
    unsigned last = ~0u;
    int last_slot = -1;
#pragma unroll 1
    for (int round = 0; round < TopK; ++round) {
        unsigned best = NO_KEY;
        int best_slot = 0;
#pragma unroll
        for (int j = 0; j < PerLane; ++j) {
            const bool after = (keys[j] < last) | ((keys[j] == last) & (j > last_slot));
            const bool better = after & (keys[j] > best);
            best = better ? keys[j] : best;
            best_slot = better ? j : best_slot;
        }
        const bool mine = select_round<Lanes, PerLane>(best, best_slot, lane, round, winner);
        last = mine ? best : last;
        last_slot = mine ? best_slot : last_slot;
    }
    return winner;
}

// Return the entry of rank r in lane r. `lane` counts within the row; every lane of the warp takes part. Spread: the
// number of lanes that winners can be in. A lane keeps enough keys that only 1 row in 1000 has all its winners but the
// last in one lane, and is then selected again: many rows share that cost, few wait for it.
template <int TopK, int Lanes, int Spread = Lanes, int PerLane>
__device__ __forceinline__ Winner select_topk(const unsigned (&keys)[PerLane], int lane) {
    static_assert(TopK <= Lanes, "one lane holds one winner");
    constexpr int KEPT = heads_for(1.1e-3, TopK - 1, Spread, min_int(PerLane, TopK));
    LaneHeads<KEPT> heads;
#pragma unroll
    for (int j = 0; j < PerLane; ++j) heads.insert(j, keys[j]);

    Winner winner = {NO_KEY, 0};
    bool exhausted = false;  // this lane gave all its heads before the last round
#pragma unroll
    for (int round = 0; round < TopK; ++round) {
        const bool mine = select_round<Lanes, PerLane>(heads.key[0], heads.slot[0], lane, round, winner);
        if (round + 1 == TopK) break;
        heads.pop(mine);
        if (KEPT < PerLane && round + 1 >= KEPT) exhausted |= mine & (heads.key[0] == NO_KEY);
    }
    if (KEPT < PerLane && TopK > KEPT && UNLIKELY(__any_sync(FULL_WARP, exhausted))) {
        winner = select_exactly<TopK, Lanes>(keys, lane);
    }
    return winner;
}
