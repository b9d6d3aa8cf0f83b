// SPDX-License-Identifier: Apache-2.0
// A row laid over Lanes threads: lane l holds PerLane adjacent columns from l * PerLane on.
#pragma once

#include "types.cuh"

// Columns first .. first + PerLane - 1 of a row as float; NaN from column `end` on. Whole: there is no such column.
// Aligned: the row starts at a multiple of 16 bytes, and whole words are read at once.
template <typename T, int PerLane, bool Whole, bool Aligned>
__device__ __forceinline__ void load_columns(const T *row, int first, int end, float (&values)[PerLane]) {
    constexpr int WORD = Aligned ? PER_WORD<T> : 1;
#pragma unroll
    for (int j = 0; j < PerLane; j += WORD) {
        if (WORD > 1 && (Whole || first + j + WORD <= end)) {
            T word[PER_WORD<T>];
            load_word(row + first + j, word);
#pragma unroll
            for (int i = 0; i < WORD; ++i) values[j + i] = to_float(word[i]);
        } else {
#pragma unroll
            for (int i = 0; i < WORD; ++i) {
                const bool exists = Whole || first + j + i < end;
                values[j + i] = exists ? to_float(row[first + j + i]) : __uint_as_float(0x7fc00000u);
            }
        }
    }
}
