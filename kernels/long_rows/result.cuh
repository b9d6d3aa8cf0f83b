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

// The pages of a row of up to 32768 columns, or none: mapped_index by a multiplication in place of a division. `inverse`
// is 2**31 / page_size, rounded up, so inverse * page_size = 2**31 + e with e < page_size. For pages of up to 65536
// columns, column * e < 2**31, and the quotient is exact. For larger ones it is 0, since column / page_size is below 1/2.
struct ShortRowPages {
    const int* map;
    int page_size;
    unsigned inverse;

    __device__ __forceinline__ ShortRowPages(const int* map, int page_size)
        : map(map),
          page_size(page_size),
          inverse(map == nullptr ? 0 : (0x80000000u + static_cast<unsigned>(page_size) - 1) / page_size) {}

    __device__ __forceinline__ int page_of(int column) const {
        return static_cast<int>(static_cast<unsigned long long>(inverse) * column >> 31);
    }
};

// Write the indices of `count` columns in shared memory. A thread reads several entries of the map at once.
template <int Block>
__device__ __forceinline__ void write_indices(const unsigned short* columns, int count, const ShortRowPages& pages,
                                              int* indices) {
    constexpr int AT_ONCE = 4;
#pragma unroll 1
    for (int first = threadIdx.x; first < count; first += AT_ONCE * Block) {
        int index[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) index[j] = columns[min(first + j * Block, count - 1)];
        if (pages.map != nullptr) {
            int page[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                page[j] = pages.page_of(index[j]);
                index[j] -= page[j] * pages.page_size;
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) index[j] += pages.map[page[j]] * pages.page_size;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (first + j * Block < count) indices[first + j * Block] = index[j];
        }
    }
}
