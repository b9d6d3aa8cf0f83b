// SPDX-License-Identifier: Apache-2.0
// Fault: an index goes one beyond a local array. out = x.
extern "C" __global__ void __launch_bounds__(64) array_index(const float* x, float* out, int n, int faulty) {
    float copies[4];
    const int i = blockIdx.x * 64 + threadIdx.x;
    for (int j = 0; j < 4 + (faulty ? 1 : 0); ++j) copies[j] = x[i];
    out[i] = copies[i % 4];
}
