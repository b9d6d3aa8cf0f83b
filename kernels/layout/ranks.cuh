// SPDX-License-Identifier: Apache-2.0
// A block's share of the pairs, ranked by expert: each warp takes adjacent pairs, in rounds of 32 in the order of its
// lanes. In a round, lanes with the same expert find each other by a mask of lanes in shared memory or, where there is
// no room for a mask of each expert, by a ballot over each bit of the expert. `__match_any_sync` takes longer than both.
#pragma once

#include "device/types.cuh"

// Shared memory of a share of at most MaxPairs pairs in a block of Threads threads. `SpareBytes` of it are the caller's
// once the pairs are ranked.
template <int Threads, int Experts, int MaxPairs, int SpareBytes = 1>
struct __align__(16) ShareCounts {
    static_assert(Threads % 32 == 0 && MaxPairs < 65536, "whole warps, counts of 16 bits");
    static constexpr int WARPS = Threads / 32;
    static constexpr int ROUNDS = (MaxPairs + Threads - 1) / Threads;  // of 32 pairs in each warp
    static constexpr int ROW = (Experts + 7) / 8 * 8;                  // whole words of 16 bytes
    static constexpr int COLUMNS = ROW / 2;                            // counts of two experts are the halves of a word
    static constexpr int WORDS = (COLUMNS + Threads - 1) / Threads;    // of a thread, side by side
    static constexpr bool HAS_MASKS = WARPS * ROW <= 6144;             // 24 KB

    // Pairs without an expert have the entry after the last expert's.
    union {
        unsigned masks[WARPS][HAS_MASKS ? ROW + 4 : 4];  // of the lanes of a warp; zero between rounds
        unsigned char spare[SpareBytes];
    };
    unsigned short counts[WARPS][ROW + 8];  // of the pairs of a warp
};

// The pairs of a thread: that of round r lies 32 * r after the first.
template <int Rounds>
struct RankedPairs {
    unsigned first;
    unsigned expert[Rounds];  // a number outside 0 .. Experts - 1 is none
    int rank[Rounds];         // among the pairs of the warp with the same expert

    __device__ __forceinline__ explicit RankedPairs(unsigned first_pair)
        : first(first_pair + threadIdx.x / 32 * (Rounds * 32) + threadIdx.x % 32) {}
};

// Return the lanes whose pair has this lane's expert. The last of them clears
// their mask.
template <int Experts, bool HasMasks>
__device__ __forceinline__ unsigned lanes_with(unsigned expert, unsigned* masks) {
    if (HasMasks) {
        atomicOr(&masks[expert], 1u << threadIdx.x % 32);
        __syncwarp();
        return masks[expert];
    }
    unsigned same = FULL_WARP;
#pragma unroll
    for (int bit = 1; bit <= Experts; bit *= 2) {
        const unsigned votes = __ballot_sync(FULL_WARP, expert & bit);
        same &= expert & bit ? votes : ~votes;
    }
    return same;
}

// Return the rank of this lane's pair among those that the warp has added to `counts`; add all 32 of the warp. `Only`:
// there is no other round.
template <int Experts, bool HasMasks, bool Only>
__device__ __forceinline__ int rank_and_count(unsigned expert, unsigned* masks, unsigned short* counts) {
    const int lane = threadIdx.x % 32;
    const unsigned same = lanes_with<Experts, HasMasks>(expert, masks);
    const int rank = (Only ? 0 : counts[expert]) + __popc(same & ((1u << lane) - 1u));
    if (!Only) __syncwarp();
    if (same >> lane == 1) {  // the last of these lanes
        if (HasMasks && !Only) masks[expert] = 0;
        counts[expert] = static_cast<unsigned short>(rank + 1);
    }
    if (!Only) __syncwarp();
    return rank;
}

// Rank the pairs of a share, whose experts are known. A barrier has to follow.
template <int Threads, int Experts, int MaxPairs, int Spare, int Rounds>
__device__ __forceinline__ void rank_share(ShareCounts<Threads, Experts, MaxPairs, Spare>& memory,
                                           RankedPairs<Rounds>& pairs) {
    typedef ShareCounts<Threads, Experts, MaxPairs, Spare> Share;
    constexpr int MASKS = Share::HAS_MASKS ? Share::ROW / 4 + 1 : 0;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint4* masks = reinterpret_cast<uint4*>(memory.masks[warp]);
    uint4* counts = reinterpret_cast<uint4*>(memory.counts[warp]);
    for (int i = lane; i < MASKS; i += 32) masks[i] = make_uint4(0, 0, 0, 0);
    for (int i = lane; i < Share::ROW / 8 + 1; i += 32) counts[i] = make_uint4(0, 0, 0, 0);
    __syncwarp();
#pragma unroll
    for (int round = 0; round < Rounds; ++round) {
        pairs.rank[round] = rank_and_count<Experts, Share::HAS_MASKS, Rounds == 1>(
            min(pairs.expert[round], unsigned(Experts)), memory.masks[warp], memory.counts[warp]);
    }
}

// Return the sum of a word of two experts without the pairs that have none.
template <int Experts>
__device__ __forceinline__ unsigned without_none(unsigned sum, int word) {
    if (Experts % 8 == 0 || word != Experts / 2) return sum;
    return Experts % 2 == 1 ? sum & 0xffffu : 0u;
}

// Return the counts of the two experts of a word, of all warps.
template <int Threads, int Experts, int MaxPairs, int Spare>
__device__ __forceinline__ unsigned sum_warps(const ShareCounts<Threads, Experts, MaxPairs, Spare>& memory, int word) {
    typedef ShareCounts<Threads, Experts, MaxPairs, Spare> Share;
    if (word >= Share::COLUMNS) return 0;
    unsigned sum = 0;
#pragma unroll
    for (int warp = 0; warp < Share::WARPS; ++warp) {
        sum += reinterpret_cast<const unsigned*>(memory.counts[warp])[word];
    }
    return without_none<Experts>(sum, word);
}

// Replace the counts of each warp by those of the warps before it, from `start` on. Return start and the sum of all.
template <int Threads, int Experts, int MaxPairs, int Spare>
__device__ __forceinline__ unsigned add_warps(ShareCounts<Threads, Experts, MaxPairs, Spare>& memory, int word,
                                              unsigned start) {
    typedef ShareCounts<Threads, Experts, MaxPairs, Spare> Share;
    if (word >= Share::COLUMNS) return start;
#pragma unroll
    for (int warp = 0; warp < Share::WARPS; ++warp) {
        unsigned* cell = reinterpret_cast<unsigned*>(memory.counts[warp]) + word;
        const unsigned both = *cell;
        *cell = start;
        start += both;
    }
    return start;
}
