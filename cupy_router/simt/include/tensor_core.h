// SPDX-License-Identifier: Apache-2.0
// Sums of tensor cores, with the bits of Hopper: tests/mma_model.py describes them. In integers, since the executor
// flushes subnormal floats and tensor cores do not.
#pragma once
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "fibers.h"

namespace simt {

struct Factor {
    int64_t significand;  // with 23 bits after the binary point
    int exponent;         // far from all others for 0, infinities and NaN
    float value;
};

SIMT_RUNTIME inline float float_of_bits(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// `lowest`: exponent of subnormal numbers in the factor's own type.
SIMT_RUNTIME inline Factor factor(float value, int lowest) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    const int field = bits >> 23 & 255, exponent = std::max(field, 1) - 127;
    int64_t significand = (bits & 0x7FFFFF) | (field ? 0x800000 : 0);
    if (exponent < lowest) significand >>= lowest - exponent;
    const int own = field == 255 ? 100'000 : significand == 0 ? -10'000 : std::max(exponent, lowest);
    return {bits >> 31 ? -significand : significand, own, value};
}

// significand * 2^unit, rounded towards +0.
SIMT_RUNTIME inline float truncated(int64_t significand, int unit) {
    const unsigned sign = significand < 0 ? 0x80000000 : 0;
    uint64_t magnitude = significand < 0 ? -significand : significand;
    if (magnitude == 0) return 0;
    const int exponent = std::max(63 - __builtin_clzll(magnitude) + unit, -126);
    const int shift = exponent - 23 - unit;
    magnitude = shift < 0 ? magnitude << -shift : shift < 64 ? magnitude >> shift : 0;
    if (magnitude == 0) return 0;
    if (exponent > 127) return float_of_bits(sign | 0x7F800000);
    return float_of_bits(sign |
                         ((exponent + 126u) << 23) + (unsigned)magnitude);  // its leading bit adds 1, if it is there
}

// a[0..15] * b[0..15] + c
SIMT_RUNTIME inline float add_products(const Factor* a, const Factor* b, float c) {
    const Factor start = factor(c, -126);
    int largest = std::max(start.exponent, -133);
    for (int k = 0; k < 16; ++k) largest = std::max(largest, a[k].exponent + b[k].exponent);
    if (largest > 1000) {  // infinities or NaN; others only count by their signs
        const auto sign = [](Factor x) {
            return x.exponent > 1000 ? x.value : x.significand < 0 ? -1.f : x.significand > 0;
        };
        float sum = sign(start);
        for (int k = 0; k < 16; ++k) sum += sign(a[k]) * sign(b[k]);
        return sum != sum ? float_of_bits(0x7FFFFFFF) : sum;
    }
    const auto aligned = [largest](int64_t product, int exponent) {  // keeps 25 of 46 bits after the binary point
        const int shift = std::min(largest - exponent + 46 - 25, 63);
        return product < 0 ? -(-product >> shift) : product >> shift;
    };
    int64_t sum = aligned(start.significand << 23, start.exponent);
    for (int k = 0; k < 16; ++k) sum += aligned(a[k].significand * b[k].significand, a[k].exponent + b[k].exponent);
    return truncated(sum, largest - 25);
}

}  // namespace simt
