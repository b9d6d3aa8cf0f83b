// SPDX-License-Identifier: Apache-2.0
// Fault: the last thread reads the element behind the array. out = x of the next thread, 0 for the last.
extern "C" __global__ void __launch_bounds__(64) global_off_by_one(const float* x, float* out, int n, int faulty) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    out[i] = i + 1 < n + (faulty ? 1 : 0) ? x[i + 1] : 0.0f;
}
