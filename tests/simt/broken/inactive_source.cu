// SPDX-License-Identifier: Apache-2.0
// Fault: a shuffle reads from a lane that takes no part. out = x of the lane 16 further for the upper half of each warp.
extern "C" __global__ void __launch_bounds__(64) inactive_source(const float* x, float* out, int n, int faulty) {
    const int i = blockIdx.x * 64 + threadIdx.x, lane = threadIdx.x % 32;
    if (lane >= 16) out[i] = __shfl_sync(0xffff0000u, x[i], (lane + 1) % 16 + (faulty ? 0 : 16));
}
