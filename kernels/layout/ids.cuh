// SPDX-License-Identifier: Apache-2.0
// From the id of a pair to its expert among those in question, and the load by id.
#pragma once

#include "device/num_valid.cuh"
#include "layout/ranks.cuh"
#include "layout/results.cuh"

SPECIALISED int ID_BYTES = 4;
SPECIALISED bool ID_UNSIGNED = false;
SPECIALISED int NUM_EXPERTS = 256;      // ids 0 .. NUM_EXPERTS - 1
SPECIALISED int LOCAL_EXPERTS = 256;    // of these, experts in question
SPECIALISED int TOP_K = 8;              // ids of a token
SPECIALISED bool HAS_MAP = false;       // a map renumbers the experts in question; else they follow each other
SPECIALISED bool DENSE_INDICES = true;  // rows of ids follow each other

typedef Integer<ID_BYTES, ID_UNSIGNED>::type id_t;

__device__ __forceinline__ void add_one(int* sum) { atomicAdd(sum, 1); }

__device__ __forceinline__ void add_one(long long* sum) { atomicAdd(reinterpret_cast<unsigned long long*>(sum), 1ull); }

// A map may send several ids to one expert. Then the load is counted by pair, else by expert.
constexpr bool LOAD_BY_PAIR = HAS_MAP && LAYOUT_LOAD_BYTES > 0;

struct Ids {
    const id_t* indices;
    const int* expert_map;
    int64_t stride;    // of rows of indices
    int first_expert;  // in question
    unsigned valid;    // pairs before the padding
    load_t* load;      // counted by pair; null if it is not

    // Read the experts of a share, all loads in flight: their numbers among those in question, or -1. Add the pairs to
    // the load.
    template <int Rounds>
    __device__ __forceinline__ void read(RankedPairs<Rounds>& pairs) const {
        id_t id[Rounds];
#pragma unroll
        for (int round = 0; round < Rounds; ++round) {
            const unsigned pair = pairs.first + round * 32;
            const int64_t gap = DENSE_INDICES ? 0 : static_cast<int64_t>(pair / TOP_K) * (stride - TOP_K);
            id[round] = pair < valid ? __ldg(indices + pair + gap) : static_cast<id_t>(-1);
        }
#pragma unroll
        for (int round = 0; round < Rounds; ++round) {
            const bool known = pairs.first + round * 32 < valid && id[round] >= 0 &&
                               static_cast<unsigned long long>(id[round]) < NUM_EXPERTS;
            const int number =
                HAS_MAP ? (known ? __ldg(expert_map + id[round]) : -1) : static_cast<int>(id[round]) - first_expert;
            pairs.expert[round] = known && static_cast<unsigned>(number) < LOCAL_EXPERTS ? number : -1;
        }
        if (!load) return;
#pragma unroll
        for (int round = 0; round < Rounds; ++round) {
            if (pairs.expert[round] < LOCAL_EXPERTS) add_one(load + id[round]);
        }
    }
};

__device__ __forceinline__ Ids ids_of(const id_t* indices, const int* expert_map, load_t* load, const int* num_valid,
                                      int num_valid_value, int num_pairs, int first_expert, int64_t stride) {
    const int64_t valid = valid_rows(num_valid, num_valid_value, num_pairs / TOP_K) * TOP_K;
    return {indices, expert_map, stride, first_expert, static_cast<unsigned>(valid), LOAD_BY_PAIR ? load : nullptr};
}
