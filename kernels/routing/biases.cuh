// SPDX-License-Identifier: Apache-2.0
// Several biases of a layer, of which each token has one: its index, and its row of the biases.
#pragma once

#include "device/prefetch.cuh"
#include "routing/config.cuh"

SPECIALISED int NUM_BIASES = 0;         // 0: one bias for all tokens
SPECIALISED int64_t BIAS_STRIDE = 256;  // floats from one bias to the next, if there are several

constexpr int BIASES = NUM_BIASES > 0 ? NUM_BIASES : 1;
constexpr bool FEW_BIASES = int64_t(BIASES) * NUM_EXPERTS <= 2048;  // to be fetched before the index is known

struct BiasRow {
    const float* bias;
    bool exists;    // the index is in range; else this is row 0
    bool is_first;  // it is 0
};

__device__ __forceinline__ BiasRow bias_row(const float* bias, int index, int64_t stride) {
    if (NUM_BIASES == 0) return {bias, true, true};
    const bool exists = index >= 0 && index < NUM_BIASES;
    return {bias + (exists ? index : 0) * stride, exists, index == 0};
}

// Return the bias of a token by lanes of a warp, which fetch all biases while the index is on its way.
__device__ __forceinline__ BiasRow bias_of_token(const float* bias, const int* bias_index, int64_t token) {
    if (NUM_BIASES == 0) return {bias, true, true};
    if (FEW_BIASES) {
        constexpr int LINES = (NUM_EXPERTS + 31) / 32;
        for (int line = threadIdx.x % 32; line < BIASES * LINES; line += 32) {
            fetch_line(bias + line / LINES * BIAS_STRIDE + line % LINES * 32);
        }
    }
    return bias_row(bias, __ldg(bias_index + token), BIAS_STRIDE);
}
