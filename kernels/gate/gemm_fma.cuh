// SPDX-License-Identifier: Apache-2.0
// The gate GEMM of a block by float32 FMA, for any mix of types. A warp has EXPERTS_PER_WARP experts and the whole
// split, which its lanes divide.
#pragma once

#include "device/vector8.cuh"
#include "device/warp.cuh"
#include "gate/gate_tiling.cuh"

namespace fma_gemm {

constexpr int SPLIT_SIZE = 8 * quotient(quotient(HIDDEN, 8), SPLITS);
constexpr int STEPS = quotient(SPLIT_SIZE, 256);
constexpr int UNROLL = STEPS < 4 ? STEPS : 4;

template <typename X, typename Gate>
__device__ __forceinline__ void run(const X* x, const Gate* weight, int64_t x_stride, int64_t weight_stride,
                                    int first_expert, int split, int num_tokens, float* shared_sums) {
    const int lane = threadIdx.x % 32, own_experts = threadIdx.x / 32 * EXPERTS_PER_WARP;
    const int end = min((split + 1) * SPLIT_SIZE, HIDDEN);
    float sums[EXPERTS_PER_WARP][TOKENS] = {};
#pragma unroll UNROLL
    for (int step = 0; step < STEPS; ++step) {
        const int column = split * SPLIT_SIZE + step * 256 + lane * 8;
        Vector8<Gate> w[EXPERTS_PER_WARP];
        Vector8<X> v[TOKENS];
#pragma unroll
        for (int e = 0; e < EXPERTS_PER_WARP; ++e) {
            const int expert = min(first_expert + own_experts + e, GATE_ROWS - 1);
            w[e] = load_vector8<ALIGNED>(weight + expert * weight_stride + column, end - column);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            v[t] = load_vector8<ALIGNED>(x + t * x_stride + column, t < num_tokens ? end - column : 0);
        }
#pragma unroll
        for (int e = 0; e < EXPERTS_PER_WARP; ++e) {
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) sums[e][t] = dot(w[e], v[t], sums[e][t]);
        }
    }
#pragma unroll
    for (int e = 0; e < EXPERTS_PER_WARP; ++e) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const float sum = lanes_sum<32>(sums[e][t]);
            if (lane == (e * TOKENS + t) % 32) shared_sums[t * ROW + own_experts + e] = sum;
        }
    }
}

}  // namespace fma_gemm
