// SPDX-License-Identifier: Apache-2.0
// The order of scores by their bits alone, for any dtype: the bits of a score stand at the top of a word, where those of
// a 16-bit float have a sign and a magnitude just as a float32 has. No conversion, and one code for all.
#pragma once

#include "order.cuh"
#include "types.cuh"

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

// The bits of +inf of a dtype code; larger magnitudes are NaN.
template <int Code>
__device__ constexpr unsigned infinity_bits() {
    return Code == 1 ? 0x7c000000u : 0x7f800000u;
}

#define ZERO_KEY 0x80000000u

// As order_key.
template <int Code>
__device__ __forceinline__ unsigned bits_key(unsigned bits) {
    const unsigned magnitude = bits & 0x7fffffffu;
    const unsigned key = static_cast<int>(bits) < 0 ? ZERO_KEY - magnitude : ZERO_KEY + magnitude;
    return magnitude > infinity_bits<Code>() ? NAN_KEY : key;
}

// The bits of a key that are known from it: all but those of the two zeros and of NaN.
__device__ __forceinline__ unsigned key_bits(unsigned key) { return key >= ZERO_KEY ? key - ZERO_KEY : 0u - key; }

__device__ __forceinline__ bool key_tells_bits(unsigned key) { return key != ZERO_KEY && key != NAN_KEY; }

// Which scores have at least this key. From above zero up to +inf that is a range of bits, without NaN.
template <int Code>
struct AtLeast {
    unsigned key;

    __device__ __forceinline__ bool is_range() const {
        return key > ZERO_KEY && key <= ZERO_KEY + infinity_bits<Code>();
    }

    // Where is_range() holds; what does not change from score to score is kept in registers.
    __device__ __forceinline__ bool by_range(unsigned bits) const {
        const unsigned lowest = key - ZERO_KEY;
        return bits - lowest <= infinity_bits<Code>() - lowest;
    }

    __device__ __forceinline__ bool by_key(unsigned bits) const { return bits_key<Code>(bits) >= key; }
};
