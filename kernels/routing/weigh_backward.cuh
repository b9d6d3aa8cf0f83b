// SPDX-License-Identifier: Apache-2.0
// From the gradients of a token's weights to those of its prepared logits, by a team of threads that share the token.
// cupy_router/reference/activation_topk_backward.py has the mathematics, and what the letters here stand for.
#pragma once

#include "routing/score_gradient.cuh"
#include "routing/weigh.cuh"

// A thread has the outputs first, first + stride, ... with their prepared logits, their scores (logits if
// WEIGHS_LOGITS) and the gradients of their weights; those of the logits come out. Behind output WEIGHED, and of a token
// that is not routed, they are 0. Returned is the A of the reference: what a softmax over the whole row has yet to take
// from the gradient of each of its logits, times the logit's score.
template <typename Team, int N>
__device__ __forceinline__ float weigh_backward(float (&gradients)[N], float (&scores)[N], const float (&logits)[N],
                                                const int64_t (&experts)[N], int first, int stride, bool routed,
                                                const float* expert_scale, const MethodNumbers numbers) {
    score_chosen<Team>(scores, first, stride, routed);
    const total_t total = sum_of<Team>(scores);
    Divisor divisor = {total_t(1), true, false};
    if (RENORMALIZE) divisor = divisor_of(total, numbers.renormalize_eps, numbers.renormalize_min);
    const total_t inverse = !RENORMALIZE ? total_t(1) : divisor.nothing ? total_t(0) : reciprocal(divisor.value);

    // scores become the u of the reference, gradients its h; NaN counts nothing for the others.
    float mean = 0.0f;
#pragma unroll 8
    for (int p = 0; p < N; ++p) {
        const int output = first + p * stride;
        const bool weighed = routed && output < WEIGHED;
        float h = weighed ? gradients[p] * numbers.scale : 0.0f;
        if (HAS_EXPERT_SCALE && routed && output < TOP_K) h *= __ldg(expert_scale + experts[p]);
        scores[p] = static_cast<float>(scores[p] * inverse);
        gradients[p] = h;
        mean += is_nan(scores[p]) ? 0.0f : h * scores[p];
    }
    mean = Team::sum(mean);
    const float shared = divisor.clamped ? 0.0f : mean;
    // mean * (D - D' S) / D; exactly 0 where D is the sum.
    const total_t rest = divisor.clamped ? divisor.value : divisor.value - total;
    const float excess = divisor.nothing ? 0.0f : mean * static_cast<float>(rest);
#pragma unroll 8
    for (int p = 0; p < N; ++p) {
        const float u = scores[p];
        float gradient = gradients[p] - shared;
        if (SHARED_LOGITS) {
            gradient *= u * sigmoid(-logits[p]);
        } else if (SCORE == SOFTMAX) {
            gradient = u * (SOFTMAX_OF_CHOSEN ? gradient - excess : gradient);
        } else {
            gradient *= score_gradient(logits[p], static_cast<float>(inverse));
        }
        gradients[p] = is_nan(u) ? u : first + p * stride < WEIGHED ? gradient : 0.0f;
    }
    return excess * static_cast<float>(inverse);
}
