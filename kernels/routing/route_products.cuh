// SPDX-License-Identifier: Apache-2.0
// Weights from dot products of x with only those rows of the gate that are needed: the rows of the experts of the token,
// or all rows for a softmax over the whole row. A block serves a token.
//
// GROUP > 0: its warps divide hidden (split-K), so that each reads its part of x once; the rows of GROUP experts are in
// flight; no load waits for the check of all table entries, and there is a block for every token.
#pragma once

#include "routing/token_call.cuh"

// Add up the values of each product over a warp: the lane 32 / P * i, where P is the next power of two from N on, returns
// the sum of product i, since lanes exchange halves of what is left. Far fewer shuffles than N sums.
template <int N>
__device__ __forceinline__ float sum_by_lane(const float (&values)[N]) {
    constexpr int P = power_of_two_from(N);
    float left[P];
#pragma unroll
    for (int i = 0; i < P; ++i) left[i] = i < N ? values[i] : 0.0f;
    int distance = 16;
#pragma unroll
    for (int count = P / 2; count > 0; count /= 2, distance /= 2) {
        const bool upper = threadIdx.x & distance;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const float sent = upper ? left[i] : left[i + count], kept = upper ? left[i + count] : left[i];
            left[i] = kept + __shfl_xor_sync(FULL_WARP, sent, distance);
        }
    }
#pragma unroll
    for (; distance > 0; distance /= 2) left[0] += __shfl_xor_sync(FULL_WARP, left[0], distance);
    return left[0];
}

// Route a token by a block. Each warp has a part of hidden, and multiplies it with the rows of all experts of the token.
template <int Group, typename Keep>
__device__ __forceinline__ void route_by_parts_of_hidden(const Call& call, Keep keep) {
    static_assert(Group > 0 && !WHOLE_ROW_SOFTMAX && !SHARED_LOGITS && OUTPUTS <= 32,
                  "only the products of chosen experts are needed");
    constexpr int GROUPS = (TOP_K + Group - 1) / Group;
    constexpr int STEP = 256 * WARPS, ROUNDS = (HIDDEN + STEP - 1) / STEP;
    constexpr bool WHOLE_STEPS = ALIGNED && HIDDEN % STEP == 0;
    __shared__ float sums[WARPS][TOP_K];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    const int64_t row = blockIdx.x;
    // For padding too, so that neither load waits.
    const int64_t token_id = table_row(call, row);
    const bool is_valid = row < valid_rows(call.num_valid, call.num_valid_value, call.num_tokens);
    const int first = warp * 256 + lane * 8;
    const scalar_t* own_x = call.x + row * call.x_stride + first;
    const auto left = [&](int column) { return WHOLE_STEPS ? 8 : HIDDEN - first - column; };
    Vector8<scalar_t> a = load_vector8<ALIGNED>(own_x, left(0));

    const bool token_exists = is_valid && exists(token_id, call.vocab_size);
    const bool has_entry = (token_exists || !BY_TOKEN_ID) && lane < TOP_K;
    const expert_t entry = has_entry ? call.table[token_id * call.table_stride + lane] : expert_t(0);
    // Rows are read before all lanes know whether all entries exist.
    const int expert = exists(entry, EXPERT_IDS) ? static_cast<int>(entry) : 0;
    const gate_t* own_gate = call.gate + first;
    const gate_t* rows[TOP_K];
#pragma unroll
    for (int place = 0; place < TOP_K; ++place) {
        rows[place] = own_gate + __shfl_sync(FULL_WARP, expert, place) * call.weight_stride;
    }
    float products[GROUPS][Group] = {};
#pragma unroll(ROUNDS* TOP_K <= 16 ? ROUNDS : 1)
    for (int round = 0; round < ROUNDS; ++round) {
        const int column = round * STEP;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            Vector8<gate_t> b[Group];
#pragma unroll
            for (int i = 0; i < Group; ++i) {
                const int place = group * Group + i;
                if (place < TOP_K) b[i] = load_vector8<ALIGNED>(rows[place] + column, left(column));
            }
#pragma unroll
            for (int i = 0; i < Group; ++i) {
                if (group * Group + i < TOP_K) products[group][i] = dot(a, b[i], products[group][i]);
            }
        }
        if (round + 1 < ROUNDS) a = load_vector8<ALIGNED>(own_x + column + STEP, left(column + STEP));
    }
    const bool bad = __any_sync(FULL_WARP, !token_exists || !exists(entry, EXPERT_IDS));
    const bool is_set = !KEEPS_UNSET || __any_sync(FULL_WARP, has_entry && static_cast<int64_t>(entry) != -1);
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        constexpr int LANES_OF_SUM = 32 / power_of_two_from(Group);
        const float sum = sum_by_lane(products[group]);
        const int i = lane / LANES_OF_SUM, place = group * Group + i;
        if (lane % LANES_OF_SUM == 0 && i < Group && place < TOP_K) sums[warp][place] = sum;
    }
    __syncthreads();

    if (warp == 0) {
        const int64_t experts[1] = {expert_of(lane, expert)};
        float value[1] = {0.0f};
        if (lane < TOP_K && !bad) {
            float quarters[4] = {};
#pragma unroll
            for (int part = 0; part < WARPS; ++part) quarters[part % 4] += sums[part][lane];
            value[0] = (quarters[0] + quarters[1]) + (quarters[2] + quarters[3]);
            value[0] = prepare(value[0], call.logit_bias, expert, call.numbers);
            if (!WEIGHS_LOGITS) value[0] = score_of(value[0], SoftmaxStatistics());
        }
        weigh<LaneTeam<32>>(value, experts, lane, 0, !bad, call.expert_scale, call.numbers);
        if (is_set && lane < OUTPUTS) {
            store_float(call.weights + row * call.weights_stride + lane, bad ? 0.0f : value[0]);
            const index_t index = bad ? index_t(-1) : written_id(experts[0], lane, row, call.replicas);
            call.indices[row * call.indices_stride + lane] = index;
            keep(row, lane, index);
        }
    }
}

