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

__device__ __forceinline__ float to_float(float value) {
    return value;
}

__device__ __forceinline__ float to_float(Float16 value) {
    return half_bits_to_float(value.bits);
}

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

template <typename T>
constexpr int PER_WORD = 16 / sizeof(T);  // elements in a 16-byte word

// Read the PER_WORD elements of an aligned 16-byte word, by the read-only path.
template <typename T>
__device__ __forceinline__ void load_word(const T *source, T (&target)[PER_WORD<T>]) {
    union {
        uint4 word;
        T elements[PER_WORD<T>];
    };
    word = __ldg(reinterpret_cast<const uint4 *>(source));
#pragma unroll
    for (int i = 0; i < PER_WORD<T>; ++i) target[i] = elements[i];
}
