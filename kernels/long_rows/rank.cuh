// SPDX-License-Identifier: Apache-2.0
// Key and column of a score in one integer: a larger rank is a better score, then a lower column. All ranks of a row
// differ, and none is 0. A column has only as many bits as the row needs, so that ranks of equal keys are close.
#pragma once

#include "select/order_bits.cuh"

template <bool Short>
struct RankWord {
    typedef unsigned long long type;
};
template <>
struct RankWord<true> {
    typedef unsigned type;
};

// Short: 16-bit scores in rows of up to 65536.
template <int Code, bool Short>
struct RankOrder {
    typedef typename RankWord<Short>::type Rank;
    static_assert(!Short || Code != 0, "a float32 has no room for a column");

    int column_bits;

    __device__ __forceinline__ explicit RankOrder(int length) : column_bits(32 - __clz(max(length - 1, 1))) {}

    __device__ __forceinline__ Rank last_column() const { return (static_cast<Rank>(1) << column_bits) - 1; }

    __device__ __forceinline__ Rank rank(unsigned key, int column) const {
        return lowest(key) | (last_column() - static_cast<Rank>(column));
    }

    // Return the lower bound of the ranks of a key.
    __device__ __forceinline__ Rank lowest(unsigned key) const {
        const unsigned upper = Code == 0 ? key : (key + 0xffffu) >> 16;  // NAN_KEY stays 1
        return static_cast<Rank>(upper) << column_bits;
    }

    __device__ __forceinline__ unsigned key(Rank rank) const {
        const unsigned upper = static_cast<unsigned>(rank >> column_bits);
        return Code == 0 || upper == NAN_KEY ? upper : upper << 16;
    }

    __device__ __forceinline__ int column(Rank rank) const {
        return static_cast<int>(last_column() - (rank & last_column()));
    }
};

// Ranks in registers; 0: none.
template <typename Rank, int N>
struct OwnRanks {
    Rank rank[N];

    // Call take(rank) for all.
    template <typename Take>
    __device__ __forceinline__ void for_each(Take take) const {
#pragma unroll
        for (int i = 0; i < N; ++i) take(rank[i]);
    }
};

__device__ __forceinline__ int bit_length(unsigned x) { return 32 - __clz(x); }
__device__ __forceinline__ int bit_length(unsigned long long x) { return 64 - __clzll(x); }
