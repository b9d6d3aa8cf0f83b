// SPDX-License-Identifier: Apache-2.0
// An entry of the results of a row.
#pragma once

#include "select/order_bits.cuh"
#include "select/row_range.cuh"

// Store the score of a column of the row `source`, -inf if the column is -1. Its key has the bits of most scores, which
// need not be read again then.
template <int Code>
__device__ __forceinline__ void store_value(typename Scalar<Code>::type* target,
                                            const typename Scalar<Code>::type* source, unsigned key, int column) {
    if (column < 0) {
        *target = minus_infinity<Code>();
    } else if (key_tells_bits(key)) {
        store_bits(target, key_bits(key));
    } else {
        *target = source[column];
    }
}

// Return the position of a column in a paged cache, by the pages of its row, or the column itself if that is -1 or there
// is no map.
__device__ __forceinline__ int mapped_index(const int* index_map, int64_t first_page, int column, int page_size) {
    if (index_map == nullptr || column < 0) return column;
    return index_map[first_page + column / page_size] * page_size + column % page_size;
}
