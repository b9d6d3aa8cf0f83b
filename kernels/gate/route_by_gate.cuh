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

#include "device/last_block.cuh"
#include "device/num_valid.cuh"
#include "gate/gate_gemm.cuh"
#include "gate/route_sums.cuh"

constexpr int GROUP_BLOCKS = TILES * SPLITS;

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
    fetch_biases(bias, NUM_BIASES > 0 ? bias_index + first_token : nullptr, count);
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
        gather_scores(group_partials, first, tokens, logit_bias, numbers, shared_floats, keep_logit);
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
