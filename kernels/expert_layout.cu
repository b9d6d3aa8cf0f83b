// SPDX-License-Identifier: Apache-2.0
// From the experts of each token to the order of pairs by expert: counts, offsets, order, positions.
//
// Not a sort: pairs are counted per expert and contiguous share of the pairs, the counts are added up over experts and
// shares, and a pair's row is its expert's first row plus the counts of shares before plus its rank in its share.
//
// expert_layout: one block. Where there is much padding, several blocks count the same pairs, and each writes a part of
// it.
#include "layout/block_layout.cuh"
#include "layout/local_expert.cuh"

SPECIALISED int THREADS = 256;
SPECIALISED int MAX_PAIRS = 512;

extern "C" __global__ void __launch_bounds__(THREADS)
    expert_layout(const id_t* __restrict__ indices, const int* __restrict__ expert_map, load_t* __restrict__ load,
                  const int* __restrict__ num_valid, int* __restrict__ counts, int* __restrict__ offsets,
                  int* __restrict__ ends, int* __restrict__ order, int* __restrict__ positions,
                  int* __restrict__ block_experts, int* __restrict__ row_experts, int num_valid_value, int num_tokens,
                  int first_expert, int capacity, int pad, long long indices_stride, long long positions_stride) {
    __shared__ BlockLayout<THREADS, LOCAL_EXPERTS, MAX_PAIRS> memory;
    const int valid = static_cast<int>(valid_rows(num_valid, num_valid_value, num_tokens)) * TOP_K;
    const Pairs pairs = {indices, expert_map, indices_stride, first_expert, valid};
    const LayoutResults results = {counts,        offsets,     ends,     order, positions,
                                   block_experts, row_experts, capacity, pad,   positions_stride};
    const auto expert_of_pair = [&](int pair) { return local_expert(pairs, id_of(pairs, pair)); };
    layout_by_block<TOP_K>(memory, num_tokens * TOP_K, expert_of_pair, results, blockIdx.x, gridDim.x);
}
