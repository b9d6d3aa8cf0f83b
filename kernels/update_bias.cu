// SPDX-License-Identifier: Apache-2.0
// The bias of each expert, moved by a fixed step towards balance, and the mean subtracted if CENTER.
//
// One block serves any number of experts; thread i has experts i, i + 256, ... Counts are added in 64-bit integers, and
// an expert is compared with the mean exactly. The float32 sum for the mean is that of the reference, in its order:
// each thread adds its values in turn, then lanes of a warp and then warps are added by halves. A thread reads and
// writes only its own experts, so the result may lie where the bias is.
#include "device/block.cuh"

SPECIALISED int COUNT_BYTES = 4;
SPECIALISED bool CENTER = false;

typedef Integer<COUNT_BYTES>::type count_t;

extern "C" __global__ void __launch_bounds__(256) update_bias(const float* bias, const count_t* __restrict__ counts,
                                                              float* updated, long long num_experts, float rate) {
    int64_t own_total = 0;
    for (int64_t e = threadIdx.x; e < num_experts; e += blockDim.x) own_total += counts[e];
    const int64_t total = block_reduce(own_total, int64_t(0), Sum());

    float own_sum = 0.0f;
    for (int64_t e = threadIdx.x; e < num_experts; e += blockDim.x) {
        const int64_t scaled = num_experts * static_cast<int64_t>(counts[e]);
        const float step = total > scaled ? rate : total < scaled ? -rate : 0.0f;
        const float value = bias[e] + step + 0.0f;  // never -0, also where a subnormal sum is flushed
        updated[e] = value;
        own_sum += value;
    }
    if (!CENTER) return;

    const float mean = block_reduce(own_sum, 0.0f, Sum()) / static_cast<float>(num_experts);
    for (int64_t e = threadIdx.x; e < num_experts; e += blockDim.x) updated[e] = updated[e] - mean + 0.0f;
}
