// SPDX-License-Identifier: Apache-2.0
// One warp: d = a * b + c through both kinds of mma, a row-major [16][16], b [16][8], c and d [16][8].
#include "device/mma.cuh"

extern "C" __global__ void __launch_bounds__(32)
    mma(const unsigned short* a, const unsigned short* b, const float* c, float* d, int is_bfloat16) {
    const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 2;
    unsigned a_words[4], b_words[2];
    float sums[4];
    for (int i = 0; i < 4; ++i) {
        const unsigned short* pair = a + (row + i % 2 * 8) * 16 + column + i / 2 * 8;
        a_words[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
        sums[i] = c[(row + i / 2 * 8) * 8 + column + i % 2];
    }
    for (int i = 0; i < 2; ++i) {
        const unsigned short* pair = b + (column + i * 8) * 8 + row;
        b_words[i] = pair[0] | static_cast<unsigned>(pair[8]) << 16;
    }
    if (is_bfloat16) {
        mma_bfloat16(sums, a_words, b_words);
    } else {
        mma_float16(sums, a_words, b_words);
    }
    for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + column + i % 2] = sums[i];
}
