// SPDX-License-Identifier: Apache-2.0
// The place of the k-th best among keys, by counting them in equal parts of a range: one step to a part of the range,
// in a block or over the blocks of a cluster.
#pragma once

#include "device/block_scan.cuh"
#include "device/cluster.cuh"

constexpr int BIN_BITS = 9, BINS = 1 << BIN_BITS;

// The part of a range that holds the key of some rank.
struct Bin {
    Extent keys;
    int above;   // keys of the range above this part
    int inside;  // keys in it
};

// Counts keys in equal parts of a range; others are left out.
struct KeyCounter {
    Extent range;
    int* bins;
    int shift;

    __device__ __forceinline__ KeyCounter(Extent range, int* bins)
        : range(range), bins(bins), shift(max(32 - __clz(range.high - range.low) - BIN_BITS, 0)) {}

    __device__ __forceinline__ int bin(unsigned key) const { return static_cast<int>((key - range.low) >> shift); }

    __device__ __forceinline__ void operator()(unsigned key, int times = 1) const {
        if (key - range.low <= range.high - range.low) atomicAdd(&bins[bin(key)], times);
    }
};

// Counts of a block in bins, two for each of the first BINS / 2 threads: the first thread has the best ones.
struct OwnBins {
    int low, high;
};

__device__ __forceinline__ int own_pair() { return BINS / 2 - 1 - static_cast<int>(threadIdx.x); }

// Take the counts of this thread's bins out of `bins`, which are 0 afterwards. All threads have passed a barrier since
// the last key was counted.
__device__ __forceinline__ OwnBins take_bins(int* bins) {
    if (own_pair() < 0) return {0, 0};
    int2& pair = reinterpret_cast<int2*>(bins)[own_pair()];
    const OwnBins own = {pair.x, pair.y};
    pair = {0, 0};
    return own;
}

// Counts in bins that the blocks of a cluster have sent, at most 65535 in each: two bins in a word.
template <int Cluster>
struct SentBins {
    unsigned pairs[Cluster][BINS / 2];

    // Send the counts of a block to all blocks, which see them after a cluster barrier.
    __device__ __forceinline__ void send(int rank, OwnBins own) {
        if (own_pair() < 0) return;
#pragma unroll
        for (int to = 0; to < Cluster; ++to) {
            cluster_map(pairs[rank], to)[own_pair()] = own.low | static_cast<unsigned>(own.high) << 16;
        }
    }

    // Return the sums over the blocks from `first` on and before `end`.
    __device__ __forceinline__ OwnBins sum(int first = 0, int end = Cluster) const {
        OwnBins sum = {0, 0};
        if (own_pair() < 0) return sum;
#pragma unroll
        for (int from = 0; from < Cluster; ++from) {
            const unsigned pair = from >= first && from < end ? pairs[from][own_pair()] : 0;
            sum = {sum.low + static_cast<int>(pair & 0xffffu), sum.high + static_cast<int>(pair >> 16)};
        }
        return sum;
    }
};

// Return the part of a counter's range that has the `wanted`-th best key, or an empty part if the range has fewer keys.
// `own`: the counts of this thread's bins. Call take(bin, above, inside) for each of them, with the keys of the range
// above it and in it. All threads pass a barrier before this returns.
template <int Block, typename Take>
__device__ __forceinline__ Bin choose_part(const KeyCounter& counter, int wanted, OwnBins own, Take take) {
    static_assert(2 * Block >= BINS, "two bins for each thread");
    __shared__ Bin found;
    __shared__ int sums[Block / 32];
    if (threadIdx.x == 0) found = {counter.range, 0, 0};  // until it is found
    int all;
    const int first = block_prefix_once<Block>(own.low + own.high, all, sums);
    const auto check = [&](int bin, int above, int inside) {
        if (bin < 0) return;
        take(bin, above, inside);
        if (above < wanted && wanted <= above + inside) {
            const unsigned low = counter.range.low + (static_cast<unsigned>(bin) << counter.shift);
            found = {{low, low + min(counter.range.high - low, (1u << counter.shift) - 1)}, above, inside};
        }
    };
    check(2 * own_pair() + 1, first, own.high);
    check(2 * own_pair(), first + own.high, own.low);
    __syncthreads();
    return found;
}

template <int Block>
__device__ __forceinline__ Bin choose_part(const KeyCounter& counter, int wanted, OwnBins own) {
    return choose_part<Block>(counter, wanted, own, [](int, int, int) {});
}
