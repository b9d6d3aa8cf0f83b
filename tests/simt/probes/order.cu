// SPDX-License-Identifier: Apache-2.0
// Writes down who runs when: each thread logs its number in the grid at each of three steps between which its warp meets.
extern "C" __global__ void __launch_bounds__(64) order(int* log, unsigned* length) {
    for (int step = 0; step < 3; ++step) {
        log[atomicAdd(length, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
        __syncwarp();
    }
}
