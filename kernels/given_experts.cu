// SPDX-License-Identifier: Apache-2.0
// Weights of the experts that the caller gives for each token, whose row of the table is the token's own: not
// BY_TOKEN_ID. A row of -1 has no experts.
#include "routing/route_tokens.cuh"

constexpr int MOST_THREADS = SOURCE == PRODUCTS ? 32 * WARPS : 256;
constexpr int LEAST_BLOCKS = SOURCE == PRODUCTS ? 1 : 0;

extern "C" __global__ void __launch_bounds__(MOST_THREADS, LEAST_BLOCKS)
    given_experts(const expert_t* __restrict__ given_experts, const replica_t* __restrict__ replicas,
                  const replica_count_t* __restrict__ replica_counts, const scalar_t* __restrict__ logits,
                  const scalar_t* __restrict__ x, const gate_t* __restrict__ weight,
                  const float* __restrict__ logit_bias, const float* __restrict__ expert_scale,
                  const int* __restrict__ num_valid, weight_t* __restrict__ weights, index_t* __restrict__ indices,
                  int num_valid_value, logit_out_t* logits_out, long long replica_offset, long long num_tokens,
                  const __grid_constant__ MethodNumbers numbers, long long given_stride, long long hidden,
                  long long logits_stride, long long x_stride, long long weight_stride, long long weights_stride,
                  long long indices_stride, long long logits_out_stride) {
    const Call call = {nullptr,         given_experts,
                       logits,          x,
                       weight,          logit_bias,
                       expert_scale,    num_valid,
                       weights,         indices,
                       num_valid_value, num_tokens,
                       numbers,         num_tokens,
                       hidden,          given_stride,
                       logits_stride,   x_stride,
                       weight_stride,   weights_stride,
                       indices_stride,  {replicas, replica_counts, replica_offset}};
    route_tokens(call, [](int64_t, int, index_t) {});
    return_logits_of(call, logits_out, logits_out_stride);
}
