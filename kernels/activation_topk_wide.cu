// SPDX-License-Identifier: Apache-2.0
// Score, bias, top-k, renormalisation and scale of rows of logits for rows and k of any size: one block per row.
//
// Each of TOP_K rounds scans the whole row for the best entry after the previous one, so that nothing is stored: right
// for any size, not fast.
#include "routing/choose_experts.cuh"
#include "device/num_valid.cuh"
#include "routing/biases.cuh"
#include "routing/given_experts.cuh"
#include "routing/logits_out.cuh"
#include "routing/replicas.cuh"
#include "routing/weigh.cuh"

SPECIALISED int DTYPE = 0;

typedef Scalar<DTYPE>::type logit_t;

typedef LogitRow<logit_t> Row;

constexpr int WIDE_THREADS = 256;
constexpr int PLACES = (OUTPUTS + WIDE_THREADS - 1) / WIDE_THREADS;  // of each thread

__shared__ unsigned group_keys[NUM_GROUPS > 0 ? NUM_GROUPS : 1];
__shared__ bool group_kept[NUM_GROUPS > 0 ? NUM_GROUPS : 1];

// A row whose experts are scored anew in each round.
struct WideRow {
    Row row;
    const float* bias;
    SoftmaxStatistics statistics;

    __device__ __forceinline__ unsigned key(unsigned e) const {
        const float value = selection_value(row[e], statistics);
        return sum_order_key(HAS_BIAS ? value + bias[e] : value);
    }
};

// A warp ranks the experts of one group at a time; then each group counts those before it.
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
                         const int* __restrict__ bias_index, const float* __restrict__ logit_bias,
                         const float* __restrict__ expert_scale, const given_t* __restrict__ given_experts,
                         const replica_t* __restrict__ replicas, const replica_count_t* __restrict__ replica_counts,
                         const int* __restrict__ num_valid, weight_t* __restrict__ weights,
                         index_t* __restrict__ indices, int num_valid_value, logit_out_t* logits_out,
                         const given_token_t* __restrict__ token_ids, long long replica_offset, long long num_tokens,
                         const MethodNumbers numbers, long long logits_stride, long long weights_stride,
                         long long indices_stride, long long given_stride, long long logits_out_stride) {
    const int64_t valid = valid_rows(num_valid, num_valid_value, num_tokens);
    for (int64_t r = blockIdx.x; r < num_tokens; r += gridDim.x) {
        weight_t* weight = weights + r * weights_stride;
        index_t* index = indices + r * indices_stride;
        return_logits<false>(logits + r * logits_stride, logit_bias, r < valid, logits_out + r * logits_out_stride,
                             threadIdx.x, WIDE_THREADS);
        const BiasRow its_bias = bias_of_token(bias, bias_index, r);
        const given_t* given = HAS_GIVEN ? given_row(given_experts, given_stride, token_ids, r) : nullptr;
        bool is_set = UNSET_EMPTY, exists = given != nullptr;
        for (int place = threadIdx.x; given != nullptr && place < TOP_K; place += WIDE_THREADS) {
            const int id = given_id(given + place);
            is_set |= id != UNSET;
            exists &= id >= 0;
        }
        if (HAS_GIVEN) {
            is_set = BY_TOKEN_ID ? its_bias.is_first : __syncthreads_or(is_set);
            exists = !__syncthreads_or(!exists);
        }
        if (r >= valid || !(HAS_GIVEN && is_set ? exists : its_bias.exists)) {
            for (int output = threadIdx.x; output < OUTPUTS; output += WIDE_THREADS) {
                store_float(weight + output, 0.0f);
                index[output] = -1;
            }
            continue;
        }
        WideRow row = {{logits + r * logits_stride, logit_bias, numbers}, its_bias.bias, {0.0f, 0.0f}};
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
        const bool selects = !(HAS_GIVEN && is_set);
        if (NUM_GROUPS > 0 && selects) find_best_groups(row);

        unsigned long long last = ~0ull;
        for (int round = 0; selects && round < TOP_K; ++round) {
            unsigned long long best = 0;
            for (unsigned e = threadIdx.x; e < NUM_EXPERTS; e += WIDE_THREADS) {
                if (NUM_GROUPS > 0 && !group_kept[e / GROUP_SIZE]) continue;
                const unsigned long long rank = rank_key(row.key(e), e);
                best = rank < last && rank > best ? rank : best;
            }
            last = block_reduce(best, 0ull, Maximum());
            if (threadIdx.x == round % WIDE_THREADS)
                index[round] = column_of(last);  // this thread reads it again below
        }

        for (int place = threadIdx.x; !selects && place < TOP_K; place += WIDE_THREADS)
            index[place] = static_cast<index_t>(given[place]);

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
            index[output] = written_id(experts[p], output, r, {replicas, replica_counts, replica_offset});
        }
    }
}
