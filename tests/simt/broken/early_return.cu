// SPDX-License-Identifier: Apache-2.0
// Fault: threads without work leave before the barrier, instead of after it. out = x of the next thread.
extern "C" __global__ void __launch_bounds__(64) early_return(const float* x, float* out, int n, int faulty) {
    __shared__ float part[64];
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (faulty && i >= n - 5) return;
    part[threadIdx.x] = x[i];
    __syncthreads();
    out[i] = part[(threadIdx.x + 1) % 64];
}
