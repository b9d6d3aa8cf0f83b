// SPDX-License-Identifier: Apache-2.0
// The order of scores by their bits alone, for any dtype. The bits of a score stand at the top of a word, where a
// 16-bit float has sign and magnitude just as a float32 has: no conversion, and the same code for all.
#pragma once

#include "select/order_key.cuh"
#include "device/types.cuh"

__device__ __forceinline__ unsigned score_bits(float value) { return __float_as_uint(value); }

template <typename T>
__device__ __forceinline__ unsigned score_bits(T value) {
    return static_cast<unsigned>(value.bits) << 16;
}

__device__ __forceinline__ void store_bits(float* target, unsigned bits) { *target = __uint_as_float(bits); }

template <typename T>
__device__ __forceinline__ void store_bits(T* target, unsigned bits) {
    target->bits = static_cast<unsigned short>(bits >> 16);
}

// Return the bits of +inf of a dtype code; larger magnitudes are NaN.
template <int Code>
__device__ constexpr unsigned infinity_bits() {
    return Code == 1 ? 0x7c000000u : 0x7f800000u;
}

constexpr unsigned ZERO_KEY = 0x80000000u;

// As order_key of order_key.cuh.
template <int Code>
__device__ __forceinline__ unsigned bits_key(unsigned bits) {
    const unsigned magnitude = bits & 0x7fffffffu;
    const unsigned key = static_cast<int>(bits) < 0 ? ZERO_KEY - magnitude : ZERO_KEY + magnitude;
    return magnitude > infinity_bits<Code>() ? NAN_KEY : key;
}

// Return the bits of the score of a key. They are unknown for the two zeros, which share a key, and for NaN.
__device__ __forceinline__ unsigned key_bits(unsigned key) { return key >= ZERO_KEY ? key - ZERO_KEY : 0u - key; }

__device__ __forceinline__ bool key_tells_bits(unsigned key) { return key != ZERO_KEY && key > NAN_KEY; }

// A test for scores that reach a key, on words as they lie in memory: one float32, or two 16-bit floats. Comparisons of
// floats do not flush subnormals here, and NaN never passes.
template <int Code>
struct Passes {
    static constexpr unsigned STEP = Code == 0 ? 1u : 0x10000u;  // from one key to the next

    unsigned key;
    bool everything, nothing;  // by_word() is for neither
    unsigned lowest;           // the lowest score that passes; in both halves of the word for 16 bits

    // Pass scores whose key is `from` or higher; higher only, if `above`.
    __device__ __forceinline__ Passes(unsigned from, bool above) {
        key = (from + (above ? STEP : 0u) + (STEP - 1u)) & ~(STEP - 1u);
        everything = from <= NAN_KEY && !above;
        nothing = key > ZERO_KEY + infinity_bits<Code>() || key < from;
        const unsigned bits = key_bits(max(key, ZERO_KEY - infinity_bits<Code>()));
        lowest = Code == 0 ? bits : bits | bits >> 16;
        if (everything) key = from;
    }

    __device__ __forceinline__ bool by_bits(unsigned bits) const { return bits_key<Code>(bits) >= key; }

    // Set bit `Bit` if the word's first score passes, and for 16-bit floats bit `Bit + 16` if the second one does.
    template <int Bit>
    __device__ __forceinline__ void by_word(unsigned word, unsigned& found) const {
#ifdef __CUDACC__
        constexpr unsigned FIRST = 1u << Bit, BOTH = 0x10001u << Bit % 16;
        if (Code == 0) {
            asm("{\n.reg .pred passes;\nsetp.ge.f32 passes, %1, %2;\n@passes or.b32 %0, %0, %3;\n}"
                : "+r"(found)
                : "f"(__uint_as_float(word)), "f"(__uint_as_float(lowest)), "n"(FIRST));
        } else if (Code == 1) {
            unsigned halves;
            asm("set.ge.u32.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(word), "r"(lowest));
            found |= halves & BOTH;
        } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
            unsigned halves;
            asm("set.ge.u32.bf16x2 %0, %1, %2;" : "=r"(halves) : "r"(word), "r"(lowest));
            found |= halves & BOTH;
#else
            asm("{\n.reg .pred passes;\nsetp.ge.f32 passes, %1, %2;\n@passes or.b32 %0, %0, %3;\n}"
                : "+r"(found)
                : "f"(__uint_as_float(word << 16)), "f"(__uint_as_float(lowest & 0xffff0000u)), "n"(FIRST));
            asm("{\n.reg .pred passes;\nsetp.ge.f32 passes, %1, %2;\n@passes or.b32 %0, %0, %3;\n}"
                : "+r"(found)
                : "f"(__uint_as_float(word & 0xffff0000u)), "f"(__uint_as_float(lowest & 0xffff0000u)),
                  "n"(BOTH - FIRST));
#endif
        }
#else
        if (by_bits(Code == 0 ? word : word << 16)) found |= 1u << Bit;
        if (Code != 0 && by_bits(word & 0xffff0000u)) found |= 0x10000u << Bit % 16;
#endif
    }
};
