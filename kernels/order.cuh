// SPDX-License-Identifier: Apache-2.0
// The order of scores, in one place: an unsigned key that is larger for a better score. Descending value, -0.0 equal to
// +0.0, subnormals exact, NaN of any kind lowest. Equal keys go to the lower index, which whoever compares them sees to.
#pragma once

#define NO_KEY 0u   // below every score: padding, or an entry already taken
#define NAN_KEY 1u  // -inf has key 0x00800000, so there is room below it

// A float's bits are a sign and a magnitude that orders like an integer, so the key is the magnitude counted up or down
// from the middle. Integers only: a float operation would flush subnormals into ties.
__device__ __forceinline__ unsigned order_key(float value) {
    const unsigned bits = __float_as_uint(value);
    const unsigned magnitude = bits & 0x7fffffffu;
    const unsigned key = static_cast<int>(bits) < 0 ? 0x80000000u - magnitude : 0x80000000u + magnitude;
    return magnitude > 0x7f800000u ? NAN_KEY : key;
}

// A key with its column below it: all entries of a row differ, and a lower column is better.
__device__ __forceinline__ unsigned long long rank_key(unsigned key, unsigned column) {
    return static_cast<unsigned long long>(key) << 32 | (0xffffffffu - column);
}

__device__ __forceinline__ unsigned column_of(unsigned long long rank) {
    return 0xffffffffu - static_cast<unsigned>(rank);
}

// The value of a key, with +0.0 for both zeros and one NaN for all.
__device__ __forceinline__ float key_value(unsigned key) {
    const unsigned bits = key >= 0x80000000u ? key - 0x80000000u : 0x80000000u | (0x80000000u - key);
    return __uint_as_float(key <= NAN_KEY ? 0x7fc00000u : bits);
}
