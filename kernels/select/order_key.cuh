// SPDX-License-Identifier: Apache-2.0
// The order of scores, in one place: an unsigned key that is larger for a better
// score. Descending value, -0.0 equal to +0.0, subnormals exact, NaN of any kind lowest. Equal keys go to the lower
// index, which whoever compares them sees to.
#pragma once

#include "device/ptx.cuh"

constexpr unsigned NO_KEY = 0u;   // below every score: padding, or an entry already taken
constexpr unsigned NAN_KEY = 1u;  // -inf has key 0x00800000, so there is capacity below it

// A float's bits are a sign and a magnitude that orders like an integer, so the key is the magnitude counted up or down
// from the middle. Integers only: a float operation would flush subnormals into ties.
__device__ __forceinline__ unsigned order_key(float value) {
    const unsigned bits = __float_as_uint(value);
    const unsigned magnitude = bits & 0x7fffffffu;
    const unsigned key = static_cast<int>(bits) < 0 ? 0x80000000u - magnitude : 0x80000000u + magnitude;
    return magnitude > 0x7f800000u ? NAN_KEY : key;
}

// The same order for a value that arithmetic made, whose NaN is the canonical one, 0x7fffffff. Flipping the bits of
// negatives and the sign of others orders them; adding 1 to negatives makes -0.0, which sums become that are flushed,
// equal to +0.0, and adding 2 to all turns NaN from the highest key into 1. Half the instructions of order_key.
__device__ __forceinline__ unsigned sum_order_key(float sum) {
    const unsigned bits = canonical_bits(sum);
    const unsigned sign = static_cast<unsigned>(static_cast<int>(bits) >> 31);
    return (bits ^ (sign | 0x80000000u)) - sign + 2u;
}

// A key of that order, but for the zeros and NaN, with a tag in the low bits that Mask has. NaN is highest if its sign
// is clear, and lowest if it is set.
template <unsigned Mask>
__device__ __forceinline__ unsigned tagged_key_of_bits(unsigned bits, unsigned tag) {
    const unsigned flips = static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u;
    return ((bits ^ flips) & ~Mask) | tag;
}

template <unsigned Mask>
__device__ __forceinline__ unsigned tagged_key(float sum, unsigned tag) {
    return tagged_key_of_bits<Mask>(canonical_bits(sum), tag);
}

// What no value with this tagged key exceeds.
template <unsigned Mask>
__device__ __forceinline__ float tagged_key_ceiling(unsigned key) {
    const unsigned flipped = key | Mask;
    return __uint_as_float(flipped ^ (static_cast<int>(flipped) < 0 ? 0x80000000u : 0xffffffffu));
}

// The value of a key of sum_order_key.
__device__ __forceinline__ float sum_key_value(unsigned key) {
    const unsigned flipped = key - 2u;
    return __uint_as_float(static_cast<int>(flipped) < 0 ? flipped ^ 0x80000000u : 0u - flipped);
}

// A key with its column below it: all entries of a row differ, and a lower column is better.
__device__ __forceinline__ unsigned long long rank_key(unsigned key, unsigned column) {
    return static_cast<unsigned long long>(key) << 32 | (0xffffffffu - column);
}

__device__ __forceinline__ unsigned column_of(unsigned long long rank) {
    return 0xffffffffu - static_cast<unsigned>(rank);
}
