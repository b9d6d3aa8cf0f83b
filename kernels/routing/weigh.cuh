// SPDX-License-Identifier: Apache-2.0
// From the scores of the chosen experts of a token to their weights, by a team of threads that share the token.
#pragma once

#include "device/block.cuh"
#include "routing/method.cuh"

template <int Lanes>
struct LaneTeam {
    template <typename T>
    static __device__ __forceinline__ T sum(T value) {
        return lanes_sum<Lanes>(value);
    }
    static __device__ __forceinline__ float highest(float value) { return lanes_max<Lanes>(value); }
};

struct BlockTeam {
    template <typename T>
    static __device__ __forceinline__ T sum(T value) {
        return block_reduce(value, T(0), Sum());
    }
    static __device__ __forceinline__ float highest(float value) {
        return block_reduce(value, -__uint_as_float(INFINITY_BITS), Maximum());
    }
};

// Return the expert of a column of the results: a chosen one, or after these a shared one.
__device__ __forceinline__ int64_t expert_of(int output, int64_t chosen) {
    return NUM_SHARED > 0 && output >= TOP_K ? static_cast<int64_t>(NUM_EXPERTS) + (output - TOP_K) : chosen;
}

constexpr bool SOFTMAX_OF_CHOSEN = SCORE_AFTER_TOPK && SCORE == SOFTMAX;

// Turn logits (if WEIGHS_LOGITS) or scores into scores; with SHARED_LOGITS up to a common factor. A thread has outputs
// first, first + stride, ... Values after output WEIGHED, or of a token that is not routed, are undefined before and
// after, and never stored.
template <typename Team, int N>
__device__ __forceinline__ void score_chosen(float (&values)[N], int first, int stride, bool routed) {
    if (SHARED_LOGITS || SOFTMAX_OF_CHOSEN) {
        float highest = -__uint_as_float(INFINITY_BITS);
#pragma unroll 8
        for (int p = 0; p < N; ++p) {
            if (routed && first + p * stride < WEIGHED) highest = fmaxf(highest, values[p]);
        }
        highest = Team::highest(highest);
#pragma unroll 8
        for (int p = 0; p < N; ++p) {
            values[p] = SHARED_LOGITS ? sigmoid_share(values[p], highest) : softmax_share(values[p], highest);
        }
    } else if (SCORE_AFTER_TOPK) {
#pragma unroll 8
        for (int p = 0; p < N; ++p) values[p] = score_of(values[p], SoftmaxStatistics());
    }
    float shares = 0.0f;
#pragma unroll 8
    for (int p = 0; p < N; ++p) {
        if (!routed || first + p * stride >= WEIGHED) values[p] = 0.0f;
        if (SOFTMAX_OF_CHOSEN) shares += is_nan(values[p]) ? 0.0f : values[p];
    }
    if (SOFTMAX_OF_CHOSEN) {
        shares = Team::sum(shares);
#pragma unroll 8
        for (int p = 0; p < N; ++p) values[p] = values[p] / shares;
    }
}

// Return the sum for the normaliser.
template <typename Team, int N>
__device__ __forceinline__ total_t sum_of(const float (&scores)[N]) {
    total_t total = 0;
    if (RENORMALIZE) {
#pragma unroll 8
        for (int p = 0; p < N; ++p) total += summand(scores[p]);
        total = Team::sum(total);
    }
    return total;
}

// Turn logits or scores into weights; see score_chosen.
template <typename Team, int N>
__device__ __forceinline__ void weigh(float (&values)[N], const int64_t (&experts)[N], int first, int stride,
                                      bool routed, const float* expert_scale, const MethodNumbers numbers) {
    score_chosen<Team>(values, first, stride, routed);
    const total_t total = sum_of<Team>(values);
#pragma unroll 8
    for (int p = 0; p < N; ++p) {
        const int output = first + p * stride;
        values[p] = weight_of(values[p], total, numbers.renormalize_eps, numbers.renormalize_min, numbers.scale);
        if (HAS_EXPERT_SCALE && routed && output < TOP_K) values[p] *= __ldg(expert_scale + experts[p]);
        if (NUM_SHARED > 0 && !SHARED_LOGITS && output >= TOP_K) values[p] = numbers.shared_weight;
    }
}
