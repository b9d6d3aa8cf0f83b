// SPDX-License-Identifier: Apache-2.0
// Experts that the caller gives for a token, in place of a selection.
#pragma once

#include "device/warp.cuh"
#include "routing/method.cuh"

SPECIALISED int GIVEN_BYTES = 0;  // of an id; 0: none are given
SPECIALISED bool GIVEN_UNSIGNED = false;
SPECIALISED bool UNSET_EMPTY = false;  // a row of -1 has no experts; else they are selected

constexpr bool HAS_GIVEN = GIVEN_BYTES > 0;

typedef Integer<HAS_GIVEN ? GIVEN_BYTES : 4, GIVEN_UNSIGNED>::type given_t;

constexpr int UNSET = -1, NO_EXPERT = -2;

// The given expert of a lane's place.
struct GivenExpert {
    int id;       // or UNSET, or NO_EXPERT
    bool is_set;  // nothing is selected for the token
    bool exists;  // all its experts do
};

// Return the id at a place, or UNSET, or NO_EXPERT.
__device__ __forceinline__ int given_id(const given_t* place) {
    const given_t id = __ldg(place);
    if (id >= 0 && static_cast<int64_t>(id) < NUM_EXPERTS) return static_cast<int>(id);
    return static_cast<int64_t>(id) == -1 ? UNSET : NO_EXPERT;
}

// Return the id of a lane's place, UNSET if it has none.
__device__ __forceinline__ int given_id(const given_t* ids, int lane, bool exists) {
    return HAS_GIVEN && exists && lane < TOP_K ? given_id(ids + lane) : UNSET;
}

// Complete it for the lanes that share a token.
template <int Lanes>
__device__ __forceinline__ GivenExpert given_expert(int id, int lane) {
    if (!HAS_GIVEN) return {id, false, true};
    const bool is_set = UNSET_EMPTY || lanes_ballot<Lanes>(id != UNSET) != 0;
    return {id, is_set, lanes_ballot<Lanes>(lane < TOP_K && id < 0) == 0};
}
