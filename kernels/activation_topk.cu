// SPDX-License-Identifier: Apache-2.0
// Score, bias, top-k, renormalisation and scale of rows of logits, in one kernel.
//
// activation_topk: LANES threads hold a row in registers, up to 1024 experts and 32 winners. They score all logits,
// select on the order-preserving key of score + bias, and lane r writes the r-th best expert and its weight.
// activation_topk_wide (WIDE): one block per row for every other size. Each of TOP_K rounds looks through the whole row
// for the best entry behind the previous one, so that nothing has to be stored: right for any size, not fast.
#include "groups.cuh"
#include "num_valid.cuh"
#include "route_row.cuh"
#include "row.cuh"
#include "select.cuh"
#include "weigh.cuh"

#ifndef DTYPE
#define DTYPE 0
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
#define BIAS_ALIGNED 1  // that of both biases
#endif
#ifndef MANY_ROWS
#define MANY_ROWS 0  // choose by bounds: less to do for all rows, more for a few of them
#endif
#ifndef WIDE
#define WIDE 0
#endif

typedef Scalar<DTYPE>::type logit_t;

// The logits of a row, prepared one at a time.
struct Row {
    const logit_t* logits;
    const float* logit_bias;
    Numbers numbers;

    __device__ __forceinline__ float operator[](int64_t column) const {
        return prepare(to_float(logits[column]), logit_bias, column, numbers);
    }
};

// What an expert is chosen by, but for its bias.
__device__ __forceinline__ float selection_value(float logit, const RowStatistics& statistics) {
    return SELECT_ON_LOGITS ? __fadd_rn(logit, 0.0f) : score_of(logit, statistics);
}

#if !WIDE

constexpr bool WHOLE = LANES * PER_LANE == NUM_EXPERTS;
static_assert(LANES * PER_LANE >= NUM_EXPERTS, "the lanes hold the row");
constexpr bool BOUNDED = HAS_BOUND && MANY_ROWS && TOP_K < LANES && TOP_K < NUM_EXPERTS && !SELECT_ON_LOGITS &&
                         !WEIGHS_LOGITS && NUM_GROUPS == 0;
constexpr int WINNER_LANES = power_of_two_from(OUTPUTS);

struct Chosen {
    int column;
    float value;  // score, or logit if WEIGHS_LOGITS; without bias
};

// Select on scores. Without a bias the key is the score; with one the score is gathered, since biased minus bias loses
// bits.
__device__ __forceinline__ Chosen choose_exactly(const float (&logits)[PER_LANE], const float (&biases)[PER_LANE],
                                                 const RowStatistics& statistics, const Row& row, int lane,
                                                 bool valid) {
    constexpr bool KEY_IS_VALUE = !HAS_BIAS && bool(SELECT_ON_LOGITS) == WEIGHS_LOGITS;
    unsigned keys[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const float value = selection_value(logits[j], statistics);
        keys[j] = sum_order_key(HAS_BIAS ? value + biases[j] : value);
        if (!WHOLE && lane * PER_LANE + j >= NUM_EXPERTS) keys[j] = NO_KEY;
    }
    if (NUM_GROUPS > 0) keep_best_groups<LANES>(keys, lane);
    // After a choice by bounds this one is rare and may take its time.
    const Winner winner = BOUNDED ? select_exactly<TOP_K, LANES>(keys, lane) : select_topk<TOP_K, LANES>(keys, lane);
    float value = sum_key_value(winner.key);
    if (!KEY_IS_VALUE && valid && lane < TOP_K) {
        value = row[winner.column];
        if (!WEIGHS_LOGITS) value = score_of(value, statistics);
    }
    return {winner.column, value};
}

