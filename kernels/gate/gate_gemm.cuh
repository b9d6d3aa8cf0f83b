// SPDX-License-Identifier: Apache-2.0
// A block's part of the gate product: TOKENS rows of x times EXPERTS_PER_BLOCK rows of the gate, over one of SPLITS
// parts of hidden, left in shared memory as WARP_SPLITS sums for each token and expert, [layer][token][ROW].
//
// TENSOR_CORES: both inputs have the same 16-bit type; experts lie on the 16 rows of mma.m16n8k16, tokens on its 8
// columns. A row's 8 neighbours along hidden are one 16-byte load; the same permutation of hidden in both factors makes
// of them what a lane needs for two products. Warps divide the block's experts (EXPERTS_PER_WARP each) and then its
// slice; their sums meet in shared memory. Otherwise float32 FMA, for any mix of types: a warp has EXPERTS_PER_WARP
// experts and the whole slice, its lanes divide that. Every sum is taken in a fixed order, so that results are
// repeatable.
#pragma once

#include "device/vector8.cuh"
#include "routing/method.cuh"
#include "device/mma.cuh"
#include "device/warp.cuh"

#ifndef HIDDEN
#define HIDDEN 4096
#endif
#ifndef DTYPE
#define DTYPE 2
#endif
#ifndef WEIGHT_DTYPE
#define WEIGHT_DTYPE DTYPE
#endif
#ifndef ALIGNED
#define ALIGNED 1  // rows of both factors start at 16-byte words, and HIDDEN is a multiple of 8
#endif
#ifndef TENSOR_CORES
#define TENSOR_CORES 1
#endif
#ifndef TOKENS
#define TOKENS 1  // of a group
#endif
#ifndef SPLITS
#define SPLITS 8
#endif
#ifndef EXPERTS_PER_BLOCK
#define EXPERTS_PER_BLOCK 16
#endif
#ifndef EXPERTS_PER_WARP
#define EXPERTS_PER_WARP 16
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef IN_FLIGHT
#define IN_FLIGHT 36  // 16-byte loads of a thread before their first use
#endif

typedef Scalar<DTYPE>::type x_t;
typedef Scalar<WEIGHT_DTYPE>::type gate_t;

__device__ constexpr int quotient(int a, int b) {  // rounded up
    return (a + b - 1) / b;
}
__device__ constexpr int at_least_1(int a) { return a > 1 ? a : 1; }

constexpr int THREADS = 32 * WARPS;
constexpr int GATE_ROWS = NUM_LOGITS;
constexpr int TILES = quotient(GATE_ROWS, EXPERTS_PER_BLOCK);
constexpr int COLUMNS = TILES * EXPERTS_PER_BLOCK;  // of a row of partial sums
constexpr int WARPS_ALONG_EXPERTS = EXPERTS_PER_BLOCK / EXPERTS_PER_WARP;
constexpr int WARP_SPLITS = WARPS / WARPS_ALONG_EXPERTS;  // warps that divide a slice among them
constexpr int ROW = EXPERTS_PER_BLOCK + 4;                // the 4 keep the stores of a fragment on banks of their own

static_assert(EXPERTS_PER_BLOCK % 4 == 0 && EXPERTS_PER_BLOCK % EXPERTS_PER_WARP == 0,
              "warps divide the block's experts");
static_assert(WARPS % WARPS_ALONG_EXPERTS == 0, "warps divide the slice");
static_assert(TENSOR_CORES || WARP_SPLITS == 1, "without tensor cores a warp has the whole slice");
static_assert(!TENSOR_CORES || (EXPERTS_PER_WARP % 16 == 0 && DTYPE == WEIGHT_DTYPE && DTYPE != 0),
              "tiles of one type");

#if TENSOR_CORES

constexpr int STEP = 32;  // hidden elements of four lanes with a word each, and of two products
constexpr int M_TILES = EXPERTS_PER_WARP / 16;
constexpr int N_TILES = quotient(TOKENS, 8);
constexpr int CHAINS = M_TILES * N_TILES < 4 ? 2 : 1;  // of products that wait for each other, for each tile
constexpr int ALL_STEPS = quotient(HIDDEN, STEP);
static_assert(ALL_STEPS < 0x7fffffff / (SPLITS * WARP_SPLITS), "parts of hidden are counted in int");
constexpr int STEPS = quotient(ALL_STEPS, SPLITS* WARP_SPLITS);  // of a warp, at most
constexpr int BATCHES = at_least_1(quotient(STEPS, at_least_1(IN_FLIGHT / (2 * M_TILES + N_TILES))));
constexpr int BATCH = at_least_1(quotient(STEPS, BATCHES));  // steps whose loads are all in flight before the first use
constexpr bool EVEN = ALIGNED && HIDDEN == BATCHES * BATCH * STEP * SPLITS * WARP_SPLITS;  // no step ends early

