// SPDX-License-Identifier: Apache-2.0
// Score, bias, top-k, renormalisation and scale of rows of logits, in one kernel.
//
// activation_topk: LANES threads hold a row in registers, up to 1024 experts and 32 winners. They score all logits,
// select on the order-preserving key of score + bias, and lane r writes the r-th best expert and its weight.
// activation_topk_wide (WIDE): one block per row for every other size. Each of TOP_K rounds looks through the whole row
// for the best entry behind the previous one, so that nothing has to be stored: right for any size, not fast.
#include "block.cuh"
#include "num_valid.cuh"
#include "route_row.cuh"
#include "row.cuh"
#include "score.cuh"
#include "select.cuh"

#ifndef NUM_EXPERTS
#define NUM_EXPERTS 256
#endif
#ifndef TOP_K
#define TOP_K 6
#endif
#ifndef DTYPE
#define DTYPE 0
#endif
#ifndef HAS_BIAS
#define HAS_BIAS 1
#endif
#ifndef LANES
#define LANES 32
#endif
#ifndef PER_LANE
#define PER_LANE 8
#endif
#ifndef ALIGNED
#define ALIGNED 1
#endif
#ifndef BIAS_ALIGNED
#define BIAS_ALIGNED 1
#endif
#ifndef MANY_ROWS
#define MANY_ROWS 0  // choose by bounds: less to do for all rows, more for a few of them
#endif
#ifndef WIDE
#define WIDE 0
#endif

typedef Scalar<DTYPE>::type logit_t;

static_assert(TOP_K >= 1 && TOP_K <= NUM_EXPERTS, "TOP_K lies in 1..NUM_EXPERTS");

#if !WIDE

constexpr bool WHOLE = LANES * PER_LANE == NUM_EXPERTS;
static_assert(LANES * PER_LANE >= NUM_EXPERTS, "the lanes hold the row");
constexpr bool BOUNDED = HAS_BOUND && MANY_ROWS && TOP_K < LANES && TOP_K < NUM_EXPERTS;
constexpr int WINNER_LANES = power_of_two_from(TOP_K);

struct Chosen {
    int column;
    float score;  // without bias
};

// Select on scores. Without a bias the key is the score; with one the score is gathered, since biased minus bias loses
// bits.
__device__ __forceinline__ Chosen choose_exactly(const float (&logits)[PER_LANE], const float (&biases)[PER_LANE],
                                                 const RowStatistics& statistics, const logit_t* row, int lane,
                                                 bool valid) {
    unsigned keys[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const float score = score_of(logits[j], statistics);
        keys[j] = sum_order_key(HAS_BIAS ? score + biases[j] : score);
        if (!WHOLE && lane * PER_LANE + j >= NUM_EXPERTS) keys[j] = NO_KEY;
    }
    // After a choice by bounds this one is rare and may take its time.
    const Winner winner = BOUNDED ? select_exactly<TOP_K, LANES>(keys, lane) : select_topk<TOP_K, LANES>(keys, lane);
    float score = sum_key_value(winner.key);
    if (HAS_BIAS && valid && lane < TOP_K) score = score_of(to_float(row[winner.column]), statistics);
    return {winner.column, score};
}

// Select on cheap bounds of the scores, then score the winners alone. True if that must be the exact choice: the
// winners are in order, and none of the others could reach the last of them even if its score were as far off as it can
// be.
__device__ __forceinline__ bool choose_by_bounds(const float (&logits)[PER_LANE], const float (&biases)[PER_LANE],
                                                 const logit_t* row, const float* bias, int lane, bool valid,
                                                 Chosen& chosen) {
    constexpr unsigned MASK = power_of_two_from(PER_LANE) - 1;
    unsigned keys[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const float bound = score_bound(logits[j]);
        keys[j] = tagged_key<MASK>(HAS_BIAS ? bound + biases[j] : bound, j);
        if (!WHOLE && lane * PER_LANE + j >= NUM_EXPERTS) keys[j] = NO_KEY;
    }
    Winner winner = {NO_KEY, 0};
    const bool best = select_tagged<BOUNDED ? TOP_K + 1 : 1, LANES, PER_LANE, MASK>(keys, lane, winner);
    chosen.column = winner.column;
    float value = 0.0f;
    if (valid && lane < TOP_K) {
        chosen.score = score_of(to_float(row[winner.column]), RowStatistics());
        value = HAS_BIAS ? chosen.score + bias[winner.column] : chosen.score;
    }
    const unsigned key = sum_order_key(value);
    const unsigned next_key = __shfl_down_sync(FULL_WARP, key, 1, LANES);
    const int next_column = __shfl_down_sync(FULL_WARP, winner.column, 1, LANES);
    const float others = tagged_key_ceiling<MASK>(__shfl_down_sync(FULL_WARP, winner.key, 1, LANES));
    const bool in_order = (key > next_key) | ((key == next_key) & (winner.column < next_column));
    const bool out_of_reach = others < value - fmaf(fabsf(value), 2.5e-7f, BOUND_ERROR);
    const bool sure = lane + 1 < TOP_K ? in_order : out_of_reach;
    return best && !__any_sync(FULL_WARP, valid & (lane < TOP_K) & !sure);
}

