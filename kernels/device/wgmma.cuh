// SPDX-License-Identifier: Apache-2.0
// Tensor cores by wgmma: d[64][N] += a[64][16] * b[N][16], a and b of 16-bit floats in shared memory, d of float32; sm_90
// alone. The 128 threads of four neighbouring warps, the first a multiple of four, take part. A thread of warp w of the
// four holds, with row = 16 * w + lane / 4 and column = 8 * j + lane % 4 * 2, for each j:
// d[4 * j..]: d[row][column], d[row][column + 1], d[row + 8][column], d[row + 8][column + 1]
//
// An operand is part of a tile of rows of 128 bytes, which begins at a multiple of 1024 bytes. Within a row, words of 16
// bytes are permuted, so that the same word of eight rows lies in different banks: `swizzled` says where a byte is.
//
// The products run while the threads go on. What threads have written to shared memory is read after each of them called
// `wgmma_sees_writes`, and then a barrier. `wgmma_fence` comes before the first product after any other access to d.
#pragma once

// Return the place of a byte of a row of 128 bytes within a tile.
__device__ __forceinline__ int swizzled(int row, int byte) { return row * 128 + (byte ^ row % 8 * 16); }

#ifdef __CUDACC__

// A matrix descriptor of 32 bytes of each row: in units of 16 bytes their address and, from eight rows to the next, 1024
// bytes; and that words are permuted within 128 bytes.
typedef unsigned long long WgmmaOperand;

// Return the operand of the 16 columns that begin at a multiple of 16.
__device__ __forceinline__ WgmmaOperand wgmma_operand(const void* tile, int column) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(tile)) + 2 * column;
    return static_cast<WgmmaOperand>((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

__device__ __forceinline__ void wgmma_sees_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// End a group of products.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most PENDING of the latest groups are still running.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Wait for all products, before d is read.
template <int Size>
__device__ __forceinline__ void wgmma_finish(float (&d)[Size]) {
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < Size; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operands 0 to n - 1 of an instruction, and the elements of d that they are.
#define WGMMA_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_24 WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_NAMES_32 WGMMA_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_36 WGMMA_NAMES_32 ", %32, %33, %34, %35"
#define WGMMA_NAMES_40 WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_NAMES_48 WGMMA_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES_56 WGMMA_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_NAMES_64 WGMMA_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_D_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define WGMMA_D_16 \
    WGMMA_D_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define WGMMA_D_24 \
    WGMMA_D_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define WGMMA_D_32 \
    WGMMA_D_24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define WGMMA_D_36 WGMMA_D_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define WGMMA_D_40 \
    WGMMA_D_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define WGMMA_D_48 \
    WGMMA_D_40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define WGMMA_D_56 \
    WGMMA_D_48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define WGMMA_D_64 \
    WGMMA_D_56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define WGMMA(n, type, size, a_and_b)                                                                    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" WGMMA_NAMES_##size \
                 "}, " a_and_b ", 1, 1, 1, 0, 0;"                                                        \
                 : WGMMA_D_##size                                                                        \
                 : "l"(a), "l"(b)                                                                        \
                 : "memory")
#define WGMMA_OF_SIZE(n, size, a_and_b)       \
    if constexpr (Size == size && BFLOAT16) { \
        WGMMA(n, "bf16", size, a_and_b);      \
    } else if constexpr (Size == size) {      \
        WGMMA(n, "f16", size, a_and_b);       \
    }

// Start a product with N = 2 * Size.
template <bool BFLOAT16, int Size>
__device__ __forceinline__ void wgmma(float (&d)[Size], WgmmaOperand a, WgmmaOperand b) {
    static_assert(Size == 16 || Size == 32 || Size == 36 || Size == 64, "these have an instruction below");
    WGMMA_OF_SIZE(32, 16, "%16, %17")
    WGMMA_OF_SIZE(64, 32, "%32, %33")
    WGMMA_OF_SIZE(72, 36, "%36, %37")
    WGMMA_OF_SIZE(128, 64, "%64, %65")
}

#undef WGMMA_OF_SIZE
#undef WGMMA

#else

// Every product is computed at once, each thread its own elements, with the bits of those of mma.cuh.
struct WgmmaOperand {
    const char* tile;
    int column;

    unsigned short operator()(int row, int k) const {
        return *reinterpret_cast<const unsigned short*>(tile + swizzled(row, 2 * (column + k)));
    }
};

inline WgmmaOperand wgmma_operand(const void* tile, int column) { return {static_cast<const char*>(tile), column}; }
inline void wgmma_sees_writes() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}

template <int PENDING>
inline void wgmma_wait() {}

template <int Size>
inline void wgmma_finish(float (&)[Size]) {}

template <bool BFLOAT16, int Size>
inline void wgmma(float (&d)[Size], WgmmaOperand a, WgmmaOperand b) {
    const auto factor = [](WgmmaOperand operand, int row, int k) {
        const float value = BFLOAT16 ? simt::bfloat16_to_float(operand(row, k)) : simt::half_to_float(operand(row, k));
        return simt::factor(value, BFLOAT16 ? -126 : -14);
    };
    const int lane = threadIdx.x % 32, first_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    simt::Factor rows[2][16], column[16];
    for (int half = 0; half < 2; ++half) {
        for (int k = 0; k < 16; ++k) rows[half][k] = factor(a, first_row + 8 * half, k);
    }
    for (int i = 0; i < Size; i += 4) {
        for (int j = 0; j < 2; ++j) {
            for (int k = 0; k < 16; ++k) column[k] = factor(b, 2 * i + lane % 4 * 2 + j, k);
            for (int half = 0; half < 2; ++half) {
                float& sum = d[i + j + 2 * half];
                sum = simt::add_products(rows[half], column, sum);
            }
        }
    }
    __syncwarp();  // all lanes take part
}

#endif
