// SPDX-License-Identifier: Apache-2.0
// From the gradients of the weights of a token to those of its prepared logits, by a team of threads that share the
// token. The names are those of cupy_router/reference/activation_topk_backward.py, which has the mathematics.
#pragma once

#include "routing/score_gradient.cuh"
#include "routing/weigh.cuh"

// Turn gradients with respect to weights into gradients with respect to prepared logits. A thread has outputs first,
// first + stride, ... with their prepared logits, their scores (logits if WEIGHS_LOGITS) and the gradients. After
// output WEIGHED, and for a token that is not routed, these are 0. Return the A of the reference: times the score of a
// logit, it is what the normaliser of a softmax over the whole row subtracts from the gradient of that logit.
template <typename Team, int N>
__device__ __forceinline__ float weigh_backward(float (&gradients)[N], float (&scores)[N], const float (&logits)[N],
                                                const int64_t (&experts)[N], int first, int stride, bool routed,
                                                const float* expert_scale, const MethodNumbers numbers) {
    score_chosen<Team>(scores, first, stride, routed);
    const total_t total = sum_of<Team>(scores);
    Divisor divisor = {total_t(1), true, false};
    if (RENORMALIZE) divisor = divisor_of(total, numbers.renormalize_eps, numbers.renormalize_min);
    const total_t inverse = !RENORMALIZE ? total_t(1) : divisor.nothing ? total_t(0) : reciprocal(divisor.value);

    // From here on, scores are the u of the reference and gradients its h. NaN is ignored in sums.
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
