// SPDX-License-Identifier: Apache-2.0
// The gate GEMM of a cluster of blocks by wgmma, for many tokens. CLUSTER_PARTS blocks multiply the same TILE_TOKENS
// rows of x with the same EXPERTS_PER_BLOCK rows of the gate, each over its share of the 8 pairs of neighbouring parts
// of hidden. If there are several, they leave the sums of their pairs in shared memory, and each adds all 8 for its
// share of the tokens, in order, from the shared memory of all.
//
// STAGE_COLUMNS columns of x and of the gate at a time are copied to one of STAGES places of a ring, while the
// warpgroups multiply those that have arrived, each 64 tokens and EXPERTS of the block's experts. Products have the
// same 16 columns as in gemm_mma.cuh.
#pragma once

#include "device/async_copy.cuh"
#include "device/cluster.cuh"
#include "device/wgmma.cuh"
#include "gate/gate_tiling.cuh"

SPECIALISED int STAGE_COLUMNS = 64;
SPECIALISED int CLUSTER_PARTS = 8;  // blocks that divide hidden
SPECIALISED int CLUSTER_TILES = 1;  // tiles of experts in a cluster; all TILES, or 1

namespace wgmma_gemm {

constexpr int BLOCKS = CLUSTER_PARTS * CLUSTER_TILES;  // of a cluster
constexpr int TILE_TOKENS = BLOCKS * TOKENS, TOKEN_TILES = quotient(TILE_TOKENS, 64);
constexpr int WARPGROUPS = WARPS / 4;
constexpr int EXPERTS = EXPERTS_PER_BLOCK * TOKEN_TILES / WARPGROUPS;  // of a warpgroup
constexpr int WARPGROUPS_ALONG_EXPERTS = EXPERTS_PER_BLOCK / EXPERTS;
constexpr int STEP = 32, ALL_STEPS = quotient(HIDDEN, STEP), PARTS = 16;
constexpr int STAGE_STEPS = STAGE_COLUMNS / STEP, ROW_BYTES = 128;
constexpr bool EVEN = HIDDEN % (PARTS * STAGE_STEPS * STEP) == 0;  // every part has the same number of whole stages
constexpr int X_BYTES = 64 * TOKEN_TILES * ROW_BYTES, TILE_BYTES = X_BYTES + EXPERTS_PER_BLOCK * ROW_BYTES;
constexpr int STAGE_TILES = STAGE_COLUMNS / 64, STAGE_BYTES = STAGE_TILES * TILE_BYTES;  // of 64 columns
constexpr int PLACES = STAGES > 0 ? STAGES : 3;                                          // of the ring
constexpr int PAIRS = PARTS / 2 / CLUSTER_PARTS;                                         // of a block
constexpr int SUMS_ROW = EXPERTS_PER_BLOCK + 8;  // 8 more, so that the stores of a fragment hit different banks
constexpr int SUMS = EXPERTS / 2;                // of a thread
// The sums of the first of a pair are parked in shared memory if registers are too few for them.
constexpr bool PARKS = CLUSTER_PARTS == 1 && 3 * SUMS + 56 > 65536 / THREADS;
constexpr int RING_BYTES = PLACES * STAGE_BYTES;
constexpr int SHARED_BYTES = RING_BYTES + (PARKS ? 4 * SUMS * THREADS : 0);  // at a multiple of 1024
static_assert(WARPS % 4 == 0 && WARPGROUPS_ALONG_EXPERTS * TOKEN_TILES == WARPGROUPS, "warpgroups divide the tile");
static_assert(PLACES >= 3, "one is multiplied, one may still be, the others are filled");
static_assert(CLUSTER_PARTS == 1 || PAIRS * TILE_TOKENS * SUMS_ROW * 4 <= RING_BYTES, "sums take the place of stages");
static_assert(ALL_STEPS < 0x7fffffff / PARTS, "parts of hidden are counted in int");
static_assert(CLUSTER_TILES == 1 || CLUSTER_TILES == TILES, "one tile of experts, or all");

__device__ __forceinline__ int first_step(int part) { return part * ALL_STEPS / PARTS; }

// Copy 64 columns of `Rows` rows to shared memory, zeros after the last column and after the last of `count` rows.
template <int Rows, typename T>
__device__ __forceinline__ void copy_rows(char* tile, const T* rows, int64_t stride, int count, int column, int end) {
    constexpr int WORDS = ROW_BYTES / 16, ROWS_AT_ONCE = THREADS / WORDS;
    static_assert(ROWS_AT_ONCE % 8 == 0, "a thread copies to the same place of each row");
    const int first_row = threadIdx.x / WORDS;
    char* target = tile + swizzled(first_row, threadIdx.x % WORDS * 16);
    column += threadIdx.x % WORDS * 8;
#pragma unroll
    for (int i = 0; i < quotient(Rows, ROWS_AT_ONCE); ++i) {
        const int row = first_row + i * ROWS_AT_ONCE;
        if (Rows % ROWS_AT_ONCE != 0 && row >= Rows) break;
        const bool exists = (EVEN || column < end) && row < count;
        const T* source = exists ? rows + row * stride + column : rows;
        copy_async16_or_zero(target + i * ROWS_AT_ONCE * ROW_BYTES, source, exists);
    }
}

// Call use(i, token, expert) for the sums i and i + 1 of this thread, of neighbouring experts.
template <typename Use>
__device__ __forceinline__ void for_each_pair_of_experts(int own_tokens, int own_experts, Use use) {
    const int lane = threadIdx.x % 32, first_token = own_tokens + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const int first_expert = own_experts + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < SUMS; i += 2) {
        const int token = first_token + i / 2 % 2 * 8;
        if (TILE_TOKENS % 64 == 0 || token < TILE_TOKENS) use(i, token, first_expert + i / 4 * 8);
    }
}