__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    if (DTYPE == 2) {
        mma_bfloat16(sums, a, b);
    } else {
        mma_float16(sums, a, b);
    }
}

__device__ __forceinline__ void gate_gemm(const x_t* x, const gate_t* weight, int64_t x_stride, int64_t weight_stride,
                                          int first_expert, int slice, int num_tokens, float* shared_sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int layer = warp / WARPS_ALONG_EXPERTS, own_experts = warp % WARPS_ALONG_EXPERTS * EXPERTS_PER_WARP;
    const int part = slice * WARP_SPLITS + layer;  // of hidden, this warp's; parts differ by a step at most
    const int end = min((part + 1) * ALL_STEPS / (SPLITS * WARP_SPLITS) * STEP, HIDDEN);
    const int begin = part * ALL_STEPS / (SPLITS * WARP_SPLITS) * STEP + lane % 4 * 8;

    const gate_t* experts[M_TILES][2];
    const x_t* tokens[N_TILES];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // after the last expert it is repeated, and not used
            const int expert = first_expert + own_experts + 16 * m + 8 * half + lane / 4;
            experts[m][half] = weight + (COLUMNS == GATE_ROWS ? expert : min(expert, GATE_ROWS - 1)) * weight_stride;
        }
    }
#pragma unroll
    for (int t = 0; t < N_TILES; ++t) tokens[t] = x + (8 * t + lane / 4) * x_stride;

    float sums[CHAINS][M_TILES][N_TILES][4] = {};
#pragma unroll 1
    for (int step = 0; step < STEPS; step += BATCH) {
        Vector8<gate_t> a[BATCH][M_TILES][2];
        Vector8<x_t> b[BATCH][N_TILES];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int column = begin + (step + i) * STEP, left = EVEN ? 8 : end - column;
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                a[i][m][0] = load_vector8<ALIGNED>(experts[m][0] + column, left);
                a[i][m][1] = load_vector8<ALIGNED>(experts[m][1] + column, left);
            }
#pragma unroll
            for (int t = 0; t < N_TILES; ++t) {  // nothing is read where there is no token
                b[i][t] = load_vector8<ALIGNED>(tokens[t] + column, 8 * t + lane / 4 < num_tokens ? left : 0);
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
                const int token = 8 * t + lane % 4 * 2 + i % 2;
                const int expert = own_experts + 16 * m + lane / 4 + i / 2 * 8;
                const float sum = CHAINS == 1 ? sums[0][m][t][i] : sums[0][m][t][i] + sums[CHAINS - 1][m][t][i];
                if (token < TOKENS) shared_sums[(layer * TOKENS + token) * ROW + expert] = sum;
            }
        }
    }
}

#else

constexpr int SPLIT_SIZE = 8 * quotient(quotient(HIDDEN, 8), SPLITS);
constexpr int STEPS = quotient(SPLIT_SIZE, 256);
constexpr int UNROLL = STEPS < 4 ? STEPS : 4;

__device__ __forceinline__ void gate_gemm(const x_t* x, const gate_t* weight, int64_t x_stride, int64_t weight_stride,
                                          int first_expert, int slice, int num_tokens, float* shared_sums) {
    const int lane = threadIdx.x % 32, own_experts = threadIdx.x / 32 * EXPERTS_PER_WARP;
    const int end = min((slice + 1) * SPLIT_SIZE, HIDDEN);
    float sums[EXPERTS_PER_WARP][TOKENS] = {};
#pragma unroll UNROLL
    for (int step = 0; step < STEPS; ++step) {
        const int column = slice * SPLIT_SIZE + step * 256 + lane * 8;
        Vector8<gate_t> w[EXPERTS_PER_WARP];
        Vector8<x_t> v[TOKENS];
#pragma unroll
        for (int e = 0; e < EXPERTS_PER_WARP; ++e) {
            const int expert = min(first_expert + own_experts + e, GATE_ROWS - 1);
            w[e] = load_vector8<ALIGNED>(weight + expert * weight_stride + column, end - column);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            v[t] = load_vector8<ALIGNED>(x + t * x_stride + column, t < num_tokens ? end - column : 0);
        }
#pragma unroll
        for (int e = 0; e < EXPERTS_PER_WARP; ++e) {
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) sums[e][t] = dot(w[e], v[t], sums[e][t]);
        }
    }
#pragma unroll
    for (int e = 0; e < EXPERTS_PER_WARP; ++e) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const float sum = lanes_sum<32>(sums[e][t]);
            if (lane == (e * TOKENS + t) % 32) shared_sums[t * ROW + own_experts + e] = sum;
        }
    }
}

#endif
