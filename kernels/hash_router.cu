// SPDX-License-Identifier: Apache-2.0
// Experts by a table of token ids, with uniform weights or weights from the scores of a gate.
//
// hash_router: LANES threads serve a token, a lane per place (lane, lane + LANES, ... where the table is wider). Token
// id, table row and logits are three dependent loads, so that many small tokens in flight are what makes it fast.
// hash_router_products (SOURCE 2): a block serves a token, its warps compute the dot products of x with only the rows
// of the gate that are needed: those of the token's experts, or all of them if softmax asks for the whole row. PARTS >
// 0: PARTS warps share each of the token's dot products, with the loads of UNROLL words of both factors in flight at
// once; nothing waits for the check of the table's entries. The grid has a block for every token.
#include "device/vector8.cuh"
#include "routing/num_valid.cuh"
#include "routing/weigh.cuh"

#ifndef TOKEN_ID_BYTES
#define TOKEN_ID_BYTES 4
#endif
#ifndef TABLE_BYTES
#define TABLE_BYTES 4
#endif
#ifndef SOURCE
#define SOURCE 1
#endif
#ifndef DTYPE
#define DTYPE 0
#endif
#ifndef WEIGHT_DTYPE
#define WEIGHT_DTYPE DTYPE
#endif
#ifndef LANES
#define LANES 8
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef DENSE
#define DENSE 0  // rows of table, logits and results follow each other
#endif
#ifndef PARTS
#define PARTS 0
#endif
#ifndef UNROLL
#define UNROLL 4
#endif
#ifndef HIDDEN
#define HIDDEN 4096  // with PARTS > 0
#endif
#ifndef ALIGNED
#define ALIGNED 1
#endif

#define UNIFORM 0
#define LOGITS 1
#define PRODUCTS 2

typedef Integer<TOKEN_ID_BYTES>::type token_id_t;
typedef Integer<TABLE_BYTES>::type expert_t;
typedef Scalar<DTYPE>::type scalar_t;
typedef Scalar<WEIGHT_DTYPE>::type gate_t;

__device__ __forceinline__ bool exists(int64_t id, int64_t count) { return id >= 0 && id < count; }

#if SOURCE != PRODUCTS

