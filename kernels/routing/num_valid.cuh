// SPDX-License-Identifier: Apache-2.0
// Rows from num_valid on are padding: a count in device memory, which a CUDA graph
// may change between replays, or a value.
#pragma once

#include "device/types.cuh"

SPECIALISED bool HAS_NUM_VALID = false;  // 1: the count is in device memory

// The number as it came, for kernels that wait for other things first.
__device__ __forceinline__ int fetch_valid(const int* num_valid, int num_valid_value) {
    return HAS_NUM_VALID ? __ldg(num_valid) : num_valid_value;
}

// What it means: a count in memory is clamped, a negative value stands for all rows.
__device__ __forceinline__ int64_t clamp_valid(int fetched, int64_t num_rows) {
    if (fetched < 0) return HAS_NUM_VALID ? 0 : num_rows;
    return min(static_cast<int64_t>(fetched), num_rows);
}

__device__ __forceinline__ int64_t valid_rows(const int* num_valid, int num_valid_value, int64_t num_rows) {
    return clamp_valid(fetch_valid(num_valid, num_valid_value), num_rows);
}
