// SPDX-License-Identifier: Apache-2.0
// Fault: the barrier between writing and reading shared memory is gone. out = x, each block's part reversed.
extern "C" __global__ void __launch_bounds__(64) removed_barrier(const float* x, float* out, int n, int faulty) {
    __shared__ float part[64];
    const int i = blockIdx.x * 64 + threadIdx.x;
    part[threadIdx.x] = x[i];
    if (!faulty) __syncthreads();
    out[i] = part[63 - threadIdx.x];
}
