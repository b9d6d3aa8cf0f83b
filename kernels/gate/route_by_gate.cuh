// SPDX-License-Identifier: Apache-2.0
// From hidden states to experts in one launch, for few tokens: gate GEMM, score, bias, top-k, renormalisation.
//
// A block multiplies EXPERTS_PER_BLOCK rows of the gate with TOKENS rows of x over one of SPLITS parts of hidden
// (split-K), and leaves its float32 partial sums in global memory. There are blocks for every tile of experts, split
// and group of tokens; a counter per group tells when all its blocks have arrived.
// SHARE 0: the last block of a group adds its partial sums, split by split, and routes its tokens, AT_ONCE at a time.
// SHARE > 0: there is one group, and the first blocks each route SHARE tokens at a time. A block that has polled too
// long leaves, and the last block to arrive does its share as well.
#pragma once

#include "device/async_copy.cuh"
#include "gate/gate_gemm.cuh"
#include "routing/groups.cuh"
#include "routing/logits_out.cuh"
#include "device/last_block.cuh"
#include "device/num_valid.cuh"
#include "routing/biases.cuh"
#include "routing/given_experts.cuh"
#include "routing/replicas.cuh"
#include "routing/softmax_statistics.cuh"
#include "select/warp_topk.cuh"
#include "routing/weigh.cuh"

SPECIALISED int SHARE = 0;
SPECIALISED int AT_ONCE = 0;        // tokens that the last block of a group routes together; 0: all of them
SPECIALISED bool DENSE = false;     // rows of x, gate, weights and indices follow each other
SPECIALISED int SHARED_FLOATS = 0;  // at least, for what a kernel does after routing

static_assert(OUTPUTS <= 32, "a lane holds a column of the results");

// Floats that are read and written as one word.
template <int N>
struct __align__(4 * N) Floats {
    float value[N];
};

constexpr int GROUP_BLOCKS = TILES * SPLITS;
constexpr int ROUTED = SHARE > 0 ? SHARE : AT_ONCE > 0 ? AT_ONCE : TOKENS;  // tokens that a block routes together
constexpr int PER_LANE = 4 * quotient(GATE_ROWS, 128);
constexpr bool KEEPS_SCORES =
    !WHOLE_ROW_SOFTMAX && !SELECT_ON_LOGITS && !WEIGHS_LOGITS;  // in shared memory, rather than logits
constexpr int REDUCTION_FLOATS = WARP_SPLITS * TOKENS * ROW;
constexpr int SCORE_FLOATS = ROUTED * 32 * PER_LANE;
__shared__ __align__(16) float shared_floats[max_int(max_int(REDUCTION_FLOATS, SCORE_FLOATS), SHARED_FLOATS)];
// Biases are in shared memory before a token needs one of them, unless they are too many.
constexpr int BIAS_ROW = 32 * PER_LANE;
constexpr bool BIASES_IN_SHARED = BIASES * BIAS_ROW <= 2048;
__shared__ float shared_bias[BIASES_IN_SHARED ? BIASES * BIAS_ROW : 1];
__shared__ int shared_bias_index[NUM_BIASES > 0 ? TOKENS : 1];

// Add the sums of the warp splits and store them as the partial sums of this split.
__device__ __forceinline__ void store_partials(float* partials, int first_expert, int num_tokens) {
    constexpr int N = TOKENS * EXPERTS_PER_BLOCK >= 4 * THREADS ? 4 : 1;
    constexpr int WORDS = EXPERTS_PER_BLOCK / N;
#pragma unroll
    for (int round = 0; round < quotient(TOKENS * WORDS, THREADS); ++round) {
        const unsigned i = round * THREADS + threadIdx.x;
        const int token = i / WORDS, expert = i % WORDS * N;
        if (token >= num_tokens) break;
        Floats<N> sum = *reinterpret_cast<const Floats<N>*>(&shared_floats[token * ROW + expert]);
#pragma unroll
        for (int warp_split = 1; warp_split < WARP_SPLITS; ++warp_split) {
            const float* source = &shared_floats[(warp_split * TOKENS + token) * ROW + expert];
            const Floats<N> more = *reinterpret_cast<const Floats<N>*>(source);
#pragma unroll
            for (int j = 0; j < N; ++j) sum.value[j] += more.value[j];
        }
        *reinterpret_cast<Floats<N>*>(&partials[token * COLUMNS + first_expert + expert]) = sum;
    }
}

__device__ constexpr int longest_word() {
    for (int n = 4; n > 1; n /= 2) {
        if (ROUTED * COLUMNS / n >= THREADS && COLUMNS % n == 0) return n;
    }
    return 1;
}

