// SPDX-License-Identifier: Apache-2.0
// From rows of logits to experts, weights and the layout of the experts.
#pragma once

#include "layout/fused_layout.cuh"
#include "routing/route_rows.cuh"

// Route the rows, by the first `routing_warps` warps of each block, and lay them out by all warps of one.
__device__ __forceinline__ void route_and_lay_out(const LogitsCall& call, const LayoutResults& results,
                                                  unsigned* counter, int routing_warps) {
    typedef FusedLayout<OUTPUTS, NUM_EXPERTS + NUM_SHARED> Layout;
    __shared__ Layout layout;
    __shared__ Layout::Memory memory;
    layout.begin(results);
    int pair = -1, own_expert = -1;
    if (threadIdx.x < 32 * routing_warps) {
        route_rows(call, static_cast<int64_t>(blockIdx.x) * routing_warps,
                   [&](int64_t token, int place, index_t expert) {
                       pair = static_cast<int>(token) * OUTPUTS + place;
                       own_expert = static_cast<int>(expert);
                   });
    }
    layout.wait();
    if (pair >= 0) layout.keep(pair, own_expert);
    layout.finish(memory, static_cast<int>(call.num_tokens) * OUTPUTS, call.indices,
                  DENSE ? OUTPUTS : call.indices_stride, results, counter, gridDim.x);
}
