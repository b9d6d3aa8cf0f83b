// SPDX-License-Identifier: Apache-2.0
// The exact key of the k-th best of a row, whatever the row holds: byte by byte from the highest, each from a histogram
// of the scores that share the bytes above. One block makes four passes over the row.
#pragma once

#include "long_rows/histogram.cuh"
#include "select/order_bits.cuh"

struct KthKey {
    unsigned key;
    int ties;  // how many scores with this key are among the k best
};

// Return the key for k up to `length`. `histogram` is BINS words of shared memory on a 16-byte boundary.
template <int Code, int Block>
__device__ __forceinline__ KthKey radix_threshold(const typename Scalar<Code>::type* row, int length, int k,
                                                  int* histogram) {
    unsigned prefix = 0;
    int rest = k;  // how many are still to be taken among scores that share the prefix
#pragma unroll 1
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < BINS; i += Block) histogram[i] = 0;
        __syncthreads();
        constexpr int LOADS = 8;  // in flight
#pragma unroll 1
        for (unsigned first = threadIdx.x; first < length; first += LOADS * Block) {
            unsigned bits[LOADS];
#pragma unroll
            for (int u = 0; u < LOADS; ++u) {
                const unsigned c = first + u * Block;
                bits[u] = score_bits(row[c < length ? c : first]);
            }
#pragma unroll
            for (int u = 0; u < LOADS; ++u) {
                const unsigned key = bits_key<Code>(bits[u]);
                const bool shares = shift == 24 || (key ^ prefix) >> (shift + 8) % 32 == 0;
                if (shares && first + u * Block < length) atomicAdd(&histogram[key >> shift & (BINS - 1)], 1);
            }
        }
        __syncthreads();
        const ChosenBin chosen = choose_bin(histogram, rest);
        prefix |= static_cast<unsigned>(chosen.bin) << shift;
        rest = chosen.rest;
        __syncthreads();  // before the histogram is used again
    }
    return {prefix, rest};
}
