// SPDX-License-Identifier: Apache-2.0
// dense_router_decode.cu and the layout of its experts in one launch.
#include "gate/route_by_gate.cuh"
#include "layout/fused_layout.cuh"

constexpr int LAYOUT_COUNTER = 127;  // the last one, after those of the routing

typedef FusedLayout<OUTPUTS, COUNTED_EXPERTS> Layout;

// Return memory for the layout: that of the routing, if it is large enough, as SHARED_FLOATS makes it.
template <bool Fits>
__device__ __forceinline__ Layout::Memory& layout_memory() {
    if constexpr (Fits) {
        return reinterpret_cast<Layout::Memory&>(shared_floats);
    } else {
        __shared__ Layout::Memory memory;
        return memory;
    }
}

extern "C" __global__ void __launch_bounds__(LAYOUT_THREADS, 1) dense_router_decode_layout(
    const x_t* __restrict__ x, const gate_t* __restrict__ weight, const float* __restrict__ bias,
    const int* __restrict__ bias_index, const float* __restrict__ logit_bias, const float* __restrict__ expert_scale,
    const given_t* __restrict__ given_experts, const replica_t* __restrict__ replicas,
    const replica_count_t* __restrict__ replica_counts, const int* __restrict__ num_valid,
    weight_t* __restrict__ weights, index_t* __restrict__ indices, logit_out_t* __restrict__ logits_out,
    int* __restrict__ counts, int* __restrict__ offsets, int* __restrict__ ends, int* __restrict__ order,
    int* __restrict__ positions, int* __restrict__ block_experts, int* __restrict__ row_experts, unsigned* counters,
    float* partials, int num_valid_value, const given_token_t* __restrict__ token_ids, long long replica_offset,
    long long num_tokens, const MethodNumbers numbers, long long x_stride, long long weight_stride,
    long long weights_stride, long long indices_stride, long long given_stride, long long logits_out_stride,
    int capacity, long long positions_stride) {
    const LayoutResults results = {counts,        offsets,     ends,     order, positions,
                                   block_experts, row_experts, capacity, -1,    positions_stride};
    __shared__ Layout layout;
    layout.begin(results);
    const bool routed = route_by_gate(
        x, weight, bias, bias_index, logit_bias, expert_scale, given_experts,
        {replicas, replica_counts, replica_offset}, num_valid, weights, indices, logits_out, counters, partials,
        num_valid_value, token_ids, num_tokens, numbers, x_stride, weight_stride, weights_stride, indices_stride,
        given_stride, logits_out_stride, [&](int64_t token, int place, index_t expert) {
            layout.keep(static_cast<int>(token) * OUTPUTS + place, static_cast<int>(expert));
        });
    if (SHARE == 0 && !routed) return;  // with shares all blocks arrive, since any may have routed that of another
    layout.finish(layout_memory<sizeof(Layout::Memory) <= sizeof(shared_floats)>(),
                  static_cast<int>(num_tokens) * OUTPUTS, indices, DENSE ? OUTPUTS : indices_stride, results,
                  counters + LAYOUT_COUNTER, SHARE > 0 ? gridDim.x : gridDim.x / GROUP_BLOCKS);
}