// Return the dot product of two vectors in every lane. Each lane sums in order, then the lanes do: repeatable.
__device__ __forceinline__ float warp_dot(const scalar_t* x, const gate_t* w, int64_t hidden, int lane) {
    float sum = 0.0f;
    for (int64_t i = lane * 8; i < hidden; i += 256) {
        const int left = static_cast<int>(hidden - i);
        sum = dot(load_vector8<ALIGNED>(x + i, left), load_vector8<ALIGNED>(w + i, left), sum);
    }
    return lanes_sum<32>(sum);
}

// Route tokens by a block each, one dot product of a warp at a time.
template <int Warps, typename Keep>
__device__ __forceinline__ void route_by_products(const Call& call, Keep keep) {
    constexpr int PLACES = (OUTPUTS + 32 * Warps - 1) / (32 * Warps);  // of each thread
    __shared__ float shared_values[WEIGHED];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t valid = valid_rows(call.num_valid, call.num_valid_value, call.num_tokens);

    for (int64_t row = blockIdx.x; row < call.num_tokens; row += gridDim.x) {
        weight_t* row_weights = call.weights + row * call.weights_stride;
        index_t* row_indices = call.indices + row * call.indices_stride;
        const int64_t token_id = row < valid ? table_row(call, row) : -1;
        const bool token_exists = exists(token_id, call.vocab_size);
        const expert_t* entries = call.table + (token_exists ? token_id : 0) * call.table_stride;
        bool bad = !token_exists, is_set = false;
        for (int place = threadIdx.x; token_exists && place < TOP_K; place += blockDim.x) {
            bad = bad || !exists(entries[place], EXPERT_IDS);
            is_set |= static_cast<int64_t>(entries[place]) != -1;
        }
        if (KEEPS_UNSET && !__syncthreads_or(is_set)) continue;
        if (__syncthreads_or(bad)) {
            for (int place = threadIdx.x; place < OUTPUTS; place += blockDim.x) {
                store_float(row_weights + place, 0.0f);
                row_indices[place] = -1;
                keep(row, place, index_t(-1));
            }
            continue;
        }

        const scalar_t* row_x = call.x + row * call.x_stride;
        const auto logit_of = [&](int64_t e) {
            const float logit = warp_dot(row_x, call.gate + e * call.weight_stride, call.hidden, lane);
            return prepare(logit, call.logit_bias, e, call.numbers);
        };
        SoftmaxStatistics statistics = {0.0f, 0.0f};
        if (WHOLE_ROW_SOFTMAX) {
            // Maximum and sum in one pass: the sum is relative to the maximum of the warp so far, and rescaled when
            // that grows.
            float highest = -__uint_as_float(INFINITY_BITS), sum = 0.0f;
            for (int e = warp; e < NUM_EXPERTS; e += Warps) {
                const float logit = logit_of(e);
                const float higher = fmaxf(highest, logit);
                const float share = softmax_share(logit, higher);
                sum = sum * (sum > 0.0f ? softmax_share(highest, higher) : 0.0f) + (is_nan(share) ? 0.0f : share);
                highest = higher;
            }
            statistics.highest = BlockTeam::highest(highest);
            sum = lane == 0 && sum > 0.0f ? sum * softmax_share(highest, statistics.highest) : 0.0f;
            statistics.inverse_sum = 1.0f / BlockTeam::sum(sum);
        }

        for (int place = warp; place < WEIGHED; place += Warps) {
            const float logit = logit_of(expert_of(place, place < TOP_K ? static_cast<int64_t>(entries[place]) : 0));
            if (lane == 0) shared_values[place] = WEIGHS_LOGITS ? logit : score_of(logit, statistics);
        }
        __syncthreads();
        int64_t experts[PLACES];
        float values[PLACES];
#pragma unroll 8
        for (int p = 0; p < PLACES; ++p) {
            const int place = p * (32 * Warps) + threadIdx.x;
            experts[p] = expert_of(place, place < TOP_K ? static_cast<int64_t>(entries[place]) : 0);
            values[p] = place < WEIGHED ? shared_values[place] : 0.0f;
        }
        weigh<BlockTeam>(values, experts, threadIdx.x, 32 * Warps, true, call.expert_scale, call.numbers);
#pragma unroll 8
        for (int p = 0; p < PLACES; ++p) {
            const int place = p * (32 * Warps) + threadIdx.x;
            if (place >= OUTPUTS) continue;
            store_float(row_weights + place, values[p]);
            const index_t index = written_id(experts[p], place, row, call.replicas);
            row_indices[place] = index;
            keep(row, place, index);
        }
        __syncthreads();  // before shared_values is used again
    }
}
