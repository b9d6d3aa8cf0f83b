// SPDX-License-Identifier: Apache-2.0
// Loads of adjacent columns of a row, as float.
#pragma once

#include "device/types.cuh"

// Load N columns of a row from `first` on; NaN from column `end` on, which is a multiple of EndsAt.
// Whole: all columns exist. Aligned: they are read as one word. A word after the end is replaced by the first one of
// the row, since a branch would hold up the code after it.
template <int N, bool Whole, bool Aligned, int EndsAt, typename T>
__device__ __forceinline__ void load_piece(const T* row, int first, int end, float* values) {
    constexpr bool ENDS_BETWEEN = EndsAt % N == 0;
    const float nan = __uint_as_float(0x7fc00000u);
    if (Aligned && (Whole || ENDS_BETWEEN || first + N <= end)) {
        const bool exists = Whole || !ENDS_BETWEEN || first < end;
        load_floats<T, N>(row + (exists ? first : 0), values);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = exists ? values[i] : nan;
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = Whole || first + i < end ? to_float(row[first + i]) : nan;
    }
}

// The same columns of 16-bit floats as words of two.
template <int N, bool Whole, bool Aligned, int EndsAt, typename T>
__device__ __forceinline__ void load_piece_packed(const T* row, int first, int end, unsigned* words) {
    static_assert(sizeof(T) == 2 && N % 4 == 0, "whole words of two floats");
    constexpr bool ENDS_BETWEEN = EndsAt % N == 0;
    constexpr unsigned NAN_BITS_16 = 0x7fffu;
    if (Aligned && (Whole || ENDS_BETWEEN || first + N <= end)) {
        const bool exists = Whole || !ENDS_BETWEEN || first < end;
        const Words<N / 2> read = load_words(row + (exists ? first : 0), Words<N / 2>());
#pragma unroll
        for (int i = 0; i < N / 2; ++i) words[i] = exists ? read.word[i] : NAN_BITS_16 * 0x10001u;
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const unsigned bits = Whole || first + i < end ? __ldg(&row[first + i].bits) : NAN_BITS_16;
            words[i / 2] = i % 2 == 0 ? bits : words[i / 2] | bits << 16;
        }
    }
}

// Load columns first .. first + PerLane - 1 of a row. Aligned: rows start at whole words and are read by words, the
// longest of up to 16 bytes that PerLane is a multiple of.
template <typename T, int PerLane, bool Whole, bool Aligned, int EndsAt = 1>
__device__ __forceinline__ void load_columns(const T* row, int first, int end, float (&values)[PerLane]) {
    constexpr int LONGEST = 16 / sizeof(T);
    constexpr int WORD = PerLane % LONGEST == 0 ? LONGEST : 4;
#pragma unroll
    for (int j = 0; j < PerLane; j += WORD) load_piece<WORD, Whole, Aligned, EndsAt>(row, first + j, end, values + j);
}
