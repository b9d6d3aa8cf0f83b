// SPDX-License-Identifier: Apache-2.0
// Fault: only the threads whose element is not negative come to the barrier. out = x of the next thread.
extern "C" __global__ void __launch_bounds__(64) conditional_barrier(const float* x, float* out, int n, int faulty) {
    __shared__ float part[64];
    const int i = blockIdx.x * 64 + threadIdx.x;
    part[threadIdx.x] = x[i];
    if (!faulty || x[i] >= 0.0f) __syncthreads();
    out[i] = part[(threadIdx.x + 1) % 64];
}
