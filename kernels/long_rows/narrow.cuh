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

    __device__ __forceinline__ void operator()(unsigned key, int times = 1) const {
        if (key - range.low <= range.high - range.low) atomicAdd(&bins[(key - range.low) >> shift], times);
    }
};

// Like block_prefix, but with one barrier. `sums` has a word for each warp. Threads pass another barrier before it is
// used again.
template <int Block>
__device__ __forceinline__ int block_prefix_once(int value, int& total, int* sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int inclusive = warp_prefix(value);
    if (lane == 31) sums[warp] = inclusive;
    __syncthreads();
    const int sum = lane < Block / 32 ? sums[lane] : 0;
    total = static_cast<int>(warp_sum(sum));
    return static_cast<int>(warp_sum(lane < warp ? sum : 0)) + inclusive - value;
}

// Return the part of a counter's range that has the `wanted`-th best key, or an empty part if the range has fewer keys.
// All blocks of a cluster of Cluster blocks call this, and their bins are added. Before the call, all threads pass a
// barrier after the last key was counted; before it returns, they pass one of their block. `used` are bins to clear:
// other bins, or, if Cluster is 1, the same.
template <int Block, int Cluster>
__device__ __forceinline__ Bin choose_part(const KeyCounter& counter, int wanted, int* used) {
    constexpr int MINE = BINS > Block ? BINS / Block : 1;  // of a thread
    static_assert(MINE <= 4, "one word");
    struct __align__(4 * MINE) Counts {
        int bin[MINE];
    };
    __shared__ Bin found;
    __shared__ int sums[Block / 32];
    const int thread = threadIdx.x;
    const int first = BINS - MINE * (thread + 1);  // the first thread has the best bins
    Counts counts = {};
    if (first >= 0) {
#pragma unroll
        for (int rank = 0; rank < Cluster; ++rank) {
            const int* bins = Cluster == 1 ? counter.bins : cluster_map(counter.bins, rank);
            const Counts others = *reinterpret_cast<const Counts*>(bins + first);
#pragma unroll
            for (int j = 0; j < MINE; ++j) counts.bin[j] += others.bin[j];
        }
        *reinterpret_cast<Counts*>(used + first) = {};
    }
    if (thread == 0) found = {counter.range, 0, 0};  // until it is found
    int sum = 0, all;
#pragma unroll
    for (int j = 0; j < MINE; ++j) sum += counts.bin[j];
    int above = block_prefix_once<Block>(sum, all, sums);
#pragma unroll
    for (int j = MINE - 1; j >= 0; --j) {
        if (above < wanted && wanted <= above + counts.bin[j]) {
            const unsigned low = counter.range.low + (static_cast<unsigned>(first + j) << counter.shift);
            found = {{low, low + min(counter.range.high - low, (1u << counter.shift) - 1)}, above, counts.bin[j]};
        }
        above += counts.bin[j];
    }
    __syncthreads();
    return found;
}
