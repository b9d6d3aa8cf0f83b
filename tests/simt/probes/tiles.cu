// SPDX-License-Identifier: Apache-2.0
// One thread copies tiles of 16 rows and 64 columns through a ring of two places, one after the other from `column` on;
// a warp writes each to `out`, [tile][16][64].
#include "device/tensor_map.cuh"

extern "C" __global__ void __launch_bounds__(64)
    tiles(const TensorMap* map, unsigned short* out, int column, int row, int count) {
    __shared__ __align__(1024) char ring[2][16 * 128];
    __shared__ Mbarrier full[2], empty[2];
    if (threadIdx.x < 2) {
        mbarrier_init(&full[threadIdx.x], 1);
        mbarrier_init(&empty[threadIdx.x], 32);
        mbarrier_init_done();
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < count; ++i) {
        const int place = i % 2, parity = i / 2 % 2;
        if (threadIdx.x == 0) {
            prefetch_map(*map);
            mbarrier_wait(&empty[place], parity ^ 1);
            mbarrier_expect(&full[place], sizeof ring[place]);
            copy_tile(ring[place], *map, column + 64 * i, row, &full[place]);
        }
        if (threadIdx.x >= 32) {
            mbarrier_wait(&full[place], parity);
            for (int j = lane; j < 16 * 64; j += 32) {
                const char* source = ring[place] + swizzled(j / 64, j % 64 * 2);
                out[i * 16 * 64 + j] = *reinterpret_cast<const unsigned short*>(source);
            }
            mbarrier_arrive(&empty[place]);
        }
    }
}
