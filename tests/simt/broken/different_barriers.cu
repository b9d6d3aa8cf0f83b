// SPDX-License-Identifier: Apache-2.0
// Fault: each half of the block waits at a barrier of its own. out = x of the thread across.
extern "C" __global__ void __launch_bounds__(64) different_barriers(const float* x, float* out, int n, int faulty) {
    __shared__ float part[64];
    const int i = blockIdx.x * 64 + threadIdx.x;
    part[threadIdx.x] = x[i];
    if (faulty && threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[i] = part[63 - threadIdx.x];
}
