// SPDX-License-Identifier: Apache-2.0
// The layout of few tokens in the launch that routes them, by one of its blocks once all have routed.
//
// All blocks first write their part of the rows as padding, while they wait for what they route by anyway; only the rows
// of pairs are left then.
#pragma once

#include "device/cluster.cuh"
#include "device/last_block.cuh"
#include "layout/block_layout.cuh"
#include "layout/few_pairs.cuh"

// Which block lays out, and where it finds the experts: there is one block, which keeps them in shared memory; the last
// block to arrive reads what all have written; the blocks of a cluster write into the shared memory of the first.
enum LayoutBy { ONE_BLOCK, LAST_BLOCK, CLUSTER };

SPECIALISED LayoutBy LAYOUT_BY = ONE_BLOCK;
SPECIALISED int LAYOUT_THREADS = 256;     // of a block
SPECIALISED int LAYOUT_PAIRS = 512;       // of the call, at most
SPECIALISED bool LAYOUT_BY_PAIR = false;  // so few that threads look at each

template <int TopK, int Experts>
struct FusedLayout {
    // Shared memory that is used after the routing only.
    typedef BlockLayout<LAYOUT_THREADS, LAYOUT_BY_PAIR ? 1 : Experts, LAYOUT_BY_PAIR ? 1 : LAYOUT_PAIRS> Memory;

    int experts[LAYOUT_BY == LAST_BLOCK ? 1 : LAYOUT_PAIRS];  // of pairs

    // Every thread calls it before it routes.
    __device__ __forceinline__ void begin(const LayoutResults& results) {
        if (LAYOUT_BY == CLUSTER) cluster_arrive();
        if (LAYOUT_PREFILLED) {
            const unsigned thread = blockIdx.x * LAYOUT_THREADS + threadIdx.x;
            fill_rows(results, 0, thread, gridDim.x * LAYOUT_THREADS);
        }
    }

    // Every thread calls it before the first expert is kept.
    __device__ __forceinline__ void wait() {
        if (LAYOUT_BY == CLUSTER) cluster_wait();
    }

    __device__ __forceinline__ void keep(int pair, int expert) {
        if (LAYOUT_BY == ONE_BLOCK) experts[pair] = expert;
        if (LAYOUT_BY == CLUSTER) *cluster_map(&experts[pair], 0) = expert;
    }

    // Lay out what the blocks have routed. Every thread of a block calls it when its block has; `arrivals` blocks do.
    template <typename Index>
    __device__ __forceinline__ void finish(Memory& memory, int num_pairs, const Index* indices, int64_t indices_stride,
                                           const LayoutResults& results, unsigned* counter, unsigned arrivals) {
        if (LAYOUT_BY == LAST_BLOCK) {
            if (!is_last_block(counter, arrivals)) return;
        } else if (LAYOUT_BY == CLUSTER) {
            cluster_barrier();
            if (cluster_rank() > 0) return;
        } else {
            __syncthreads();
        }
        const auto expert_of_pair = [&](unsigned pair) {
            if (LAYOUT_BY != LAST_BLOCK) return experts[pair];
            return static_cast<int>(__ldcg(indices + pair / TopK * indices_stride + pair % TopK));
        };
        if constexpr (LAYOUT_BY_PAIR) {
            const int lane = threadIdx.x % 32, expert = lane < num_pairs ? expert_of_pair(lane) : -1;
            constexpr int ROUNDS = (Experts + LAYOUT_THREADS - 1) / LAYOUT_THREADS;
            layout_few_pairs<TopK, Experts, LAYOUT_PAIRS, ROUNDS>(num_pairs, expert, results, threadIdx.x,
                                                                  LAYOUT_THREADS);
        } else {
            layout_by_block<TopK>(memory, num_pairs, expert_of_pair, results);
        }
    }
};