// Compute the logits of tokens first .. first + count - 1 of a group from their partial sums, in a fixed order; leave
// their scores, or prepared logits, in shared memory. `keep_logit(token, expert, logit)` gets each with its bias.
template <typename KeepLogit>
__device__ __forceinline__ void gather_scores(const float* partials, int first, int count, const float* logit_bias,
                                              const MethodNumbers numbers, KeepLogit keep_logit) {
    constexpr int N = longest_word();
    constexpr int WORDS = COLUMNS / N;
    static_assert(EXPERTS_PER_BLOCK % N == 0, "rows of partial sums hold whole words");
#pragma unroll 2
    for (int round = 0; round < quotient(ROUTED * WORDS, THREADS); ++round) {
        const unsigned i = round * THREADS + threadIdx.x;
        const int token = i / WORDS, expert = i % WORDS * N;
        if (token >= count) break;
        const float* source = partials + (first + token) * COLUMNS + expert;
        Floats<N> parts[SPLITS];
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) {
            parts[s] = *reinterpret_cast<const Floats<N>*>(source + s * (TOKENS * COLUMNS));
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
            float logit = parts[0].value[j];
#pragma unroll
            for (int s = 1; s < SPLITS; ++s) logit += parts[s].value[j];
            if (expert + j >= 32 * PER_LANE) continue;
            const int column = HAS_LOGIT_BIAS ? min(expert + j, NUM_EXPERTS - 1) : 0;
            const bool is_shared = SHARED_LOGITS && expert + j >= NUM_EXPERTS;
            const float its_bias = HAS_LOGIT_BIAS && !is_shared ? __ldg(logit_bias + column) : 0.0f;
            if (RETURNS_LOGITS && expert + j < GATE_ROWS)
                keep_logit(first + token, expert + j, biased(logit, its_bias));
            logit = prepare(logit, its_bias, numbers);
            shared_floats[token * (32 * PER_LANE) + expert + j] =
                KEEPS_SCORES ? score_of(logit, SoftmaxStatistics()) : logit;
        }
    }
}

struct Results {
    weight_t* weights;
    index_t* indices;
    int64_t weights_stride, indices_stride;
    const float* expert_scale;
    MethodNumbers numbers;
    Replicas replicas;
};

// Route one token by a warp, from its scores or logits in shared memory. `id`: the given expert of this lane's place.
template <typename Keep>
__device__ __forceinline__ void route(const float* scores, const BiasRow& its_bias, int id, int64_t token, bool valid,
                                      const Results& results, Keep keep) {
    const int lane = threadIdx.x % 32, first = lane * PER_LANE;
    const GivenExpert given = given_expert<32>(id, its_bias, lane);
    if (KEEPS_UNSET && !given.is_set) return;  // the whole warp
    valid = valid && (given.is_set ? given.exists : its_bias.exists);
    float values[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; j += 4) {
        const Floats<4> word = *reinterpret_cast<const Floats<4>*>(&scores[first + j]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values[j + i] = first + j + i < NUM_EXPERTS ? word.value[i] : __uint_as_float(NAN_BITS);
        }
    }
    const SoftmaxStatistics statistics = softmax_statistics<32>(values);
    int chosen = given.id;
    if (!given.is_set) {  // for the whole warp
        unsigned keys[PER_LANE];
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            const float value = KEEPS_SCORES       ? values[j]
                                : SELECT_ON_LOGITS ? __fadd_rn(values[j], 0.0f)
                                                   : score_of(values[j], statistics);
            const bool has_bias = HAS_BIAS && (BIASES_IN_SHARED || first + j < NUM_EXPERTS);
            keys[j] = sum_order_key(has_bias ? value + its_bias.bias[first + j] : value);
            if (first + j >= NUM_EXPERTS) keys[j] = NO_KEY;
        }
        if (NUM_GROUPS > 0) keep_best_groups<32>(keys, lane);
        chosen = select_topk<TOP_K, 32>(keys, lane).column;
    }
    const int64_t expert[1] = {expert_of(lane, chosen)};
    float weight[1] = {lane < WEIGHED && (!HAS_GIVEN || valid) ? scores[expert[0]] : 0.0f};
    if (!KEEPS_SCORES && !WEIGHS_LOGITS) weight[0] = score_of(weight[0], statistics);
    weigh<LaneTeam<32>>(weight, expert, lane, 0, valid, results.expert_scale, results.numbers);
    if (lane < OUTPUTS) {
        store_float(results.weights + token * results.weights_stride + lane, valid ? weight[0] : 0.0f);
        const index_t id = valid ? written_id(expert[0], lane, token, results.replicas) : index_t(-1);
        results.indices[token * results.indices_stride + lane] = id;
        keep(token, lane, id);
    }
}

