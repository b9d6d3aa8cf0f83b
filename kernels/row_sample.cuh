// SPDX-License-Identifier: Apache-2.0
// A threshold that, with all but certainty, at least k scores of a long row pass and few more than twice as many, from a sample.
//
// Each thread looks at a few vectors of 16 bytes, one from each of as many stretches of the row as there are vectors in
// the sample, at a place in it that looks random: a byte more or less costs nothing beside the access. How many of the
// sample are among the row's k best is known but for a deviation whatever the scores are, and whoever needs to be sure
// counts. Every block that samples a row gets the same threshold.
#pragma once

#include "row_stream.cuh"

struct Threshold {
    unsigned key;
    bool tied;  // more scores than are wanted may have this very key
};

// The key that at least `target` of all threads' keys reach, and no more than an eighth more if keys differ. The first
// of a thread's keys is its best. `counts`: 33 words of shared memory, all 0 before.
template <int Block, int Keys>
__device__ __forceinline__ Threshold block_threshold(const unsigned (&keys)[Keys], int target, int* counts) {
    const auto count_from = [&](unsigned key, int round) {
        unsigned reached = 0;
#pragma unroll
        for (int j = 0; j < Keys; ++j) reached += __popc(__ballot_sync(FULL_WARP, keys[j] >= key));
        if (threadIdx.x % 32 == 0) atomicAdd(&counts[round], static_cast<int>(reached));
        __syncthreads();
        return counts[round];
    };
    // Some warps' best are above it and others' below, mostly.
    unsigned best = keys[0];
#pragma unroll
    for (int j = 1; j < Keys; ++j) best = max(best, keys[j]);
    best = warp_max(best);
    const Extent extent = block_extent<Block>({best, best});
    unsigned low = extent.low, high = extent.high + 1;
    int reached = count_from(low, 0);
    if (reached < target) {
        high = low;
        low = NO_KEY;
        reached = Block * Keys;
    }
    const int enough = target + target / 8;
#pragma unroll 1
    for (int round = 1; reached > enough && high - low > 1; ++round) {
        const unsigned middle = low + (high - low) / 2;
        const int count = count_from(middle, round);
        if (count >= target) {
            low = middle;
            reached = count;
        } else {
            high = middle;
        }
    }
    return {low, reached > enough};
}

// For rows that have a vector, and k up to half a row.
template <typename Piece, int Code, int Block, int Vectors>
__device__ __forceinline__ Threshold sampled_threshold(const Piece& piece, int k, int* counts) {
    constexpr int SCORES = Piece::VECTOR, SAMPLE = Block * Vectors * SCORES;
    const unsigned row_vectors = (piece.tail - piece.head) / SCORES;
    Words<4> vectors[Vectors];
#pragma unroll
    for (int j = 0; j < Vectors; ++j) {
        const unsigned number = j * Block + threadIdx.x;
        unsigned random = (number + 1) * 0x9e3779b1u;
        random = (random ^ random >> 15) * 0x85ebca6bu;
        const unsigned part = ~0u / (Block * Vectors) * number + random / (Block * Vectors);  // of 2**32 parts of a row
        const unsigned vector = __umulhi(part, row_vectors);
        vectors[j] = load_words(piece.row + piece.head + static_cast<int64_t>(vector) * SCORES, Words<4>());
    }
    const float hits = static_cast<float>(SAMPLE) * k / piece.length;
    const int target = static_cast<int>(hits + 5.0f * sqrtf(hits)) + 3;
    unsigned keys[Vectors * SCORES];
#pragma unroll
    for (int j = 0; j < Vectors * SCORES; ++j) {
        keys[j] = bits_key<Code>(Piece::bits_of(vectors[j / SCORES], j % SCORES));
    }
    return block_threshold<Block>(keys, target, counts);
}
