// SPDX-License-Identifier: Apache-2.0
// expert_layout for some thousand pairs, by one cluster of blocks; sm_90 and later. See layout/grid_layout.cuh.
#include "layout/grid_layout.cuh"

__shared__ GridMemory memory;
__shared__ uint2 published[QUADS];

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(THREADS, 1)
    expert_layout_cluster(const id_t* __restrict__ indices, const int* __restrict__ expert_map, load_t* load,
                          const int* __restrict__ num_valid, int* __restrict__ counts, int* __restrict__ offsets,
                          int* __restrict__ ends, int* __restrict__ order, int* __restrict__ positions,
                          int* __restrict__ block_experts, int* __restrict__ row_experts, int num_valid_value,
                          int num_pairs, int first_expert, int capacity, int pad, long long indices_stride,
                          long long positions_stride) {
    const Ids ids =
        ids_of(indices, expert_map, load, num_valid, num_valid_value, num_pairs, first_expert, indices_stride);
    const LayoutResults results = {counts,        offsets,     ends,     order, positions,
                                   block_experts, row_experts, capacity, pad,   positions_stride};
    ExpertSums<WORDS> sums;
    const Counts<true> counts_of = {published};
    const auto wait = [] {
        cluster_wait();
        return true;
    };
    lay_out_share(memory, ids, counts_of, blockIdx.x, num_pairs, results, sums, [] { cluster_arrive(); }, wait);
    if (blockIdx.x == 0) add_load(load, first_expert, sums);
    cluster_wait();  // until no other block reads what this one has published
}
