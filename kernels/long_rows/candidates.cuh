// SPDX-License-Identifier: Apache-2.0
// The candidates of the blocks of a cluster: a threshold, the lists that they have sent to each other, and bins of their
// order by value.
#pragma once

#include "long_rows/narrow.cuh"
#include "select/order_key.cuh"

// Read blockIdx.x again, so that what only the results need is not kept in registers before.
__device__ __forceinline__ unsigned block_anew() {
#ifdef __CUDACC__
    unsigned block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
#else
    return blockIdx.x;
#endif
}

// The keys of a block: its threshold and the highest.
struct BlockKeys {
    Extent keys;
    bool tied;  // almost all threads reach the threshold, and most just so

    __device__ __forceinline__ uint4 words() const { return {keys.low, keys.high, tied, 0}; }
};

// Find a key that the best keys of at least `wanted` threads reach, NAN_KEY if there are not so many. `bins` are 0, before
// and after.
template <int Block>
__device__ __forceinline__ BlockKeys keys_of_block(int* bins, unsigned best, int wanted) {
    const auto bounds = [&](Extent inside) {  // of the threads' best keys in this range
        const bool counts = best >= inside.low && best <= inside.high;
        return block_extent<Block>({counts ? best : ~0u, counts ? best : NO_KEY});
    };
    Extent range = bounds({NAN_KEY + 1, ~0u});
    const unsigned highest = range.high;
    if (range.low > range.high) return {{NAN_KEY, NAN_KEY}, false};
    int rest = wanted;
#pragma unroll 1
    for (;;) {
        const KeyCounter count(range, bins);
        count(best);
        __syncthreads();
        const Bin bin = choose_part<Block>(count, rest, take_bins(bins));
        if (bin.inside == 0) return {{NAN_KEY, highest}, false};
        if (bin.inside <= wanted / 8 + 16) return {{bin.keys.low, highest}, false};
        range = bounds(bin.keys);
        if (range.low == range.high) {
            const int below = Block - (wanted - rest) - bin.above - bin.inside;
            return {{range.low, highest}, below <= Block / 16};
        }
        rest -= bin.above;
    }
}

// The lists of all blocks, in the shared memory of each.
template <int Cluster, int Block, int Capacity>
struct Candidates {
    typedef unsigned long long Entry;
    static constexpr int SIZE = Cluster * Capacity, WARPS = Block / 32;
    static constexpr int TEAM = WARPS > Cluster ? WARPS / Cluster : 1;  // warps that share a list

    Entry* entries;
    const int* listed;  // entries of each list

    __device__ __forceinline__ Entry* list(int rank) const { return entries + rank * Capacity; }

    // Call take(entry, rank of its block) for all entries.
    template <typename Take>
    __device__ __forceinline__ void for_each(Take take) const {
        const int warp = threadIdx.x / 32;
#pragma unroll 1
        for (int from = warp / TEAM; from < Cluster; from += WARPS / TEAM) {
#pragma unroll 2
            for (int i = warp % TEAM * 32 + threadIdx.x % 32; i < listed[from]; i += 32 * TEAM) {
                take(list(from)[i], from);
            }
        }
    }
};

// Bins whose order is that of their entries by value: of keys or, if there are ties at the threshold, half of them of
// higher keys and half of columns of these ties. KeyMask: the bits of a key that are the score's.
template <unsigned KeyMask>
struct BinOrder {
    unsigned threshold, lowest;  // key of ties, and of the first bin for keys
    unsigned last_tie;           // lower word of the last of these ties
    int key_shift, tie_shift;
    bool ties;

    // `end`: ties are before this column.
    __device__ __forceinline__ BinOrder(unsigned threshold, unsigned highest, bool ties, int end)
        : threshold(threshold & KeyMask),
          lowest(ties ? threshold + (~KeyMask + 1u == 0u ? 1u : ~KeyMask + 1u) : threshold),
          last_tie(~static_cast<unsigned>(end - 1)),
          key_shift(max(32 - __clz(highest - lowest) - BIN_BITS + ties, 0)),
          tie_shift(max(32 - __clz(end - 1) - BIN_BITS + 1, 0)),
          ties(ties) {}

    __device__ __forceinline__ int bin(unsigned long long entry) const {
        const unsigned key = static_cast<unsigned>(entry >> 32), column = static_cast<unsigned>(entry);
        const bool tie = ties && (key & KeyMask) == threshold;
        return static_cast<int>(tie ? (column - last_tie) >> tie_shift
                                    : ((key - lowest) >> key_shift) + (ties ? BINS / 2 : 0));
    }
};

// Where the entries of bins are in the order, the best first.
struct BinPlaces {
    int firsts[BINS + 1];  // by bin + 1; then the number of all entries
    int next[BINS];        // place for the next entry of a bin
    int crowded;           // whether a bin of the wanted places has too many entries; 0 before

    __device__ __forceinline__ int first(int bin) const { return firsts[bin + 1]; }

    // Find the places of all bins. `own`: the counts of this thread's bins; `crowd`: the most entries of a bin. `sums` is
    // as for block_prefix_once. All threads pass a barrier before this returns.
    template <int Block>
    __device__ __forceinline__ void find(OwnBins own, int wanted, int crowd, int* sums) {
        int all;
        const int above = block_prefix_once<Block>(own.low + own.high, all, sums);
        const auto put = [&](int bin, int place, int inside) {
            if (bin < 0) return;
            firsts[bin + 1] = next[bin] = place;
            if (place < wanted && inside > crowd) atomicOr(&crowded, 1);
        };
        put(2 * own_pair() + 1, above, own.high);
        put(2 * own_pair(), above + own.high, own.low);
        if (own_pair() == 0) firsts[0] = all;
        __syncthreads();
    }
};
