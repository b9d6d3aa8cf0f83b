// SPDX-License-Identifier: Apache-2.0
// Logits as results: rows of logits with their bias, before all other steps; 0 in the rows of padding.
#pragma once

#include "device/row_load.cuh"
#include "routing/method.cuh"

SPECIALISED int LOGITS_OUT = -1;           // dtype of the logits that are returned; -1: none are
SPECIALISED bool LOGITS_IN_PLACE = false;  // they are those that are read, so only padding is written

constexpr bool RETURNS_LOGITS = LOGITS_OUT >= 0;

typedef Scalar<LOGITS_OUT>::type logit_out_t;

// Return a row of logits by some threads, `step` of them, of which this is one. `valid`: it is no padding.
template <bool Aligned, typename T>
__device__ __forceinline__ void return_logits(const T* row, const float* logit_bias, bool valid, logit_out_t* target,
                                              int thread, int step) {
    if (!RETURNS_LOGITS || (LOGITS_IN_PLACE && valid)) return;
    for (int64_t first = 4 * thread; first < NUM_LOGITS; first += 4 * step) {
        float logits[4] = {};
        if (valid) load_columns<T, 4, NUM_LOGITS % 4 == 0, Aligned>(row, first, NUM_LOGITS, logits);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int64_t column = first + j;
            if (NUM_LOGITS % 4 != 0 && column >= NUM_LOGITS) break;
            store_float(target + column, valid ? biased(logits[j], bias_of(logit_bias, column)) : 0.0f);
        }
    }
}
