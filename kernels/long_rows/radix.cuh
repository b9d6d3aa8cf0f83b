// SPDX-License-Identifier: Apache-2.0
// The exact key of the k-th best of a row, whatever the row holds: byte by byte from the highest, each from a histogram
// of the scores that share the bytes above. One block makes four passes over the row.
#pragma once

#include "device/block_scan.cuh"
#include "select/order_bits.cuh"

constexpr int RADIX = 256;

struct KthKey {
    unsigned key;
    int ties;  // how many scores with this key are among the k best
};

// Return the key for k up to `length`. `histogram` is RADIX words of shared memory.
template <int Code, int Block>
__device__ __forceinline__ KthKey radix_threshold(const typename Scalar<Code>::type* row, int length, int k,
                                                  int* histogram) {
    static_assert(Block >= RADIX, "a thread for each bin");
    __shared__ unsigned chosen_bin;
    __shared__ int chosen_rest;
    unsigned prefix = 0;
    int rest = k;  // how many are still to be taken among scores that share the prefix
#pragma unroll 1
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < RADIX) histogram[threadIdx.x] = 0;
        __syncthreads();
        for (unsigned c = threadIdx.x; c < length; c += Block) {
            const unsigned key = bits_key<Code>(score_bits(row[c]));
            const bool shares = shift == 24 || (key ^ prefix) >> (shift + 8) % 32 == 0;
            if (shares) atomicAdd(&histogram[key >> shift & (RADIX - 1)], 1);
        }
        __syncthreads();
        // Thread t has bin 255 - t, so that better bins come first.
        const unsigned bin = RADIX - 1 - threadIdx.x;
        const int count = threadIdx.x < RADIX ? histogram[bin % RADIX] : 0;
        int total;
        const int better = block_prefix<Block>(count, total);
        if (threadIdx.x < RADIX && better < rest && rest <= better + count) {
            chosen_bin = bin;
            chosen_rest = rest - better;
        }
        __syncthreads();
        prefix |= chosen_bin << shift;
        rest = chosen_rest;
    }
    return {prefix, rest};
}
