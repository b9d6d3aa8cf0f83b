// SPDX-License-Identifier: Apache-2.0
// A row laid over Lanes threads: lane l holds PerLane adjacent columns from l * PerLane on.
#pragma once

#include "types.cuh"

// Columns first .. first + PerLane - 1 of a row as float; NaN from column `end` on. Whole: there is no such column.
// Aligned: rows start at whole words, the longest of up to 16 bytes that PerLane is a multiple of, and are read by
// words.
template <typename T, int PerLane, bool Whole, bool Aligned>
__device__ __forceinline__ void load_columns(const T* row, int first, int end, float (&values)[PerLane]) {
    constexpr int LONGEST = 16 / sizeof(T);
    constexpr int WORD = PerLane % LONGEST == 0 ? LONGEST : 4;
#pragma unroll
    for (int j = 0; j < PerLane; j += WORD) {
        if (Aligned && (Whole || first + j + WORD <= end)) {
            load_floats<T, WORD>(row + first + j, values + j);
        } else {
#pragma unroll
            for (int i = 0; i < WORD; ++i) {
                const bool exists = Whole || first + j + i < end;
                values[j + i] = exists ? to_float(row[first + j + i]) : __uint_as_float(0x7fc00000u);
            }
        }
    }
}
