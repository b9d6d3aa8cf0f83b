// SPDX-License-Identifier: Apache-2.0
// A block's share of the pairs, ranked by expert: each warp takes adjacent pairs, in rounds of 32 in the order of its
// lanes. In a round, lanes with the same expert find each other by a mask of lanes in shared memory or, where there is
// no room for a mask of each expert, by a ballot over each bit of the expert. `__match_any_sync` takes longer than both.
#pragma once

#include "device/types.cuh"

// Shared memory of a share of at most MaxPairs pairs in a block of Threads threads.
template <int Threads, int Experts, int MaxPairs>
struct __align__(16) ShareCounts {
    static_assert(Threads % 32 == 0 && MaxPairs < 65536, "whole warps, counts of 16 bits");
    static constexpr int WARPS = Threads / 32;
    static constexpr int ROUNDS = (MaxPairs + Threads - 1) / Threads;  // of 32 pairs in each warp
    static constexpr int ROW = (Experts + 7) / 8 * 8;                  // whole words of 16 bytes
    static constexpr int COLUMNS = ROW / 2;                            // counts of two experts are the halves of a word
    static constexpr int WORDS = (COLUMNS + Threads - 1) / Threads;    // of a thread, side by side

    static constexpr bool HAS_MASKS = WARPS * ROW <= 6144;  // 24 KB

    unsigned masks[WARPS][HAS_MASKS ? ROW : 1];  // of the lanes of a warp; zero between rounds
    unsigned short counts[WARPS][ROW];           // of the pairs of a warp; later of those of the warps before it
};

// The pairs of a thread: that of round r lies 32 * r after the first.
template <int Rounds>
struct RankedPairs {
    unsigned first;
    unsigned expert[Rounds];  // a number outside 0 .. Experts - 1 is none
    int rank[Rounds];         // among the pairs of the warp with the same expert
};

// Return the lanes whose pair has this lane's expert; 0 if that is none. Their mask is
// zero again after the last of them clears it.
template <int Experts, bool HasMasks>
__device__ __forceinline__ unsigned lanes_with(unsigned expert, bool has_expert, unsigned* masks) {
    if (HasMasks) {
        if (has_expert) atomicOr(&masks[expert], 1u << threadIdx.x % 32);
        __syncwarp();
        return has_expert ? masks[expert] : 0;
    }
    unsigned same = __ballot_sync(FULL_WARP, has_expert);
#pragma unroll
    for (int bit = 1; bit < Experts; bit *= 2) {
        const unsigned votes = __ballot_sync(FULL_WARP, expert & bit);
        same &= expert & bit ? votes : ~votes;
    }
    return has_expert ? same : 0;
}

// Return the rank of this lane's pair among those that the warp has added to `counts`; add all 32 of the warp.
template <int Experts, bool HasMasks>
__device__ __forceinline__ int rank_and_count(unsigned expert, unsigned* masks, unsigned short* counts) {
    const int lane = threadIdx.x % 32;
    const bool has_expert = expert < Experts;
    const unsigned same = lanes_with<Experts, HasMasks>(expert, has_expert, masks);
    const int rank = (has_expert ? counts[expert] : 0) + __popc(same & ((1u << lane) - 1u));
    __syncwarp();
    if (same >> lane == 1) {  // the last of these lanes
        if (HasMasks) masks[expert] = 0;
        counts[expert] = static_cast<unsigned short>(rank + 1);
    }
    __syncwarp();
    return rank;
}

// Rank the pairs from first_pair on, `expert_of_pair(pair)` being their experts. A barrier has to follow.
template <int Threads, int Experts, int MaxPairs, int Rounds, typename ExpertOfPair>
__device__ __forceinline__ void rank_share(ShareCounts<Threads, Experts, MaxPairs>& memory, unsigned first_pair,
                                           unsigned num_pairs, ExpertOfPair expert_of_pair,
                                           RankedPairs<Rounds>& pairs) {
    typedef ShareCounts<Threads, Experts, MaxPairs> Share;
    constexpr int MASKS = Share::HAS_MASKS ? Share::ROW / 4 : 0;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    pairs.first = first_pair + warp * (Rounds * 32) + lane;
#pragma unroll
    for (int round = 0; round < Rounds; ++round) {
        const unsigned pair = pairs.first + round * 32;
        pairs.expert[round] = pair < num_pairs ? expert_of_pair(pair) : -1;
    }
    uint4* masks = reinterpret_cast<uint4*>(memory.masks[warp]);
    uint4* counts = reinterpret_cast<uint4*>(memory.counts[warp]);
    for (int i = lane; i < MASKS; i += 32) masks[i] = make_uint4(0, 0, 0, 0);
    for (int i = lane; i < Share::ROW / 8; i += 32) counts[i] = make_uint4(0, 0, 0, 0);
    __syncwarp();
#pragma unroll
    for (int round = 0; round < Rounds; ++round) {
        pairs.rank[round] =
            rank_and_count<Experts, Share::HAS_MASKS>(pairs.expert[round], memory.masks[warp], memory.counts[warp]);
    }
}

// Replace the counts of each warp by those of the warps before it. Return the counts of the two experts of a word.
template <int Threads, int Experts, int MaxPairs>
__device__ __forceinline__ unsigned add_warps(ShareCounts<Threads, Experts, MaxPairs>& memory, int word) {
    typedef ShareCounts<Threads, Experts, MaxPairs> Share;
    unsigned sum = 0;
    if (word < Share::COLUMNS) {
#pragma unroll
        for (int warp = 0; warp < Share::WARPS; ++warp) {
            unsigned* cell = reinterpret_cast<unsigned*>(memory.counts[warp]) + word;
            const unsigned both = *cell;
            *cell = sum;
            sum += both;
        }
    }
    return sum;
}
