// SPDX-License-Identifier: Apache-2.0
// Reductions over the Lanes threads (a power of two up to 32) that share a row. Every lane of the warp takes part.
#pragma once

#include "device/types.cuh"

__device__ constexpr int power_of_two_from(int count) {
    return count <= 1 ? 1 : 2 * power_of_two_from((count + 1) / 2);
}

__device__ constexpr int min_int(int a, int b) { return a < b ? a : b; }

__device__ constexpr int max_int(int a, int b) { return a > b ? a : b; }

// From sm_80 on, one instruction does this for a whole warp.
template <int Lanes>
__device__ __forceinline__ unsigned lanes_max(unsigned value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    constexpr int REDUCED = 1;
#else
    constexpr int REDUCED = Lanes == 32 ? 32 : 1;
    if (REDUCED == 32) value = __reduce_max_sync(FULL_WARP, value);
#endif
#pragma unroll
    for (int distance = Lanes / 2; distance >= REDUCED; distance /= 2) {
        value = max(value, __shfl_xor_sync(FULL_WARP, value, distance));
    }
    return value;
}

// Adds in a fixed order, so that the result of a row is the same to the bit wherever the row lies.
template <int Lanes, typename T>
__device__ __forceinline__ T lanes_sum(T value) {
#pragma unroll
    for (int distance = Lanes / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(FULL_WARP, value, distance);
    }
    return value;
}

// NaN is ignored.
template <int Lanes>
__device__ __forceinline__ float lanes_max(float value) {
#pragma unroll
    for (int distance = Lanes / 2; distance > 0; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, distance));
    }
    return value;
}

// Return the votes of this row's lanes, its first lane in the lowest bit.
template <int Lanes>
__device__ __forceinline__ unsigned lanes_ballot(bool vote) {
    const unsigned votes = __ballot_sync(FULL_WARP, vote);
    if (Lanes == 32) return votes;
    const unsigned first = (threadIdx.x % 32) / Lanes * Lanes;
    return votes >> first & ((1u << Lanes % 32) - 1u);
}
