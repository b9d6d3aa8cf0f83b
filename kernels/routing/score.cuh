// SPDX-License-Identifier: Apache-2.0
// Scores of logits and weights from scores, in float32. Results that would be subnormal are 0 (-ftz=true).
//
// Relative to float64, sigmoid and sqrt(softplus) are within 1e-6 over the whole range, softmax within 1e-6 + 6e-8 |x -
// max|.
#pragma once

#include "device/warp.cuh"
#include "routing/config.cuh"
#include "routing/score_function.cuh"

constexpr unsigned NAN_BITS = 0x7fc00000u, INFINITY_BITS = 0x7f800000u;

// What a softmax needs to know of the whole row; other scores need nothing.
struct SoftmaxStatistics {
    float highest;
    float inverse_sum;
};

// Return exp(-magnitude * factor) for a magnitude up to infinity, with high + low = factor * log2(e). Two floats for
// that product, since the error of one alone grows to 5e-6 near underflow.
__device__ __forceinline__ float precise_exp(float magnitude, float high, float low) {
    const float exponent = magnitude * high;
    const float rest = fmaf(magnitude, low, fmaf(magnitude, high, -exponent));
    const float power = fast_exp2(-exponent);
    // Multiply rather than add, since a summand could be subnormal. Where the power is 0, the rest may be anything:
    // fmaxf makes it a number, fabsf keeps the 0 positive. NaN makes the power NaN.
    return power * fabsf(fmaf(fmaxf(rest, -1.0f), -0.693147181f, 1.0f));
}

constexpr float LOG2E_HIGH = 1.44269502f, LOG2E_LOW = 1.92596299e-8f;

// Return log1p(t) / t for t in 0..1 by a polynomial (our fit, 2.0e-7 relative).
__device__ __forceinline__ float log1p_ratio(float t) {
    float ratio = -0.008539168164134026f;
    ratio = fmaf(ratio, t, 0.04408948868513107f);
    ratio = fmaf(ratio, t, -0.1076815202832222f);
    ratio = fmaf(ratio, t, 0.17745228111743927f);
    ratio = fmaf(ratio, t, -0.24495458602905273f);
    ratio = fmaf(ratio, t, 0.33275479078292847f);
    ratio = fmaf(ratio, t, -0.4999740421772003f);
    return fmaf(ratio, t, 0.9999998211860657f);
}

// Return sqrt(max(x, 0) + log1p(t)) with t = exp(-|x|). For x < 0 that is exp(x / 2) sqrt(log1p(t) / t), which keeps
// its relative accuracy and stays normal down to x = -174.
__device__ __forceinline__ float sqrtsoftplus(float x) {
    const float root = precise_exp(fabsf(x), 0.5f * LOG2E_HIGH, 0.5f * LOG2E_LOW);
    const float t = root * root;
    const float ratio = log1p_ratio(t);
    const bool negative = x < 0.0f;
    const float y = fast_sqrt(negative ? ratio : fmaf(t, ratio, x));
    return negative ? root * y : y;
}

// Return 1 / (1 + exp(-x)); for x < 0 as exp(x) / (1 + exp(x)).
__device__ __forceinline__ float sigmoid(float x) {
    const float t = precise_exp(fabsf(x), LOG2E_HIGH, LOG2E_LOW);
    const float y = fast_reciprocal(1.0f + t);
    return x < 0.0f ? t * y : y;
}

// Return exp(x - highest); 1 where x is the highest, even if that is infinite.
__device__ __forceinline__ float softmax_share(float x, float highest) {
    const float share = precise_exp(highest - x, LOG2E_HIGH, LOG2E_LOW);
    return x == highest ? 1.0f : share;
}

