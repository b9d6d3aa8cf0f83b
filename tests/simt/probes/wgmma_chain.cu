// SPDX-License-Identifier: Apache-2.0
// Four warps: a [64][columns] times b [size][columns] as chains of products of 16 columns from zero, by wgmma with both
// in shared memory, and by mma.sync with rows of a as its rows. place: where wgmma has each column of a product.
#include "device/mma.cuh"
#include "device/wgmma.cuh"

__shared__ __align__(1024) unsigned short tile_a[64 * 64], tile_b[128 * 64];

__device__ void store_tile(unsigned short* tile, const unsigned short* rows, int count, int columns, int first,
                           const int* place) {
    for (int i = threadIdx.x; i < count * 64; i += 128) {
        const int row = i / 64, column = i % 64;
        const unsigned short value = first + column < columns ? rows[row * columns + first + column] : 0;
        tile[swizzled(row, 2 * (column / 16 * 16 + place[column % 16])) / 2] = value;
    }
}

template <bool BFLOAT16, int N>
__device__ void by_wgmma(const unsigned short* a, const unsigned short* b, const int* place, float* d, int columns) {
    float sums[N / 2] = {};
    for (int first = 0; first < columns; first += 64) {
        store_tile(tile_a, a, 64, columns, first, place);
        store_tile(tile_b, b, N, columns, first, place);
        wgmma_sees_writes();
        __syncthreads();
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 64; k += 16) wgmma<BFLOAT16>(sums, wgmma_operand(tile_a, k), wgmma_operand(tile_b, k));
        wgmma_commit();
        wgmma_finish(sums);
        __syncthreads();
    }
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

template <bool BFLOAT16>
__device__ void by_mma(const unsigned short* a, const unsigned short* b, float* d, int columns, int size) {
    const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
    for (int tile = threadIdx.x / 32; tile < 4 * (size / 8); tile += 4) {
        const int first_a = tile % 4 * 16, first_b = tile / 4 * 8;
        float sums[4] = {};
        for (int first = 0; first < columns; first += 16) {
            unsigned rows_a[4], rows_b[2];
            for (int i = 0; i < 4; ++i) {
                const unsigned short* pair = a + (first_a + row + i % 2 * 8) * columns + first + column + i / 2 * 8;
                rows_a[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
            }
            for (int i = 0; i < 2; ++i) {
                const unsigned short* pair = b + (first_b + row) * columns + first + column + i * 8;
                rows_b[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
            }
            if (BFLOAT16) {
                mma_bfloat16(sums, rows_a, rows_b);
            } else {
                mma_float16(sums, rows_a, rows_b);
            }
        }
        for (int i = 0; i < 4; ++i) d[(first_a + row + i / 2 * 8) * size + first_b + column + i % 2] = sums[i];
    }
}

template <bool BFLOAT16>
__device__ void both(const unsigned short* a, const unsigned short* b, const int* place, float* wgmma_d, float* mma_d,
                     int columns, int size) {
    if (size == 32) by_wgmma<BFLOAT16, 32>(a, b, place, wgmma_d, columns);
    if (size == 64) by_wgmma<BFLOAT16, 64>(a, b, place, wgmma_d, columns);
    if (size == 72) by_wgmma<BFLOAT16, 72>(a, b, place, wgmma_d, columns);
    if (size == 128) by_wgmma<BFLOAT16, 128>(a, b, place, wgmma_d, columns);
    by_mma<BFLOAT16>(a, b, mma_d, columns, size);
}

extern "C" __global__ void __launch_bounds__(128)
    wgmma_chain(const unsigned short* a, const unsigned short* b, const int* place, float* wgmma_d, float* mma_d,
                int columns, int size, int is_bfloat16) {
    if (is_bfloat16) {
        both<true>(a, b, place, wgmma_d, mma_d, columns, size);
    } else {
        both<false>(a, b, place, wgmma_d, mma_d, columns, size);
    }
}
