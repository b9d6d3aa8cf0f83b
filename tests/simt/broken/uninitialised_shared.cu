// SPDX-License-Identifier: Apache-2.0
// Fault: the sum in shared memory starts from whatever lies there. out = the sum of the block's elements.
template <typename T>
__device__ T& block_sum() {
    __shared__ T sum;
    return sum;
}

extern "C" __global__ void __launch_bounds__(64) uninitialised_shared(const float* x, float* out, int n, int faulty) {
    float& sum = block_sum<float>();
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (!faulty && threadIdx.x == 0) sum = 0.0f;
    __syncthreads();
    atomicAdd(&sum, x[i]);
    __syncthreads();
    out[i] = sum;
}
