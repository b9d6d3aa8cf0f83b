// SPDX-License-Identifier: Apache-2.0
// Physical experts: the replica of its expert that a token takes, in place of the id of the expert.
#pragma once

#include "routing/weigh.cuh"

SPECIALISED int NUM_PHYSICAL = 0;         // 0: experts have no replicas
SPECIALISED int MAX_REPLICAS = 1;         // of an expert
SPECIALISED int64_t REPLICA_STRIDE = 1;   // ids from one expert's replicas to the next's
SPECIALISED int REPLICA_BYTES = 4;        // of an id
SPECIALISED int REPLICA_COUNT_BYTES = 4;  // of a count

constexpr int COUNTED_EXPERTS = (NUM_PHYSICAL > 0 ? NUM_PHYSICAL : NUM_EXPERTS) + NUM_SHARED;

typedef Integer<REPLICA_BYTES>::type replica_t;
typedef Integer<REPLICA_COUNT_BYTES>::type replica_count_t;

struct Replicas {
    const replica_t* ids;
    const replica_count_t* counts;
    int64_t offset;
};

// Return the id of a token's expert in a column of the results, -1 if it has no replica. `expert` is that of
// `expert_of`.
__device__ __forceinline__ index_t written_id(int64_t expert, int output, int64_t token, const Replicas& replicas) {
    if (NUM_PHYSICAL == 0) return static_cast<index_t>(expert);
    if (NUM_SHARED > 0 && output >= TOP_K) return static_cast<index_t>(NUM_PHYSICAL + (output - TOP_K));
    const replica_count_t count = __ldg(replicas.counts + expert);
    if (count < 1 || count > MAX_REPLICAS) return index_t(-1);
    const unsigned place = static_cast<unsigned>(token) + static_cast<unsigned>(replicas.offset);
    const replica_t id = __ldg(replicas.ids + expert * REPLICA_STRIDE + place % static_cast<unsigned>(count));
    return id >= 0 && id < NUM_PHYSICAL ? static_cast<index_t>(id) : index_t(-1);
}
