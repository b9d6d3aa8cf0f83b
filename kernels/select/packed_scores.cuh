// SPDX-License-Identifier: Apache-2.0
// Pairs of 16-bit scores, as they lie in a word, the one at the lower address in the lower half. From sm_90 on, one
// instruction treats both. Code is their dtype code. Comparisons are those of floats: -0.0 equals +0.0, and with NaN all
// are false. Nothing flushes subnormals.
#pragma once

#include "select/order_bits.cuh"

constexpr unsigned PACKED_NAN = 0x7fff7fffu;

__device__ __forceinline__ unsigned swap_halves(unsigned word) { return word << 16 | word >> 16; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

#ifdef __CUDACC__

#define PACKED_INSTRUCTION(NAME, OF_FLOAT16, OF_BFLOAT16)                    \
    template <int Code>                                                      \
    __device__ __forceinline__ unsigned NAME(unsigned a, unsigned b) {       \
        unsigned result;                                                     \
        if (Code == 1) {                                                     \
            asm(OF_FLOAT16 " %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));  \
        } else {                                                             \
            asm(OF_BFLOAT16 " %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b)); \
        }                                                                    \
        return result;                                                       \
    }

// The greater or the lower of each pair; NaN only if both are.
PACKED_INSTRUCTION(packed_max, "max.f16x2", "max.bf16x2")
PACKED_INSTRUCTION(packed_min, "min.f16x2", "min.bf16x2")
// 0xffff in each half where a >= b, or a > b, or both are numbers; else 0.
PACKED_INSTRUCTION(packed_reaches, "set.ge.u32.f16x2", "set.ge.u32.bf16x2")
PACKED_INSTRUCTION(packed_exceeds, "set.gt.u32.f16x2", "set.gt.u32.bf16x2")
PACKED_INSTRUCTION(packed_are_numbers, "set.num.u32.f16x2", "set.num.u32.bf16x2")
PACKED_INSTRUCTION(packed_add, "add.f16x2", "add.bf16x2")

// Return 0xffff in each half that is negative.
__device__ __forceinline__ unsigned packed_signs(unsigned word) {
    unsigned signs;
    asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(signs) : "r"(word));
    return signs;
}

#endif

// Return 16-bit keys that order both scores; 0 for NaN. Flipping all bits of negative scores and the sign of others
// orders them; before, adding 0 makes -0.0 equal to +0.0.
template <int Code>
__device__ __forceinline__ unsigned packed_order(unsigned scores) {
    const unsigned sums = packed_add<Code>(scores, 0u);
    return (sums ^ (packed_signs(sums) | 0x80008000u)) & packed_are_numbers<Code>(scores, scores);
}

#else

// Apply a function to the lower halves and to the upper ones, each at the top of a word, beside their keys.
template <int Code, typename Function>
__device__ __forceinline__ unsigned by_halves(unsigned a, unsigned b, Function function) {
    const unsigned low = function(a << 16, b << 16, bits_key<Code>(a << 16), bits_key<Code>(b << 16));
    const unsigned high_a = a & 0xffff0000u, high_b = b & 0xffff0000u;
    return low >> 16 | (function(high_a, high_b, bits_key<Code>(high_a), bits_key<Code>(high_b)) & 0xffff0000u);
}

template <int Code>
__device__ __forceinline__ unsigned packed_max(unsigned a, unsigned b) {
    return by_halves<Code>(
        a, b, [](unsigned x, unsigned y, unsigned key_x, unsigned key_y) { return key_x >= key_y ? x : y; });
}

template <int Code>
__device__ __forceinline__ unsigned packed_min(unsigned a, unsigned b) {
    return by_halves<Code>(a, b, [](unsigned x, unsigned y, unsigned key_x, unsigned key_y) {
        return key_x == NAN_KEY || (key_y != NAN_KEY && key_y < key_x) ? y : x;
    });
}

template <int Code>
__device__ __forceinline__ unsigned packed_reaches(unsigned a, unsigned b) {
    return by_halves<Code>(a, b, [](unsigned, unsigned, unsigned key_x, unsigned key_y) {
        return key_y != NAN_KEY && key_x >= key_y ? ~0u : 0u;
    });
}

template <int Code>
__device__ __forceinline__ unsigned packed_exceeds(unsigned a, unsigned b) {
    return by_halves<Code>(a, b, [](unsigned, unsigned, unsigned key_x, unsigned key_y) {
        return key_y != NAN_KEY && key_x > key_y ? ~0u : 0u;
    });
}

template <int Code>
__device__ __forceinline__ unsigned packed_order(unsigned scores) {
    return by_halves<Code>(scores, scores, [](unsigned, unsigned, unsigned key, unsigned) {
        return key == NAN_KEY ? 0u : key - (key < ZERO_KEY ? 0x10000u : 0u);
    });
}

#endif

// Return the key of bits_key for a 16-bit key.
__device__ __forceinline__ unsigned key_of_order(unsigned order) {
    return order == 0u ? NAN_KEY : (order + (order < ZERO_KEY >> 16 ? 1u : 0u)) << 16;
}
