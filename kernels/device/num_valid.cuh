// SPDX-License-Identifier: Apache-2.0
// Rows from num_valid on are padding. The number is in device memory, where a CUDA graph may change it between replays,
// or a parameter.
#pragma once

#include "device/types.cuh"

SPECIALISED bool HAS_NUM_VALID = false;  // the number is in device memory

// Return the number as given, for kernels that use it later.
__device__ __forceinline__ int fetch_valid(const int* num_valid, int num_valid_value) {
    return HAS_NUM_VALID ? __ldg(num_valid) : num_valid_value;
}

// Return the number of valid rows: a number in memory is clamped; a negative parameter means all rows.
__device__ __forceinline__ int64_t clamp_valid(int fetched, int64_t num_rows) {
    if (fetched < 0) return HAS_NUM_VALID ? 0 : num_rows;
    return min(static_cast<int64_t>(fetched), num_rows);
}

__device__ __forceinline__ int64_t valid_rows(const int* num_valid, int num_valid_value, int64_t num_rows) {
    return clamp_valid(fetch_valid(num_valid, num_valid_value), num_rows);
}
