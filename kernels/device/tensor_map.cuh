// SPDX-License-Identifier: Apache-2.0
// Copies of tiles of a matrix of 16-bit elements in global memory to shared memory, by hardware (TMA): sm_90. Such a
// copy runs while the thread goes on, and arrives at a barrier, see mbarrier.cuh, that expects its bytes.
#pragma once

#include "device/mbarrier.cuh"
#include "device/wgmma.cuh"

// A matrix and the size of its tiles: 64 columns, so rows of 128 bytes, and up to 256 rows. The host makes it, by
// `tensor_map` of a backend. It is a parameter of the kernel, `const __grid_constant__ TensorMap`.
#ifdef __CUDACC__
struct alignas(64) TensorMap {
#else
struct TensorMap {
#endif
    unsigned long long words[16];
};

// Copy the tile at this column and row to a place at a multiple of 1024 bytes, its words permuted as `swizzled` says.
// Elements outside of the matrix are zeros. By one thread.
__device__ __forceinline__ void copy_tile(void* shared, const TensorMap& map, int column, int row, Mbarrier* barrier) {
#ifdef __CUDACC__
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(shared)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
#else
    const char* address = reinterpret_cast<const char*>(map.words[0]);
    const long long columns = map.words[1], rows = map.words[2], row_bytes = map.words[3], tile_rows = map.words[4];
    for (int i = 0; i < tile_rows; ++i) {
        for (int byte = 0; byte < 128; byte += 2) {
            static const char zeros[2] = {};
            const bool exists = row + i < rows && column + byte / 2 < columns;
            const char* source = exists ? address + (row + i) * row_bytes + 2 * column + byte : zeros;
            memcpy(static_cast<char*>(shared) + swizzled(i, byte), source, 2);
        }
    }
    mbarrier_complete(barrier, 128 * tile_rows);
#endif
}

// Fetch the map itself, before its first use.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
#ifdef __CUDACC__
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}
