// SPDX-License-Identifier: Apache-2.0
// What experts are chosen by, and something cheaper that says nearly the same.
#pragma once

#include "routing/groups.cuh"

// What an expert is chosen by, but for its bias.
__device__ __forceinline__ float selection_value(float logit, const SoftmaxStatistics& statistics) {
    return SELECT_ON_LOGITS ? __fadd_rn(logit, 0.0f) : score_of(logit, statistics);
}

// Without a bias the scores rise with the logits, but for their rounding. Groups are ranked by their best exact values.
constexpr bool BOUND_BY_LOGITS =
    NUM_GROUPS == 0 && !HAS_BIAS && !SELECT_ON_LOGITS && (SCORE == SIGMOID || SCORE == SQRTSOFTPLUS);
constexpr bool BOUND_BY_SCORES = NUM_GROUPS == 0 && HAS_BIAS && !SELECT_ON_LOGITS && HAS_SCORE_BOUND;

// In its stead, still without the bias: a number for which selection_reach says how high the value can be.
__device__ __forceinline__ float selection_bound(float logit) {
    if (BOUND_BY_LOGITS) return logit;
    return BOUND_BY_SCORES ? score_bound(logit) : selection_value(logit, SoftmaxStatistics());
}

// What no selection value exceeds whose bound, with its bias, is not above this one. Scores are within 1e-6 of the
// exact ones.
__device__ __forceinline__ float selection_reach(float bound) {
    if (BOUND_BY_LOGITS) return score_of(bound, SoftmaxStatistics()) * 1.000003f;
    return BOUND_BY_SCORES ? bound + SCORE_BOUND_ERROR : bound;
}
