// SPDX-License-Identifier: Apache-2.0
// Sizes and types that follow from the switches of a method, and its steps on one logit.
#pragma once

#include "routing/score.cuh"

static_assert(TOP_K >= 1 && (NUM_EXPERTS == 0 || TOP_K <= NUM_EXPERTS), "TOP_K lies in 1..NUM_EXPERTS");

constexpr int64_t EXPERT_IDS = NUM_EXPERTS > 0 ? NUM_EXPERTS : int64_t(1) << 31;  // ids of experts are below this

// Columns of the logits; columns of the results, and how many of these have a weight computed from a logit.
constexpr int64_t NUM_LOGITS = static_cast<int64_t>(NUM_EXPERTS) + (SHARED_LOGITS ? NUM_SHARED : 0);
constexpr int OUTPUTS = TOP_K + NUM_SHARED;
constexpr int WEIGHED = SHARED_LOGITS ? OUTPUTS : TOP_K;

constexpr bool WHOLE_ROW_SOFTMAX = SCORE == SOFTMAX && !SCORE_AFTER_TOPK;
constexpr bool WEIGHS_LOGITS =
    SHARED_LOGITS || SCORE_AFTER_TOPK;  // weights are computed from logits rather than scores

typedef Scalar<RESULT_DTYPE>::type weight_t;
typedef Integer<INDEX_BYTES, INDEX_UNSIGNED>::type index_t;

// The first steps of a logit, each rounded by itself as in the reference.
__device__ __forceinline__ float biased(float logit, float logit_bias) {
    return HAS_LOGIT_BIAS ? __fadd_rn(logit, logit_bias) : logit;
}

__device__ __forceinline__ float scaled(float logit, float logit_bias, const MethodNumbers numbers) {
    logit = biased(logit, logit_bias);
    if (LOGIT_SCALED) logit = __fmul_rn(logit, numbers.logit_scale);
    return logit;
}

__device__ __forceinline__ float capped(float logit, const MethodNumbers numbers) {
    if (LOGIT_CAPPED) logit = __fmul_rn(numbers.logit_softcap, tanhf(logit / numbers.logit_softcap));
    return logit;
}

// Return the logit that is scored.
__device__ __forceinline__ float prepare(float logit, float logit_bias, const MethodNumbers numbers) {
    return capped(scaled(logit, logit_bias, numbers), numbers);
}

// Return the logit bias of a column; shared experts have none.
__device__ __forceinline__ float bias_of(const float* logit_bias, int64_t column) {
    const bool biased = HAS_LOGIT_BIAS && (!SHARED_LOGITS || column < NUM_EXPERTS);
    return biased ? __ldg(logit_bias + column) : 0.0f;
}

__device__ __forceinline__ float prepare(float logit, const float* logit_bias, int64_t column,
                                         const MethodNumbers numbers) {
    return prepare(logit, bias_of(logit_bias, column), numbers);
}
