// SPDX-License-Identifier: Apache-2.0
// How rows are divided over threads: a team of threads moves a row, or one of PARTS parts of it.
#pragma once

#include "rows/vector.cuh"

SPECIALISED int TOP_K = 6;
SPECIALISED int HIDDEN = 4096;
SPECIALISED int VECTOR = 8;         // elements that a thread moves at once; hidden is a multiple
SPECIALISED int TEAM = 128;         // threads, whole warps
SPECIALISED int TEAMS = 1;          // of a block
SPECIALISED int PARTS = 1;          // of a row, each moved by a team of its own
SPECIALISED int UNROLL = 2;         // vectors of each row that a thread has in flight
SPECIALISED int SLOTS = 6;          // of a token, whose rows are in flight together
SPECIALISED bool SPREAD = false;    // groups of so many slots have a team each, instead of following each other
SPECIALISED bool READ_ONCE = true;  // rows of pairs are the first to leave the caches once they are read
SPECIALISED bool DENSE = false;     // the rows of every array follow each other
SPECIALISED int MIN_BLOCKS = 0;     // of a multiprocessor, for ptxas; 0: as it chooses
SPECIALISED bool WEIGHTED = false;
SPECIALISED int WEIGHT_DTYPE = 0;

typedef Scalar<WEIGHT_DTYPE>::type weight_t;

constexpr int VECTORS = HIDDEN / VECTOR;  // of a row
constexpr int STEP = TEAM * UNROLL;       // vectors of a row that a team moves at once
constexpr bool WHOLE_STEPS = VECTORS % STEP == 0;
constexpr int GROUPS = (TOP_K + SLOTS - 1) / SLOTS;    // of slots
constexpr bool ONE_GROUP = GROUPS == 1 || SPREAD;      // for a team
constexpr int SHARES = PARTS * (SPREAD ? GROUPS : 1);  // of the work for a token

static_assert(TEAM % 32 == 0, "whole warps");

// Return whether the row has this vector.
__device__ __forceinline__ bool exists(int vector) { return WHOLE_STEPS || vector < VECTORS; }

// Return the address of a row, whose length is known if rows follow each other.
template <int DENSE_BYTES>
__device__ __forceinline__ const char* row_at(const char* rows, int row, int64_t bytes) {
    return rows + row * (DENSE ? int64_t(DENSE_BYTES) : bytes);
}

template <int DENSE_BYTES>
__device__ __forceinline__ char* row_at(char* rows, int row, int64_t bytes) {
    return rows + row * (DENSE ? int64_t(DENSE_BYTES) : bytes);
}

// The rows of the pairs of a group of a token's slots: -1 for none, and for what is outside the buffer.
struct Slots {
    int row[SLOTS];
    float weight[SLOTS];

    __device__ __forceinline__ void load(const int* positions, const weight_t* weights, int group, int capacity) {
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
            const int slot = group * SLOTS + s;
            row[s] = slot < TOP_K ? __ldg(positions + slot) : -1;
            if (WEIGHTED) weight[s] = slot < TOP_K ? to_float(weights[slot]) : 0.0f;
        }
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) row[s] = row[s] < capacity ? row[s] : -1;
    }

    __device__ __forceinline__ bool has(int s) const { return row[s] >= 0; }
};

// Return the positions or the weights of a token.
template <typename T>
__device__ __forceinline__ const T* slots_of(const T* array, int token, int64_t stride) {
    return array + token * (DENSE ? int64_t(TOP_K) : stride);
}
