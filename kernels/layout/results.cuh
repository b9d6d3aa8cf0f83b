// SPDX-License-Identifier: Apache-2.0
// The arrays of a layout, and who writes what: an expert's owner its counts and offsets, and the padding behind its
// rows; a pair's owner its row. Together they write every element once, so that nothing is cleared before.
#pragma once

#include "device/types.cuh"

SPECIALISED bool LAYOUT_COUNTS = true;  // these arrays are wanted
SPECIALISED bool LAYOUT_OFFSETS = true;
SPECIALISED bool LAYOUT_ENDS = true;
SPECIALISED bool LAYOUT_ORDER = true;
SPECIALISED bool LAYOUT_POSITIONS = true;
SPECIALISED bool LAYOUT_BLOCK_EXPERTS = false;
SPECIALISED bool LAYOUT_ROW_EXPERTS = false;
SPECIALISED int LAYOUT_ALIGNMENT = 1;       // an expert's first row is a multiple of it
SPECIALISED bool LAYOUT_DENSE = true;       // rows of positions follow each other
SPECIALISED bool LAYOUT_PREFILLED = false;  // all rows were written as padding before
SPECIALISED int LAYOUT_LOAD_BYTES = 0;      // of a number of the load; 0: it is not wanted

constexpr bool LAYOUT_BY_ROW = LAYOUT_ORDER || LAYOUT_BLOCK_EXPERTS || LAYOUT_ROW_EXPERTS;
typedef Integer<LAYOUT_LOAD_BYTES == 8 ? 8 : 4>::type load_t;

struct LayoutResults {
    int* counts;
    int* offsets;
    int* ends;
    int* order;
    int* positions;
    int* block_experts;
    int* row_experts;
    int capacity;
    int pad;
    int64_t positions_stride;
    load_t* load = nullptr;  // of the first expert; null if it is counted elsewhere
};

// Rows begin .. end - 1.
struct Rows {
    int begin;
    int end;
};

// Blocks of rows that so many pairs of an expert take.
__device__ __forceinline__ int aligned_blocks(int count) {
    return LAYOUT_ALIGNMENT == 1 ? count : (count - 1) / LAYOUT_ALIGNMENT + (count > 0);
}

// Return the first row of a block, at most the capacity: the demand may exceed 32 bits.
__device__ __forceinline__ int first_row(int block, int capacity) {
    if (LAYOUT_ALIGNMENT == 1) return min(block, capacity);
    return static_cast<int>(min(static_cast<int64_t>(block) * LAYOUT_ALIGNMENT, static_cast<int64_t>(capacity)));
}

// Return the rows with a pair of an expert, from its first block of rows and the number of its pairs.
__device__ __forceinline__ Rows rows_of(int first_block, int count, int capacity) {
    const int first = first_row(first_block, capacity);
    return {first, first + min(count, capacity - first)};
}

// Write what is known of an expert.
__device__ __forceinline__ void write_expert(const LayoutResults& results, int expert, int count, Rows rows) {
    if (LAYOUT_COUNTS) results.counts[expert] = count;
    if (LAYOUT_LOAD_BYTES > 0 && results.load) results.load[expert] += count;
    if (LAYOUT_OFFSETS) results.offsets[expert] = rows.begin;
    if (LAYOUT_ENDS) results.ends[expert] = rows.end;
}

// Return a row, the sum of a first row and a rank, as it is written: -1 if there is no room for it.
__device__ __forceinline__ int row_of(unsigned row, int capacity) {
    return row < static_cast<unsigned>(capacity) ? static_cast<int>(row) : -1;
}

// Write the row of a pair of TopK a token; -1 where it has none.
template <int TopK>
__device__ __forceinline__ void write_position(const LayoutResults& results, unsigned pair, int row) {
    if (!LAYOUT_POSITIONS) return;
    const int64_t gap = LAYOUT_DENSE ? 0 : static_cast<int64_t>(pair / TopK) * (results.positions_stride - TopK);
    results.positions[pair + gap] = row;
}

// Write the pair of a row.
__device__ __forceinline__ void write_row(const LayoutResults& results, int row, unsigned pair, int expert) {
    if (LAYOUT_ORDER) results.order[row] = pair;
    if (LAYOUT_ROW_EXPERTS) results.row_experts[row] = expert;
    if (LAYOUT_BLOCK_EXPERTS && row % LAYOUT_ALIGNMENT == 0) results.block_experts[row / LAYOUT_ALIGNMENT] = expert;
}

// Write rows as padding, by threads `thread` of `threads`.
__device__ __forceinline__ void write_padding(const LayoutResults& results, Rows rows, unsigned thread,
                                              unsigned threads) {
    if (!LAYOUT_ORDER && !LAYOUT_ROW_EXPERTS) return;
#pragma unroll 1
    for (unsigned row = rows.begin + thread; row < static_cast<unsigned>(rows.end); row += threads) {
        if (LAYOUT_ORDER) results.order[row] = results.pad;
        if (LAYOUT_ROW_EXPERTS) results.row_experts[row] = -1;
    }
}

// The same for the rows from `begin` on, whose blocks have no expert.
__device__ __forceinline__ void fill_rows(const LayoutResults& results, int begin, unsigned thread, unsigned threads) {
    write_padding(results, {begin, results.capacity}, thread, threads);
    if (!LAYOUT_BLOCK_EXPERTS) return;
    const unsigned blocks = results.capacity / LAYOUT_ALIGNMENT;
#pragma unroll 1
    for (unsigned block = begin / LAYOUT_ALIGNMENT + thread; block < blocks; block += threads) {
        results.block_experts[block] = -1;
    }
}

// Write the rows behind the pairs of an expert, and those behind all experts.
__device__ __forceinline__ void fill_padding(const LayoutResults& results, Rows rows, unsigned thread,
                                             unsigned threads) {
    if (!LAYOUT_PREFILLED) write_padding(results, rows, thread, threads);
}

__device__ __forceinline__ void fill_tail(const LayoutResults& results, int begin, unsigned thread, unsigned threads) {
    if (!LAYOUT_PREFILLED) fill_rows(results, begin, thread, threads);
}

// Write the padding rows of each lane of a warp, by all lanes.
__device__ __forceinline__ void fill_by_warp(const LayoutResults& results, Rows own) {
    for (unsigned todo = __ballot_sync(FULL_WARP, own.begin < own.end); todo; todo &= todo - 1u) {
        const int source = __ffs(static_cast<int>(todo)) - 1;
        const Rows rows = {__shfl_sync(FULL_WARP, own.begin, source), __shfl_sync(FULL_WARP, own.end, source)};
        fill_padding(results, rows, threadIdx.x % 32, 32);
        __syncwarp();
    }
}

// Write the rows behind the pairs of each expert: warps take every so many experts, as many at once as they have lanes.
template <int Threads>
__device__ __forceinline__ void fill_experts(const LayoutResults& results, const Rows* padding, int num_experts,
                                             int block, int blocks) {
    if (LAYOUT_ALIGNMENT == 1 || LAYOUT_PREFILLED || (!LAYOUT_ORDER && !LAYOUT_ROW_EXPERTS)) return;
    const int lane = threadIdx.x % 32, warps = blocks * (Threads / 32);
    for (int first = block * (Threads / 32) + threadIdx.x / 32; first < num_experts; first += 32 * warps) {
        const int expert = first + lane * warps;
        fill_by_warp(results, expert < num_experts ? padding[expert] : Rows{0, 0});
    }
}
