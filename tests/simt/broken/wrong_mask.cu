// SPDX-License-Identifier: Apache-2.0
// Fault: half of each warp shuffles under a mask that names all of it. out = x of the next of 16 lanes, for those.
extern "C" __global__ void __launch_bounds__(64) wrong_mask(const float* x, float* out, int n, int faulty) {
    const int i = blockIdx.x * 64 + threadIdx.x, lane = threadIdx.x % 32;
    if (lane < 16) out[i] = __shfl_sync(faulty ? 0xffffffffu : 0x0000ffffu, x[i], (lane + 1) % 16);
    __syncthreads();
}
