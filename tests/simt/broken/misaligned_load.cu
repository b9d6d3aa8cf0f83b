// SPDX-License-Identifier: Apache-2.0
// Fault: a 16-byte load from a row that starts in the middle of 16 bytes. out = sums of four.
extern "C" __global__ void __launch_bounds__(64) misaligned_load(const float* x, float* out, int n, int faulty) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (i >= n / 4 - 1) return;
    const float4 word = __ldg(reinterpret_cast<const float4*>(x + (faulty ? 1 : 0)) + i);
    out[i] = word.x + word.y + word.z + word.w;
}
