// SPDX-License-Identifier: Apache-2.0
// expert_layout for up to some hundred thousand pairs, in one launch of at most a block for each multiprocessor. See
// layout/grid_layout.cuh.
#include "layout/grid_layout.cuh"

__shared__ GridMemory memory;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    expert_layout_grid(const id_t* __restrict__ indices, const int* __restrict__ expert_map, load_t* load,
                       const int* __restrict__ num_valid, int* __restrict__ counts, int* __restrict__ offsets,
                       int* __restrict__ ends, int* __restrict__ order, int* __restrict__ positions,
                       int* __restrict__ block_experts, int* __restrict__ row_experts, unsigned* counters, uint2* table,
                       int num_valid_value, int num_pairs, int first_expert, int capacity, int pad,
                       long long indices_stride, long long positions_stride) {
    Ids ids = ids_of(indices, expert_map, load, num_valid, num_valid_value, num_pairs, first_expert, indices_stride);
    const LayoutResults results = {counts,        offsets,     ends,     order, positions,
                                   block_experts, row_experts, capacity, pad,   positions_stride};
    const int shares = gridDim.x, thread = threadIdx.x;
    unsigned* left = counters + 1;  // a flag for each share
    ExpertSums<WORDS> sums;
    bool is_last = false, raised = false;
    Arrival arrival = LEFT;
    const auto arrive_once = [&] {
        if (arrival == LEFT) is_last = arrive(counters, shares);
    };
    const auto wait_once = [&] {
        if (arrival == LEFT) arrival = poll_arrivals(is_last, counters, true, left + blockIdx.x);
        return arrival != LEFT;
    };
    // Its own share, and then those of blocks that have left.
    for (int share = blockIdx.x, returned = -1; returned < shares;) {
        const Counts<false> published = {table};
        if (!lay_out_share(memory, ids, published, share, num_pairs, results, sums, arrive_once, wait_once)) return;
        if (arrival == SEEN_COMPLETE) return;
        if (returned < 0) {
            add_load(load, first_expert, sums);
            ids.load = nullptr;
            __threadfence();  // between counting and looking at the flags
            raised = thread < shares && load_acquire(&left[thread]) != 0;
            if (raised) left[thread] = 0;
            if (!__syncthreads_or(raised)) return;
        }
        do {
            ++returned;
        } while (returned < shares && !__syncthreads_or(raised && thread == returned));
        share = returned;
    }
}
