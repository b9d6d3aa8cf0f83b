// SPDX-License-Identifier: Apache-2.0
// Fault: two halves of a warp meet in different intrinsics. out = 1 where a lane of the warp has a positive element.
extern "C" __global__ void __launch_bounds__(64) mixed_collectives(const float* x, float* out, int n, int faulty) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (faulty && threadIdx.x % 32 < 16) {
        __syncwarp();
        out[i] = 1.0f;
    } else {
        out[i] = __any_sync(0xffffffffu, x[i] > 0.0f);
    }
}
