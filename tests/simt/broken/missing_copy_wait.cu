// SPDX-License-Identifier: Apache-2.0
// Fault: an asynchronous copy is used without waiting for it. out = x.
#include "device/async_copy.cuh"

extern "C" __global__ void __launch_bounds__(64) missing_copy_wait(const float* x, float* out, int n, int faulty) {
    __shared__ float part[64];
    copy_async4(&part[threadIdx.x], x + blockIdx.x * 64 + threadIdx.x);
    copy_async_commit();
    if (!faulty) copy_async_wait<0>();
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = part[threadIdx.x];
}
