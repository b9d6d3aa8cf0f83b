// SPDX-License-Identifier: Apache-2.0
// One warp: every warp intrinsic once, one row of 32 results for each; sm_80 and later.
#define FULL 0xffffffffu

extern "C" __global__ void __launch_bounds__(32) warp(const int* x, long long* out) {
    const int lane = threadIdx.x;
    const int value = x[lane];
    const unsigned bits = value;
    long long* next = out + lane;
#define RECORD(result) (*next = static_cast<long long>(result), next += 32)
    RECORD(__shfl_sync(FULL, value, lane * 7 + 3));
    RECORD(__shfl_sync(FULL, value, 5, 8));
    RECORD(__shfl_xor_sync(FULL, value, 9));
    RECORD(__shfl_xor_sync(FULL, value, 6, 4));
    RECORD(__shfl_up_sync(FULL, value, 3));
    RECORD(__shfl_up_sync(FULL, value, 3, 8));
    RECORD(__shfl_down_sync(FULL, value, 5));
    RECORD(__shfl_down_sync(FULL, value, 5, 16));
    RECORD(__shfl_sync(FULL, static_cast<long long>(value) << 30, 31 - lane));
    RECORD(__shfl_sync(FULL, value * 0.25, 31 - lane) * 4);
    RECORD(__shfl_sync(FULL, value * 0.25f, 31 - lane) * 4);
    RECORD(__ballot_sync(FULL, value & 2));
    RECORD(__any_sync(FULL, value == x[7]));
    RECORD(__any_sync(FULL, 0));
    RECORD(__all_sync(FULL, 2));
    RECORD(__all_sync(FULL, value != x[7]));
    RECORD(__match_any_sync(FULL, value % 4));
    int all_equal;
    RECORD(__match_all_sync(FULL, value, &all_equal));
    RECORD(all_equal);
    RECORD(__match_all_sync(FULL, 7ll, &all_equal));
    RECORD(all_equal);
    RECORD(__reduce_add_sync(FULL, value));
    RECORD(__reduce_min_sync(FULL, value));
    RECORD(__reduce_max_sync(FULL, value));
    RECORD(__reduce_add_sync(FULL, bits));
    RECORD(__reduce_min_sync(FULL, bits));
    RECORD(__reduce_max_sync(FULL, bits));
    RECORD(__reduce_and_sync(FULL, bits | 0xf0f0u));
    RECORD(__reduce_or_sync(FULL, bits & 0xf0f0u));
    RECORD(__reduce_xor_sync(FULL, bits));
    // Two groups of lanes go their own ways, a different number of steps each, and meet again.
    int sum = value;
    if (lane % 3 == 0) {
        sum = __reduce_add_sync(0x49249249u, value);
    } else {
        for (int round = 0; round < 3; ++round) sum = __shfl_sync(0xb6db6db6u, sum, lane % 3);
    }
    __syncwarp();
    RECORD(__shfl_xor_sync(FULL, sum, 1));
}
