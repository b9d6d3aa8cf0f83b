// SPDX-License-Identifier: Apache-2.0
// Fault: a lane that has left is named in a mask. out = the sum of each warp's lanes.
extern "C" __global__ void __launch_bounds__(64) exited_lane(const float* x, float* out, int n, int faulty) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (faulty && i == n - 1) return;
    float sum = x[i];
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    out[i] = sum;
}
