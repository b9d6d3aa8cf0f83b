// SPDX-License-Identifier: Apache-2.0
// How the gate GEMM is divided over blocks and warps.
#pragma once

#include "routing/method.cuh"

SPECIALISED int HIDDEN = 4096;
SPECIALISED int DTYPE = 2;
SPECIALISED int WEIGHT_DTYPE = DTYPE;
SPECIALISED bool ALIGNED = true;  // rows of both start at 16-byte words, and HIDDEN is a multiple of 8
SPECIALISED bool TENSOR_CORES = true;
SPECIALISED int TOKENS = 1;  // tokens of a group
SPECIALISED int SPLITS = 8;
SPECIALISED int EXPERTS_PER_BLOCK = 64;
SPECIALISED int EXPERTS_PER_WARP = 16;
SPECIALISED int WARPS = 8;
SPECIALISED int WARPS_ALONG_TOKENS = 1;
SPECIALISED bool INVARIANT = false;  // sums have one order for any number of tokens, which depends on HIDDEN alone
SPECIALISED int STAGES = 0;          // of copies to shared memory, see gemm_wgmma.cuh; 0: there are none
SPECIALISED int IN_FLIGHT = 36;      // 16-byte loads of a thread before their first use

typedef Scalar<DTYPE>::type x_t;
typedef Scalar<WEIGHT_DTYPE>::type gate_t;

__device__ constexpr int quotient(int a, int b) {  // rounded up
    return (a + b - 1) / b;
}
__device__ constexpr int at_least_1(int a) { return a > 1 ? a : 1; }

constexpr int THREADS = 32 * WARPS;
constexpr int GATE_ROWS = NUM_LOGITS;
constexpr int TILES = quotient(GATE_ROWS, EXPERTS_PER_BLOCK);
constexpr int COLUMNS = TILES * EXPERTS_PER_BLOCK;  // columns of a row of partial sums
constexpr int WARPS_ALONG_EXPERTS = EXPERTS_PER_BLOCK / EXPERTS_PER_WARP;
constexpr int WARP_SPLITS = WARPS / (WARPS_ALONG_EXPERTS * WARPS_ALONG_TOKENS);  // warps that divide a split among them
constexpr int ROW = EXPERTS_PER_BLOCK + 4;  // 4 more, so that the stores of a fragment hit different banks

static_assert(EXPERTS_PER_BLOCK % 4 == 0 && EXPERTS_PER_BLOCK % EXPERTS_PER_WARP == 0,
              "warps divide the block's experts");
static_assert(WARPS % (WARPS_ALONG_EXPERTS * WARPS_ALONG_TOKENS) == 0, "warps divide the split");
static_assert(TENSOR_CORES || (WARP_SPLITS == 1 && WARPS_ALONG_TOKENS == 1),
              "without tensor cores a warp has the whole split");
static_assert(!INVARIANT || (SPLITS == 8 && WARP_SPLITS == (TENSOR_CORES ? 2 : 1)),
              "hidden is always divided into the same parts, and pairs of neighbours are added first");
static_assert(!TENSOR_CORES || (DTYPE == WEIGHT_DTYPE && DTYPE != 0), "tensor cores multiply one type");
