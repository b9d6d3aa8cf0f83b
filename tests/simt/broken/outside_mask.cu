// SPDX-License-Identifier: Apache-2.0
// Fault: a lane votes under a mask that does not name it. out = how many lanes of the warp have a positive element.
extern "C" __global__ void __launch_bounds__(64) outside_mask(const float* x, float* out, int n, int faulty) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    out[i] = __popc(__ballot_sync(faulty ? 0x7fffffffu : 0xffffffffu, x[i] > 0.0f));
}
