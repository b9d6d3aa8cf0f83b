// SPDX-License-Identifier: Apache-2.0
// Rows from num_valid on are padding: a count in device memory, which a CUDA graph may change between replays, or a value.
#pragma once

#include "types.cuh"

__device__ __forceinline__ int64_t valid_rows(const int *num_valid, int num_valid_value, int64_t num_rows) {
    if (num_valid != nullptr) return min(max(static_cast<int64_t>(__ldg(num_valid)), int64_t(0)), num_rows);
    return num_valid_value < 0 ? num_rows : min(static_cast<int64_t>(num_valid_value), num_rows);
}
