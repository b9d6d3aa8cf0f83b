// SPDX-License-Identifier: Apache-2.0
// The gate GEMM of a block by tensor cores, for inputs of one 16-bit type.
//
// Experts lie on the 16 rows of mma.m16n8k16, tokens on its 8 columns. A lane loads 8 neighbours along hidden, 16
// bytes, and uses them as its elements of two products: the same permutation of hidden in both operands changes no sum.
// INVARIANT: it loads 4 neighbours for each of them, so that a product has 16 neighbours, as in gemm_wgmma.cuh.
// Warps divide the experts of the block (EXPERTS_PER_WARP each), then its tokens and then its split; their sums meet in
// shared memory.
#pragma once

#include "device/mma.cuh"
#include "device/vector8.cuh"
#include "gate/gate_tiling.cuh"

namespace mma_gemm {

constexpr int STEP = 32;  // along hidden: four lanes with 8 elements each, for two products
static_assert(!TENSOR_CORES || EXPERTS_PER_WARP % 16 == 0, "tiles of 16 experts");
constexpr int M_TILES = at_least_1(EXPERTS_PER_WARP / 16);
constexpr int N_TILES = quotient(TOKENS, 8 * WARPS_ALONG_TOKENS);
constexpr int CHAINS = !INVARIANT && M_TILES * N_TILES < 4 ? 2 : 1;  // of dependent products for each tile
constexpr int ALL_STEPS = quotient(HIDDEN, STEP);
static_assert(ALL_STEPS < 0x7fffffff / (SPLITS * WARP_SPLITS), "parts of hidden are counted in int");
constexpr int STEPS = quotient(ALL_STEPS, SPLITS* WARP_SPLITS);  // of a warp, at most
constexpr int BATCHES = at_least_1(quotient(STEPS, at_least_1(IN_FLIGHT / (2 * M_TILES + N_TILES))));
constexpr int BATCH = at_least_1(quotient(STEPS, BATCHES));  // steps whose loads are all in flight before the first use
constexpr bool EVEN = ALIGNED && HIDDEN == BATCHES * BATCH * STEP * SPLITS * WARP_SPLITS;  // no step ends early

// Load a lane's elements of the two products of a step, of which the first `left` are within the row.
template <typename T>
__device__ __forceinline__ Vector8<T> load_step(const T* source, int left) {
    if constexpr (INVARIANT && sizeof(T) == 2) {
        return load_vector4_twice<ALIGNED, STEP / 2>(source, left);
    } else {
        return load_vector8<ALIGNED>(source, left);
    }
}

__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    if (DTYPE == 2) {
        mma_bfloat16(sums, a, b);
    } else {
        mma_float16(sums, a, b);
    }
}

template <typename X, typename Gate>
__device__ __forceinline__ void run(const X* x, const Gate* weight, int64_t x_stride, int64_t weight_stride,
                                    int first_expert, int split, int num_tokens, float* shared_sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    constexpr int WARPS_OF_SPLIT = WARPS_ALONG_EXPERTS * WARPS_ALONG_TOKENS;
    const int warp_split = warp / WARPS_OF_SPLIT, own_experts = warp % WARPS_ALONG_EXPERTS * EXPERTS_PER_WARP;
    const int own_tokens =
        WARPS_ALONG_TOKENS == 1 ? 0 : warp / WARPS_ALONG_EXPERTS % WARPS_ALONG_TOKENS * (8 * N_TILES);
    const int part = split * WARP_SPLITS + warp_split;  // of hidden, for this warp; parts differ by at most one step
    const int end = min((part + 1) * ALL_STEPS / (SPLITS * WARP_SPLITS) * STEP, HIDDEN);
    const int begin = part * ALL_STEPS / (SPLITS * WARP_SPLITS) * STEP + lane % 4 * (INVARIANT ? 4 : 8);

    const Gate* experts[M_TILES][2];
    const X* tokens[N_TILES];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // after the last expert it is repeated, and not used
            const int expert = first_expert + own_experts + 16 * m + 8 * half + lane / 4;
            experts[m][half] = weight + (COLUMNS == GATE_ROWS ? expert : min(expert, GATE_ROWS - 1)) * weight_stride;
        }
    }
#pragma unroll
    for (int t = 0; t < N_TILES; ++t) tokens[t] = x + (own_tokens + 8 * t + lane / 4) * x_stride;

    float sums[CHAINS][M_TILES][N_TILES][4] = {};
#pragma unroll 1
    for (int step = 0; step < STEPS; step += BATCH) {
        Vector8<Gate> a[BATCH][M_TILES][2];
        Vector8<X> b[BATCH][N_TILES];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int column = begin + (step + i) * STEP, left = EVEN ? STEP : end - column;
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                a[i][m][0] = load_step(experts[m][0] + column, left);
                a[i][m][1] = load_step(experts[m][1] + column, left);
            }
#pragma unroll
            for (int t = 0; t < N_TILES; ++t) {  // nothing is read where there is no token
                b[i][t] = load_step(tokens[t] + column, own_tokens + 8 * t + lane / 4 < num_tokens ? left : 0);
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
                for (int t = 0; t < N_TILES; ++t) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const unsigned *upper = a[i][m][0].words + 2 * half, *lower = a[i][m][1].words + 2 * half;
                        const unsigned* token = b[i][t].words + 2 * half;
                        float (&target)[4] = sums[half % CHAINS][m][t];
                        multiply(target, {upper[0], lower[0], upper[1], lower[1]}, {token[0], token[1]});
                    }
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int t = 0; t < N_TILES; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = own_tokens + 8 * t + lane % 4 * 2 + i % 2;
                const int expert = own_experts + 16 * m + lane / 4 + i / 2 * 8;
                const float sum = CHAINS == 1 ? sums[0][m][t][i] : sums[0][m][t][i] + sums[CHAINS - 1][m][t][i];
                if (token < TOKENS) shared_sums[(warp_split * TOKENS + token) * ROW + expert] = sum;
            }
        }
    }
}

}  // namespace mma_gemm
