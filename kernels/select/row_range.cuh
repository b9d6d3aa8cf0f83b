// SPDX-License-Identifier: Apache-2.0
// The part of a row that is ranked, and what fills results for which there is no entry.
#pragma once

#include "device/types.cuh"

// `length` columns from `start` on, clamped to the row.
struct RowRange {
    int start;
    int length;
};

__device__ __forceinline__ RowRange row_range(const int* lengths, const int* starts, int64_t row, int num_columns) {
    const int start = starts != nullptr ? starts[row] : 0;
    if (start < 0 || start >= num_columns) return {0, 0};
    const int rest = num_columns - start;
    return {start, lengths != nullptr ? min(max(lengths[row], 0), rest) : rest};
}

// Return -inf in the type of a dtype code.
template <int CODE>
__device__ __forceinline__ typename Scalar<CODE>::type minus_infinity() {
    union {
        unsigned bits;
        typename Scalar<CODE>::type value;
    };
    bits = CODE == 0 ? 0xff800000u : CODE == 1 ? 0xfc00u : 0xff80u;
    return value;
}
