// SPDX-License-Identifier: Apache-2.0
// Fault: only one block of the pair comes to the cluster's barrier. out = x.
#include "device/cluster.cuh"

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(64)
    lone_cluster_barrier(const float* x, float* out, int n, int faulty) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    out[i] = x[i];
    if (!faulty || cluster_rank() == 0) cluster_barrier();
}
