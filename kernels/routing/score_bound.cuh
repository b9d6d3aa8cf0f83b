// SPDX-License-Identifier: Apache-2.0
// The selection value of an expert, and cheap bounds of it.
#pragma once

#include "routing/groups.cuh"

// Return the value that experts are ranked by, before the bias.
__device__ __forceinline__ float selection_value(float logit, const SoftmaxStatistics& statistics) {
    return SELECT_ON_LOGITS ? __fadd_rn(logit, 0.0f) : score_of(logit, statistics);
}

// Without a bias, scores rise with logits, up to rounding. Groups are ranked by exact values.
constexpr bool BOUND_BY_LOGITS =
    NUM_GROUPS == 0 && !HAS_BIAS && !SELECT_ON_LOGITS && (SCORE == SIGMOID || SCORE == SQRTSOFTPLUS);
constexpr bool BOUND_BY_SCORES = NUM_GROUPS == 0 && HAS_BIAS && !SELECT_ON_LOGITS && HAS_SCORE_BOUND;

// Return a cheap number in place of the selection value, before the bias. selection_reach tells how high the value can
// be.
__device__ __forceinline__ float selection_bound(float logit) {
    if (BOUND_BY_LOGITS) return logit;
    return BOUND_BY_SCORES ? score_bound(logit) : selection_value(logit, SoftmaxStatistics());
}

// Return an upper bound of all selection values whose bound, with its bias, is at most this one. Scores are within 1e-6
// of the exact ones.
__device__ __forceinline__ float selection_reach(float bound) {
    if (BOUND_BY_LOGITS) return score_of(bound, SoftmaxStatistics()) * 1.000003f;
    return BOUND_BY_SCORES ? bound + SCORE_BOUND_ERROR : bound;
}
