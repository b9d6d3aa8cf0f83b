// SPDX-License-Identifier: Apache-2.0
// What a method asks of a kernel, and its steps on a single logit. A step that is not asked for is not compiled.
#pragma once

#include "routing/score.cuh"

#ifndef NUM_EXPERTS
#define NUM_EXPERTS 256
#endif
#ifndef TOP_K
#define TOP_K 6
#endif
#ifndef HAS_BIAS
#define HAS_BIAS 0
#endif
#ifndef HAS_LOGIT_BIAS
#define HAS_LOGIT_BIAS 0
#endif
#ifndef HAS_EXPERT_SCALE
#define HAS_EXPERT_SCALE 0
#endif
#ifndef LOGIT_SCALED
#define LOGIT_SCALED 0
#endif
#ifndef LOGIT_CAPPED
#define LOGIT_CAPPED 0
#endif
#ifndef SELECT_ON_LOGITS
#define SELECT_ON_LOGITS 0
#endif
#ifndef SCORE_AFTER_TOPK
#define SCORE_AFTER_TOPK 0
#endif
#ifndef NUM_SHARED
#define NUM_SHARED 0
#endif
#ifndef SHARED_LOGITS
#define SHARED_LOGITS 0  // shared experts have logits behind the others', and a part in the normaliser
#endif
#ifndef RESULT_DTYPE
#define RESULT_DTYPE 0
#endif
#ifndef INDEX_INT64
#define INDEX_INT64 0
#endif

static_assert(TOP_K >= 1 && TOP_K <= NUM_EXPERTS, "TOP_K lies in 1..NUM_EXPERTS");

// Columns of the logits; columns of the results, and how many of these are weighed by a logit.
constexpr int64_t NUM_LOGITS = static_cast<int64_t>(NUM_EXPERTS) + (SHARED_LOGITS ? NUM_SHARED : 0);
constexpr int OUTPUTS = TOP_K + NUM_SHARED;
constexpr int WEIGHED = SHARED_LOGITS ? OUTPUTS : TOP_K;

constexpr bool WHOLE_ROW_SOFTMAX = SCORE == SOFTMAX && !SCORE_AFTER_TOPK;
constexpr bool WEIGHS_LOGITS = SHARED_LOGITS || SCORE_AFTER_TOPK;  // rather than scores

typedef Scalar<RESULT_DTYPE>::type weight_t;
typedef Integer<INDEX_INT64 ? 8 : 4>::type index_t;

struct Numbers {
    float renormalize_eps, renormalize_min, scale, logit_scale, logit_softcap, shared_weight;
};

// A logit's first steps, each rounded by itself, as in the reference.
__device__ __forceinline__ float scaled(float logit, float logit_bias, const Numbers& numbers) {
    if (HAS_LOGIT_BIAS) logit = __fadd_rn(logit, logit_bias);
    if (LOGIT_SCALED) logit = __fmul_rn(logit, numbers.logit_scale);
    return logit;
}

__device__ __forceinline__ float capped(float logit, const Numbers& numbers) {
    if (LOGIT_CAPPED) logit = __fmul_rn(numbers.logit_softcap, tanhf(logit / numbers.logit_softcap));
    return logit;
}

// A logit as it is scored.
__device__ __forceinline__ float prepare(float logit, float logit_bias, const Numbers& numbers) {
    return capped(scaled(logit, logit_bias, numbers), numbers);
}

// The bias of a logit's column; shared experts have none.
__device__ __forceinline__ float bias_of(const float* logit_bias, int64_t column) {
    const bool biased = HAS_LOGIT_BIAS && (!SHARED_LOGITS || column < NUM_EXPERTS);
    return biased ? __ldg(logit_bias + column) : 0.0f;
}

__device__ __forceinline__ float prepare(float logit, const float* logit_bias, int64_t column, const Numbers& numbers) {
    return prepare(logit, bias_of(logit_bias, column), numbers);
}
