// SPDX-License-Identifier: Apache-2.0
// The gate GEMM of a cluster of blocks by wgmma, for many tokens. CLUSTER_PARTS blocks multiply the same TILE_TOKENS
// rows of x with the same EXPERTS_PER_BLOCK rows of the gate, each over its share of the 8 pairs of neighbouring parts
// of hidden. They leave the sums of their pairs in shared memory, or the sum of all 8, from where all blocks of the
// cluster read them.
//
// A thread of one warpgroup copies STAGE_COLUMNS columns of x and of the gate at a time to one of STAGES places of a
// ring, and the other warpgroups multiply what has arrived, each 64 of the block's experts and TOKENS_AT_ONCE tokens.
// A place of the ring has two barriers: it is full when all copies to it are done, and empty when all warps have
// multiplied it. One more barrier tells when all products are done. Products have the same 16 columns as in gemm_mma.cuh.
#pragma once

#include "device/cluster.cuh"
#include "device/mbarrier.cuh"
#include "device/tensor_map.cuh"
#include "device/wgmma.cuh"
#include "gate/gate_tiling.cuh"

SPECIALISED int STAGE_COLUMNS = 64;
SPECIALISED int TOKEN_WARPGROUPS = 1;  // that divide the tokens of a tile
SPECIALISED int CLUSTER_PARTS = 8;     // blocks that divide hidden
SPECIALISED int CLUSTER_TILES = 1;     // tiles of experts in a cluster; all TILES, or 1

namespace wgmma_gemm {

constexpr int BLOCKS = CLUSTER_PARTS * CLUSTER_TILES;  // of a cluster
constexpr int TILE_TOKENS = BLOCKS * TOKENS, TOKEN_ROWS = 8 * quotient(TILE_TOKENS, 8);
constexpr int EXPERT_WARPGROUPS = EXPERTS_PER_BLOCK / 64;
constexpr int WARPGROUPS = EXPERT_WARPGROUPS * TOKEN_WARPGROUPS, MULTIPLYING_WARPS = 4 * WARPGROUPS;
constexpr int OTHER_WARPGROUPS = WARPS / 4 - WARPGROUPS;  // of which one copies; all of them route
constexpr int TOKENS_AT_ONCE = STAGES > 0 ? TOKEN_ROWS / TOKEN_WARPGROUPS : 32;  // of a warpgroup
constexpr int STEP = 32, ALL_STEPS = quotient(HIDDEN, STEP), PARTS = 16;
constexpr int STAGE_STEPS = STAGE_COLUMNS / STEP, ROW_BYTES = 128;
constexpr bool EVEN = HIDDEN % (PARTS * STAGE_STEPS * STEP) == 0;  // every part has the same number of whole stages
constexpr int GATE_BYTES = EXPERTS_PER_BLOCK * ROW_BYTES, TILE_BYTES = GATE_BYTES + TOKEN_ROWS * ROW_BYTES;
constexpr int STAGE_TILES = STAGE_COLUMNS / 64, STAGE_BYTES = STAGE_TILES * TILE_BYTES;  // of 64 columns
constexpr int PLACES = STAGES > 0 ? STAGES : 2;                                          // of the ring
constexpr int BARRIERS = 2 * PLACES + 1;
constexpr int PAIRS = PARTS / 2 / CLUSTER_PARTS;      // of a block
constexpr int SETS = CLUSTER_PARTS == 1 ? 1 : PAIRS;  // of sums that the block leaves in shared memory
constexpr int SUMS_ROW = EXPERTS_PER_BLOCK + 4;       // 4 more, so that the stores of a fragment hit different banks
constexpr int SUMS = TOKENS_AT_ONCE / 2;              // of a thread
// Registers of a thread: each of the four parts of a multiprocessor has 512 for every lane, and a warp of each
// warpgroup. If those are too few for sums, the other warpgroups give theirs to those that multiply; if they still are,
// the sums of the first of a pair are parked in shared memory.
constexpr int REGISTERS = min_int(512 / (WARPS / 4) / 8 * 8, 248), FEWEST_REGISTERS = 24, MORE_THAN_SUMS = 32;
constexpr bool GIVES_REGISTERS = (CLUSTER_PARTS == 1 ? 3 : SETS + 1) * SUMS + MORE_THAN_SUMS > REGISTERS;
constexpr int LEFT_REGISTERS = (REGISTERS * (WARPS / 4) - FEWEST_REGISTERS * OTHER_WARPGROUPS) / WARPGROUPS / 8 * 8;
constexpr int MULTIPLYING_REGISTERS = GIVES_REGISTERS ? min_int(LEFT_REGISTERS, 240) : REGISTERS;
constexpr bool PARKS = CLUSTER_PARTS == 1 && 3 * SUMS + MORE_THAN_SUMS > MULTIPLYING_REGISTERS;
constexpr int RING_BYTES = PLACES * STAGE_BYTES;
constexpr int SHARED_BYTES =  // at a multiple of 1024
    RING_BYTES + (PARKS ? 4 * SUMS * 128 * WARPGROUPS : 0);
constexpr int SUMS_BYTES = 4 * SETS * TILE_TOKENS * SUMS_ROW;  // in place of stages
static_assert(EXPERTS_PER_BLOCK % 64 == 0 && TOKENS_AT_ONCE % 8 == 0, "warpgroups divide the tile");
static_assert(WARPS % 4 == 0 && OTHER_WARPGROUPS > 0, "one warpgroup copies");
static_assert(PLACES >= 2, "one is multiplied, the others are filled");
static_assert(SUMS_BYTES <= SHARED_BYTES, "sums take the place of stages");
static_assert(ALL_STEPS < 0x7fffffff / PARTS, "parts of hidden are counted in int");
static_assert(CLUSTER_TILES == 1 || CLUSTER_TILES == TILES, "one tile of experts, or all");

__device__ __forceinline__ int first_step(int part) { return part * ALL_STEPS / PARTS; }

// Return the number of stages of a part. The last one may have columns of the next part, which are not multiplied.
__device__ __forceinline__ int stages_of(int part) {
    return EVEN ? ALL_STEPS / PARTS / STAGE_STEPS : quotient(first_step(part + 1) - first_step(part), STAGE_STEPS);
}

// Change the number of registers of each thread of a warpgroup.
template <int From, int To>
__device__ __forceinline__ void set_registers() {
#ifdef __CUDACC__
    if (GIVES_REGISTERS && From < To) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(To));
    if (GIVES_REGISTERS && From > To) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(To));
