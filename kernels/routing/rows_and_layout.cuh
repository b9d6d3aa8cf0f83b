// SPDX-License-Identifier: Apache-2.0
// From rows of logits to experts, weights and the layout of the experts.
#pragma once

#include "layout/fused_layout.cuh"
#include "routing/route_rows.cuh"

// Route the rows, by the first `routing_warps` warps of each block, and lay them out by all warps of one. The parameters
// are those of the kernel.
__device__ __forceinline__ void route_and_lay_out(
    const logit_t* logits, const float* bias, const int* bias_index, const float* logit_bias, const float* expert_scale,
    const given_t* given_experts, const Replicas& replicas, const int* num_valid, weight_t* weights, index_t* indices,
    int num_valid_value, const given_token_t* token_ids, int64_t num_tokens, const MethodNumbers numbers,
    int64_t logits_stride, int64_t weights_stride, int64_t indices_stride, int64_t given_stride,
    const LayoutResults& results, unsigned* counter, int routing_warps) {
    typedef FusedLayout<OUTPUTS, COUNTED_EXPERTS> Layout;
    __shared__ Layout layout;
    __shared__ Layout::Memory memory;
    layout.begin(results);
    int pair = -1, own_expert = -1;
    if (threadIdx.x < 32 * routing_warps) {
        route_rows(
            logits, bias, bias_index, logit_bias, expert_scale, given_experts, replicas, num_valid, weights, indices,
            num_valid_value, token_ids, num_tokens, numbers, logits_stride, weights_stride, indices_stride,
            given_stride, [&] { return routing_warps; },
            [&](int64_t token, int place, index_t expert) {
                pair = static_cast<int>(token) * OUTPUTS + place;
                own_expert = static_cast<int>(expert);
            });
    }
    layout.wait();
    if (pair >= 0) layout.keep(pair, own_expert);
    layout.finish(memory, static_cast<int>(num_tokens) * OUTPUTS, indices, DENSE ? OUTPUTS : indices_stride, results,
                  counter, gridDim.x);
}
