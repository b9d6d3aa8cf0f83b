// SPDX-License-Identifier: Apache-2.0
// hash_router.cu and the layout of its experts in one launch, for few tokens.
#include "layout/fused_layout.cuh"
#include "routing/route_tokens.cuh"

extern "C" __global__ void __launch_bounds__(LAYOUT_THREADS, 1)
    hash_router_layout(const token_id_t* __restrict__ token_ids, const expert_t* __restrict__ table,
                       const scalar_t* __restrict__ logits, const scalar_t* __restrict__ x,
                       const gate_t* __restrict__ weight, const float* __restrict__ logit_bias,
                       const float* __restrict__ expert_scale, const int* __restrict__ num_valid,
                       weight_t* __restrict__ weights, index_t* __restrict__ indices, int* __restrict__ counts,
                       int* __restrict__ offsets, int* __restrict__ ends, int* __restrict__ order,
                       int* __restrict__ positions, int* __restrict__ block_experts, int* __restrict__ row_experts,
                       int num_valid_value, unsigned* counter, long long num_tokens,
                       const __grid_constant__ MethodNumbers numbers, long long vocab_size, long long table_stride,
                       long long hidden, long long logits_stride, long long x_stride, long long weight_stride,
                       long long weights_stride, long long indices_stride, int capacity, long long positions_stride) {
    const Call call = {token_ids,     table,      logits,          x,
                       weight,        logit_bias, expert_scale,    num_valid,
                       weights,       indices,    num_valid_value, num_tokens,
                       numbers,       vocab_size, hidden,          table_stride,
                       logits_stride, x_stride,   weight_stride,   weights_stride,
                       indices_stride};
    const LayoutResults results = {counts,        offsets,     ends,     order, positions,
                                   block_experts, row_experts, capacity, -1,    positions_stride};
    typedef FusedLayout<OUTPUTS, NUM_EXPERTS + NUM_SHARED> Layout;
    __shared__ Layout layout;
    __shared__ Layout::Memory memory;
    layout.begin(results);
    route_tokens(call, [&](int64_t token, int place, index_t expert) {
        layout.keep(static_cast<int>(token) * OUTPUTS + place, static_cast<int>(expert));
    });
    layout.finish(memory, static_cast<int>(num_tokens) * OUTPUTS, indices, indices_stride, results, counter, gridDim.x);
}
