// SPDX-License-Identifier: Apache-2.0
// expert_layout for at most 32 pairs, with a thread for each expert. See layout/few_pairs.cuh.
#include "layout/ids.cuh"
#include "layout/few_pairs.cuh"

SPECIALISED int THREADS = 64;
SPECIALISED int MAX_PAIRS = 8;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    expert_layout_few(const id_t* __restrict__ indices, const int* __restrict__ expert_map, load_t* load,
                      const int* __restrict__ num_valid, int* __restrict__ counts, int* __restrict__ offsets,
                      int* __restrict__ ends, int* __restrict__ order, int* __restrict__ positions,
                      int* __restrict__ block_experts, int* __restrict__ row_experts, int num_valid_value,
                      int num_pairs, int first_expert, int capacity, int pad, long long indices_stride,
                      long long positions_stride) {
    const int thread = blockIdx.x * THREADS + threadIdx.x;
    const Ids ids = ids_of(indices, expert_map, thread < 32 ? load : nullptr, num_valid, num_valid_value, num_pairs,
                           first_expert, indices_stride);
    const LayoutResults results = {counts,
                                   offsets,
                                   ends,
                                   order,
                                   positions,
                                   block_experts,
                                   row_experts,
                                   capacity,
                                   pad,
                                   positions_stride,
                                   LOAD_BY_PAIR || !load ? nullptr : load + first_expert};
    RankedPairs<1> pairs(0);
    pairs.first = threadIdx.x % 32;
    ids.read(pairs);
    layout_few_pairs<TOP_K, LOCAL_EXPERTS, MAX_PAIRS, 1>(num_pairs, pairs.expert[0], results, thread,
                                                         gridDim.x * THREADS);
}
