// SPDX-License-Identifier: Apache-2.0
// Valid rows of each slice of slice_rows rows, from one number for all rows in device memory: a call that is cut into
// slices stays right in a CUDA graph whose num_valid changes between replays.
#include "device/types.cuh"

extern "C" __global__ void __launch_bounds__(128)
    slice_counts(const int* __restrict__ num_valid, int* __restrict__ counts, long long num_slices,
                 long long slice_rows) {
    for (int64_t slice = threadIdx.x; slice < num_slices; slice += blockDim.x) {
        const int64_t rest = static_cast<int64_t>(num_valid[0]) - slice * slice_rows;
        counts[slice] = static_cast<int>(min(max(rest, int64_t(0)), static_cast<int64_t>(slice_rows)));
    }
}
