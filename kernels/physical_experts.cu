// SPDX-License-Identifier: Apache-2.0
// Replace the ids of experts by those of their replicas, in place; a thread for each id.
#include "routing/replicas.cuh"

extern "C" __global__ void __launch_bounds__(256)
    physical_experts(const replica_t* __restrict__ replicas, const replica_count_t* __restrict__ replica_counts,
                     index_t* indices, long long replica_offset, long long num_tokens, long long indices_stride) {
    const Replicas its_replicas = {replicas, replica_counts, replica_offset};
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < num_tokens * OUTPUTS; i += step) {
        const int64_t token = i / OUTPUTS;
        const int output = static_cast<int>(i % OUTPUTS);
        index_t* place = indices + token * indices_stride + output;
        const index_t id = *place;
        if (id != index_t(-1)) *place = written_id(static_cast<int64_t>(id), output, token, its_replicas);
    }
}
