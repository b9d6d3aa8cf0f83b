// SPDX-License-Identifier: Apache-2.0
// Fault: lanes of a warp exchange through shared memory as if they ran in lockstep. out = x, each warp's part reversed.
extern "C" __global__ void __launch_bounds__(64) missing_syncwarp(const float* x, float* out, int n, int faulty) {
    __shared__ float part[64];
    const int i = blockIdx.x * 64 + threadIdx.x;
    part[threadIdx.x] = x[i];
    if (!faulty) __syncwarp();
    out[i] = part[threadIdx.x ^ 31];
}
