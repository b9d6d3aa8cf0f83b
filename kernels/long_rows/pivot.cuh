// SPDX-License-Identifier: Apache-2.0
// The rank of the k-th best of a list, by histograms: each has the ranks of one bin of the one before. A few ranks are
// compared with each other.
#pragma once

#include "long_rows/histogram.cuh"
#include "long_rows/rank.cuh"

template <typename Rank>
struct Pivot {
    static constexpr int FEW = 32;

    int histograms[3][BINS];  // in turn: a warp may still read one while another fills the next
    Rank few[FEW];
    int num_few;

    // Prepare for find(); a barrier has to follow.
    template <int Block>
    __device__ __forceinline__ void clear() {
        for (int i = threadIdx.x; i < BINS; i += Block) histograms[0][i] = 0;
        if (threadIdx.x == 0) num_few = 0;
    }

    // Return the lower bound of the `wanted` best ranks of more. Ranks below `low` or above `high` are left out.
    // ranks.for_each(take) calls take(rank) for those of a thread.
    template <int Block, typename Ranks>
    __device__ __forceinline__ Rank find(const Ranks& ranks, int wanted, Rank low, Rank high) {
        int round = 0;
#pragma unroll 1
        for (;;) {
            const int shift = max(bit_length(high - low) - 8, 0);
            int* histogram = histograms[round];
            round = round == 2 ? 0 : round + 1;
            for (int i = threadIdx.x; i < BINS; i += Block) histograms[round][i] = 0;
            ranks.for_each([&](Rank rank) {
                if (rank >= low && rank <= high) atomicAdd(&histogram[(rank - low) >> shift], 1);
            });
            __syncthreads();
            const ChosenBin chosen = choose_bin(histogram, wanted);
            low += static_cast<Rank>(chosen.bin) << shift;
            if (chosen.rest == chosen.count) return low;
            const Rank last = (static_cast<Rank>(1) << shift) - 1;
            if (high - low > last) high = low + last;
            wanted = chosen.rest;
            if (chosen.count <= FEW) return among_few(ranks, wanted, low, high, chosen.count);
        }
    }

  private:
    template <typename Ranks>
    __device__ __forceinline__ Rank among_few(const Ranks& ranks, int wanted, Rank low, Rank high, int number) {
        ranks.for_each([&](Rank rank) {
            if (rank >= low && rank <= high) few[atomicAdd(&num_few, 1)] = rank;
        });
        __syncthreads();
        const int lane = threadIdx.x % 32;
        const Rank own = lane < number ? few[lane] : 0;
        int better = 0;
#pragma unroll 4
        for (int i = 0; i < number; ++i) better += few[i] > own;
        const unsigned found = __ballot_sync(FULL_WARP, lane < number && better == wanted - 1);
        return __shfl_sync(FULL_WARP, own, __ffs(found) - 1);
    }
};
