// SPDX-License-Identifier: Apache-2.0
// From token ids to the experts that a table has for them, with uniform weights or weights from the scores of a gate.
//
// SOURCE UNIFORM or LOGITS: LANES threads serve a token, a lane per place (lane, lane + LANES, ... for wider tables).
// Token id, table row and logits are three dependent loads, so speed comes from many small tokens in flight. HOLDS_ROW,
// for few tokens: a warp reads all logits of its token before it knows which it needs, and two dependent loads are left.
// SOURCE PRODUCTS: see route_products.cuh.
#pragma once

#include "routing/logits_out.cuh"
#include "routing/route_products.cuh"

__device__ __forceinline__ SoftmaxStatistics softmax_statistics(const scalar_t* logits, const float* logit_bias,
                                                                const MethodNumbers numbers, int lane) {
    SoftmaxStatistics row = {0.0f, 0.0f};
    if (!WHOLE_ROW_SOFTMAX || SOURCE != LOGITS || logits == nullptr) return row;
    const auto logit = [&](int e) { return prepare(to_float(logits[e]), logit_bias, e, numbers); };
    float highest = -__uint_as_float(INFINITY_BITS), sum = 0.0f;
    for (int e = lane; e < NUM_EXPERTS; e += LANES) highest = fmaxf(highest, logit(e));
    row.highest = lanes_max<LANES>(highest);
    for (int e = lane; e < NUM_EXPERTS; e += LANES) {
        const float share = softmax_share(logit(e), row.highest);
        sum += is_nan(share) ? 0.0f : share;
    }
    row.inverse_sum = 1.0f / lanes_sum<LANES>(sum);
    return row;
}

// The logits of a token in the registers of its warp.
template <bool Exists>
struct HeldRow {
    static constexpr bool EXISTS = Exists;
    static constexpr int COUNT = Exists ? static_cast<int>((NUM_LOGITS + 31) / 32) : 1;

    float logit[COUNT];  // of column 32 * i + lane

    __device__ __forceinline__ void load(const scalar_t* logits, int lane) {
        if (!Exists) return;
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            logit[i] = NUM_LOGITS % 32 == 0 || 32 * i + lane < NUM_LOGITS ? ldg_float(logits + 32 * i + lane) : 0.0f;
    }

    // Return the logit of a column; anything for one that does not exist.
    __device__ __forceinline__ float at(int column) const {
        float found[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) found[i] = __shfl_sync(FULL_WARP, logit[i], column & 31);
#pragma unroll
        for (int step = 1; step < COUNT; step *= 2) {
#pragma unroll
            for (int i = 0; i + step < COUNT; i += 2 * step)
                found[i] = (column >> 5 & step) != 0 ? found[i + step] : found[i];
        }
        return found[0];
    }
};

