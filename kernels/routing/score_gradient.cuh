// SPDX-License-Identifier: Apache-2.0
// Derivatives of scores and of prepared logits, in float32, within 2e-6 relative. One that would be subnormal is 0.
#pragma once

#include "routing/method.cuh"
#include "routing/score_function_gradient.cuh"

// Return factor * dy/dx of y = sqrtsoftplus(x), where dy/dx = sigmoid(x) / (2 y). With t = exp(-|x|) that is 1 / (2 (1
// + t) y). For x < 0, where y = exp(x / 2) r, it is exp(x / 2) / (2 (1 + t) r): no part of it is 0 before y is. The
// factor may be as large as 1 / y, so it comes first.
__device__ __forceinline__ float sqrtsoftplus_gradient(float x, float factor) {
    const float root = precise_exp(fabsf(x), 0.5f * LOG2E_HIGH, 0.5f * LOG2E_LOW);
    const float t = root * root;
    const float ratio = log1p_ratio(t);
    const bool negative = x < 0.0f;
    const float y = fast_sqrt(negative ? ratio : fmaf(t, ratio, x));
    return (negative ? factor * root : factor) * (0.5f * fast_reciprocal((1.0f + t) * y));
}

// The same for sigmoid(x): t / (1 + t)^2.
__device__ __forceinline__ float sigmoid_gradient(float x, float factor) {
    const float t = precise_exp(fabsf(x), LOG2E_HIGH, LOG2E_LOW);
    const float y = fast_reciprocal(1.0f + t);
    return factor * t * (y * y);
}

// The same for the score of a logit, unless that is a softmax.
__device__ __forceinline__ float score_gradient(float logit, float factor) {
    if (SCORE == SIGMOID) return sigmoid_gradient(logit, factor);
    if (SCORE == SQRTSOFTPLUS) return sqrtsoftplus_gradient(logit, factor);
    if (SCORE == OWN) return factor * score_function_gradient(logit);
    return factor;
}

// Return the derivative of a prepared logit with respect to the logit: 1 / cosh(x / cap)^2 = 4 t / (1 + t)^2 with t =
// exp(-2 |x / cap|).
__device__ __forceinline__ float prepare_gradient(float scaled_logit, const MethodNumbers numbers) {
    float gradient = 1.0f;
    if (LOGIT_CAPPED) gradient = 4.0f * sigmoid_gradient(2.0f * (scaled_logit / numbers.logit_softcap), 1.0f);
    if (LOGIT_SCALED) gradient *= numbers.logit_scale;
    return gradient;
}