extern "C" __global__ void __launch_bounds__(256)
    activation_topk(const logit_t* __restrict__ logits, const float* __restrict__ bias,
                    const int* __restrict__ num_valid, float* __restrict__ weights, int* __restrict__ indices,
                    int num_valid_value, long long num_tokens, long long logits_stride, long long weights_stride,
                    long long indices_stride, float renormalize_eps, float renormalize_min, float scale) {
    const int lane = threadIdx.x % LANES;
    const int first = lane * PER_LANE;
    constexpr int ROWS_PER_WARP = 32 / LANES;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
    int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;

    const int64_t valid = valid_rows(num_valid, num_valid_value, num_tokens);
    float biases[PER_LANE];
    if (HAS_BIAS) load_columns<float, PER_LANE, WHOLE, BIAS_ALIGNED>(bias, first, NUM_EXPERTS, biases);

    // Whole warps stay together: a row that does not exist goes along without being read.
    for (; warp * ROWS_PER_WARP < num_tokens; warp += warps) {
        const int64_t row = warp * ROWS_PER_WARP + threadIdx.x % 32 / LANES;
        const logit_t* source = logits + row * logits_stride;
        float values[PER_LANE];
        if (row < num_tokens) {  // padding can be read as well, and need not wait for num_valid
            load_columns<logit_t, PER_LANE, WHOLE, ALIGNED>(source, first, NUM_EXPERTS, values);
        } else {
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j) values[j] = 0.0f;
        }
        const RowStatistics statistics = row_statistics<LANES>(values);

        Chosen chosen = {0, 0.0f};
        bool sure = false;
        if (BOUNDED) sure = choose_by_bounds(values, biases, source, bias, lane, row < valid, chosen);
        if (!BOUNDED || UNLIKELY(!sure)) chosen = choose_exactly(values, biases, statistics, source, lane, row < valid);

        const bool has_winner = lane < TOP_K && row < valid;
        const float score = has_winner ? chosen.score : 0.0f;
        const total_t total = RENORMALIZE ? lanes_sum<WINNER_LANES>(summand(score)) : total_t(0);
        const float weight = weight_of(score, total, renormalize_eps, renormalize_min, scale);
        if (lane < TOP_K && row < num_tokens) {
            weights[row * weights_stride + lane] = has_winner ? weight : 0.0f;
            indices[row * indices_stride + lane] = has_winner ? chosen.column : -1;
        }
    }
}

#else

extern "C" __global__ void __launch_bounds__(256)
    activation_topk_wide(const logit_t* __restrict__ logits, const float* __restrict__ bias,
                         const int* __restrict__ num_valid, float* __restrict__ weights, int* __restrict__ indices,
                         int num_valid_value, long long num_tokens, long long logits_stride, long long weights_stride,
                         long long indices_stride, float renormalize_eps, float renormalize_min, float scale) {
    const int64_t valid = valid_rows(num_valid, num_valid_value, num_tokens);
    for (int64_t row = blockIdx.x; row < num_tokens; row += gridDim.x) {
        const logit_t* source = logits + row * logits_stride;
        float* weight = weights + row * weights_stride;
        int* index = indices + row * indices_stride;
        if (row >= valid) {
            for (int r = threadIdx.x; r < TOP_K; r += blockDim.x) {
                weight[r] = 0.0f;
                index[r] = -1;
            }
            continue;
        }
        RowStatistics statistics = {0.0f, 0.0f};
        if (SCORE == SOFTMAX) {
            float highest = __uint_as_float(0xff800000u), sum = 0.0f;
            for (unsigned e = threadIdx.x; e < NUM_EXPERTS; e += blockDim.x) {
                highest = fmaxf(highest, to_float(source[e]));
            }
            statistics.highest = block_reduce(highest, __uint_as_float(0xff800000u), Maximum());
            for (unsigned e = threadIdx.x; e < NUM_EXPERTS; e += blockDim.x) {
                const float share = softmax_share(to_float(source[e]), statistics.highest);
                sum += is_nan(share) ? 0.0f : share;
            }
            statistics.inverse_sum = 1.0f / block_reduce(sum, 0.0f, Sum());
        }

        unsigned long long last = ~0ull;
        for (int r = 0; r < TOP_K; ++r) {
            unsigned long long best = 0;
            for (unsigned e = threadIdx.x; e < NUM_EXPERTS; e += blockDim.x) {
                const float score = score_of(to_float(source[e]), statistics);
                const unsigned long long rank = rank_key(sum_order_key(HAS_BIAS ? score + bias[e] : score), e);
                best = rank < last && rank > best ? rank : best;
            }
            last = block_reduce(best, 0ull, Maximum());
            if (threadIdx.x == r % blockDim.x) {
                index[r] = column_of(last);
                weight[r] = score_of(to_float(source[column_of(last)]), statistics);
            }
        }

        // Each thread now reads only weights that it wrote itself.
        total_t sum = 0;
        for (int r = threadIdx.x; r < TOP_K; r += blockDim.x) sum += summand(weight[r]);
        const total_t total = block_reduce(sum, total_t(0), Sum());
        for (int r = threadIdx.x; r < TOP_K; r += blockDim.x) {
            weight[r] = weight_of(weight[r], total, renormalize_eps, renormalize_min, scale);
        }
    }
}

#endif
