// SPDX-License-Identifier: Apache-2.0
// Score, bias, top-k, renormalisation and scale of rows of logits, in one kernel.
//
// activation_topk: LANES threads hold a row in registers, up to 1024 experts and 32 winners. They score all logits,
// select on the order-preserving key of score + bias, and lane r writes the r-th best expert and its weight.
// INTERLEAVED: they select on bounds of the scores, several rows to a warp, and score only the best.
// activation_topk_wide (WIDE): one block per row for every other size. Each of TOP_K rounds looks through the whole row
// for the best entry after the previous one, so that nothing has to be stored: right for any size, not fast.
#include "routing/choose_experts.cuh"
#include "routing/num_valid.cuh"
#include "routing/softmax_statistics.cuh"
#include "routing/weigh.cuh"

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
#ifndef DENSE
#define DENSE 0  // rows of logits and results follow each other
#endif
#ifndef WIDE
#define WIDE 0
#endif

typedef Scalar<DTYPE>::type logit_t;

typedef LogitRow<logit_t> Row;

#if !WIDE

constexpr bool WHOLE = LANES * PER_LANE == NUM_EXPERTS;
static_assert(LANES * PER_LANE >= NUM_EXPERTS, "the lanes hold the row");
constexpr int WINNER_LANES = power_of_two_from(OUTPUTS);
typedef InterleavedRow<logit_t, LANES, PER_LANE, (NUM_GROUPS > 0)> Interleaved;

// From sm_100 on, and for some interleaved rows, ptxas spills registers to fit more blocks, unless it is told how many
// are wanted. 0: no wish.
#define UNEVEN (LANES * PER_LANE != NUM_EXPERTS || (LANES < 32 && PER_LANE % 8 != 0))
#if (INTERLEAVED && (LOGIT_CAPPED || UNEVEN)) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000)
#define LEAST_BLOCKS 1
#else
#define LEAST_BLOCKS 0
#endif

extern "C" __global__ void __launch_bounds__(256, LEAST_BLOCKS)
    activation_topk(const logit_t* __restrict__ logits, const float* __restrict__ bias,
                    const float* __restrict__ logit_bias, const float* __restrict__ expert_scale,
                    const int* __restrict__ num_valid, weight_t* __restrict__ weights, index_t* __restrict__ indices,
                    int num_valid_value, long long num_tokens, float renormalize_eps, float renormalize_min,
                    float scale, float logit_scale, float logit_softcap, float shared_weight, long long logits_stride,
                    long long weights_stride, long long indices_stride) {
    const Numbers numbers = {renormalize_eps, renormalize_min, scale, logit_scale, logit_softcap, shared_weight};
    if (DENSE) {
        logits_stride = NUM_LOGITS;
        weights_stride = indices_stride = OUTPUTS;
    }
    constexpr int ROWS_PER_WARP = 32 / LANES;
    const int lane = threadIdx.x % LANES;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (warp * ROWS_PER_WARP >= num_tokens) return;
    // Whole warps stay together: a row that does not exist goes along, without being read or in the place of row 0.
    const int64_t row = warp * ROWS_PER_WARP + threadIdx.x % 32 / LANES;
    const int64_t valid = valid_rows(num_valid, num_valid_value, num_tokens);
    int64_t experts[1];
    float weight[1];
#if INTERLEAVED
    const Row source = {logits + (row < num_tokens ? row * logits_stride : 0), logit_bias, numbers};
    InterleavedChoice<Interleaved, ALIGNED, BIAS_ALIGNED> choice(source, bias, lane, row < valid);
    const bool in_order = choice.in_order(lane), complete = choice.complete();
    bool settled = !__any_sync(FULL_WARP, row < valid && !(in_order && complete));
#pragma unroll 1
    while (true) {  // weights are worked out before it is known that the choice is right, which it nearly always is
        experts[0] = expert_of(lane, choice.own.column);
        weight[0] = choice.own.value;
        if (SHARED_LOGITS && row < valid && lane >= TOP_K && lane < OUTPUTS) weight[0] = source[experts[0]];
        weigh<LaneTeam<WINNER_LANES>>(weight, experts, lane, 0, row < valid, expert_scale, numbers);
        if (!UNLIKELY(!settled)) break;
        choice.sort(lane);
        const bool now_complete = choice.complete();
        const unsigned unsure = __ballot_sync(FULL_WARP, row < valid && !now_complete);
        choose_again<LANES>(unsure, source, bias, choice.statistics, choice.own);
        settled = true;
    }
#else
    float biases[PER_LANE], logit_biases[PER_LANE], values[PER_LANE];
    if (HAS_BIAS)
        load_columns<float, PER_LANE, WHOLE, BIAS_ALIGNED, NUM_EXPERTS>(bias, lane * PER_LANE, NUM_EXPERTS, biases);
    if (HAS_LOGIT_BIAS)
        load_columns<float, PER_LANE, WHOLE, BIAS_ALIGNED, NUM_EXPERTS>(logit_bias, lane * PER_LANE, NUM_EXPERTS,
                                                                        logit_biases);
    const Row source = {logits + row * logits_stride, logit_bias, numbers};
    if (row < num_tokens) {  // padding can be read as well, and need not wait for num_valid
        load_columns<logit_t, PER_LANE, WHOLE, ALIGNED, NUM_EXPERTS>(source.logits, lane * PER_LANE, NUM_EXPERTS,
                                                                     values);
    } else {
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) values[j] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) values[j] = prepare(values[j], HAS_LOGIT_BIAS ? logit_biases[j] : 0.0f, numbers);
    const SoftmaxStatistics statistics = softmax_statistics<LANES>(values);
    const Chosen chosen = choose_exactly<LANES>(values, biases, statistics, source, lane, row < valid);
    experts[0] = expert_of(lane, chosen.column);
    weight[0] = chosen.value;
    if (SHARED_LOGITS && row < valid && lane >= TOP_K && lane < OUTPUTS) weight[0] = source[experts[0]];
    weigh<LaneTeam<WINNER_LANES>>(weight, experts, lane, 0, row < valid, expert_scale, numbers);
#endif
    if (lane < OUTPUTS && row < num_tokens) {
        store_float(weights + row * weights_stride + lane, row < valid ? weight[0] : 0.0f);
        indices[row * indices_stride + lane] = row < valid ? static_cast<index_t>(experts[0]) : index_t(-1);
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
    SoftmaxStatistics statistics;

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
                         float renormalize_eps, float renormalize_min, float scale, float logit_scale,
                         float logit_softcap, float shared_weight, long long logits_stride, long long weights_stride,
                         long long indices_stride) {
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
