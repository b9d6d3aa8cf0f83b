// SPDX-License-Identifier: Apache-2.0
// The gradient with respect to the logits, from that with respect to the weights: the backward pass of activation_topk,
// and of hash_router with logits, in one pass over the result.
//
// Unless there is a softmax over the whole row, only the columns of the chosen experts are not 0, and only their logits
// are read. The row is first written as zeros by 16-byte words, while indices and logits are in flight; after a barrier
// the chosen columns are written again. A softmax has a full row in place of the zeros.
//
// LANES threads serve a row, a lane per weight, up to 32. For a softmax they hold the row in registers, up to 1024
// columns. For other sizes see activation_topk_backward_wide.cu.
//
// A row with an index that is no expert, such as padding, gets zeros. REPEATED: an expert may be in a row more than
// once.
#include "device/row_load.cuh"
#include "routing/gradient_row.cuh"
#include "routing/softmax_statistics.cuh"
#include "routing/weigh_backward.cuh"

SPECIALISED int LANES = 32;
SPECIALISED bool ALIGNED = true;  // rows of logits start at multiples of UNIT of them
SPECIALISED bool DENSE = false;   // rows of all arrays follow each other

static_assert(WEIGHED <= LANES && LANES <= 32, "a lane per weight");

constexpr int UNITS = WHOLE_ROW_SOFTMAX ? (NUM_LOGITS + UNIT * LANES - 1) / (UNIT * LANES) : 1;  // of each lane
constexpr int TEAM = WHOLE_ROW_SOFTMAX ? LANES : power_of_two_from(WEIGHED);  // lanes that need the sums

// Load the scaled logits of a row; units are interleaved over the lanes. NaN where there is no column.
__device__ __forceinline__ void load_row(const logit_t* logits, const float* logit_bias, int lane,
                                         const MethodNumbers numbers, float (&values)[UNITS * UNIT]) {
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
        const int first = (u * LANES + lane) * UNIT;
        float unit[UNIT];
        load_columns<logit_t, UNIT, NUM_LOGITS % (UNIT * LANES) == 0, ALIGNED, NUM_LOGITS>(logits, first, NUM_LOGITS,
                                                                                           unit);
#pragma unroll
        for (int i = 0; i < UNIT; ++i) {
            const bool biased = HAS_LOGIT_BIAS && first + i < NUM_LOGITS;
            values[u * UNIT + i] = scaled(unit[i], biased ? __ldg(logit_bias + first + i) : 0.0f, numbers);
        }
    }
}

__device__ __forceinline__ void store_row(gradient_t* row, int lane, const float (&values)[UNITS * UNIT]) {
    const bool by_words = takes_words(row);
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
        const int first = (u * LANES + lane) * UNIT;
        float unit[UNIT];
#pragma unroll
        for (int i = 0; i < UNIT; ++i) unit[i] = values[u * UNIT + i];
        if (by_words && first + UNIT <= NUM_LOGITS) {
            store_floats(row + first, unit);
        } else {
#pragma unroll
            for (int i = 0; i < UNIT; ++i) {
                if (first + i < NUM_LOGITS) store_float(row + first + i, unit[i]);
            }
        }
    }
}

// Sum the gradients of each expert in its first place. Return false in its other places.
__device__ __forceinline__ bool sum_repeated(int64_t expert, int lane, float& gradient) {
    float sum = 0.0f;
    bool first = true;
#pragma unroll
    for (int place = 0; place < TOP_K; ++place) {
        const bool same = __shfl_sync(FULL_WARP, static_cast<int>(expert), place, LANES) == expert;
        const float other = __shfl_sync(FULL_WARP, gradient, place, LANES);
        sum += same ? other : 0.0f;
        first &= !same | (place >= lane);
    }
    if (lane < TOP_K) gradient = sum;
    return first | (lane >= TOP_K);
}

extern "C" __global__ void __launch_bounds__(256)
    activation_topk_backward(const weight_t* __restrict__ grad_weights, const index_t* __restrict__ indices,
                             const logit_t* __restrict__ logits, const float* __restrict__ logit_bias,
                             const float* __restrict__ expert_scale, gradient_t* __restrict__ grad_logits,
                             long long num_tokens, const MethodNumbers numbers, long long grad_weights_stride,
                             long long indices_stride, long long logits_stride, long long grad_logits_stride) {
    if (DENSE) {
        grad_weights_stride = indices_stride = OUTPUTS;
        logits_stride = grad_logits_stride = NUM_LOGITS;
    }
    constexpr int ROWS_PER_WARP = 32 / LANES;
    const int lane = threadIdx.x % LANES;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (warp * ROWS_PER_WARP >= num_tokens) return;
    // Whole warps stay together: lanes of rows that do not exist vote and sum too.
    const int64_t row = warp * ROWS_PER_WARP + threadIdx.x % 32 / LANES;
    const bool exists = row < num_tokens;
    const bool weighed = exists && lane < WEIGHED;
    const logit_t* source = logits + row * logits_stride;
    gradient_t* target = grad_logits + row * grad_logits_stride;

    int64_t expert[1] = {expert_of(lane, 0)};
    float gradient[1] = {0.0f};
    if (exists && lane < TOP_K) expert[0] = static_cast<int64_t>(indices[row * indices_stride + lane]);
    if (weighed) gradient[0] = to_float(grad_weights[row * grad_weights_stride + lane]);
    float whole_row[UNITS * UNIT];
    if (!WHOLE_ROW_SOFTMAX) {
        if (exists) store_zeros<LANES>(target, lane);
    } else if (exists) {
        load_row(source, logit_bias, lane, numbers, whole_row);
    } else {
#pragma unroll
        for (int j = 0; j < UNITS * UNIT; ++j) whole_row[j] = 0.0f;
    }
    const bool good = weighed && (lane >= TOP_K || is_expert(expert[0]));
    float scaled_logit = 0.0f;
    if (good) scaled_logit = scaled(to_float(source[expert[0]]), bias_of(logit_bias, expert[0]), numbers);
    const bool routed = lanes_ballot<LANES>(weighed && !good) == 0;

    SoftmaxStatistics statistics = {0.0f, 0.0f};
    if (WHOLE_ROW_SOFTMAX) {
        float prepared[UNITS * UNIT];
#pragma unroll
        for (int j = 0; j < UNITS * UNIT; ++j) prepared[j] = capped(whole_row[j], numbers);
        statistics = softmax_statistics<LANES>(prepared);
    }
    const float logit[1] = {capped(scaled_logit, numbers)};
    float score[1] = {WEIGHS_LOGITS ? logit[0] : score_of(logit[0], statistics)};
    const float softmax_factor = weigh_backward<LaneTeam<TEAM>>(gradient, score, logit, expert, lane, 0,
                                                                routed && exists, expert_scale, numbers);
    bool first = true;
    if (REPEATED) first = sum_repeated(expert[0], lane, gradient[0]);
    gradient[0] *= prepare_gradient(scaled_logit, numbers);
    if (WHOLE_ROW_SOFTMAX) {
        gradient[0] -= softmax_term(scaled_logit, statistics, softmax_factor, numbers);
#pragma unroll
        for (int j = 0; j < UNITS * UNIT; ++j)
            whole_row[j] = 0.0f - softmax_term(whole_row[j], statistics, softmax_factor, numbers);
        if (exists) store_row(target, lane, whole_row);
    }
    __syncwarp();  // orders the stores so far before those below
    if (good && routed && first) store_float(target + expert[0], gradient[0]);
}