// Route the tokens of the call, and pass each expert on: `keep(token, place, expert)`. Return whether this block has
// routed any. The other parameters are those of the kernel.
template <typename Keep>
__device__ __forceinline__ bool route_by_gate(const x_t* x, const gate_t* weight, const float* bias,
                                              const int* bias_index, const float* logit_bias, const float* expert_scale,
                                              const given_t* given_experts, const Replicas& replicas,
                                              const int* num_valid, weight_t* weights, index_t* indices,
                                              logit_out_t* logits_out, unsigned* counters, float* partials,
                                              int num_valid_value, const given_token_t* token_ids, int64_t num_tokens,
                                              const MethodNumbers numbers, int64_t x_stride, int64_t weight_stride,
                                              int64_t weights_stride, int64_t indices_stride, int64_t given_stride,
                                              int64_t logits_out_stride, Keep keep) {
    if (DENSE) {
        x_stride = weight_stride = HIDDEN;
        weights_stride = indices_stride = OUTPUTS;
    }
    const int tile = blockIdx.x % TILES, split = blockIdx.x / TILES % SPLITS, group = blockIdx.x / GROUP_BLOCKS;
    const int first_token = group * TOKENS, first_expert = tile * EXPERTS_PER_BLOCK;
    const int count = min(static_cast<int>(num_tokens) - first_token, TOKENS);
    float* group_partials = partials + static_cast<int64_t>(group) * SPLITS * TOKENS * COLUMNS;

    // Loads that routing needs start before the GEMM, so that they are there in time if this block routes.
    const int fetched_valid = fetch_valid(num_valid, num_valid_value);
    if (HAS_BIAS && BIASES_IN_SHARED) {
#pragma unroll
        for (int i = 0; i < BIASES; ++i) {
#pragma unroll
            for (int round = 0; round < quotient(NUM_EXPERTS, THREADS); ++round) {
                const int expert = round * THREADS + threadIdx.x;
                if (expert < NUM_EXPERTS)
                    copy_async4(&shared_bias[i * BIAS_ROW + expert], bias + i * BIAS_STRIDE + expert);
            }
        }
    }
    if (NUM_BIASES > 0) {
        for (int t = threadIdx.x; t < count; t += THREADS)
            copy_async4(&shared_bias_index[t], bias_index + first_token + t);
    }
    if (HAS_BIAS) copy_async_commit();
    gate_gemm(x + first_token * x_stride, weight, x_stride, weight_stride, first_expert, split, count, shared_floats);
    if (HAS_BIAS) copy_async_wait<0>();
    __syncthreads();
    store_partials(group_partials + split * (TOKENS * COLUMNS), first_expert, count);

    const int valid = static_cast<int>(clamp_valid(fetched_valid, num_tokens));
    const Results results = {weights, indices, weights_stride, indices_stride, expert_scale, numbers, replicas};
    const auto keep_logit = [&](int token, int expert, float logit) {
        token += first_token;
        store_float(logits_out + token * logits_out_stride + expert, token < valid ? logit : 0.0f);
    };
    const auto given_id_of = [&](int token) {
        return given_id(given_experts, given_stride, token_ids, first_token + token, threadIdx.x % 32, token < count);
    };
    const auto route_tokens = [&](int first, int tokens) {
        const int warp = threadIdx.x / 32;
        int id = given_id_of(first + warp);  // in flight while scores are gathered
        gather_scores(group_partials, first, tokens, logit_bias, numbers, keep_logit);
        __syncthreads();
        for (int t = warp; t < tokens; t += WARPS) {
            const int token = first_token + first + t, index = NUM_BIASES > 0 ? shared_bias_index[first + t] : 0;
            const BiasRow its_bias =
                BIASES_IN_SHARED ? bias_row(shared_bias, index, BIAS_ROW) : bias_row(bias, index, BIAS_STRIDE);
            if (t > warp) id = given_id_of(first + t);
            route(&shared_floats[t * 32 * PER_LANE], its_bias, id, token, token < valid, results, keep);
        }
    };
    if (SHARE == 0) {
        if (!is_last_block(&counters[group], GROUP_BLOCKS)) return false;
        route_tokens(0, ROUTED == TOKENS ? count : min(count, ROUTED));
        for (int first = ROUTED; ROUTED < TOKENS && first < count; first += ROUTED) {
            __syncthreads();  // all have read the scores before
            route_tokens(first, min(count - first, ROUTED));
        }
        return true;
    }
    constexpr int STRIDE = SHARE > 0 ? SHARE : 1;
    const int shares = min((count + STRIDE - 1) / STRIDE, GROUP_BLOCKS);
    unsigned* left = counters + 1;  // a flag for each share
    const bool has_share = blockIdx.x < shares;
    const Arrival arrival = arrive_and_poll(&counters[0], GROUP_BLOCKS, has_share, left + blockIdx.x);
    if (arrival == LEFT) return false;
    const auto route_share = [&](int share) {
        for (int first = share * STRIDE; first < count; first += shares * STRIDE) {
            __syncthreads();
            route_tokens(first, min(count - first, STRIDE));
        }
    };
    if (has_share) route_share(blockIdx.x);
    if (arrival == SEEN_COMPLETE) return true;
    __threadfence();  // between counting and looking at the flags
    const bool raised = threadIdx.x < shares && load_acquire(&left[threadIdx.x]) != 0;
    if (raised) left[threadIdx.x] = 0;
    if (!__syncthreads_or(raised)) return true;
    for (int share = 0; share < shares; ++share) {
        if (__syncthreads_or(raised && threadIdx.x == share)) route_share(share);
    }
    return true;
}
