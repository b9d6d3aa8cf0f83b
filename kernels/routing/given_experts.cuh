// SPDX-License-Identifier: Apache-2.0
// Experts that the caller gives for a token, in place of a selection.
#pragma once

#include "device/warp.cuh"
#include "routing/biases.cuh"
#include "routing/method.cuh"

SPECIALISED int GIVEN_BYTES = 0;  // of an id; 0: none are given
SPECIALISED bool GIVEN_UNSIGNED = false;
SPECIALISED bool UNSET_EMPTY = false;  // a row of -1 has no experts; else they are selected
SPECIALISED bool KEEPS_UNSET = false;  // the results of a row of -1 are left as they are
SPECIALISED int GIVEN_ID_BYTES = 0;    // of token ids, by which tokens with bias 0 find theirs; 0: each has its own row
SPECIALISED int64_t GIVEN_ROWS = 0;    // token ids are below this

constexpr bool HAS_GIVEN = GIVEN_BYTES > 0, BY_TOKEN_ID = GIVEN_ID_BYTES > 0;

typedef Integer<HAS_GIVEN ? GIVEN_BYTES : 4, GIVEN_UNSIGNED>::type given_t;
typedef Integer<BY_TOKEN_ID ? GIVEN_ID_BYTES : 4>::type given_token_t;

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

// Return the ids of a token, null if its token id has none.
__device__ __forceinline__ const given_t* given_row(const given_t* experts, int64_t stride,
                                                    const given_token_t* token_ids, int64_t token) {
    if (!BY_TOKEN_ID) return experts + token * stride;
    const int64_t id = __ldg(token_ids + token);
    return id >= 0 && id < GIVEN_ROWS ? experts + id * stride : nullptr;
}

// Return the id of a lane's place, UNSET if it has none.
__device__ __forceinline__ int given_id(const given_t* experts, int64_t stride, const given_token_t* token_ids,
                                        int64_t token, int lane, bool exists) {
    if (!BY_TOKEN_ID) return HAS_GIVEN && exists && lane < TOP_K ? given_id(experts + token * stride + lane) : UNSET;
    if (!exists || lane >= TOP_K) return UNSET;  // before the row is found, or ptxas spills registers
    const given_t* row = given_row(experts, stride, token_ids, token);
    return row == nullptr ? UNSET : given_id(row + lane);
}

// Complete it for the lanes that share a token.
template <int Lanes>
__device__ __forceinline__ GivenExpert given_expert(int id, const BiasRow& its_bias, int lane) {
    if (!HAS_GIVEN) return {id, false, true};
    bool is_set = BY_TOKEN_ID ? its_bias.is_first : UNSET_EMPTY;
    if (!BY_TOKEN_ID && !UNSET_EMPTY) is_set = lanes_ballot<Lanes>(id != UNSET) != 0;
    return {id, is_set, lanes_ballot<Lanes>(lane < TOP_K && id < 0) == 0};
}
