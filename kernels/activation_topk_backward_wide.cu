// SPDX-License-Identifier: Apache-2.0
// The gradient with respect to the logits for rows and k of any size: one block per row.
#include "routing/gradient_row.cuh"
#include "routing/weigh_backward.cuh"

constexpr int WIDE_THREADS = 256;
constexpr int PLACES = (WEIGHED + WIDE_THREADS - 1) / WIDE_THREADS;  // of each thread

__shared__ float place_gradients[REPEATED ? WEIGHED : 1];

extern "C" __global__ void __launch_bounds__(WIDE_THREADS)
    activation_topk_backward_wide(const weight_t* __restrict__ grad_weights, const index_t* __restrict__ indices,
                                  const logit_t* __restrict__ logits, const float* __restrict__ logit_bias,
                                  const float* __restrict__ expert_scale, gradient_t* __restrict__ grad_logits,
                                  long long num_tokens, const MethodNumbers numbers, long long grad_weights_stride,
                                  long long indices_stride, long long logits_stride, long long grad_logits_stride) {
    for (int64_t row = blockIdx.x; row < num_tokens; row += gridDim.x) {
        const index_t* index = indices + row * indices_stride;
        const logit_t* source = logits + row * logits_stride;
        gradient_t* target = grad_logits + row * grad_logits_stride;
        const auto scaled_at = [&](int64_t column) {
            return scaled(to_float(source[column]), bias_of(logit_bias, column), numbers);
        };

        int64_t experts[PLACES];
        bool bad = false;
#pragma unroll 8
        for (int p = 0; p < PLACES; ++p) {
            const int place = p * WIDE_THREADS + threadIdx.x;
            experts[p] = expert_of(place, place < TOP_K ? static_cast<int64_t>(index[place]) : 0);
            bad |= place < TOP_K && !is_expert(experts[p]);
        }
        if (__syncthreads_or(bad)) {
            store_zeros<WIDE_THREADS>(target, threadIdx.x);
            continue;
        }

        SoftmaxStatistics statistics = {0.0f, 0.0f};
        if (WHOLE_ROW_SOFTMAX) {
            float highest = -__uint_as_float(INFINITY_BITS), sum = 0.0f;
            for (int64_t e = threadIdx.x; e < NUM_LOGITS; e += WIDE_THREADS) {
                highest = fmaxf(highest, capped(scaled_at(e), numbers));
            }
            statistics.highest = BlockTeam::highest(highest);
            for (int64_t e = threadIdx.x; e < NUM_LOGITS; e += WIDE_THREADS) {
                const float share = softmax_share(capped(scaled_at(e), numbers), statistics.highest);
                sum += is_nan(share) ? 0.0f : share;
            }
            statistics.inverse_sum = 1.0f / BlockTeam::sum(sum);
        } else {
            store_zeros<WIDE_THREADS>(target, threadIdx.x);
        }

        float gradients[PLACES], scaled_logits[PLACES], values[PLACES], scores[PLACES];
#pragma unroll 8
        for (int p = 0; p < PLACES; ++p) {
            const int place = p * WIDE_THREADS + threadIdx.x;
            const bool weighed = place < WEIGHED;
            gradients[p] = weighed ? to_float(grad_weights[row * grad_weights_stride + place]) : 0.0f;
            scaled_logits[p] = weighed ? scaled_at(experts[p]) : 0.0f;
            values[p] = capped(scaled_logits[p], numbers);
            scores[p] = WEIGHS_LOGITS ? values[p] : score_of(values[p], statistics);
        }
        const float softmax_factor = weigh_backward<BlockTeam>(gradients, scores, values, experts, threadIdx.x,
                                                               WIDE_THREADS, true, expert_scale, numbers);
        if (WHOLE_ROW_SOFTMAX) {
            for (int64_t e = threadIdx.x; e < NUM_LOGITS; e += WIDE_THREADS) {
                store_float(target + e, 0.0f - softmax_term(scaled_at(e), statistics, softmax_factor, numbers));
            }
        }
        if (REPEATED) {
#pragma unroll 8
            for (int p = 0; p < PLACES; ++p) {
                const int place = p * WIDE_THREADS + threadIdx.x;
                if (place < WEIGHED) place_gradients[place] = gradients[p];
            }
        }
        __syncthreads();  // orders the stores so far before those below
#pragma unroll 8
        for (int p = 0; p < PLACES; ++p) {
            const int place = p * WIDE_THREADS + threadIdx.x;
            if (place >= WEIGHED) continue;
            bool first = true;
            if (REPEATED && place < TOP_K) {
                float sum = 0.0f;
                for (int other = 0; other < TOP_K; ++other) {
                    if (static_cast<int64_t>(index[other]) != experts[p]) continue;
                    sum += place_gradients[other];
                    first &= other >= place;
                }
                gradients[p] = sum;
            }
            float gradient = gradients[p] * prepare_gradient(scaled_logits[p], numbers);
            if (WHOLE_ROW_SOFTMAX) gradient -= softmax_term(scaled_logits[p], statistics, softmax_factor, numbers);
            if (first) store_float(target + experts[p], gradient);
        }
        if (REPEATED) __syncthreads();  // before place_gradients is used again
    }
}
