// SPDX-License-Identifier: Apache-2.0
// Contiguous groups of experts of equal size: only experts of the best groups can be chosen.
//
// The value of a group is its best selection value, or the sum of its best two. Equal groups go to the lower one.
#pragma once

#include "routing/method.cuh"
#include "select/order_key.cuh"

constexpr int GROUP_SIZE = NUM_EXPERTS / (NUM_GROUPS > 0 ? NUM_GROUPS : 1);

static_assert(NUM_GROUPS == 0 || (GROUP_SIZE * NUM_GROUPS == NUM_EXPERTS && TOP_K <= GROUP_SIZE * TOP_GROUPS),
              "groups are equal, and the best of them have TOP_K experts");

// The best two keys that a thread has seen of a group.
struct BestTwo {
    unsigned first, second;

    __device__ __forceinline__ void insert(unsigned key) {
        if (GROUP_TOP2) second = max(second, min(first, key));
        first = max(first, key);
    }
};

__device__ __forceinline__ unsigned worth_key(unsigned best, unsigned next) {
    if (!GROUP_TOP2 || GROUP_SIZE == 1) return best;
    return sum_order_key(sum_key_value(best) + sum_key_value(next));
}

// Return the key of a group's value, from what each of Lanes lanes saw of it.
template <int Lanes>
__device__ __forceinline__ unsigned group_key(BestTwo seen, int lane) {
    const unsigned best = lanes_max<Lanes>(seen.first);
    if (!GROUP_TOP2 || GROUP_SIZE == 1) return best;
    const bool owns_best = lane == __ffs(static_cast<int>(lanes_ballot<Lanes>(seen.first == best))) - 1;
    const unsigned next = lanes_max<Lanes>(owns_best ? seen.second : seen.first);
    return worth_key(best, next);
}

// Return whether a group is kept: fewer than TOP_GROUPS others rank before it. `other_key` returns the key of any
// group.
template <typename OtherKey>
__device__ __forceinline__ bool keeps_group(unsigned key, int group, OtherKey other_key) {
    int rank = 0;
#pragma unroll
    for (int other = 0; other < NUM_GROUPS; ++other) {
        const unsigned its_key = other_key(other);
        rank += (its_key > key) | ((its_key == key) & (other < group));
    }
    return rank < TOP_GROUPS;
}

// Return whether the group of a lane is kept, where each group lies in adjacent lanes, from what this lane saw of it.
template <int Lanes>
__device__ __forceinline__ bool keeps_own_group(BestTwo seen, int lane) {
    constexpr int SHARERS = NUM_GROUPS > 0 ? Lanes / NUM_GROUPS : 1;
#pragma unroll
    for (int distance = 1; distance < SHARERS; distance *= 2) {
        const unsigned first = __shfl_xor_sync(FULL_WARP, seen.first, distance);
        if (GROUP_TOP2) seen.second = max(seen.second, __shfl_xor_sync(FULL_WARP, seen.second, distance));
        seen.insert(first);
    }
    const unsigned key = worth_key(seen.first, seen.second);
    return keeps_group(key, lane / SHARERS,
                       [&](int group) { return __shfl_sync(FULL_WARP, key, group * SHARERS, Lanes); });
}

// Remove the experts that cannot be chosen from a row that Lanes lanes hold, PerLane adjacent columns each.
template <int Lanes, int PerLane>
__device__ __forceinline__ void keep_best_groups(unsigned (&keys)[PerLane], int lane) {
    static_assert(NUM_GROUPS <= Lanes, "a lane holds a group's key");
    static_assert(NUM_GROUPS == 0 || PerLane <= GROUP_SIZE, "a lane has columns of two groups at most");
    constexpr bool STRADDLES = GROUP_SIZE % PerLane != 0;
    const int own = lane * PerLane / GROUP_SIZE;                // the group of the lane's first column
    const int split = (own + 1) * GROUP_SIZE - lane * PerLane;  // from this entry on, its columns are of the next group
    BestTwo of_own = {NO_KEY, NO_KEY}, of_next = {NO_KEY, NO_KEY};
#pragma unroll
    for (int j = 0; j < PerLane; ++j) {
        of_own.insert(STRADDLES && j >= split ? NO_KEY : keys[j]);
        if (STRADDLES) of_next.insert(j >= split ? keys[j] : NO_KEY);
    }
    unsigned mine = NO_KEY;  // of the group that has the number of this lane
#pragma unroll
    for (int group = 0; group < NUM_GROUPS; ++group) {
        const BestTwo none = {NO_KEY, NO_KEY};
        const BestTwo seen = own == group ? of_own : STRADDLES && own + 1 == group ? of_next : none;
        const unsigned key = group_key<Lanes>(seen, lane);
        mine = lane == group ? key : mine;
    }
    const bool keeps = keeps_group(mine, lane, [&](int group) { return __shfl_sync(FULL_WARP, mine, group, Lanes); });
    const unsigned kept = lanes_ballot<Lanes>(lane < NUM_GROUPS && keeps);
    const bool keeps_own = kept >> own & 1, keeps_next = kept >> own >> 1 & 1;
#pragma unroll
    for (int j = 0; j < PerLane; ++j) {
        if (!(STRADDLES && j >= split ? keeps_next : keeps_own)) keys[j] = NO_KEY;
    }
}
