// SPDX-License-Identifier: Apache-2.0
// Number types of NVRTC without any CUDA header: 16-bit floats are words that are converted to float, which is exact.
#pragma once

#include "ptx.cuh"

typedef long long int64_t;

#define FULL_WARP 0xffffffffu

struct Float16 {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float to_float(Float16 value) { return half_bits_to_float(value.bits); }

__device__ __forceinline__ float to_float(BFloat16 value) {
    return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

// The type of a dtype code: 0 float32, 1 float16, 2 bfloat16.
template <int CODE>
struct Scalar {
    typedef float type;
};
template <>
struct Scalar<1> {
    typedef Float16 type;
};
template <>
struct Scalar<2> {
    typedef BFloat16 type;
};

// Unsigned words of 8 and 16 bytes.
template <int BYTES>
struct Word {
    typedef uint4 type;
};
template <>
struct Word<8> {
    typedef uint2 type;
};

// Read N adjacent elements that form an aligned word, by the read-only path.
template <typename T, int N>
__device__ __forceinline__ void load_word(const T* source, T (&target)[N]) {
    typedef typename Word<N * sizeof(T)>::type word_t;
    static_assert(sizeof(word_t) == N * sizeof(T), "words have 8 or 16 bytes");
    union {
        word_t word;
        T elements[N];
    };
    word = __ldg(reinterpret_cast<const word_t*>(source));
#pragma unroll
    for (int i = 0; i < N; ++i) target[i] = elements[i];
}
