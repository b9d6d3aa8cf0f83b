// SPDX-License-Identifier: Apache-2.0
// From the experts of each token to the order of pairs by expert: counts, offsets, order, positions. For few pairs.
//
// Not a sort: each warp counts its share of the pairs by expert, the counts are added up over warps and experts, and a
// pair's row is its expert's first row, plus the counts of the warps before, plus its rank in its warp. One block does
// it. Where there is much padding, several blocks count the same pairs, and each writes a part of it.
#include "layout/block_layout.cuh"
#include "layout/ids.cuh"

SPECIALISED int THREADS = 256;
SPECIALISED int MAX_PAIRS = 512;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    expert_layout(const id_t* __restrict__ indices, const int* __restrict__ expert_map, load_t* load,
                  const int* __restrict__ num_valid, int* __restrict__ counts, int* __restrict__ offsets,
                  int* __restrict__ ends, int* __restrict__ order, int* __restrict__ positions,
                  int* __restrict__ block_experts, int* __restrict__ row_experts, int num_valid_value, int num_pairs,
                  int first_expert, int capacity, int pad, long long indices_stride, long long positions_stride) {
    __shared__ BlockLayout<THREADS, LOCAL_EXPERTS, MAX_PAIRS> memory;
    const Ids ids = ids_of(indices, expert_map, blockIdx.x == 0 ? load : nullptr, num_valid, num_valid_value, num_pairs,
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
    RankedPairs<BlockLayout<THREADS, LOCAL_EXPERTS, MAX_PAIRS>::Share::ROUNDS> pairs(0);
    ids.read(pairs);
    layout_by_block<TOP_K>(memory, num_pairs, pairs, results, blockIdx.x, gridDim.x);
}
