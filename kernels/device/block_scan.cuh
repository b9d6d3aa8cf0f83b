// SPDX-License-Identifier: Apache-2.0
// Prefix sums over a warp or a block, minimum and maximum of a block. A block has Block threads in whole warps; every
// thread takes part.
#pragma once

#include "device/types.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800

template <typename Combine>
__device__ __forceinline__ unsigned warp_combine(unsigned value, Combine combine) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(FULL_WARP, value, distance));
    }
    return value;
}

__device__ __forceinline__ unsigned warp_sum(unsigned value) {
    return warp_combine(value, [](unsigned a, unsigned b) { return a + b; });
}

__device__ __forceinline__ unsigned warp_min(unsigned value) {
    return warp_combine(value, [](unsigned a, unsigned b) { return min(a, b); });
}

__device__ __forceinline__ unsigned warp_max(unsigned value) {
    return warp_combine(value, [](unsigned a, unsigned b) { return max(a, b); });
}

#else

__device__ __forceinline__ unsigned warp_sum(unsigned value) { return __reduce_add_sync(FULL_WARP, value); }
__device__ __forceinline__ unsigned warp_min(unsigned value) { return __reduce_min_sync(FULL_WARP, value); }
__device__ __forceinline__ unsigned warp_max(unsigned value) { return __reduce_max_sync(FULL_WARP, value); }

#endif

// Return the sum over this lane and those before it.
__device__ __forceinline__ int warp_prefix(int value) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(FULL_WARP, value, distance);
        if (lane >= distance) value += other;
    }
    return value;
}

// Return the sum over the threads before this one; `total` is the sum over all.
template <int Block>
__device__ __forceinline__ int block_prefix(int value, int& total) {
    __shared__ int sums[Block / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int inclusive = warp_prefix(value);
    if (lane == 31) sums[warp] = inclusive;
    __syncthreads();
    const int sum = lane < Block / 32 ? sums[lane] : 0;
    total = warp_sum(sum);
    const int before = warp_sum(lane < warp ? sum : 0) + inclusive - value;
    __syncthreads();  // before sums are used again
    return before;
}

// Like block_prefix, but with one barrier. `sums` has a word for each warp. Threads pass another barrier before it is
// used again.
template <int Block>
__device__ __forceinline__ int block_prefix_once(int value, int& total, int* sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int inclusive = warp_prefix(value);
    if (lane == 31) sums[warp] = inclusive;
    __syncthreads();
    const int sum = lane < Block / 32 ? sums[lane] : 0;
    total = static_cast<int>(warp_sum(sum));
    return static_cast<int>(warp_sum(lane < warp ? sum : 0)) + inclusive - value;
}

struct Extent {
    unsigned low;
    unsigned high;
};

// Return the minimum and the maximum over all threads.
template <int Block>
__device__ __forceinline__ Extent block_extent(Extent extent) {
    __shared__ Extent extents[Block / 32];
    const int lane = threadIdx.x % 32;
    extent = {warp_min(extent.low), warp_max(extent.high)};
    if (lane == 0) extents[threadIdx.x / 32] = extent;
    __syncthreads();
    extent = lane < Block / 32 ? extents[lane] : Extent{~0u, 0u};
    extent = {warp_min(extent.low), warp_max(extent.high)};
    __syncthreads();  // before extents are used again
    return extent;
}
