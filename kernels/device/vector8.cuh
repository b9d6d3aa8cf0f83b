// SPDX-License-Identifier: Apache-2.0
// Eight adjacent elements of a row, the unit in which dot products over hidden read.
#pragma once

#include "device/types.cuh"

// The elements stay as they lie in memory, so that many loads in flight take few registers.
template <typename T>
struct Vector8 {
    unsigned words[2 * sizeof(T)];

    __device__ __forceinline__ float operator[](int j) const;
};

template <>
__device__ __forceinline__ float Vector8<float>::operator[](int j) const {
    return __uint_as_float(words[j]);
}

template <typename T>
__device__ __forceinline__ float Vector8<T>::operator[](int j) const {
    const T element = {static_cast<unsigned short>(words[j / 2] >> j % 2 * 16)};
    return to_float(element);
}

__device__ __forceinline__ unsigned bits_of(float value) { return __float_as_uint(value); }
template <typename T>
__device__ __forceinline__ unsigned bits_of(T value) {
    return value.bits;
}

// Load eight elements, of which the first `left` (any number) are within the row; the others are 0. Aligned: the source
// is a multiple of 16 bytes, and so is the length of the row.
template <bool Aligned, typename T>
__device__ __forceinline__ Vector8<T> load_vector8(const T* source, int left) {
    constexpr int SIZE = sizeof(T), PER_WORD = 4 / SIZE;
    Vector8<T> vector;
#pragma unroll
    for (int i = 0; i < 2 * SIZE; ++i) vector.words[i] = 0u;
    if (Aligned) {
        if (left > 0) {
#pragma unroll
            for (int i = 0; i < SIZE / 2; ++i) {
                const uint4 word = __ldg(reinterpret_cast<const uint4*>(source) + i);
                vector.words[4 * i] = word.x;
                vector.words[4 * i + 1] = word.y;
                vector.words[4 * i + 2] = word.z;
                vector.words[4 * i + 3] = word.w;
            }
        }
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (j < left) vector.words[j / PER_WORD] |= bits_of(source[j]) << j % PER_WORD * 16;
        }
    }
    return vector;
}

// The same for two groups of four 16-bit elements. The second begins `Distance` elements after the first.
template <bool Aligned, int Distance, typename T>
__device__ __forceinline__ Vector8<T> load_vector4_twice(const T* source, int left) {
    static_assert(sizeof(T) == 2, "four elements are a word of 8 bytes");
    Vector8<T> vector = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const T* four = source + i * Distance;
        if (Aligned) {
            if (left <= i * Distance) continue;
            const uint2 word = __ldg(reinterpret_cast<const uint2*>(four));
            vector.words[2 * i] = word.x;
            vector.words[2 * i + 1] = word.y;
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (i * Distance + j < left) vector.words[2 * i + j / 2] |= bits_of(four[j]) << j % 2 * 16;
            }
        }
    }
    return vector;
}

// Add the products of eight pairs to a dot product.
template <typename A, typename B>
__device__ __forceinline__ float dot(const Vector8<A>& a, const Vector8<B>& b, float sum) {
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(a[j], b[j], sum);
    return sum;
}