// Return sigmoid(x) / exp(min(highest, 0)): sigmoids far below 1 keep their ratios.
__device__ __forceinline__ float sigmoid_share(float x, float highest) {
    const float t = precise_exp(fabsf(x), LOG2E_HIGH, LOG2E_LOW);
    return softmax_share(x > 0.0f ? 0.0f : x, fminf(highest, 0.0f)) * fast_reciprocal(1.0f + t);
}

__device__ __forceinline__ float score_of(float logit, const SoftmaxStatistics& row) {
    if (SCORE == SIGMOID) return sigmoid(logit);
    if (SCORE == SQRTSOFTPLUS) return sqrtsoftplus(logit);
    if (SCORE == SOFTMAX) return softmax_share(logit, row.highest) * row.inverse_sum;
    if (SCORE == OWN) logit = score_function(logit);
    return __fadd_rn(logit, 0.0f);  // flush subnormals, as the others do
}

// Whether there is a cheap value that no score exceeds by more than SCORE_BOUND_ERROR. It may be far above small
// scores, and is anything for NaN.
constexpr bool HAS_SCORE_BOUND = SCORE == SQRTSOFTPLUS || SCORE == SIGMOID;
constexpr float SCORE_BOUND_ERROR = 1e-5f;

// Return that value. For sqrt(softplus), sqrt(max(x, 0) + log(1 + exp(-|x|))) has an error of 3e-7 in the sum. From a
// root of 0.013 on that is less than 1e-5 of the root, and the sum is kept above the square of that. Sigmoid has an
// error of 1e-6 everywhere.
__device__ __forceinline__ float score_bound(float x) {
    if (SCORE == SIGMOID) return fast_reciprocal(1.0f + fast_exp2(-LOG2E_HIGH * x));
    const float log = fast_log2(1.0f + fast_exp2(-LOG2E_HIGH * fabsf(x)));
    return fast_sqrt(fmaf(log, 0.693147181f, fmaxf(x, 1.7e-4f)));
}

__device__ __forceinline__ bool is_nan(float value) { return value != value; }

// The type of sums of scores. Identity scores and those of the caller may be as large as floats get, so their sum needs
// a wider type.
template <Score>
struct Total {
    typedef float type;
};
template <>
struct Total<IDENTITY> {
    typedef double type;
};
template <>
struct Total<OWN> {
    typedef double type;
};
typedef Total<SCORE>::type total_t;

__device__ __forceinline__ float reciprocal(float divisor) { return fast_reciprocal(divisor); }

__device__ __forceinline__ double reciprocal(double divisor) { return 1.0 / divisor; }

// Return what a score adds to the normaliser: nothing if it is NaN.
__device__ __forceinline__ total_t summand(float score) { return is_nan(score) ? total_t(0) : total_t(score); }

// The normaliser that scores are divided by.
struct Divisor {
    total_t value;
    bool clamped;  // a constant, whatever the sum is
    bool nothing;  // weights are 0 instead
};

__device__ __forceinline__ Divisor divisor_of(total_t total, float renormalize_eps, float renormalize_min) {
    if (total != total) total = __uint_as_float(INFINITY_BITS);  // +inf and -inf in one sum
    const total_t sum = HAS_EPS ? total + renormalize_eps : total;
    const bool clamped = HAS_MIN && sum < renormalize_min;
    const total_t value = clamped ? total_t(renormalize_min) : sum;
    return {value, clamped, total == total_t(0) || value == total_t(0)};
}

// Return the weight of a chosen expert from its score and the sum of the chosen scores that are not NaN. Score NaN
// gives NaN; an infinite sum gives NaN to infinite scores and 0 to the others; a sum of 0 gives 0.
__device__ __forceinline__ float weight_of(float score, total_t total, float renormalize_eps, float renormalize_min,
                                           float scale) {
    if (!RENORMALIZE) return score * scale;
    const Divisor divisor = divisor_of(total, renormalize_eps, renormalize_min);
    return static_cast<float>(divisor.nothing ? score * total_t(0) : score * reciprocal(divisor.value) * scale);
}
