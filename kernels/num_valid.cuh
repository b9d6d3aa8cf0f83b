// SPDX-License-Identifier: Apache-2.0 Rows from num_valid on are padding: a count in device memory, which a CUDA graph
// may change between replays, or a value.
#pragma once

#include "types.cuh"

__device__ __forceinline__ int64_t valid_rows(const int* num_valid, int num_valid_value, int64_t num_rows) {
    const int count = num_valid != nullptr ? max(__ldg(num_valid), 0) : num_valid_value;  // -1: all
    return count < 0 ? num_rows : min(static_cast<int64_t>(count), num_rows);
}
