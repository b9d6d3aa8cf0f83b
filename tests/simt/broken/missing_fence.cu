// SPDX-License-Identifier: Apache-2.0
// Fault: the last block to arrive sums what the others wrote, but nothing orders their writes before its reads.
// out[block] = the block's sum, out[gridDim.x] = the sum of all; out[gridDim.x + 1] counts blocks.
extern "C" __global__ void __launch_bounds__(64) missing_fence(const float* x, float* out, int n, int faulty) {
    __shared__ float sum;
    __shared__ bool last;
    if (threadIdx.x == 0) sum = 0.0f;
    __syncthreads();
    atomicAdd(&sum, x[blockIdx.x * 64 + threadIdx.x]);
    __syncthreads();
    if (threadIdx.x == 0) {
        out[blockIdx.x] = sum;
        if (!faulty) __threadfence();
        last = atomicAdd(&out[gridDim.x + 1], 1.0f) == gridDim.x - 1;
        if (!faulty) __threadfence();
    }
    __syncthreads();
    if (last && threadIdx.x == 32) {
        float all = 0.0f;
        for (int block = 0; block < gridDim.x; ++block) all += out[block];
        out[gridDim.x] = all;
    }
}
