// SPDX-License-Identifier: Apache-2.0
// A histogram in shared memory, and the bin in which its k-th best entry is.
#pragma once

#include "device/block_scan.cuh"

constexpr int BINS = 256;

struct ChosenBin {
    int bin;
    int count;  // of its entries
    int rest;   // how many of them are among the k best
};

// Return the bin of the `wanted`-th best entry; higher bins are better. Every warp finds it by itself. `histogram` lies on
// a 16-byte boundary.
__device__ __forceinline__ ChosenBin choose_bin(const int* histogram, int wanted) {
    constexpr int PER_LANE = BINS / 32;
    // A lane has adjacent bins, the first lane the highest ones.
    const int lane = threadIdx.x % 32;
    const int4* own = reinterpret_cast<const int4*>(histogram + PER_LANE * (31 - lane));
    const int4 low = own[0], high = own[1];
    const int sum = low.x + low.y + low.z + low.w + high.x + high.y + high.z + high.w;
    const int reached = warp_prefix(sum);
    const int chosen = __ffs(__ballot_sync(FULL_WARP, reached >= wanted)) - 1;
    const int rest = wanted - __shfl_sync(FULL_WARP, reached - sum, chosen);
    // Then a lane has a bin of the chosen one, the first lane the highest.
    const int last = PER_LANE * (31 - chosen) + PER_LANE - 1;
    const int count = lane < PER_LANE ? histogram[last - lane] : 0;
    const int reached_here = warp_prefix(count);
    const int place = __ffs(__ballot_sync(FULL_WARP, reached_here >= rest)) - 1;
    const int before = __shfl_sync(FULL_WARP, reached_here - count, place);
    return {last - place, __shfl_sync(FULL_WARP, count, place), rest - before};
}
