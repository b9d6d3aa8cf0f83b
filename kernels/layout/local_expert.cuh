// SPDX-License-Identifier: Apache-2.0
// From the id of a pair to its expert among those in question, and the load by id.
#pragma once

#include "device/num_valid.cuh"

SPECIALISED int ID_BYTES = 4;
SPECIALISED bool ID_UNSIGNED = false;
SPECIALISED int NUM_EXPERTS = 256;      // ids 0 .. NUM_EXPERTS - 1
SPECIALISED int LOCAL_EXPERTS = 256;    // of these, experts in question
SPECIALISED int TOP_K = 8;              // ids of a token
SPECIALISED bool HAS_MAP = false;       // a map renumbers the experts in question; else they follow each other
SPECIALISED bool DENSE_INDICES = true;  // rows of ids follow each other
SPECIALISED int LOAD_BYTES = 0;         // the load is wanted

template <int BYTES, bool UNSIGNED>
struct Id {
    typedef typename Integer<BYTES>::type type;
};
template <>
struct Id<1, true> {
    typedef unsigned char type;
};
template <>
struct Id<2, false> {
    typedef short type;
};
template <>
struct Id<2, true> {
    typedef unsigned short type;
};
typedef Id<ID_BYTES, ID_UNSIGNED>::type id_t;
typedef Integer<LOAD_BYTES == 8 ? 8 : 4>::type load_t;

struct Pairs {
    const id_t* indices;
    const int* expert_map;
    int64_t stride;    // of rows of indices
    int first_expert;  // in question
    int valid;         // pairs before the padding
};

// Return the id of a pair; -1 if it is no expert or the pair is padding.
__device__ __forceinline__ int id_of(const Pairs& pairs, int pair) {
    if (pair >= pairs.valid) return -1;
    const int64_t gap = DENSE_INDICES ? 0 : pair / TOP_K * (pairs.stride - TOP_K);
    const id_t id = __ldg(pairs.indices + pair + gap);
    return id >= 0 && static_cast<unsigned long long>(id) < NUM_EXPERTS ? static_cast<int>(id) : -1;
}

// Return the number of an expert among those in question; a number outside 0 .. LOCAL_EXPERTS - 1 if it is not.
__device__ __forceinline__ int local_expert(const Pairs& pairs, int id) {
    if (id < 0) return -1;
    return HAS_MAP ? __ldg(pairs.expert_map + id) : id - pairs.first_expert;
}
