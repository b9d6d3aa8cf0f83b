// SPDX-License-Identifier: Apache-2.0
// Half and bfloat16, kept as 16-bit words, converted as cvt.rn does on the device: to nearest, ties to even, NaN to the
// one NaN 0x7FFF, subnormals kept. Integers only, so that no float mode matters.
#pragma once
#include <string.h>

namespace simt {

inline float bfloat16_to_float(unsigned short word) {
    const unsigned bits = (unsigned)word << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline unsigned short float_to_bfloat16(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
    return (unsigned short)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(unsigned short word) {
    const unsigned sign = (unsigned)(word & 0x8000) << 16;
    unsigned exponent = word >> 10 & 31, fraction = word & 0x3FF;
    unsigned bits = sign;
    if (exponent == 31) {
        bits |= 0x7F800000 | fraction << 13;
    } else if (exponent) {
        bits |= (exponent + 112) << 23 | fraction << 13;
    } else if (fraction) {  // subnormal: its leading one becomes the implicit one
        const int shift = __builtin_clz(fraction) - 21;
        bits |= (unsigned)(113 - shift) << 23 | (fraction << shift & 0x3FF) << 13;
    }
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline unsigned short float_to_half(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    const unsigned sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return 0x7FFF;
    if (magnitude >= 0x477FF000) return (unsigned short)(sign | 0x7C00);  // 65520 and above round to infinity
    if (magnitude < 0x33000000) return (unsigned short)sign;              // below half of the least subnormal
    const int exponent = (int)(magnitude >> 23) - 112;
    const unsigned fraction = exponent > 0 ? magnitude - (112u << 23) : (magnitude & 0x7FFFFF) | 0x800000;
    const int dropped = exponent > 0 ? 13 : 14 - exponent;  // bits below the half's last one
    const unsigned half = 1u << (dropped - 1), kept = fraction >> dropped, rest = fraction & ((1u << dropped) - 1);
    return (unsigned short)(sign | (kept + (rest > half || (rest == half && (kept & 1)))));
}

}  // namespace simt
