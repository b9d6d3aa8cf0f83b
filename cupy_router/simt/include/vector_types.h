// SPDX-License-Identifier: Apache-2.0
// CUDA's vector types with CUDA's alignments, so that a misaligned wide load is reported here as it would fault there.
#pragma once

#define SIMT_VECTOR(type, T, align2, align4)                              \
    struct alignas(align2) T##2 { type x, y; };                           \
    struct T##3 { type x, y, z; };                                        \
    struct alignas(align4) T##4 { type x, y, z, w; };                     \
    inline T##2 make_##T##2(type x, type y) { return {x, y}; }            \
    inline T##3 make_##T##3(type x, type y, type z) { return {x, y, z}; } \
    inline T##4 make_##T##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SIMT_VECTOR(signed char, char, 2, 4);
SIMT_VECTOR(unsigned char, uchar, 2, 4);
SIMT_VECTOR(short, short, 4, 8);
SIMT_VECTOR(unsigned short, ushort, 4, 8);
SIMT_VECTOR(int, int, 8, 16);
SIMT_VECTOR(unsigned, uint, 8, 16);
SIMT_VECTOR(long long, longlong, 16, 16);
SIMT_VECTOR(unsigned long long, ulonglong, 16, 16);
SIMT_VECTOR(float, float, 8, 16);
SIMT_VECTOR(double, double, 16, 16);
#undef SIMT_VECTOR

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr operator uint3() const { return {x, y, z}; }
};
