// SPDX-License-Identifier: Apache-2.0
// From hidden states to experts in one launch, for few tokens.
#include "gate/route_by_gate.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
    dense_router_decode(const x_t* __restrict__ x, const gate_t* __restrict__ weight, const float* __restrict__ bias,
                        const int* __restrict__ bias_index, const float* __restrict__ logit_bias,
                        const float* __restrict__ expert_scale, const given_t* __restrict__ given_experts,
                        const replica_t* __restrict__ replicas, const replica_count_t* __restrict__ replica_counts,
                        const int* __restrict__ num_valid, weight_t* __restrict__ weights,
                        index_t* __restrict__ indices, logit_out_t* __restrict__ logits_out, unsigned* counters,
                        float* partials, int num_valid_value, const given_token_t* __restrict__ token_ids,
                        long long replica_offset, long long num_tokens, const MethodNumbers numbers, long long x_stride,
                        long long weight_stride, long long weights_stride, long long indices_stride,
                        long long given_stride, long long logits_out_stride) {
    route_by_gate(x, weight, bias, bias_index, logit_bias, expert_scale, given_experts,
                  {replicas, replica_counts, replica_offset}, num_valid, weights, indices, logits_out, counters,
                  partials, num_valid_value, token_ids, num_tokens, numbers, x_stride, weight_stride, weights_stride,
                  indices_stride, given_stride, logits_out_stride, [](int64_t, int, index_t) {});
}
