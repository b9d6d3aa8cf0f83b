// SPDX-License-Identifier: Apache-2.0
// Number types without any CUDA header. A 16-bit float is a word of bits, which converts to float exactly.
#pragma once

#include "device/ptx.cuh"

typedef long long int64_t;

// Declare a constant that each specialisation chooses: cupy_router/declarations.py replaces the default that stands in
// the file. One declaration a line.
#define SPECIALISED constexpr

constexpr unsigned FULL_WARP = 0xffffffffu;

// Move the code for a rare condition out of the way: at small sizes a kernel spends much of its time on fetching
// instructions.
#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)

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

// Read an element as float, by the read-only path.
__device__ __forceinline__ float ldg_float(const float* source) { return __ldg(source); }

template <typename T>
__device__ __forceinline__ float ldg_float(const T* source) {
    return to_float(T{__ldg(&source->bits)});
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

// The integer of that many bytes.
template <int BYTES, bool UNSIGNED = false>
struct Integer;
template <>
struct Integer<1, true> {
    typedef unsigned char type;
};
template <>
struct Integer<2, false> {
    typedef short type;
};
template <>
struct Integer<2, true> {
    typedef unsigned short type;
};
template <>
struct Integer<4, false> {
    typedef int type;
};
template <>
struct Integer<8, false> {
    typedef long long type;
};

// Return the bits of the nearest 16-bit float, ties to even.
__device__ __forceinline__ unsigned short rounded_bits(float value, Float16) { return float_to_half_bits(value); }

__device__ __forceinline__ unsigned short rounded_bits(float value, BFloat16) {
    const unsigned bits = __float_as_uint(value);
    const unsigned rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return static_cast<unsigned short>(value != value ? 0x7fffu : rounded);
}

__device__ __forceinline__ void store_float(float* target, float value) { *target = value; }

template <typename T>
__device__ __forceinline__ void store_float(T* target, float value) {
    target->bits = rounded_bits(value, T());
}

// Return the next floats of `source` as one 32-bit word, the first one at the lower address.
__device__ __forceinline__ unsigned floats_to_word(const float* source, float) { return __float_as_uint(source[0]); }

template <typename T>
__device__ __forceinline__ unsigned floats_to_word(const float* source, T type) {
    return rounded_bits(source[0], type) | static_cast<unsigned>(rounded_bits(source[1], type)) << 16;
}

// Write 16 bytes of adjacent elements to an address that is a multiple of 16.
template <typename T>
__device__ __forceinline__ void store_floats(T* target, const float (&source)[16 / sizeof(T)]) {
    constexpr int IN_WORD = 4 / sizeof(T);
    uint4 words;
    words.x = floats_to_word(source, T());
    words.y = floats_to_word(source + IN_WORD, T());
    words.z = floats_to_word(source + 2 * IN_WORD, T());
    words.w = floats_to_word(source + 3 * IN_WORD, T());
    *reinterpret_cast<uint4*>(target) = words;
}

// Split a 32-bit word into its floats, the one at the lower address first.
__device__ __forceinline__ void word_to_floats(unsigned word, float, float* target) {
    target[0] = __uint_as_float(word);
}

__device__ __forceinline__ void word_to_floats(unsigned word, BFloat16, float* target) {
    target[0] = __uint_as_float(word << 16);
    target[1] = __uint_as_float(word & 0xffff0000u);
}

__device__ __forceinline__ void word_to_floats(unsigned word, Float16, float* target) {
    target[0] = half_bits_to_float(static_cast<unsigned short>(word));
    target[1] = half_bits_to_float(static_cast<unsigned short>(word >> 16));
}

// 32-bit words that are read together, by the read-only path.
template <int N>
struct Words {
    unsigned word[N];
};

__device__ __forceinline__ Words<2> load_words(const void* source, Words<2>) {
    const uint2 read = __ldg(static_cast<const uint2*>(source));
    return {{read.x, read.y}};
}

__device__ __forceinline__ Words<4> load_words(const void* source, Words<4>) {
    const uint4 read = __ldg(static_cast<const uint4*>(source));
    return {{read.x, read.y, read.z, read.w}};
}

// Read N adjacent elements, 8 or 16 bytes in all, as float. The address is a multiple of that size.
template <typename T, int N>
__device__ __forceinline__ void load_floats(const T* source, float* target) {
    constexpr int WORDS = N * sizeof(T) / 4;
    static_assert(WORDS == 2 || WORDS == 4, "8 or 16 bytes are read at once");
    const Words<WORDS> words = load_words(source, Words<WORDS>());
#pragma unroll
    for (int i = 0; i < WORDS; ++i) word_to_floats(words.word[i], T(), target + i * (4 / sizeof(T)));
}
