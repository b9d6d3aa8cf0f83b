// SPDX-License-Identifier: Apache-2.0
// Fault: among equal values the higher index wins. One warp per row of 32: out = the indices of the eight largest.
extern "C" __global__ void __launch_bounds__(64) swapped_tie(const float* x, float* out, int n, int faulty) {
    const int lane = threadIdx.x % 32, row = (blockIdx.x * 64 + threadIdx.x) / 32;
    float value = x[row * 32 + lane];
    for (int round = 0; round < 8; ++round) {
        float best = value;
        int index = lane;
        for (int distance = 16; distance > 0; distance /= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, best, distance);
            const int other_index = __shfl_xor_sync(0xffffffffu, index, distance);
            const bool wins_tie = faulty ? other_index > index : other_index < index;
            if (other > best || (other == best && wins_tie)) best = other, index = other_index;
        }
        if (lane == 0) out[row * 8 + round] = index;
        if (lane == index) value = __int_as_float(0xff800000);
    }
}
