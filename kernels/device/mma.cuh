// SPDX-License-Identifier: Apache-2.0
// Tensor cores by mma.sync.m16n8k16: d[16][8] += a[16][16] * b[16][8], a and b of 16-bit floats, d of float32; sm_80
// and later. All 32 lanes take part. With row = lane / 4 and column = lane % 4 * 2, a lane holds
// a: 4 words of two neighbours along k each, the first in the low half: a[row][column..], a[row + 8][column..],
// a[row][column + 8..], a[row + 8][column + 8..]
// b: 2 words, also of two neighbours along k: b[column..][row], b[column + 8..][row]
// d: d[row][column], d[row][column + 1], d[row + 8][column], d[row + 8][column + 1]
#pragma once

#ifdef __CUDACC__

#define MMA_M16N8K16(type)                                     \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "  \
        "{%0, %1, %2, %3};"                                    \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

__device__ __forceinline__ void mma_bfloat16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    MMA_M16N8K16("bf16");
}

__device__ __forceinline__ void mma_float16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    MMA_M16N8K16("f16");
}

#undef MMA_M16N8K16

#else

// Each lane publishes a pointer to its fragments, and the last to come computes for all.
struct MmaFragments {
    float (&d)[4];
    const unsigned (&a)[4];
    const unsigned (&b)[2];
};

template <float (*to_float)(unsigned short), int LOWEST_EXPONENT>
SIMT_RUNTIME inline void mma_all_lanes(simt::Thread* lanes, unsigned) {
    simt::Factor a[16][16], b[8][16];
    const auto factor = [](unsigned word, int half) {
        return simt::factor(to_float(static_cast<unsigned short>(word >> half * 16)), LOWEST_EXPONENT);
    };
    for (int lane = 0; lane < 32; ++lane) {
        const MmaFragments& mine = *reinterpret_cast<MmaFragments*>(lanes[lane].value);
        const int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 8; ++i) {  // word i / 2, half i % 2
            const int k = column + i % 2;
            a[row + i / 2 % 2 * 8][k + i / 4 * 8] = factor(mine.a[i / 2], i % 2);
            if (i < 4) b[row][k + i / 2 * 8] = factor(mine.b[i / 2], i % 2);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const MmaFragments& mine = *reinterpret_cast<MmaFragments*>(lanes[lane].value);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            mine.d[i] = simt::add_products(a[row], b[column], mine.d[i]);
        }
    }
}

inline void mma_bfloat16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const MmaFragments mine = {d, a, b};
    simt::collective("mma_bfloat16", 0xffffffffu, reinterpret_cast<uintptr_t>(&mine),
                     mma_all_lanes<simt::bfloat16_to_float, -126>, simt::Site::here());
}

inline void mma_float16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const MmaFragments mine = {d, a, b};
    simt::collective("mma_float16", 0xffffffffu, reinterpret_cast<uintptr_t>(&mine),
                     mma_all_lanes<simt::half_to_float, -14>, simt::Site::here());
}

#endif