// Tokens that share warps, with uniform weights or given logits.
template <int Lanes, typename Keep>
__device__ __forceinline__ void route_by_table(const Call& call, Keep keep) {
    static_assert(SOURCE != LOGITS || !WHOLE_ROW_SOFTMAX || Lanes == 32,
                  "a bad token's whole warp skips its statistics");
    constexpr int TOKENS_PER_WARP = 32 / Lanes;
    constexpr int PLACES = (OUTPUTS + Lanes - 1) / Lanes;               // of each lane
    constexpr int SUMMED = min_int(power_of_two_from(OUTPUTS), Lanes);  // lanes that can have results
    const int64_t table_stride = DENSE ? TOP_K : call.table_stride;
    const int64_t logits_stride = DENSE ? NUM_LOGITS : call.logits_stride;
    const int64_t weights_stride = DENSE ? OUTPUTS : call.weights_stride;
    const int64_t indices_stride = DENSE ? OUTPUTS : call.indices_stride;
    const int lane = threadIdx.x % Lanes;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (warp * TOKENS_PER_WARP >= call.num_tokens) return;  // whole warps, since lanes vote and sum
    const int64_t row = warp * TOKENS_PER_WARP + threadIdx.x % 32 / Lanes;
    const bool row_exists = TOKENS_PER_WARP == 1 || row < call.num_tokens;

    // The token id is read for padding too, so that the load waits for nothing. Addresses of the next loads are computed
    // meanwhile.
    const token_id_t id = table_row(call, row_exists ? row : 0);
    const scalar_t* row_logits = SOURCE == LOGITS ? computed_now(call.logits + row * logits_stride) : nullptr;
    const expert_t* lane_entries = computed_now(call.table + lane);
    HeldRow<HOLDS_ROW && SOURCE == LOGITS> held;
    held.load(row_logits, lane);
    const int64_t valid = valid_rows(call.num_valid, call.num_valid_value, call.num_tokens);
    bool bad = (row >= valid) | !exists(id, call.vocab_size);
    expert_t entries[PLACES];
#pragma unroll 8
    for (int p = 0; p < PLACES; ++p) {
        entries[p] = 0;
        if ((!bad || !BY_TOKEN_ID) && p * Lanes + lane < TOP_K)
            entries[p] = __ldg(lane_entries + id * table_stride + p * Lanes);
    }
    bool is_set = !KEEPS_UNSET;
    for (int p = 0; KEEPS_UNSET && p < PLACES; ++p) {
        is_set |= p * Lanes + lane < TOP_K && static_cast<int64_t>(entries[p]) != -1;
    }
    if (KEEPS_UNSET) is_set = lanes_ballot<Lanes>(is_set) != 0;
    // Read a logit as soon as its expert is known to exist; the vote on the whole row happens meanwhile.
    float values[PLACES];
    int64_t experts[PLACES];
#pragma unroll 8
    for (int p = 0; p < PLACES; ++p) {
        const int place = p * Lanes + lane;
        const bool good = exists(entries[p], EXPERT_IDS) & !bad;
        bad |= !good;
        experts[p] = expert_of(place, entries[p]);
        values[p] = 0.0f;
        if (SOURCE != LOGITS) continue;
        float logit = 0.0f;
        if (held.EXISTS) {
            logit = held.at(static_cast<int>(experts[p]));
        } else if (good && place < WEIGHED) {
            logit = ldg_float(row_logits + experts[p]);
        }
        if (good && place < WEIGHED) values[p] = prepare(logit, call.logit_bias, experts[p], call.numbers);
    }
    bad = lanes_ballot<Lanes>(bad) != 0;

    if (SOURCE == LOGITS) {
        const SoftmaxStatistics statistics =
            softmax_statistics(bad ? nullptr : row_logits, call.logit_bias, call.numbers, lane);
#pragma unroll 8
        for (int p = 0; p < PLACES; ++p) {
            if (!WEIGHS_LOGITS) values[p] = score_of(values[p], statistics);
        }
        weigh<LaneTeam<SUMMED>>(values, experts, lane, Lanes, !bad, call.expert_scale, call.numbers);
    }
#pragma unroll 8
    for (int p = 0; p < PLACES; ++p) {
        const int place = p * Lanes + lane;
        if (!row_exists || !is_set || place >= OUTPUTS) continue;
        float weight = values[p];
        if (SOURCE == UNIFORM) weight = place < TOP_K ? 1.0f / TOP_K : call.numbers.shared_weight;
        store_float(call.weights + row * weights_stride + place, bad ? 0.0f : weight);
        const index_t index = bad ? index_t(-1) : written_id(experts[p], place, row, call.replicas);
        call.indices[row * indices_stride + place] = index;
        keep(row, place, index);
    }
}

// Route the tokens of the call, and pass each expert on: `keep(token, place, expert)`.
template <typename Keep>
__device__ __forceinline__ void route_tokens(const Call& call, Keep keep) {
    if constexpr (SOURCE != PRODUCTS) {
        route_by_table<LANES>(call, keep);
    } else if constexpr (GROUP > 0) {
        route_by_parts_of_hidden<GROUP>(call, keep);
    } else {
        route_by_products<WARPS>(call, keep);
    }
}

// Return the logits of the call, by the lanes of each token.
__device__ __forceinline__ void return_logits_of(const Call& call, logit_out_t* logits_out, int64_t logits_out_stride) {
    if (!RETURNS_LOGITS) return;
    const int64_t token = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;
    if (token >= call.num_tokens) return;
    const bool valid = token < valid_rows(call.num_valid, call.num_valid_value, call.num_tokens);
    return_logits<false>(call.logits + token * call.logits_stride, call.logit_bias, valid,
                         logits_out + token * logits_out_stride, threadIdx.x % LANES, LANES);
}
