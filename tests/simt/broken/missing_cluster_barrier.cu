// SPDX-License-Identifier: Apache-2.0
// Fault: blocks read their neighbour's shared memory before it has been written. out = x of the other block of a pair.
#include "device/cluster.cuh"

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(64)
    missing_cluster_barrier(const float* x, float* out, int n, int faulty) {
    __shared__ float part[64];
    const int i = blockIdx.x * 64 + threadIdx.x;
    part[threadIdx.x] = x[i];
    if (!faulty) cluster_barrier();
    out[i] = cluster_map(part, cluster_rank() ^ 1)[threadIdx.x];
    cluster_barrier();
}
