// SPDX-License-Identifier: Apache-2.0
// The k-th greatest of all keys of four blocks, twice, each time in as many steps as it takes. Every block writes the
// key and how many of the last range are above it; then the same of its own keys alone.
#include "long_rows/narrow.cuh"

template <int Cluster>
__device__ __forceinline__ uint2 kth(const unsigned* keys, int count, int k, int* bins, SentBins<4>* sent, int& turn) {
    Bin bin = {{0u, ~0u}, 0, 0};
    while (bin.keys.low < bin.keys.high) {
        const KeyCounter counter(bin.keys, bins);
        for (int i = threadIdx.x; i < count; i += 256) counter(keys[i]);
        __syncthreads();
        OwnBins own = take_bins(bins);
        if (Cluster > 1) {
            sent[turn].send(cluster_rank(), own);
            cluster_barrier();
            own = sent[turn].sum();
            turn = 1 - turn;
        }
        bin = choose_part<256>(counter, k, own);
        k -= bin.above;
    }
    return {bin.keys.low, static_cast<unsigned>(bin.above)};
}

extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(256)
    kth_key(const unsigned* keys, uint2* together, uint2* alone, int count, int k) {
    __shared__ __align__(16) int bins[BINS];
    __shared__ SentBins<4> sent[2];
    for (int i = threadIdx.x; i < BINS; i += 256) bins[i] = 0;
    cluster_barrier();
    const unsigned* mine = keys + blockIdx.x * count;
    int turn = 0;
    for (int time = 0; time < 2; ++time) {
        const uint2 found = kth<4>(mine, count, k, bins, sent, turn);
        if (threadIdx.x == 0) together[2 * blockIdx.x + time] = found;
    }
    const uint2 found = kth<1>(mine, count, min(k, count), bins, sent, turn);
    if (threadIdx.x == 0) alone[blockIdx.x] = found;
    cluster_wait();
}
