// SPDX-License-Identifier: Apache-2.0
// Fault: a warp reads what another one writes for it without waiting for its arrival. out = x, each warp's part reversed.
#include "device/mbarrier.cuh"

extern "C" __global__ void __launch_bounds__(64) missing_arrival_wait(const float* x, float* out, int n, int faulty) {
    __shared__ float part[2][32];
    __shared__ Mbarrier full[2];
    if (threadIdx.x < 2) mbarrier_init(&full[threadIdx.x], 32);
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int step = 0; step < 2; ++step) {
        const int i = blockIdx.x * 64 + step * 32 + lane;
        if (threadIdx.x >= 32) {
            part[step][lane] = x[i];
            mbarrier_arrive(&full[step]);
        } else {
            if (!faulty) mbarrier_wait(&full[step], 0);
            out[i] = part[step][31 - lane];
        }
    }
}
