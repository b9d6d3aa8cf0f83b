// SPDX-License-Identifier: Apache-2.0
// Clusters of four blocks: a histogram of each cluster's values modulo 8, by atomics into the first block's shared memory;
// then every block reads its right neighbour's mark and leaves a greeting at its left neighbour.
#include "device/cluster.cuh"

extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(64)
    cluster(const int* values, int* histograms, int* marks, int* greetings) {
    __shared__ int counts[8];
    __shared__ int mark, greeting;
    const unsigned rank = cluster_rank(), size = cluster_size(), number = blockIdx.x / size;
    if (threadIdx.x < 8) counts[threadIdx.x] = 0;
    if (threadIdx.x == 0) mark = 100 * blockIdx.x;
    cluster_barrier();
    atomicAdd(cluster_map(counts, 0) + values[blockIdx.x * blockDim.x + threadIdx.x] % 8, 1);
    if (threadIdx.x == 0) {
        marks[blockIdx.x] = *cluster_map(&mark, (rank + 1) % size);
        *cluster_map(&greeting, (rank + size - 1) % size) = 100 * blockIdx.x + 1;
    }
    cluster_barrier();
    if (rank == 0 && threadIdx.x < 8) histograms[number * 8 + threadIdx.x] = counts[threadIdx.x];
    if (threadIdx.x == 0) greetings[blockIdx.x] = greeting;
}
