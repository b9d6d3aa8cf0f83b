// SPDX-License-Identifier: Apache-2.0
// The gradient of rows of logits from that of the weights of their chosen experts: activation_topk and hash_router with
// logits, backwards, in one pass over the result.
//
// But for a softmax over the whole row, only the k chosen of a row's columns are not 0, and only their logits are read.
// So a row is written as zeros by 16-byte words, while indices and logits are on their way, and then, behind a barrier,
// the chosen columns once more; a softmax has the whole row in place of the zeros.
//
// activation_topk_backward: LANES threads serve a row, a lane per weight, up to 32; a softmax holds the row in their
// registers, up to 1024 columns.
// activation_topk_backward_wide (WIDE): one block per row for every other size.
//
// A row in which an index is no expert, as in padding, gets zeros. REPEATED: an expert may be in a row more than once.
#include "routing/softmax_statistics.cuh"
#include "device/row_load.cuh"
#include "routing/weigh_backward.cuh"

#ifndef DTYPE
#define DTYPE 0
#endif
#ifndef GRADIENT_DTYPE
#define GRADIENT_DTYPE DTYPE  // of the result
#endif
#ifndef LANES
#define LANES 32
#endif
#ifndef ALIGNED
#define ALIGNED 1  // rows of logits start at multiples of what UNIT of them take
#endif
#ifndef DENSE
#define DENSE 0  // rows of all arrays follow each other
#endif
#ifndef REPEATED
#define REPEATED 0
#endif
#ifndef WIDE
#define WIDE 0
#endif

typedef Scalar<DTYPE>::type logit_t;
typedef Scalar<GRADIENT_DTYPE>::type gradient_t;

constexpr int UNIT = 16 / sizeof(gradient_t);  // columns that are written at once
constexpr int64_t WHOLE_UNITS = NUM_LOGITS / UNIT;

__device__ __forceinline__ bool takes_words(const gradient_t* row) {
    return reinterpret_cast<unsigned long long>(row) % 16 == 0;
}

__device__ __forceinline__ bool is_expert(int64_t index) { return index >= 0 && index < NUM_EXPERTS; }

// By Threads threads, of which this is number `thread`.
template <int Threads>
__device__ __forceinline__ void store_zeros(gradient_t* row, int thread) {
    constexpr int64_t EACH = WHOLE_UNITS / Threads, REST = WHOLE_UNITS % Threads;
    const float zeros[UNIT] = {};
    const bool by_words = takes_words(row);
    if (by_words) {
        gradient_t* unit = row + thread * UNIT;
#pragma unroll 16
        for (int64_t u = 0; u < EACH; ++u) store_floats(unit + u * Threads * UNIT, zeros);
        if (thread < REST) store_floats(unit + EACH * Threads * UNIT, zeros);
    }
    const int64_t written = by_words ? WHOLE_UNITS * UNIT : 0;
    for (int64_t column = written + thread; column < NUM_LOGITS; column += Threads) store_float(row + column, 0.0f);
}

// What a softmax over the whole row takes from the gradient of a logit.
__device__ __forceinline__ float softmax_term(float scaled_logit, const SoftmaxStatistics& statistics,
                                              float softmax_factor, const Numbers& numbers) {
    const float share = softmax_share(capped(scaled_logit, numbers), statistics.highest) * statistics.inverse_sum;
    return is_nan(share) ? 0.0f
                         : share * softmax_factor * prepare_gradient(scaled_logit, numbers);  // the sum left NaN out
}

#if !WIDE

static_assert(WEIGHED <= LANES && LANES <= 32, "a lane per weight");

constexpr int UNITS = WHOLE_ROW_SOFTMAX ? (NUM_LOGITS + UNIT * LANES - 1) / (UNIT * LANES) : 1;  // of each lane
constexpr int TEAM = WHOLE_ROW_SOFTMAX ? LANES : power_of_two_from(WEIGHED);  // lanes that need the sums

// The scaled logits of a row, UNIT * LANES apart a unit of each lane; NaN where there is no column.
__device__ __forceinline__ void load_row(const logit_t* logits, const float* logit_bias, int lane,
                                         const Numbers& numbers, float (&values)[UNITS * UNIT]) {
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

// The sum of the gradients of one expert goes to its first place; false at the others.
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
                             long long num_tokens, float renormalize_eps, float renormalize_min, float scale,
                             float logit_scale, float logit_softcap, float shared_weight, long long grad_weights_stride,
                             long long indices_stride, long long logits_stride, long long grad_logits_stride) {
    const Numbers numbers = {renormalize_eps, renormalize_min, scale, logit_scale, logit_softcap, shared_weight};
    if (DENSE) {
        grad_weights_stride = indices_stride = OUTPUTS;
        logits_stride = grad_logits_stride = NUM_LOGITS;
    }
    constexpr int ROWS_PER_WARP = 32 / LANES;
    const int lane = threadIdx.x % LANES;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (warp * ROWS_PER_WARP >= num_tokens) return;
    // Whole warps stay together: lanes vote and sum, also those of rows that do not exist.
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
    __syncwarp();  // what was written so far lies below what comes now
    if (good && routed && first) store_float(target + expert[0], gradient[0]);
}

#else

constexpr int WIDE_THREADS = 256;
constexpr int PLACES = (WEIGHED + WIDE_THREADS - 1) / WIDE_THREADS;  // of each thread

__shared__ float place_gradients[REPEATED ? WEIGHED : 1];

extern "C" __global__ void __launch_bounds__(WIDE_THREADS)
    activation_topk_backward_wide(const weight_t* __restrict__ grad_weights, const index_t* __restrict__ indices,
                                  const logit_t* __restrict__ logits, const float* __restrict__ logit_bias,
                                  const float* __restrict__ expert_scale, gradient_t* __restrict__ grad_logits,
                                  long long num_tokens, float renormalize_eps, float renormalize_min, float scale,
                                  float logit_scale, float logit_softcap, float shared_weight,
                                  long long grad_weights_stride, long long indices_stride, long long logits_stride,
                                  long long grad_logits_stride) {
    const Numbers numbers = {renormalize_eps, renormalize_min, scale, logit_scale, logit_softcap, shared_weight};
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
        __syncthreads();  // what was written so far lies below what comes now
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
        if (REPEATED) __syncthreads();  // their places are used again
    }
}

#endif
