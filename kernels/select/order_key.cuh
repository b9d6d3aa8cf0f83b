// SPDX-License-Identifier: Apache-2.0
// The order of scores, in one place: an unsigned key that is larger for a better score. Scores descend, -0.0 equals
// +0.0, subnormals are exact, NaN of any kind is lowest. Equal keys go to the lower index, which the code that compares
// them sees to.
#pragma once

#include "device/ptx.cuh"

constexpr unsigned NO_KEY = 0u;   // below every score: padding, or an entry already taken
constexpr unsigned NAN_KEY = 1u;  // -inf has key 0x00800000, so lower keys are free

// The bits of a float are a sign and a magnitude that orders like an integer, so the key is the magnitude counted up or
// down from the middle. Integer operations only: a float operation would flush subnormals into ties.
__device__ __forceinline__ unsigned order_key(float value) {
    const unsigned bits = __float_as_uint(value);
    const unsigned magnitude = bits & 0x7fffffffu;
    const unsigned key = static_cast<int>(bits) < 0 ? 0x80000000u - magnitude : 0x80000000u + magnitude;
    return magnitude > 0x7f800000u ? NAN_KEY : key;
}

// The same order for a value that arithmetic made, whose only NaN is 0x7fffffff, in half the instructions. Flipping all
// bits of negative values and the sign of others orders them. Adding 1 to negative ones makes -0.0, into which flushed
// sums turn, equal to +0.0. Adding 2 to all turns NaN from the highest key into 1.
__device__ __forceinline__ unsigned sum_order_key(float sum) {
    const unsigned bits = canonical_bits(sum);
    const unsigned sign = static_cast<unsigned>(static_cast<int>(bits) >> 31);
    return (bits ^ (sign | 0x80000000u)) - sign + 2u;
}

// A key of that order with a tag in the low bits, those of Mask. Zeros of both signs differ. NaN is highest if its sign
// is clear, lowest if it is set.
template <unsigned Mask>
__device__ __forceinline__ unsigned tagged_key_of_bits(unsigned bits, unsigned tag) {
    const unsigned flips = static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u;
    return ((bits ^ flips) & ~Mask) | tag;
}

template <unsigned Mask>
__device__ __forceinline__ unsigned tagged_key(float sum, unsigned tag) {
    return tagged_key_of_bits<Mask>(canonical_bits(sum), tag);
}

// Return an upper bound of the values that have this tagged key.
template <unsigned Mask>
__device__ __forceinline__ float tagged_key_ceiling(unsigned key) {
    const unsigned flipped = key | Mask;
    return __uint_as_float(flipped ^ (static_cast<int>(flipped) < 0 ? 0x80000000u : 0xffffffffu));
}

// Return the value of a key of sum_order_key.
__device__ __forceinline__ float sum_key_value(unsigned key) {
    const unsigned flipped = key - 2u;
    return __uint_as_float(static_cast<int>(flipped) < 0 ? flipped ^ 0x80000000u : 0u - flipped);
}

// Append the column to a key, in the low half: all entries of a row differ, and a lower column is better.
__device__ __forceinline__ unsigned long long rank_key(unsigned key, unsigned column) {
    return static_cast<unsigned long long>(key) << 32 | (0xffffffffu - column);
}

__device__ __forceinline__ unsigned column_of(unsigned long long rank) {
    return 0xffffffffu - static_cast<unsigned>(rank);
}
