// SPDX-License-Identifier: Apache-2.0
// Dot products of rows that a team reads. The order of additions depends on the launch alone, and there are no atomics.
#pragma once

#include "device/warp.cuh"
#include "rows/team.cuh"

// Add up N values over a warp. The lane 32 / P * i, where P is the next power of two from N on, returns the sum of value
// i: lanes exchange halves of what is left, which takes fewer steps than N sums.
template <int N>
__device__ __forceinline__ float warp_sums(const float (&values)[N]) {
    constexpr int P = power_of_two_from(N);
    static_assert(P <= 32, "a lane each");
    const int lane = threadIdx.x % 32;
    float left[P];
#pragma unroll
    for (int i = 0; i < P; ++i) left[i] = i < N ? values[i] : 0.0f;
    int distance = 16;
#pragma unroll
    for (int width = P / 2; width > 0; width /= 2, distance /= 2) {
        const bool upper = lane & distance;
#pragma unroll
        for (int i = 0; i < width; ++i) {
            const float sent = upper ? left[i] : left[i + width], kept = upper ? left[i + width] : left[i];
            left[i] = kept + __shfl_xor_sync(FULL_WARP, sent, distance);
        }
    }
#pragma unroll
    for (; distance > 0; distance /= 2) left[0] += __shfl_xor_sync(FULL_WARP, left[0], distance);
    return left[0];
}

// COUNT sums for each team, to which its warps add.
template <int COUNT>
struct TeamSums {
    static constexpr int WARPS = TEAM / 32;
    static_assert(WARPS == 1 || TEAMS == 1, "the threads of a team can wait for each other");
    float (*parts)[COUNT];  // by warp of the block

    __device__ __forceinline__ void clear() {
        for (int i = threadIdx.x % 32; i < COUNT; i += 32) parts[threadIdx.x / 32][i] = 0.0f;
        __syncwarp();
    }

    // Add N values of each thread to the sums from `first` on, as far as there are so many.
    template <int N>
    __device__ __forceinline__ void add(const float (&values)[N], int first) {
        constexpr int LANES = 32 / power_of_two_from(N);
        const float sum = warp_sums(values);
        const int lane = threadIdx.x % 32, i = lane / LANES;
        if (lane % LANES == 0 && i < N && first + i < COUNT) parts[threadIdx.x / 32][first + i] += sum;
        __syncwarp();
    }

    // All threads have added. Every thread of the team calls it before `sum`.
    __device__ __forceinline__ void finish() {
        if (WARPS > 1) __syncthreads();
    }

    __device__ __forceinline__ float sum(int i) const {
        const int first = threadIdx.x / TEAM * WARPS;
        float sum = 0.0f;
        for (int warp = 0; warp < WARPS; ++warp) sum += parts[first + warp][i];
        return sum;
    }
};
