// SPDX-License-Identifier: Apache-2.0
// From token ids to the experts that a table has for them, with uniform weights or weights from the scores of a gate.
//
// SOURCE UNIFORM or LOGITS: LANES threads serve a token, a lane per place (lane, lane + LANES, ... for wider tables).
// Token id, table row and logits are three dependent loads, so speed comes from many small tokens in flight. HOLDS_ROW,
// for few tokens: a warp reads all logits of its token before it knows which it needs, and two dependent loads are left.
// SOURCE PRODUCTS: a block serves a token. Its warps compute the dot products of x with only those rows of the gate
// that are needed: the rows of the experts of the token, or all rows for a softmax over the whole row. PARTS > 0: PARTS
// warps share each dot product (split-K), with the loads of UNROLL vectors of both operands in flight; nothing waits
// for the check of the table entries, and there is a block for every token.
#pragma once

#include "device/vector8.cuh"
#include "device/num_valid.cuh"
#include "routing/logits_out.cuh"
#include "routing/replicas.cuh"
#include "routing/weigh.cuh"

enum Source { UNIFORM, LOGITS, PRODUCTS };  // of the weights

SPECIALISED Source SOURCE = LOGITS;
SPECIALISED bool BY_TOKEN_ID = true;  // else the table has a row for each token
SPECIALISED int TOKEN_ID_BYTES = 4;
SPECIALISED int TABLE_BYTES = 4;
SPECIALISED bool TABLE_UNSIGNED = false;
SPECIALISED bool KEEPS_UNSET = false;  // results of tokens whose entries are all -1 are left as they are
SPECIALISED int DTYPE = 0;             // of the logits, or of x
SPECIALISED int WEIGHT_DTYPE = DTYPE;  // of the gate
SPECIALISED int LANES = 8;
SPECIALISED int WARPS = 8;           // of a block, for products
SPECIALISED bool HOLDS_ROW = false;  // a warp reads all logits of its token
SPECIALISED bool DENSE = false;      // rows of table, logits and results follow each other
SPECIALISED int PARTS = 0;
SPECIALISED int UNROLL = 4;
SPECIALISED int HIDDEN = 4096;    // if PARTS > 0
SPECIALISED bool ALIGNED = true;  // rows of x and gate start at 16-byte words, and hidden is a multiple of 8

typedef Integer<TOKEN_ID_BYTES>::type token_id_t;
typedef Integer<TABLE_BYTES, TABLE_UNSIGNED>::type expert_t;
typedef Scalar<DTYPE>::type scalar_t;
typedef Scalar<WEIGHT_DTYPE>::type gate_t;

// The parameters of the kernel. The numbers are read where they lie (__grid_constant__), which keeps registers free.
struct Call {
    const token_id_t* token_ids;
    const expert_t* table;
    const scalar_t* logits;
    const scalar_t* x;
    const gate_t* gate;
    const float* logit_bias;
    const float* expert_scale;
    const int* num_valid;
    weight_t* weights;
    index_t* indices;
    int num_valid_value;
    int64_t num_tokens;
    const MethodNumbers& numbers;
    int64_t vocab_size, hidden, table_stride, logits_stride, x_stride, weight_stride, weights_stride, indices_stride;
    Replicas replicas = {};  // of given experts
};

__device__ __forceinline__ bool exists(int64_t id, int64_t count) {
    return static_cast<unsigned long long>(id) < static_cast<unsigned long long>(count);
}

// Return the row of the table that a token of the call has.
__device__ __forceinline__ token_id_t table_row(const Call& call, int64_t token) {
    return BY_TOKEN_ID ? call.token_ids[token] : static_cast<token_id_t>(token);
}

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

// Route a token by a block: a warp for each of Parts parts of its TOP_K dot products.
template <int Parts, typename Keep>
__device__ __forceinline__ void route_by_parts_of_products(const Call& call, Keep keep) {
    static_assert(Parts > 0 && !WHOLE_ROW_SOFTMAX && !SHARED_LOGITS && OUTPUTS <= 32,
                  "only the products of chosen experts are needed");
    static_assert(TOP_K * Parts == WARPS && WARPS <= 32, "a warp for each part of a token's products");
    constexpr int STEP = 256 * Parts;  // elements that the warps of a product read together
    constexpr bool WHOLE_STEPS = ALIGNED && HIDDEN % (STEP * UNROLL) == 0;
    __shared__ float sums[Parts][TOP_K];
    const int lane = threadIdx.x % 32, place = threadIdx.x / 32 % TOP_K, part = threadIdx.x / 32 / TOP_K;

    const int64_t row = blockIdx.x;
    // For padding too, so that neither load waits.
    const int64_t token_id = table_row(call, row);
    const bool is_valid = row < valid_rows(call.num_valid, call.num_valid_value, call.num_tokens);
    const int first = part * 256 + lane * 8;
    const scalar_t* own_x = call.x + row * call.x_stride + first;
    const auto left = [&](int column) { return WHOLE_STEPS ? 8 : HIDDEN - first - column; };
    Vector8<scalar_t> a[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) a[i] = load_vector8<ALIGNED>(own_x + i * STEP, left(i * STEP));

    const bool token_exists = is_valid && exists(token_id, call.vocab_size);
    const bool has_entry = (token_exists || !BY_TOKEN_ID) && lane < TOP_K;
    const expert_t entry = has_entry ? call.table[token_id * call.table_stride + lane] : expert_t(0);
    const bool bad = __any_sync(FULL_WARP, !token_exists || !exists(entry, EXPERT_IDS));
    const bool is_set = !KEEPS_UNSET || __any_sync(FULL_WARP, has_entry && static_cast<int64_t>(entry) != -1);
    const int expert = static_cast<int>(entry);
    const int own_expert = __shfl_sync(FULL_WARP, expert, place);
    const gate_t* own_gate = call.gate + (bad ? 0 : own_expert) * call.weight_stride + first;

    float part_sums[UNROLL] = {};
#pragma unroll 1
    for (int column = 0; column < HIDDEN; column += UNROLL * STEP) {
        Vector8<gate_t> b[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            b[i] = load_vector8<ALIGNED>(own_gate + column + i * STEP, left(column + i * STEP));
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) part_sums[i] = dot(a[i], b[i], part_sums[i]);
        if (column + UNROLL * STEP >= HIDDEN) break;
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int next = column + (UNROLL + i) * STEP;
            a[i] = load_vector8<ALIGNED>(own_x + next, left(next));
        }
    }
    float sum = part_sums[0];
#pragma unroll
    for (int i = 1; i < UNROLL; ++i) sum += part_sums[i];
    sum = lanes_sum<32>(sum);
    if (lane == 0) sums[part][place] = sum;
    __syncthreads();

    if (threadIdx.x < 32) {
        const int64_t experts[1] = {expert_of(lane, expert)};
        float value[1] = {0.0f};
        if (lane < TOP_K && !bad) {
            value[0] = sums[0][lane];
#pragma unroll
            for (int p = 1; p < Parts; ++p) value[0] += sums[p][lane];
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

// Route the tokens of the call, and pass each expert on: `keep(token, place, expert)`.
template <typename Keep>
__device__ __forceinline__ void route_tokens(const Call& call, Keep keep) {
    if constexpr (SOURCE != PRODUCTS) {
        route_by_table<LANES>(call, keep);
    } else if constexpr (PARTS > 0) {
        route_by_parts_of_products<PARTS>(call, keep);
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
