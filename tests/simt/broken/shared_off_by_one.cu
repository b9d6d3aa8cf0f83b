// SPDX-License-Identifier: Apache-2.0
// Fault: one element too many is written to shared memory through a pointer. out = x.
extern "C" __global__ void __launch_bounds__(64) shared_off_by_one(const float* x, float* out, int n, int faulty) {
    __shared__ float part[64];
    float* target = part + threadIdx.x;
    const int i = blockIdx.x * 64 + threadIdx.x;
    target[faulty ? 1 : 0] = x[i];
    __syncthreads();
    out[i] = part[threadIdx.x];
}
