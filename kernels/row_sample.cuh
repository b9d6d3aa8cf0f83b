// SPDX-License-Identifier: Apache-2.0
// A threshold that, with all but certainty, at least k scores of a long row reach and few more than twice as many, from a sample.
//
// Each thread looks at a few scores, one from each of as many stretches of the row as there are samples, at a place in it
// that looks random, and keeps the best. How many threads' best are among the row's k best is binomially distributed
// whatever the scores are, and whoever needs to be sure counts. Every block that samples a row gets the same threshold.
#pragma once

#include "block_scan.cuh"
#include "score_bits.cuh"

struct Threshold {
    unsigned key;
    bool tied;  // more scores than are wanted may have this very key
};

// Threads whose best score is expected above the k-th best of the row, and five deviations more.
template <int Block>
__device__ __forceinline__ int sample_target(int k, int length, int samples) {
    const float share = static_cast<float>(k) / length;
    float misses = 1.0f;
#pragma unroll 1
    for (int i = 0; i < samples; ++i) misses *= 1.0f - share;
    const float hits = Block * (1.0f - misses);
    return static_cast<int>(hits + 5.0f * sqrtf(hits * misses)) + 3;
}

// The key that at least `target` threads' keys reach, and no more than an eighth more if keys differ.
template <int Block>
__device__ __forceinline__ Threshold block_threshold(unsigned key, int target) {
    // Some warps' best are above it and others' below, mostly.
    const unsigned best = warp_max(key);
    const Extent extent = block_extent<Block>({best, best});
    unsigned low = extent.low, high = extent.high + 1;
    int reached = __syncthreads_count(key >= low);
    if (reached < target) {
        high = low;
        low = NO_KEY;
        reached = Block;
    }
    const int enough = target + target / 8;
#pragma unroll 1
    while (reached > enough && high - low > 1) {
        const unsigned middle = low + (high - low) / 2;
        const int count = __syncthreads_count(key >= middle);
        if (count >= target) {
            low = middle;
            reached = count;
        } else {
            high = middle;
        }
    }
    return {low, reached > enough};
}

// For rows of more than 2 * Block scores and k up to half of them.
template <int Code, int Block, int Samples>
__device__ __forceinline__ Threshold sampled_threshold(const typename Scalar<Code>::type* row, int length, int k) {
    // Where k is a large part of the row, a thread's best of many would say little.
    int samples = Samples;
    while (samples > 1 && (samples * Block > length || 3.0f * k * samples > length)) samples /= 2;
    const unsigned stretch = length / (samples * Block);
    unsigned bits[Samples];
#pragma unroll
    for (int j = 0; j < Samples; ++j) {
        if (j < samples) {
            const unsigned number = j * Block + threadIdx.x;
            unsigned random = (number + 1) * 0x9e3779b1u;
            random = (random ^ random >> 15) * 0x85ebca6bu;
            bits[j] = score_bits(row[static_cast<int64_t>(number) * stretch + __umulhi(random, stretch)]);
        }
    }
    unsigned key = NO_KEY;
#pragma unroll
    for (int j = 0; j < Samples; ++j) {
        if (j < samples) key = max(key, bits_key<Code>(bits[j]));
    }
    return block_threshold<Block>(key, sample_target<Block>(k, length, samples));
}
