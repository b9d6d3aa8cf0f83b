// SPDX-License-Identifier: Apache-2.0
// Stable ranks of pairs by expert in a warp: round by round of 32 pairs, in the order of the lanes.
#pragma once

#include "device/types.cuh"

// The expert of a pair that has none, after experts 0 .. Experts - 1.
template <int Experts>
__device__ __forceinline__ unsigned expert_or_none(int expert) {
    return min(static_cast<unsigned>(expert), static_cast<unsigned>(Experts));
}

// Return how many pairs before this one, among those that the warp has added to `counts`, have the same expert; add all
// 32. `counts` are those of the warp alone, and visible to it.
template <int Experts, typename Count>
__device__ __forceinline__ int rank_and_count(unsigned expert, Count* counts) {
    const unsigned same = __match_any_sync(FULL_WARP, expert);
    const unsigned earlier = same & ((1u << threadIdx.x % 32) - 1u);
    const bool has_expert = expert < Experts;
    const int before = has_expert ? counts[expert] : 0;
    __syncwarp();
    if (has_expert && earlier == 0) counts[expert] = static_cast<Count>(before + __popc(same));
    __syncwarp();
    return before + __popc(earlier);
}
