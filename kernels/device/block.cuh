// SPDX-License-Identifier: Apache-2.0
// Reductions over a block of whole warps, at most 32; every thread takes part and gets the result.
#pragma once

#include "device/types.cuh"

struct Maximum {
    __device__ __forceinline__ unsigned long long operator()(unsigned long long a, unsigned long long b) const {
        return a > b ? a : b;
    }
    __device__ __forceinline__ float operator()(float a, float b) const {
        return fmaxf(a, b);  // the other one if one is NaN
    }
};

struct Sum {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a + b;
    }
};

// Combined in a fixed order, so that sums are the same to the bit.
template <typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, T neutral, Combine combine) {
    __shared__ T partial[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    for (int distance = 16; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(FULL_WARP, value, distance));
    }
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    value = lane < num_warps ? partial[lane] : neutral;
    for (int distance = 16; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(FULL_WARP, value, distance));
    }
    __syncthreads();  // before partial is used again
    return value;
}
