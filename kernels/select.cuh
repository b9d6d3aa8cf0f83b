// SPDX-License-Identifier: Apache-2.0
// The TopK best of a row whose keys lie in the registers of Lanes threads, PerLane adjacent columns each.
//
// Each lane first orders its own best few keys ("heads"). A round then compares one head per lane: the warp's maximum, and
// of the lanes that have it the lowest, which by the layout also has the lowest columns. A lane whose heads are used up looks
// at all of its keys again; that is rare and exact. Code is straight, with selects instead of branches: lanes that go
// different ways cost more than they save.
#pragma once

#include "order.cuh"
#include "warp.cuh"

struct Winner {
    unsigned key;  // NO_KEY: the row has no such entry
    int column;
};

template <int PerLane, int Heads>
struct LaneHeads {
    unsigned key[Heads];
    int slot[Heads];  // position among the lane's columns

    // Insert the keys one by one; a later equal key stays behind, so lower columns come first.
    __device__ __forceinline__ explicit LaneHeads(const unsigned (&keys)[PerLane]) {
#pragma unroll
        for (int j = 0; j < PerLane; ++j) {
            bool above[Heads];
#pragma unroll
            for (int h = 0; h < Heads; ++h) above[h] = h >= j || keys[j] > key[h];
#pragma unroll
            for (int h = Heads - 1; h >= 0; --h) {
                if (h > j) continue;  // that place is not filled yet
                const bool above_previous = h > 0 && above[h > 0 ? h - 1 : 0];
                const unsigned new_key = above_previous ? key[h > 0 ? h - 1 : 0] : keys[j];
                const int new_slot = above_previous ? slot[h > 0 ? h - 1 : 0] : j;
                key[h] = above[h] ? new_key : key[h];
                slot[h] = above[h] ? new_slot : slot[h];
            }
        }
    }

    __device__ __forceinline__ void pop(bool yes) {
#pragma unroll
        for (int h = 0; h < Heads; ++h) {
            const unsigned next_key = h + 1 < Heads ? key[h + 1 < Heads ? h + 1 : h] : NO_KEY;
            key[h] = yes ? next_key : key[h];
            if (h + 1 < Heads) slot[h] = yes ? slot[h + 1 < Heads ? h + 1 : h] : slot[h];
        }
    }

    // The best key behind the entry (last, last_slot) becomes the head.
    __device__ __forceinline__ void refill(bool yes, const unsigned (&keys)[PerLane], unsigned last, int last_slot) {
        unsigned best = NO_KEY;
        int best_slot = 0;
#pragma unroll
        for (int j = 0; j < PerLane; ++j) {
            const bool behind = keys[j] < last || (keys[j] == last && j > last_slot);
            const bool better = behind && keys[j] > best;
            best = better ? keys[j] : best;
            best_slot = better ? j : best_slot;
        }
        key[0] = yes ? best : key[0];
        slot[0] = yes ? best_slot : slot[0];
    }
};

// The r-th best entry in lane r. `lane` counts within the row's lanes; every lane of the warp takes part.
template <int TopK, int Lanes, int PerLane>
__device__ __forceinline__ Winner select_topk(const unsigned (&keys)[PerLane], int lane) {
    static_assert(TopK <= Lanes, "one lane holds one winner");
    constexpr int WANTED = TopK < 3 ? TopK : 3;
    constexpr int Heads = WANTED < PerLane ? WANTED : PerLane;
    LaneHeads<PerLane, Heads> heads(keys);
    Winner winner = {NO_KEY, 0};
#pragma unroll
    for (int round = 0; round < TopK; ++round) {
        const unsigned best = lanes_max<Lanes>(heads.key[0]);
        const int owner = __ffs(static_cast<int>(lanes_ballot<Lanes>(heads.key[0] == best))) - 1;
        const int column = __shfl_sync(FULL_WARP, lane * PerLane + heads.slot[0], owner, Lanes);
        winner.key = lane == round ? best : winner.key;
        winner.column = lane == round ? column : winner.column;
        if (round + 1 == TopK) break;
        const bool mine = lane == owner;
        const int slot = heads.slot[0];
        heads.pop(mine);
        if (Heads < PerLane && round + 1 >= Heads) {
            const bool empty = mine && heads.key[0] == NO_KEY;
            if (__any_sync(FULL_WARP, empty)) heads.refill(empty, keys, best, slot);
        }
    }
    return winner;
}
