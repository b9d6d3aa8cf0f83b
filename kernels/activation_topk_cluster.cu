// SPDX-License-Identifier: Apache-2.0
// activation_topk.cu and the layout of its experts in one launch, for few tokens: by a cluster of blocks (sm_90 and later).
#include "routing/rows_and_layout.cuh"

static_assert(LAYOUT_BY != LAST_BLOCK, "all blocks are in one cluster");

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(LAYOUT_THREADS, MIN_BLOCKS)
    activation_topk_cluster(const logit_t* __restrict__ logits, const float* __restrict__ bias,
                            const int* __restrict__ bias_index, const float* __restrict__ logit_bias,
                            const float* __restrict__ expert_scale, const given_t* __restrict__ given_experts,
                            const replica_t* __restrict__ replicas, const replica_count_t* __restrict__ replica_counts,
                            const int* __restrict__ num_valid, weight_t* __restrict__ weights,
                            index_t* __restrict__ indices, int* __restrict__ counts, int* __restrict__ offsets,
                            int* __restrict__ ends, int* __restrict__ order, int* __restrict__ positions,
                            int* __restrict__ block_experts, int* __restrict__ row_experts, int num_valid_value,
                            unsigned* counter, const given_token_t* __restrict__ token_ids, long long replica_offset,
                            long long num_tokens, const MethodNumbers numbers, long long logits_stride,
                            long long weights_stride, long long indices_stride, long long given_stride, int capacity,
                            long long positions_stride, int routing_warps) {
    const LayoutResults results = {counts,        offsets,     ends,     order, positions,
                                   block_experts, row_experts, capacity, -1,    positions_stride};
    route_and_lay_out(logits, bias, bias_index, logit_bias, expert_scale, given_experts,
                      {replicas, replica_counts, replica_offset}, num_valid, weights, indices, num_valid_value,
                      token_ids, num_tokens, numbers, logits_stride, weights_stride, indices_stride, given_stride,
                      results, counter, routing_warps);
}
