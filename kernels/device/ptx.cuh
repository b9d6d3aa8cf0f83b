// SPDX-License-Identifier: Apache-2.0
// Single instructions that CUDA C++ offers only in its headers, each with a C++ twin for runs on a CPU.
#pragma once

#ifdef __CUDACC__

__device__ __forceinline__ float half_bits_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ unsigned short float_to_half_bits(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Return the bits of the nearest bfloat16 of each, ties to even, the first in the lower half. sm_80 and later; otherwise
// `rounded_bits` of both is the same.
__device__ __forceinline__ unsigned two_bfloat16_bits(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Return 2**x to 2 ulp; a result that would be subnormal is 0.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Return log2(x), with an absolute error of 2**-22 for x in 0.5..2.
__device__ __forceinline__ float fast_log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Return sqrt(x) to 1 ulp.
__device__ __forceinline__ float fast_sqrt(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Return 1 / x to 1 ulp.
__device__ __forceinline__ float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Add 1 to the count if a > b, in two instructions; the compiler finds three.
__device__ __forceinline__ void count_greater(unsigned a, unsigned b, int& count) {
    asm("{\n.reg .pred greater;\nsetp.gt.u32 greater, %1, %2;\n@greater add.s32 %0, %0, 1;\n}"
        : "+r"(count)
        : "r"(a), "r"(b));
}

// Write to shared memory if `yes`, without a branch.
__device__ __forceinline__ void store_shared_if(bool yes, unsigned short* target, unsigned value) {
    asm volatile("{\n.reg .pred yes;\nsetp.ne.s32 yes, %0, 0;\n@yes st.shared.u16 [%1], %2;\n}"
                 :
                 : "r"(static_cast<int>(yes)), "r"(static_cast<unsigned>(__cvta_generic_to_shared(target))),
                   "h"(static_cast<unsigned short>(value))
                 : "memory");
}

// Return an offset or an address, computed here: the compiler would wait until it is used. It forgets that an address is
// one of global memory, so read by __ldg.
template <typename T>
__device__ __forceinline__ T computed_now(T value) {
    static_assert(sizeof(T) == 8, "a register of 64 bits");
    asm volatile("" : "+l"(value));
    return value;
}

// Return the bits of a float that arithmetic made. The only NaN that the hardware makes is 0x7fffffff.
__device__ __forceinline__ unsigned canonical_bits(float sum) { return __float_as_uint(sum); }

#else

#include <cmath>

inline void count_greater(unsigned a, unsigned b, int& count) { count += a > b; }

inline void store_shared_if(bool yes, unsigned short* target, unsigned value) {
    if (yes) *target = static_cast<unsigned short>(value);
}

template <typename T>
inline T computed_now(T value) {
    return value;
}

inline unsigned canonical_bits(float sum) { return sum != sum ? 0x7fffffffu : __float_as_uint(sum); }

inline float half_bits_to_float(unsigned short bits) {
    const float magnitude = std::ldexp(static_cast<float>(bits & 0x3ff), -24);  // as a subnormal of half
    const int exponent = (bits >> 10) & 31;
    float value = magnitude;
    if (exponent == 31) {
        value = (bits & 0x3ff) ? __uint_as_float(0x7fc00000u) : __uint_as_float(0x7f800000u);
    } else if (exponent > 0) {
        value = std::ldexp(1.0f + static_cast<float>(bits & 0x3ff) / 1024.0f, exponent - 15);
    }
    return (bits & 0x8000) ? -value : value;
}

// Round to nearest, ties to even, in units of the last bit of the half.
inline unsigned short float_to_half_bits(float value) {
    const unsigned sign = __float_as_uint(value) >> 16 & 0x8000u;
    const float magnitude = std::fabs(value);
    if (value != value) return 0x7fff;
    if (magnitude >= 65520.0f) return static_cast<unsigned short>(sign | 0x7c00u);
    const int exponent = magnitude < 6.103515625e-5f ? -14 : std::ilogb(magnitude);
    const float units = std::nearbyint(std::ldexp(magnitude, 10 - exponent));  // 1024 to 2048; less if subnormal
    const unsigned bits = static_cast<unsigned>(units) + (static_cast<unsigned>(exponent + 14) << 10);
    return static_cast<unsigned short>(sign | bits);
}

inline float fast_exp2(float x) { return std::exp2(x); }

inline float fast_log2(float x) { return std::log2(x); }

inline float fast_sqrt(float x) { return std::sqrt(x); }

inline float fast_reciprocal(float x) { return 1.0f / x; }

#endif