// Multiply over pairs first_pair .. first_pair + PAIRS - 1. `num_tokens`: of the tile. If the block has all pairs,
// keep(token, expert, sums) gets the sums of two neighbouring experts; otherwise `shared` has those of its pairs,
// [pair][token of the tile][SUMS_ROW].
template <typename X, typename Gate, typename Keep>
__device__ __forceinline__ void run(const X* x, const Gate* weight, int64_t x_stride, int64_t weight_stride,
                                    int first_expert, int first_pair, int num_tokens, char* shared, Keep keep) {
    const int num_experts = COLUMNS == GATE_ROWS ? EXPERTS_PER_BLOCK : GATE_ROWS - first_expert;
    weight += first_expert * weight_stride;
    const int end = first_step(2 * (first_pair + PAIRS));
    int fill_part = 2 * first_pair, fill_step = first_step(fill_part), fill_place = 0;  // of the next copies
    const auto fill = [&] {
        if (fill_step < end) {
            int part_end = end;
            if (!EVEN) {
                while (first_step(fill_part + 1) <= fill_step) ++fill_part;
                part_end = first_step(fill_part + 1);
            }
            const int last = min(part_end * STEP, HIDDEN);
#pragma unroll
            for (int i = 0; i < STAGE_TILES; ++i) {
                const int column = fill_step * STEP + 64 * i;
                char* tile = shared + fill_place * STAGE_BYTES + i * TILE_BYTES;
                copy_rows<TILE_TOKENS>(tile, x, x_stride, num_tokens, column, last);
                copy_rows<EXPERTS_PER_BLOCK>(tile + X_BYTES, weight, weight_stride, num_experts, column, last);
            }
            fill_step = min(fill_step + STAGE_STEPS, part_end);
        }
        copy_async_commit();
        fill_place = fill_place + 1 == PLACES ? 0 : fill_place + 1;
    };
    for (int i = 0; i < PLACES; ++i) fill();

    const int warpgroup = threadIdx.x / 128;
    const int own_tokens = warpgroup / WARPGROUPS_ALONG_EXPERTS * 64;
    const int own_experts = warpgroup % WARPGROUPS_ALONG_EXPERTS * EXPERTS;
    int place = 0, multiplied = 0;
    const auto multiply = [&](float (&sums)[SUMS], int part) {
        const int stages =
            EVEN ? ALL_STEPS / PARTS / STAGE_STEPS : quotient(first_step(part + 1) - first_step(part), STAGE_STEPS);
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
#pragma unroll 1
        for (int i = 0; i < stages; ++i) {
            if (multiplied >= 2) {
                copy_async_wait<PLACES - 3>();
            } else if (multiplied == 1) {
                copy_async_wait<PLACES - 2>();
            } else {
                copy_async_wait<PLACES - 1>();
            }
            wgmma_sees_writes();
            __syncthreads();  // all copies of this stage have arrived, and the stage before the last one has been read
            const char* stage = shared + place * STAGE_BYTES;
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < STAGE_COLUMNS; k += 16) {  // zeros where a part has fewer columns
                const char* tile = stage + k / 64 * TILE_BYTES;
                wgmma<DTYPE == 2>(sums, wgmma_operand(tile + own_tokens * ROW_BYTES, k % 64),
                                  wgmma_operand(tile + X_BYTES + own_experts * ROW_BYTES, k % 64));
            }
            wgmma_commit();
            if (multiplied++ >= 2) fill();
            wgmma_wait<1>();
            place = place + 1 == PLACES ? 0 : place + 1;
        }
        wgmma_finish(sums);
    };

    if constexpr (CLUSTER_PARTS == 1) {
        float total[SUMS], sums[SUMS], first[PARKS ? 1 : SUMS];
        float* parked = reinterpret_cast<float*>(shared + RING_BYTES) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < SUMS; ++i) total[i] = -0.0f;  // which changes no sum
