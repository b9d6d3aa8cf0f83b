// SPDX-License-Identifier: Apache-2.0
// A row of the gradient with respect to the logits: zeros but for the chosen experts, or the contribution of a softmax
// to every logit.
#pragma once

#include "routing/score_gradient.cuh"

SPECIALISED int DTYPE = 0;               // of the logits
SPECIALISED int GRADIENT_DTYPE = DTYPE;  // of the result
SPECIALISED bool REPEATED = false;       // an expert may be in a row more than once

typedef Scalar<DTYPE>::type logit_t;
typedef Scalar<GRADIENT_DTYPE>::type gradient_t;

constexpr int UNIT = 16 / sizeof(gradient_t);  // columns that are written together
constexpr int64_t WHOLE_UNITS = NUM_LOGITS / UNIT;

__device__ __forceinline__ bool takes_words(const gradient_t* row) {
    return reinterpret_cast<unsigned long long>(row) % 16 == 0;
}

__device__ __forceinline__ bool is_expert(int64_t index) { return index >= 0 && index < NUM_EXPERTS; }

// Zero a row by Threads threads, of which this is number `thread`.
template <int Threads>
__device__ __forceinline__ void store_zeros(gradient_t* row, int thread) {
    constexpr int64_t EACH = WHOLE_UNITS / Threads, REST = WHOLE_UNITS % Threads;
    const float zeros[UNIT] = {};
    const bool by_words = takes_words(row);
    if (by_words) {
        gradient_t* unit = row + thread * UNIT;
#pragma unroll 16
        for (int64_t u = 0; u < EACH; ++u) store_floats(unit + u * Threads * UNIT, zeros);
        if (thread < REST) store_floats(unit + EACH * Threads * UNIT, zeros);
    }
    const int64_t written = by_words ? WHOLE_UNITS * UNIT : 0;
    for (int64_t column = written + thread; column < NUM_LOGITS; column += Threads) store_float(row + column, 0.0f);
}

// Return what the normaliser of a softmax over the whole row subtracts from the gradient of a logit.
__device__ __forceinline__ float softmax_term(float scaled_logit, const SoftmaxStatistics& statistics,
                                              float softmax_factor, const MethodNumbers numbers) {
    const float share = softmax_share(capped(scaled_logit, numbers), statistics.highest) * statistics.inverse_sum;
    return is_nan(share)
               ? 0.0f
               : share * softmax_factor * prepare_gradient(scaled_logit, numbers);  // NaN is not part of the sum
}