__device__ __forceinline__ SoftmaxStatistics softmax_statistics(const scalar_t* logits, const float* logit_bias,
                                                                const Numbers& numbers, int lane) {
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

extern "C" __global__ void __launch_bounds__(256)
    hash_router(const token_id_t* __restrict__ token_ids, const expert_t* __restrict__ table,
                const scalar_t* __restrict__ logits, const void* __restrict__ x, const void* __restrict__ weight,
                const float* __restrict__ logit_bias, const float* __restrict__ expert_scale,
                const int* __restrict__ num_valid, weight_t* __restrict__ weights, index_t* __restrict__ indices,
                int num_valid_value, long long num_tokens, float renormalize_eps, float renormalize_min, float scale,
                float logit_scale, float logit_softcap, float shared_weight, long long vocab_size, long long hidden,
                long long table_stride, long long logits_stride, long long x_stride, long long weight_stride,
                long long weights_stride, long long indices_stride) {
    const Numbers numbers = {renormalize_eps, renormalize_min, scale, logit_scale, logit_softcap, shared_weight};
    static_assert(SOURCE != LOGITS || !WHOLE_ROW_SOFTMAX || LANES == 32,
                  "a bad token's whole warp skips its statistics");
    constexpr int TOKENS_PER_WARP = 32 / LANES;
    constexpr int PLACES = (OUTPUTS + LANES - 1) / LANES;  // of each lane
    if (DENSE) {
        table_stride = TOP_K;
        logits_stride = NUM_LOGITS;
        weights_stride = indices_stride = OUTPUTS;
    }
    const int lane = threadIdx.x % LANES;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (warp * TOKENS_PER_WARP >= num_tokens) return;  // whole warps, because lanes vote and sum their scores
    const int64_t row = warp * TOKENS_PER_WARP + threadIdx.x % 32 / LANES;

    const int64_t valid = valid_rows(num_valid, num_valid_value, num_tokens);
    const int64_t token_id = row < valid ? static_cast<int64_t>(token_ids[row]) : -1;
    const scalar_t* row_logits = SOURCE == LOGITS ? logits + row * logits_stride : nullptr;
    bool bad = !exists(token_id, vocab_size);
    const expert_t* entries = table + (bad ? 0 : token_id) * table_stride;

    int64_t experts[PLACES];
#pragma unroll 8
    for (int p = 0; p < PLACES; ++p) {
        const int place = p * LANES + lane;
        experts[p] = bad || place >= TOP_K ? 0 : static_cast<int64_t>(entries[place]);
    }
    // A logit is read as soon as its expert is known to exist; whether the whole row is good is voted on meanwhile.
    float values[PLACES];
#pragma unroll 8
    for (int p = 0; p < PLACES; ++p) {
        const int place = p * LANES + lane;
        const bool good = exists(experts[p], NUM_EXPERTS) && !bad;
        bad |= !good;
        experts[p] = expert_of(place, experts[p]);
        values[p] = 0.0f;
        if (SOURCE == LOGITS && good && place < WEIGHED) {
            values[p] = prepare(to_float(row_logits[experts[p]]), logit_bias, experts[p], numbers);
        }
    }
    bad = lanes_ballot<LANES>(bad) != 0;

    if (SOURCE == LOGITS) {
        const SoftmaxStatistics statistics = softmax_statistics(bad ? nullptr : row_logits, logit_bias, numbers, lane);
#pragma unroll 8
        for (int p = 0; p < PLACES; ++p) {
            if (!WEIGHS_LOGITS) values[p] = score_of(values[p], statistics);
        }
        weigh<LaneTeam<LANES>>(values, experts, lane, LANES, !bad, expert_scale, numbers);
    }
#pragma unroll 8
    for (int p = 0; p < PLACES; ++p) {
        const int place = p * LANES + lane;
        if (row >= num_tokens || place >= OUTPUTS) continue;
        float weight = values[p];
        if (SOURCE == UNIFORM) weight = place < TOP_K ? 1.0f / TOP_K : shared_weight;
        store_float(weights + row * weights_stride + place, bad ? 0.0f : weight);
        indices[row * indices_stride + place] = bad ? index_t(-1) : static_cast<index_t>(experts[p]);
    }
}

#else

#if PARTS

static_assert(!WHOLE_ROW_SOFTMAX && !SHARED_LOGITS && OUTPUTS <= 32, "only the products of chosen experts are needed");
static_assert(TOP_K * PARTS == WARPS && WARPS <= 32, "a warp for each part of a token's products");

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
    hash_router_products(const token_id_t* __restrict__ token_ids, const expert_t* __restrict__ table,
                         const void* __restrict__ logits, const scalar_t* __restrict__ x,
                         const gate_t* __restrict__ weight, const float* __restrict__ logit_bias,
                         const float* __restrict__ expert_scale, const int* __restrict__ num_valid,
                         weight_t* __restrict__ weights, index_t* __restrict__ indices, int num_valid_value,
                         long long num_tokens, float renormalize_eps, float renormalize_min, float scale,
                         float logit_scale, float logit_softcap, float shared_weight, long long vocab_size,
                         long long hidden, long long table_stride, long long logits_stride, long long x_stride,
                         long long weight_stride, long long weights_stride, long long indices_stride) {
    const Numbers numbers = {renormalize_eps, renormalize_min, scale, logit_scale, logit_softcap, shared_weight};
    constexpr int STEP = 256 * PARTS;  // elements that the warps of a product read at once
    constexpr bool WHOLE_STEPS = ALIGNED && HIDDEN % (STEP * UNROLL) == 0;
    __shared__ float sums[PARTS][TOP_K];
    const int lane = threadIdx.x % 32, place = threadIdx.x / 32 % TOP_K, part = threadIdx.x / 32 / TOP_K;

    const int64_t row = blockIdx.x;
    const int64_t token_id = static_cast<int64_t>(token_ids[row]);  // of padding as well, so that neither load waits
    const bool is_valid = row < valid_rows(num_valid, num_valid_value, num_tokens);
    const int first = part * 256 + lane * 8;
    const scalar_t* own_x = x + row * x_stride + first;
    const auto left = [&](int column) { return WHOLE_STEPS ? 8 : HIDDEN - first - column; };
    Vector8<scalar_t> a[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) a[i] = load_vector8<ALIGNED>(own_x + i * STEP, left(i * STEP));

    const bool token_exists = is_valid && exists(token_id, vocab_size);
    const bool has_entry = token_exists && lane < TOP_K;
    const expert_t entry = has_entry ? table[token_id * table_stride + lane] : expert_t(0);
    const bool bad = __any_sync(FULL_WARP, !token_exists || !exists(entry, NUM_EXPERTS));
    const int expert = static_cast<int>(entry);
    const int own_expert = __shfl_sync(FULL_WARP, expert, place);
    const gate_t* own_weight = weight + (bad ? 0 : own_expert) * weight_stride + first;

    float part_sums[UNROLL] = {};
#pragma unroll 1
    for (int column = 0; column < HIDDEN; column += UNROLL * STEP) {
        Vector8<gate_t> b[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            b[i] = load_vector8<ALIGNED>(own_weight + column + i * STEP, left(column + i * STEP));
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
            for (int p = 1; p < PARTS; ++p) value[0] += sums[p][lane];
            value[0] = prepare(value[0], logit_bias, expert, numbers);
            if (!WEIGHS_LOGITS) value[0] = score_of(value[0], SoftmaxStatistics());
        }
        weigh<LaneTeam<32>>(value, experts, lane, 0, !bad, expert_scale, numbers);
        if (lane < OUTPUTS) {
            store_float(weights + row * weights_stride + lane, bad ? 0.0f : value[0]);
            indices[row * indices_stride + lane] = bad ? index_t(-1) : static_cast<index_t>(experts[0]);
        }
    }
}

#else

// The dot product of two vectors, the same in every lane; lane by lane in order, then over the lanes: repeatable.
__device__ __forceinline__ float warp_dot(const scalar_t* x, const gate_t* w, int64_t hidden, int lane) {
    float sum = 0.0f;
    for (int64_t i = lane * 8; i < hidden; i += 256) {
        const int left = static_cast<int>(hidden - i);
        sum = dot(load_vector8<ALIGNED>(x + i, left), load_vector8<ALIGNED>(w + i, left), sum);
    }
    return lanes_sum<32>(sum);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
    hash_router_products(const token_id_t* __restrict__ token_ids, const expert_t* __restrict__ table,
                         const void* __restrict__ logits, const scalar_t* __restrict__ x,
                         const gate_t* __restrict__ weight, const float* __restrict__ logit_bias,
                         const float* __restrict__ expert_scale, const int* __restrict__ num_valid,
                         weight_t* __restrict__ weights, index_t* __restrict__ indices, int num_valid_value,
                         long long num_tokens, float renormalize_eps, float renormalize_min, float scale,
                         float logit_scale, float logit_softcap, float shared_weight, long long vocab_size,
                         long long hidden, long long table_stride, long long logits_stride, long long x_stride,
                         long long weight_stride, long long weights_stride, long long indices_stride) {
    const Numbers numbers = {renormalize_eps, renormalize_min, scale, logit_scale, logit_softcap, shared_weight};
    constexpr int PLACES = (OUTPUTS + 32 * WARPS - 1) / (32 * WARPS);  // of each thread
    __shared__ float shared_values[WEIGHED];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t valid = valid_rows(num_valid, num_valid_value, num_tokens);

    for (int64_t row = blockIdx.x; row < num_tokens; row += gridDim.x) {
        weight_t* row_weights = weights + row * weights_stride;
        index_t* row_indices = indices + row * indices_stride;
        const int64_t token_id = row < valid ? static_cast<int64_t>(token_ids[row]) : -1;
        const bool token_exists = exists(token_id, vocab_size);
        const expert_t* entries = table + (token_exists ? token_id : 0) * table_stride;
        bool bad = !token_exists;
        for (int place = threadIdx.x; token_exists && place < TOP_K; place += blockDim.x) {
            bad = bad || !exists(entries[place], NUM_EXPERTS);
        }
        if (__syncthreads_or(bad)) {
            for (int place = threadIdx.x; place < OUTPUTS; place += blockDim.x) {
                store_float(row_weights + place, 0.0f);
                row_indices[place] = -1;
            }
            continue;
        }

        const scalar_t* row_x = x + row * x_stride;
        const auto logit_of = [&](int64_t e) {
            return prepare(warp_dot(row_x, weight + e * weight_stride, hidden, lane), logit_bias, e, numbers);
        };
        SoftmaxStatistics statistics = {0.0f, 0.0f};
        if (WHOLE_ROW_SOFTMAX) {
            // Maximum and sum go together: a sum is of shares of the warp's own maximum so far, and is rescaled as that
            // grows.
            float highest = -__uint_as_float(INFINITY_BITS), sum = 0.0f;
            for (int e = warp; e < NUM_EXPERTS; e += WARPS) {
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

        for (int place = warp; place < WEIGHED; place += WARPS) {
            const float logit = logit_of(expert_of(place, place < TOP_K ? static_cast<int64_t>(entries[place]) : 0));
            if (lane == 0) shared_values[place] = WEIGHS_LOGITS ? logit : score_of(logit, statistics);
        }
        __syncthreads();
        int64_t experts[PLACES];
        float values[PLACES];
#pragma unroll 8
        for (int p = 0; p < PLACES; ++p) {
            const int place = p * (32 * WARPS) + threadIdx.x;
            experts[p] = expert_of(place, place < TOP_K ? static_cast<int64_t>(entries[place]) : 0);
            values[p] = place < WEIGHED ? shared_values[place] : 0.0f;
        }
        weigh<BlockTeam>(values, experts, threadIdx.x, 32 * WARPS, true, expert_scale, numbers);
#pragma unroll 8
        for (int p = 0; p < PLACES; ++p) {
            const int place = p * (32 * WARPS) + threadIdx.x;
            if (place >= OUTPUTS) continue;
            store_float(row_weights + place, values[p]);
            row_indices[place] = static_cast<index_t>(experts[p]);
        }
        __syncthreads();  // shared_values may be used again
    }
}

#endif

#endif