#endif
}

// A barrier for each place of the ring when it is full, one for each when it is empty, and one for the end.
struct Ring {
    char* places;
    Mbarrier* barriers;
    int place = 0;
    unsigned parity = 0;

    __device__ __forceinline__ char* stage() const { return places + place * STAGE_BYTES; }
    __device__ __forceinline__ Mbarrier* full() const { return barriers + place; }
    __device__ __forceinline__ Mbarrier* empty() const { return barriers + PLACES + place; }
    __device__ __forceinline__ Mbarrier* end() const { return barriers + 2 * PLACES; }
    __device__ __forceinline__ void advance() {
        if (++place == PLACES) {
            place = 0;
            parity ^= 1;
        }
    }
};

__device__ __forceinline__ void init_ring(Mbarrier* barriers) {
    if (threadIdx.x < BARRIERS) {
        mbarrier_init(&barriers[threadIdx.x], threadIdx.x < PLACES ? 1 : MULTIPLYING_WARPS);
        mbarrier_init_done();
    }
    __syncthreads();
}

// By one thread, for the parts of this block.
__device__ __forceinline__ void fill(Ring ring, const TensorMap& x_map, const TensorMap& weight_map, int first_expert,
                                     int first_token, int first_part) {
#pragma unroll 1
    for (int part = first_part; part < first_part + 2 * PAIRS; ++part) {
        int column = first_step(part) * STEP;
#pragma unroll 1
        for (int i = 0; i < stages_of(part); ++i) {
            mbarrier_wait(ring.empty(), ring.parity ^ 1);  // at first, the phase before the first one
            mbarrier_expect(ring.full(), STAGE_BYTES);
#pragma unroll
            for (int j = 0; j < STAGE_TILES; ++j) {
                char* tile = ring.stage() + j * TILE_BYTES;
                copy_tile(tile, weight_map, column, first_expert, ring.full());
                copy_tile(tile + GATE_BYTES, x_map, column, first_token, ring.full());
                column += 64;
            }
            ring.advance();
        }
    }
}

// Multiplies the tiles of a ring for one warpgroup.
struct Multiplier {
    Ring ring;
    int gate_byte, x_byte;           // of its rows in a tile
    Mbarrier* multiplied = nullptr;  // of the place whose products may still run

    // Start the products of a part, as sums from zero.
    __device__ __forceinline__ void start(float (&sums)[SUMS], int part) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
        int steps = first_step(part + 1) - first_step(part);
#pragma unroll 1
        for (int i = 0; i < stages_of(part); ++i) {
            mbarrier_wait(ring.full(), ring.parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < STAGE_COLUMNS; k += 16) {
                if (!EVEN && k / STEP >= steps) break;
                const char* tile = ring.stage() + k / 64 * TILE_BYTES;
                wgmma<DTYPE == 2>(sums, wgmma_operand(tile + gate_byte, k % 64), wgmma_operand(tile + x_byte, k % 64));
            }
            steps -= STAGE_STEPS;
            wgmma_commit();
            wgmma_wait<1>();
            release();
            multiplied = ring.empty();
            ring.advance();
        }
    }

    // Return the place whose products are done to the threads that copy.
    __device__ __forceinline__ void release() {
        if (multiplied != nullptr && threadIdx.x % 32 == 0) mbarrier_arrive(multiplied);
        multiplied = nullptr;
    }
};

