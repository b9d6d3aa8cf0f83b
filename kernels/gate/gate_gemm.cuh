// SPDX-License-Identifier: Apache-2.0
// A block's part of the gate GEMM: TOKENS rows of x times EXPERTS_PER_BLOCK rows of the gate, over one of SPLITS parts
// of hidden (split-K). It leaves WARP_SPLITS sums for each token and expert in shared memory, [warp split][token][ROW].
// Every sum is taken in a fixed order, so results are repeatable.
#pragma once

#include "gate/gemm_fma.cuh"
#include "gate/gemm_mma.cuh"

__device__ __forceinline__ void gate_gemm(const x_t* x, const gate_t* weight, int64_t x_stride, int64_t weight_stride,
                                          int first_expert, int split, int num_tokens, float* shared_sums) {
    if constexpr (TENSOR_CORES) {
        mma_gemm::run(x, weight, x_stride, weight_stride, first_expert, split, num_tokens, shared_sums);
    } else {
        fma_gemm::run(x, weight, x_stride, weight_stride, first_expert, split, num_tokens, shared_sums);
    }
}
