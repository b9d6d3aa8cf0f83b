// SPDX-License-Identifier: Apache-2.0
// Float intrinsics. The host's float mode flushes subnormals in arithmetic; what is done on bits flushes by itself.
#pragma once
#include <math.h>
#include <string.h>

#include <limits>

namespace simt {

template <class To, class From>
inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "a bit copy");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}

inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

// NaN counts as nothing, and -0 is less than +0.
inline float fmin(float a, float b) {
    return flushed(a != a ? b : b != b ? a : a == b ? (signbit(a) ? a : b) : a < b ? a : b);
}
inline float fmax(float a, float b) {
    return flushed(a != a ? b : b != b ? a : a == b ? (signbit(a) ? b : a) : a < b ? b : a);
}

// NaN becomes 0, and what is out of range the nearest integer that exists.
template <class T>
T to_integer(double rounded) {
    typedef std::numeric_limits<T> Limits;
    constexpr double end = 2.0 * ((T)1 << (Limits::digits - 1));  // one above the highest
    if (rounded != rounded) return 0;
    if (rounded >= end) return Limits::max();
    return rounded <= (Limits::is_signed ? -end : 0) ? Limits::min() : (T)rounded;
}

// The fast functions are the same formulas around the special-function unit, whose results are taken as correctly rounded.
inline float fast_exp(float x) { return exp2f(x * 1.44269504f); }
inline float fast_exp10(float x) { return exp2f(x * 3.32192809f); }
inline float fast_log2(float x) { return log2f(flushed(x)); }
inline float fast_log(float x) { return fast_log2(x) * 0.693147181f; }
inline float fast_log10(float x) { return fast_log2(x) * 0.301029996f; }
inline float fast_pow(float x, float y) { return exp2f(y * fast_log2(x)); }
inline float fast_tan(float x) { return sinf(x) / cosf(x); }
inline float fast_divide(float x, float y) { return fabsf(y) > 0x1p126f && fabsf(y) < INFINITY ? x * 0.f : x / y; }

}  // namespace simt

// Names that glibc has already, some with another meaning.
#define fminf simt::fmin
#define fmaxf simt::fmax
#define __expf simt::fast_exp
#define __exp10f simt::fast_exp10
#define __logf simt::fast_log
#define __log2f simt::fast_log2
#define __log10f simt::fast_log10
#define __powf simt::fast_pow
#define __sinf sinf
#define __cosf cosf
#define __tanf simt::fast_tan
#define __fdividef simt::fast_divide

inline float min(float a, float b) { return simt::fmin(a, b); }
inline float max(float a, float b) { return simt::fmax(a, b); }
inline double min(double a, double b) { return ::fmin(a, b); }
inline double max(double a, double b) { return ::fmax(a, b); }

inline float rsqrtf(float x) { return (float)(1 / sqrt((double)x)); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bits<double>(x); }

#define SIMT_TO_INTEGER(name, T)                                                         \
    inline T __float2##name##_rn(float x) { return simt::to_integer<T>(nearbyintf(x)); } \
    inline T __float2##name##_rz(float x) { return simt::to_integer<T>(truncf(x)); }     \
    inline T __float2##name##_rd(float x) { return simt::to_integer<T>(floorf(x)); }     \
    inline T __float2##name##_ru(float x) { return simt::to_integer<T>(ceilf(x)); }
SIMT_TO_INTEGER(int, int);
SIMT_TO_INTEGER(uint, unsigned);
SIMT_TO_INTEGER(ll, long long);
SIMT_TO_INTEGER(ull, unsigned long long);
#undef SIMT_TO_INTEGER
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline float __ll2float_rn(long long x) { return (float)x; }
inline float __ull2float_rn(unsigned long long x) { return (float)x; }
