// SPDX-License-Identifier: Apache-2.0
// Fault: a block waits for a flag that only a later block would set. out[0] = 1 once every block has been there.
extern "C" __global__ void __launch_bounds__(64) endless_loop(const float* x, float* out, int n, int faulty) {
    if (threadIdx.x == 0) atomicAdd(&out[1], 1.0f);
    if (faulty && threadIdx.x == 0) {
        while (*static_cast<volatile float*>(&out[1]) < gridDim.x) continue;
    }
    if (threadIdx.x == 0 && *static_cast<volatile float*>(&out[1]) == gridDim.x) out[0] = 1.0f;
}
