// SPDX-License-Identifier: Apache-2.0
// Score, bias, top-k, renormalisation and scale of rows of logits, in one kernel.
//
// A warp, or a part of one, routes a row; for sizes that it cannot hold see activation_topk_wide.cu.
#include "routing/logits_out.cuh"
#include "routing/route_rows.cuh"

extern "C" __global__ void __launch_bounds__(256, MIN_BLOCKS)
    activation_topk(const logit_t* __restrict__ logits, const float* __restrict__ bias,
                    const int* __restrict__ bias_index, const float* __restrict__ logit_bias,
                    const float* __restrict__ expert_scale, const given_t* __restrict__ given_experts,
                    const replica_t* __restrict__ replicas, const replica_count_t* __restrict__ replica_counts,
                    const int* __restrict__ num_valid, weight_t* __restrict__ weights, index_t* __restrict__ indices,
                    int num_valid_value, logit_out_t* logits_out, const given_token_t* __restrict__ token_ids,
                    long long replica_offset, long long num_tokens, const MethodNumbers numbers,
                    long long logits_stride, long long weights_stride, long long indices_stride, long long given_stride,
                    long long logits_out_stride) {
    route_rows(
        logits, bias, bias_index, logit_bias, expert_scale, given_experts, {replicas, replica_counts, replica_offset},
        num_valid, weights, indices, num_valid_value, token_ids, num_tokens, numbers, logits_stride, weights_stride,
        indices_stride, given_stride, [] { return blockDim.x / 32; }, [](int64_t, int, index_t) {});
    if (RETURNS_LOGITS) {
        const int64_t token = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;
        if (token >= num_tokens) return;
        const bool valid = token < valid_rows(num_valid, num_valid_value, num_tokens);
        return_logits<ALIGNED>(logits + token * (DENSE ? NUM_LOGITS : logits_stride), logit_bias, valid,
                               logits_out + token * logits_out_stride, threadIdx.x % LANES, LANES);
    }
}