// Select on cheap bounds of the scores, then score the winners alone. True if that must be the exact choice: the
// winners are in order, and none of the others could reach the last of them even if its score were as far off as it can
// be.
__device__ __forceinline__ bool choose_by_bounds(const float (&logits)[PER_LANE], const float (&biases)[PER_LANE],
                                                 const Row& row, const float* bias, int lane, bool valid,
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
        chosen.value = score_of(row[winner.column], RowStatistics());
        value = HAS_BIAS ? chosen.value + bias[winner.column] : chosen.value;
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

// From sm_100 on ptxas spills registers to fit more blocks, unless it is told how many are wanted. 0: as it likes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define LEAST_BLOCKS 1
#else
#define LEAST_BLOCKS 0
#endif

extern "C" __global__ void __launch_bounds__(256, LEAST_BLOCKS)
    activation_topk(const logit_t* __restrict__ logits, const float* __restrict__ bias,
                    const float* __restrict__ logit_bias, const float* __restrict__ expert_scale,
                    const int* __restrict__ num_valid, weight_t* __restrict__ weights, index_t* __restrict__ indices,
                    int num_valid_value, long long num_tokens, long long logits_stride, long long weights_stride,
                    long long indices_stride, float renormalize_eps, float renormalize_min, float scale,
                    float logit_scale, float logit_softcap, float shared_weight) {
    const Numbers numbers = {renormalize_eps, renormalize_min, scale, logit_scale, logit_softcap, shared_weight};
    const int lane = threadIdx.x % LANES;
    const int first = lane * PER_LANE;
    constexpr int ROWS_PER_WARP = 32 / LANES;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
    int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;

    const int64_t valid = valid_rows(num_valid, num_valid_value, num_tokens);
    float biases[PER_LANE], logit_biases[PER_LANE];
    if (HAS_BIAS) load_columns<float, PER_LANE, WHOLE, BIAS_ALIGNED>(bias, first, NUM_EXPERTS, biases);
    if (HAS_LOGIT_BIAS)
        load_columns<float, PER_LANE, WHOLE, BIAS_ALIGNED>(logit_bias, first, NUM_EXPERTS, logit_biases);

    // Whole warps stay together: a row that does not exist goes along without being read.
    for (; warp * ROWS_PER_WARP < num_tokens; warp += warps) {
        const int64_t row = warp * ROWS_PER_WARP + threadIdx.x % 32 / LANES;
        const Row source = {logits + row * logits_stride, logit_bias, numbers};
        float values[PER_LANE];
        if (row < num_tokens) {  // padding can be read as well, and need not wait for num_valid
            load_columns<logit_t, PER_LANE, WHOLE, ALIGNED>(source.logits, first, NUM_EXPERTS, values);
        } else {
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j) values[j] = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j)
            values[j] = prepare(values[j], HAS_LOGIT_BIAS ? logit_biases[j] : 0.0f, numbers);
        const RowStatistics statistics = row_statistics<LANES>(values);

        Chosen chosen = {0, 0.0f};
        bool sure = false;
        if (BOUNDED) sure = choose_by_bounds(values, biases, source, bias, lane, row < valid, chosen);
        if (!BOUNDED || UNLIKELY(!sure)) chosen = choose_exactly(values, biases, statistics, source, lane, row < valid);

        const int64_t expert[1] = {expert_of(lane, chosen.column)};
        float weight[1] = {chosen.value};
        if (SHARED_LOGITS && row < valid && lane >= TOP_K && lane < OUTPUTS) weight[0] = source[expert[0]];
        weigh<LaneTeam<WINNER_LANES>>(weight, expert, lane, 0, row < valid, expert_scale, numbers);
        if (lane < OUTPUTS && row < num_tokens) {
            store_float(weights + row * weights_stride + lane, row < valid ? weight[0] : 0.0f);
            indices[row * indices_stride + lane] = row < valid ? static_cast<index_t>(expert[0]) : index_t(-1);
        }
    }
}

#else

constexpr int WIDE_THREADS = 256;
constexpr int PLACES = (OUTPUTS + WIDE_THREADS - 1) / WIDE_THREADS;  // of each thread

__shared__ unsigned group_keys[NUM_GROUPS > 0 ? NUM_GROUPS : 1];
__shared__ bool group_kept[NUM_GROUPS > 0 ? NUM_GROUPS : 1];

// A row whose experts are scored again in each round.
struct WideRow {
    Row row;
    const float* bias;
    RowStatistics statistics;

    __device__ __forceinline__ unsigned key(unsigned e) const {
        const float value = selection_value(row[e], statistics);
        return sum_order_key(HAS_BIAS ? value + bias[e] : value);
    }
};