#pragma unroll 1
        for (int pair = 0; pair < PAIRS; ++pair) {
            if constexpr (PARKS) {
                multiply(sums, 2 * pair);
#pragma unroll
                for (int i = 0; i < SUMS; ++i) parked[i * THREADS] = sums[i];
            } else {
                multiply(first, 2 * pair);
            }
            multiply(sums, 2 * pair + 1);
#pragma unroll
            for (int i = 0; i < SUMS; ++i) total[i] += (PARKS ? parked[i * THREADS] : first[PARKS ? 0 : i]) + sums[i];
        }
        for_each_pair_of_experts(own_tokens, own_experts, [&](int i, int token, int expert) {
            if (token < num_tokens) keep(token, expert, make_float2(total[i], total[i + 1]));
        });
    } else {
        float sums[PAIRS + 1][SUMS];
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            multiply(sums[pair], 2 * (first_pair + pair));
            multiply(sums[pair + 1], 2 * (first_pair + pair) + 1);
#pragma unroll
            for (int i = 0; i < SUMS; ++i) sums[pair][i] += sums[pair + 1][i];
        }
        copy_async_wait<0>();
        __syncthreads();  // all products are done, so sums may take the place of their factors
        float* target = reinterpret_cast<float*>(shared);
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            for_each_pair_of_experts(own_tokens, own_experts, [&](int i, int token, int expert) {
                float* place = target + (pair * TILE_TOKENS + token) * SUMS_ROW + expert;
                *reinterpret_cast<float2*>(place) = make_float2(sums[pair][i], sums[pair][i + 1]);
            });
        }
    }
}

// Add the sums of all pairs, in order, for one token of the tile and four experts. first_rank: of the blocks of the
// cluster that have them.
__device__ __forceinline__ float4 add_pairs(char* shared, int first_rank, int token, int expert) {
    float4 parts[PARTS / 2];
#pragma unroll
    for (int i = 0; i < PARTS / 2; ++i) {
        const float* sums = reinterpret_cast<const float*>(cluster_map(shared, first_rank + i / PAIRS));
        const float* source = sums + (i % PAIRS * TILE_TOKENS + token) * SUMS_ROW + expert;
        parts[i] = *reinterpret_cast<const float4*>(source);
    }
    float4 sum = parts[0];
#pragma unroll
    for (int i = 1; i < PARTS / 2; ++i) {
        sum.x += parts[i].x;
        sum.y += parts[i].y;
        sum.z += parts[i].z;
        sum.w += parts[i].w;
    }
    return sum;
}

}  // namespace wgmma_gemm
