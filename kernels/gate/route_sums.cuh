// SPDX-License-Identifier: Apache-2.0
// From the sums of the gate GEMM to experts: a block routes the tokens of a group, of which global memory has the sums
// of SPLITS parts of hidden.
#pragma once

#include "device/async_copy.cuh"
#include "gate/gate_tiling.cuh"
#include "routing/groups.cuh"
#include "routing/logits_out.cuh"
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

constexpr int ROUTED = SHARE > 0 ? SHARE : AT_ONCE > 0 ? AT_ONCE : TOKENS;  // tokens that a block routes together
constexpr int PER_LANE = 4 * quotient(GATE_ROWS, 128);
constexpr bool KEEPS_SCORES =
    !WHOLE_ROW_SOFTMAX && !SELECT_ON_LOGITS && !WEIGHS_LOGITS;  // in shared memory, rather than logits
constexpr int SCORE_FLOATS = ROUTED * 32 * PER_LANE;
constexpr int REDUCTION_FLOATS = WARP_SPLITS * TOKENS * ROW;
constexpr int FLOATS = STAGES > 0 ? 1 : max_int(max_int(REDUCTION_FLOATS, SCORE_FLOATS), SHARED_FLOATS);
__shared__ __align__(16) float shared_floats[FLOATS];  // where there are no stages
// Biases are in shared memory before a token needs one of them, unless they are too many.
constexpr int BIAS_ROW = 32 * PER_LANE;
constexpr bool BIASES_IN_SHARED = BIASES * BIAS_ROW <= 2048;
__shared__ float shared_bias[BIASES_IN_SHARED ? BIASES * BIAS_ROW : 1];
__shared__ int shared_bias_index[NUM_BIASES > 0 ? TOKENS : 1];

__device__ constexpr int longest_word() {
    for (int n = 4; n > 1; n /= 2) {
        if (ROUTED * COLUMNS / n >= THREADS && COLUMNS % n == 0) return n;
    }
    return 1;
}

// Leave the scores of tokens 0 .. count - 1 of a group, or their prepared logits, in shared memory. `read_logits(token,
// expert)` returns the sums of N neighbouring experts, of which a thread waits for AtOnce. `keep_logit(token, expert,
// logit)` gets each with its bias.
template <int N, int AtOnce, typename ReadLogits, typename KeepLogit>
__device__ __forceinline__ void score_tokens(ReadLogits read_logits, int count, const float* logit_bias,
                                             const MethodNumbers numbers, float* scores, KeepLogit keep_logit) {
    constexpr int WORDS = COLUMNS / N;
    static_assert(EXPERTS_PER_BLOCK % N == 0, "rows of sums hold whole words");
#pragma unroll AtOnce
    for (int round = 0; round < quotient(ROUTED * WORDS, THREADS); ++round) {
        const unsigned i = round * THREADS + threadIdx.x;
        const int token = i / WORDS, expert = i % WORDS * N;
        if (token >= count) break;
        const Floats<N> logits = read_logits(token, expert);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            float logit = logits.value[j];
            if (expert + j >= 32 * PER_LANE) continue;
            const int column = HAS_LOGIT_BIAS ? min(expert + j, NUM_EXPERTS - 1) : 0;
            const bool is_shared = SHARED_LOGITS && expert + j >= NUM_EXPERTS;
            const float its_bias = HAS_LOGIT_BIAS && !is_shared ? __ldg(logit_bias + column) : 0.0f;
            if (RETURNS_LOGITS && expert + j < GATE_ROWS) keep_logit(token, expert + j, biased(logit, its_bias));
            logit = prepare(logit, its_bias, numbers);
            scores[token * (32 * PER_LANE) + expert + j] = KEEPS_SCORES ? score_of(logit, SoftmaxStatistics()) : logit;
        }
    }
}

// The same for tokens first .. first + count - 1, from their partial sums in global memory, in a fixed order.
template <typename KeepLogit>
__device__ __forceinline__ void gather_scores(const float* partials, int first, int count, const float* logit_bias,
                                              const MethodNumbers numbers, float* scores, KeepLogit keep_logit) {
    constexpr int N = longest_word();
    const auto read_logits = [&](int token, int expert) {
        const float* source = partials + (first + token) * COLUMNS + expert;
        Floats<N> parts[SPLITS];
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) {
            parts[s] = *reinterpret_cast<const Floats<N>*>(source + s * (TOKENS * COLUMNS));
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
#pragma unroll
            for (int s = 1; s < SPLITS; ++s) parts[0].value[j] += parts[s].value[j];
        }
        return parts[0];
    };
    score_tokens<N, 2>(read_logits, count, logit_bias, numbers, scores,
                       [&](int token, int expert, float logit) { keep_logit(first + token, expert, logit); });
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

// Start to fetch the biases of the tokens of a group to shared memory, so that they are there when it is routed.
__device__ __forceinline__ void fetch_biases(const float* bias, const int* bias_index, int count) {
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
        for (int t = threadIdx.x; t < count; t += THREADS) copy_async4(&shared_bias_index[t], bias_index + t);
    }
    if (HAS_BIAS) copy_async_commit();
}