// A warp at a time looks at a group; then each group counts those before it.
__device__ __forceinline__ void find_best_groups(const WideRow& row) {
    const int lane = threadIdx.x % 32;
    for (unsigned group = threadIdx.x / 32; group < NUM_GROUPS; group += WIDE_THREADS / 32) {
        BestTwo seen = {NO_KEY, NO_KEY};
        for (unsigned i = lane; i < GROUP_SIZE; i += 32) seen.insert(row.key(group * GROUP_SIZE + i));
        const unsigned key = group_key<32>(seen, lane);
        if (lane == 0) group_keys[group] = key;
    }
    __syncthreads();
    for (unsigned group = threadIdx.x; group < NUM_GROUPS; group += WIDE_THREADS) {
        const unsigned key = group_keys[group];
        int rank = 0;
        for (unsigned other = 0; other < NUM_GROUPS; ++other) {
            rank += (group_keys[other] > key) | ((group_keys[other] == key) & (other < group));
        }
        group_kept[group] = rank < TOP_GROUPS;
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(WIDE_THREADS)
    activation_topk_wide(const logit_t* __restrict__ logits, const float* __restrict__ bias,
                         const float* __restrict__ logit_bias, const float* __restrict__ expert_scale,
                         const int* __restrict__ num_valid, weight_t* __restrict__ weights,
                         index_t* __restrict__ indices, int num_valid_value, long long num_tokens,
                         long long logits_stride, long long weights_stride, long long indices_stride,
                         float renormalize_eps, float renormalize_min, float scale, float logit_scale,
                         float logit_softcap, float shared_weight) {
    const Numbers numbers = {renormalize_eps, renormalize_min, scale, logit_scale, logit_softcap, shared_weight};
    const int64_t valid = valid_rows(num_valid, num_valid_value, num_tokens);
    for (int64_t r = blockIdx.x; r < num_tokens; r += gridDim.x) {
        weight_t* weight = weights + r * weights_stride;
        index_t* index = indices + r * indices_stride;
        if (r >= valid) {
            for (int output = threadIdx.x; output < OUTPUTS; output += WIDE_THREADS) {
                store_float(weight + output, 0.0f);
                index[output] = -1;
            }
            continue;
        }
        WideRow row = {{logits + r * logits_stride, logit_bias, numbers}, bias, {0.0f, 0.0f}};
        if (WHOLE_ROW_SOFTMAX) {
            float highest = -__uint_as_float(INFINITY_BITS), sum = 0.0f;
            for (unsigned e = threadIdx.x; e < NUM_EXPERTS; e += WIDE_THREADS) highest = fmaxf(highest, row.row[e]);
            row.statistics.highest = BlockTeam::highest(highest);
            for (unsigned e = threadIdx.x; e < NUM_EXPERTS; e += WIDE_THREADS) {
                const float share = softmax_share(row.row[e], row.statistics.highest);
                sum += is_nan(share) ? 0.0f : share;
            }
            row.statistics.inverse_sum = 1.0f / BlockTeam::sum(sum);
        }
        if (NUM_GROUPS > 0) find_best_groups(row);

        unsigned long long last = ~0ull;
        for (int round = 0; round < TOP_K; ++round) {
            unsigned long long best = 0;
            for (unsigned e = threadIdx.x; e < NUM_EXPERTS; e += WIDE_THREADS) {
                if (NUM_GROUPS > 0 && !group_kept[e / GROUP_SIZE]) continue;
                const unsigned long long rank = rank_key(row.key(e), e);
                best = rank < last && rank > best ? rank : best;
            }
            last = block_reduce(best, 0ull, Maximum());
            if (threadIdx.x == round % WIDE_THREADS) index[round] = column_of(last);  // read again by this thread
        }

        int64_t experts[PLACES];
        float values[PLACES];
#pragma unroll 8
        for (int p = 0; p < PLACES; ++p) {
            const int output = p * WIDE_THREADS + threadIdx.x;
            experts[p] = expert_of(output, output < TOP_K ? static_cast<int64_t>(index[output]) : 0);
            values[p] = output < WEIGHED ? row.row[experts[p]] : 0.0f;
            if (!WEIGHS_LOGITS) values[p] = score_of(values[p], row.statistics);
        }
        weigh<BlockTeam>(values, experts, threadIdx.x, WIDE_THREADS, true, expert_scale, numbers);
#pragma unroll 8
        for (int p = 0; p < PLACES; ++p) {
            const int output = p * WIDE_THREADS + threadIdx.x;
            if (output >= OUTPUTS) continue;
            store_float(weight + output, values[p]);
            index[output] = static_cast<index_t>(experts[p]);
        }
    }
}

#endif