// By the multiplying warps: over pairs first_pair .. first_pair + PAIRS - 1. Afterwards `sets` are the sums of these
// pairs, or the sum of all.
template <typename Products>
__device__ __forceinline__ void multiply(Products multiplier, int first_pair, float* parked,
                                         float (&sets)[SETS][SUMS]) {
    if constexpr (CLUSTER_PARTS == 1) {
        float second[SUMS], first[PARKS ? 1 : SUMS];
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sets[0][i] = -0.0f;  // which changes no sum
#pragma unroll 1
        for (int pair = 0; pair < PAIRS; ++pair) {
            if constexpr (PARKS) {
                multiplier.start(second, 2 * pair);
                wgmma_finish(second);
#pragma unroll
                for (int i = 0; i < SUMS; ++i) parked[i * 128 * WARPGROUPS] = second[i];
            } else {
                multiplier.start(first, 2 * pair);
            }
            multiplier.start(second, 2 * pair + 1);
            if constexpr (!PARKS) wgmma_finish(first);
            wgmma_finish(second);
            multiplier.release();
#pragma unroll
            for (int i = 0; i < SUMS; ++i)
                sets[0][i] += (PARKS ? parked[i * 128 * WARPGROUPS] : first[PARKS ? 0 : i]) + second[i];
        }
    } else {
        float second[SUMS];
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            multiplier.start(sets[pair], 2 * (first_pair + pair));
            multiplier.start(second, 2 * (first_pair + pair) + 1);
            wgmma_finish(sets[pair]);
            wgmma_finish(second);
            multiplier.release();
#pragma unroll
            for (int i = 0; i < SUMS; ++i) sets[pair][i] += second[i];
        }
    }
}

// Multiply, and leave in `shared` the sums of this block: [set][token of the tile][SUMS_ROW].
__device__ __forceinline__ void run(const TensorMap& x_map, const TensorMap& weight_map, int first_expert,
                                    int first_token, int first_pair, char* shared, Mbarrier* barriers) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Ring ring = {shared, barriers};
    if (threadIdx.x == 32 * MULTIPLYING_WARPS) {
        prefetch_map(x_map);
        prefetch_map(weight_map);
    }
    init_ring(barriers);
    if (warp >= MULTIPLYING_WARPS) {
        set_registers<REGISTERS, FEWEST_REGISTERS>();
        if (threadIdx.x == 32 * MULTIPLYING_WARPS)
            fill(ring, x_map, weight_map, first_expert, first_token, 2 * first_pair);
        __syncwarp();
        set_registers<FEWEST_REGISTERS, REGISTERS>();
        return;
    }
    set_registers<REGISTERS, MULTIPLYING_REGISTERS>();
    const int own_experts = warp / 4 % EXPERT_WARPGROUPS * 64;
    const int own_tokens = warp / 4 / EXPERT_WARPGROUPS * TOKENS_AT_ONCE;
    float sets[SETS][SUMS];
    multiply(Multiplier{ring, own_experts * ROW_BYTES, GATE_BYTES + own_tokens * ROW_BYTES}, first_pair,
             reinterpret_cast<float*>(shared + RING_BYTES) + threadIdx.x, sets);
    if (lane == 0) mbarrier_arrive(ring.end());
    mbarrier_wait(ring.end(), 0);  // all products are done, so sums may take the place of their factors
    float* target = reinterpret_cast<float*>(shared) + own_experts + warp % 4 * 16 + lane / 4;
#pragma unroll
    for (int set = 0; set < SETS; ++set) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
            const int token = own_tokens + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (TILE_TOKENS % 8 == 0 || token < TILE_TOKENS)
                target[(set * TILE_TOKENS + token) * SUMS_ROW + i / 2 % 2 * 8] = sets[set][i];
        }
    }
    set_registers<MULTIPLYING_REGISTERS, REGISTERS>();
}

// Return the logits of one token of the tile and four experts, of this block's tile or, if the cluster has all, of any:
// the sums of all pairs, added in order, from the shared memory of the blocks that have them.
__device__ __forceinline__ float4 read_logits(char* shared, int rank, int token, int expert) {
    const int first_rank = CLUSTER_TILES > 1 ? expert / EXPERTS_PER_BLOCK * CLUSTER_PARTS : rank - rank % CLUSTER_PARTS;
    const int own_expert = expert % EXPERTS_PER_BLOCK;
    float4 sets[SETS * CLUSTER_PARTS];
#pragma unroll
    for (int i = 0; i < SETS * CLUSTER_PARTS; ++i) {
        char* of_block = BLOCKS > 1 ? cluster_map(shared, first_rank + i / SETS) : shared;
        const float* source =
            reinterpret_cast<const float*>(of_block) + (i % SETS * TILE_TOKENS + token) * SUMS_ROW + own_expert;
        sets[i] = *reinterpret_cast<const float4*>(source);
    }
    float4 sum = sets[0];
#pragma unroll
    for (int i = 1; i < SETS * CLUSTER_PARTS; ++i) {
        sum.x += sets[i].x;
        sum.y += sets[i].y;
        sum.z += sets[i].z;
        sum.w += sets[i].w;
    }
    return sum;
}

}  // namespace wgmma_gemm
