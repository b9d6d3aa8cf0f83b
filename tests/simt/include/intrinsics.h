// SPDX-License-Identifier: Apache-2.0
// CUDA's other built-in functions: memory, integers, floats.
#pragma once
#include <math.h>

#include "conversions.h"
#include "warp.h"

// clang-format off
// -- Memory: atomics, fences, cached loads -----------------------------------------------------------------------------

// Fibers take turns, so a load and a store are one step; both are atomic to ThreadSanitizer and order nothing.
template <class T, class Change>
inline T simt_atomic(T* address, Change change) {
    T before, after;
    __atomic_load(address, &before, __ATOMIC_RELAXED);
    after = change(before);
    __atomic_store(address, &after, __ATOMIC_RELAXED);
    return before;
}
#define SIMT_ATOMIC(name, result) \
    template <class T> T name(T* p, std::common_type_t<T> v) { return simt_atomic(p, [=](T old) -> T { return result; }); }
template <class T> T simt_sum(T a, T b) { if constexpr (std::is_integral<T>::value) return simt::add(a, b); else return a + b; }
SIMT_ATOMIC(atomicAdd, simt_sum<T>(old, v))   SIMT_ATOMIC(atomicSub, simt_sum<T>(old, -v))   SIMT_ATOMIC(atomicExch, ((void)old, v))
SIMT_ATOMIC(atomicMin, v < old ? v : old)     SIMT_ATOMIC(atomicMax, old < v ? v : old)
SIMT_ATOMIC(atomicAnd, old & v)               SIMT_ATOMIC(atomicOr, old | v)                 SIMT_ATOMIC(atomicXor, old ^ v)
SIMT_ATOMIC(atomicInc, old >= v ? 0 : old + 1) SIMT_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
#undef SIMT_ATOMIC
template <class T> T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> v) {
    return simt_atomic(p, [=](T old) -> T { return simt::pack(old) == simt::pack<T>(expected) ? v : old; });
}

// A fence orders the thread after every earlier fence of the launch: enough for "write, fence, count; last one reads".
inline void __threadfence() { static simt::Tag tag; simt::release(&tag); simt::acquire(&tag); }
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }
inline void __nanosleep(unsigned) { simt::yield(); }
inline void __trap() { simt::fault({}, "trap", "__trap"); }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldca(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcv(const T* p) { return *p; }
template <class T> T __ldlu(const T* p) { return *p; }
template <class T> void __stwb(T* p, T value) { *p = value; }
template <class T> void __stcg(T* p, T value) { *p = value; }
template <class T> void __stcs(T* p, T value) { *p = value; }
template <class T> void __stwt(T* p, T value) { *p = value; }

// -- Integers ----------------------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= (x >> i & 1) << (31 - i);
    return result;
}
inline unsigned long long __brevll(unsigned long long x) {
    return (unsigned long long)__brev((unsigned)x) << 32 | __brev((unsigned)(x >> 32));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (shift & 31));
}
inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)((unsigned __int128)a * b >> 64); }

#define SIMT_MIN_MAX(A, B, T)                                                          \
    inline T min(A a, B b) { return (T)b < (T)a ? (T)b : (T)a; }                       \
    inline T max(A a, B b) { return (T)a < (T)b ? (T)b : (T)a; }
SIMT_MIN_MAX(int, int, int) SIMT_MIN_MAX(unsigned, unsigned, unsigned) SIMT_MIN_MAX(int, unsigned, unsigned) SIMT_MIN_MAX(unsigned, int, unsigned)
SIMT_MIN_MAX(long, long, long) SIMT_MIN_MAX(unsigned long, unsigned long, unsigned long)
SIMT_MIN_MAX(long long, long long, long long) SIMT_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
SIMT_MIN_MAX(long long, unsigned long long, unsigned long long) SIMT_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef SIMT_MIN_MAX
namespace simt {  // subnormals are flushed here too, -0 is less than +0, and NaN counts as nothing
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
inline float fmin(float a, float b) { return flushed(a != a ? b : b != b ? a : a == b ? (signbit(a) ? a : b) : a < b ? a : b); }
inline float fmax(float a, float b) { return flushed(a != a ? b : b != b ? a : a == b ? (signbit(a) ? b : a) : a < b ? b : a); }
}  // namespace simt
#define fminf simt::fmin
#define fmaxf simt::fmax
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// -- Floats ------------------------------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bits<double>(x); }

// Conversions to integers saturate, and NaN becomes 0.
template <class T> T simt_to_integer(double rounded) {
    constexpr double range = (double)((T)1 << (sizeof(T) * 8 - 2)) * (std::is_signed<T>::value ? 2 : 4);
    if (rounded != rounded) return 0;
    if (rounded >= range) return (T)~(std::is_signed<T>::value ? (T)1 << (sizeof(T) * 8 - 1) : (T)0);
    return rounded <= (std::is_signed<T>::value ? -range : 0) ? (std::is_signed<T>::value ? (T)1 << (sizeof(T) * 8 - 1) : 0) : (T)rounded;
}
#define SIMT_TO_INTEGER(name, T)                                                         \
    inline T __float2##name##_rn(float x) { return simt_to_integer<T>(nearbyintf(x)); }  \
    inline T __float2##name##_rz(float x) { return simt_to_integer<T>(truncf(x)); }      \
    inline T __float2##name##_rd(float x) { return simt_to_integer<T>(floorf(x)); }      \
    inline T __float2##name##_ru(float x) { return simt_to_integer<T>(ceilf(x)); }
SIMT_TO_INTEGER(int, int) SIMT_TO_INTEGER(uint, unsigned) SIMT_TO_INTEGER(ll, long long) SIMT_TO_INTEGER(ull, unsigned long long)
#undef SIMT_TO_INTEGER
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline float __ll2float_rn(long long x) { return (float)x; }
inline float __ull2float_rn(unsigned long long x) { return (float)x; }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float x) { return (float)(1 / sqrt((double)x)); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

// The fast functions: the same formulas around the special-function unit, whose results are taken as correctly rounded.
namespace simt {
inline float fast_exp(float x) { return exp2f(x * 1.44269504f); }
inline float fast_exp10(float x) { return exp2f(x * 3.32192809f); }
inline float fast_log(float x) { return log2f(flushed(x)) * 0.693147181f; }
inline float fast_log10(float x) { return log2f(flushed(x)) * 0.301029996f; }
inline float fast_pow(float x, float y) { return exp2f(y * log2f(flushed(x))); }
inline float fast_tan(float x) { return sinf(x) / cosf(x); }
inline float fast_divide(float x, float y) { return fabsf(y) > 0x1p126f && fabsf(y) < INFINITY ? x * 0.f : x / y; }
}  // namespace simt
// glibc declares these names itself, with another meaning
#define __expf simt::fast_exp
#define __exp10f simt::fast_exp10
#define __logf simt::fast_log
#define __log2f(x) log2f(simt::flushed(x))
#define __log10f simt::fast_log10
#define __powf simt::fast_pow
#define __sinf sinf
#define __cosf cosf
#define __tanf simt::fast_tan
#define __fdividef simt::fast_divide
// clang-format on
