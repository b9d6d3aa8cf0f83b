// SPDX-License-Identifier: Apache-2.0
// A threshold from a sample of a long row: almost certainly at least k scores reach it, and few more than twice as
// many.
//
// The row is divided into equal stretches. In each, two threads read two adjacent vectors (32 bytes, the least that
// memory delivers) at a pseudo-random place. How many sampled scores are among the k best of the row is known up to a
// deviation, which is larger where neighbours are alike; code that must be sure counts. Every block that samples a row
// gets the same threshold.
#pragma once

#include "device/prefetch.cuh"
#include "long_rows/stream.cuh"

constexpr int SAMPLED_READS = 3;  // of a row by thresholds of its sample, before it is read by the exact key

// Narrow a range of keys until at least `target` of what count() counts reach its lower end, and at most an eighth more
// if keys differ. Return how many do.
template <typename Count>
__device__ __forceinline__ int narrow(Extent& range, int reached, int target, Count count) {
#pragma unroll 1
    for (int round = 0; reached > target + target / 8 && range.high - range.low > 1; ++round) {
        const unsigned middle = range.low + (range.high - range.low) / 2;
        const int from_middle = count(middle, round);
        if (from_middle >= target) {
            range.low = middle;
            reached = from_middle;
        } else {
            range.high = middle;
        }
    }
    return reached;
}

// Return a key that `target` or a few more of all threads' keys reach; a thread has key_of(j) for j below Keys. It is
// tied if more than `most` reach it. `counts` is 33 words of shared memory, all 0.
template <int Block, int Keys, typename KeyOf>
__device__ __forceinline__ Threshold block_threshold(KeyOf key_of, int target, int most, int* counts) {
    // Count by each thread's best key first, which takes only a barrier. Of `target` keys, this many threads have at
    // least one:
    float misses = 1.0f;
#pragma unroll
    for (int j = 0; j < Keys; ++j) misses *= 1.0f - min(static_cast<float>(target) / (Block * Keys), 1.0f);
    const int threads = static_cast<int>(Block * (1.0f - misses));
    unsigned best = NO_KEY;
#pragma unroll
    for (int j = 0; j < Keys; ++j) best = max(best, key_of(j));
    const auto count_threads = [&](unsigned key, int) { return __syncthreads_count(best >= key); };

    // Start from the minimum over groups of four threads: it is low enough if there are more such groups than
    // `threads`.
    unsigned best_of_four = max(best, __shfl_xor_sync(FULL_WARP, best, 1));
    best_of_four = max(best_of_four, __shfl_xor_sync(FULL_WARP, best_of_four, 2));
    Extent range = block_extent<Block>({best_of_four, best_of_four});
    range.high += 1;
    int reached = count_threads(range.low, 0);
    if (reached < threads) {
        range = {NO_KEY, range.low};
        reached = Block;
    }
    reached = narrow(range, reached, threads, count_threads);
    const bool ends = range.high - range.low <= 1;

    // Where neighbours are alike, threads have several such keys each, and the threshold must be higher.
    const auto count_keys = [&](unsigned key, int round) {
        unsigned sum = 0;
#pragma unroll
        for (int j = 0; j < Keys; ++j) sum += key_of(j) >= key;
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) atomicAdd(&counts[round], static_cast<int>(sum));
        __syncthreads();
        return counts[round];
    };
    const int all = count_keys(range.low, 32);
    if (ends || all <= target + target / 4) return {range.low, ends && all > most};
    range.high = ~0u;
    const int reached_by_keys = narrow(range, all, target, count_keys);
    return {range.low, reached_by_keys > max(most, target + target / 8)};
}

// Read threadIdx.x again, so that what a loop computes from it is not kept in registers between rounds.
__device__ __forceinline__ unsigned thread_anew() {
#ifdef __CUDACC__
    unsigned thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
#else
    return threadIdx.x;
#endif
}

// The sample of a row of at least two vectors, over the threads of a block.
template <typename Piece, int Code, int Block, int Vectors>
struct RowSample {
    static constexpr int SCORES = Piece::VECTOR, SIZE = Block * Vectors * SCORES;

    Words<4> vectors[Vectors];

    __device__ __forceinline__ void load(const Piece& piece) {
#pragma unroll
        for (int j = 0; j < Vectors; ++j) vectors[j] = load_words(place(piece, j), Words<4>());
    }

    // Prefetch what load() reads.
    static __device__ __forceinline__ void prefetch(const Piece& piece) {
#pragma unroll
        for (int j = 0; j < Vectors; ++j) prefetch_line(place(piece, j));
    }

    // Return how many sampled scores a threshold has to pass for k scores of the row, up to half of them.
    static __device__ __forceinline__ int target(int k, int length) {
        const float hits = static_cast<float>(SIZE) * k / length;
        return static_cast<int>(hits + 5.0f * sqrtf(hits)) + 3;
    }

    // Return how many sampled scores may pass so that a list has room for those of the row.
    static __device__ __forceinline__ int most(int room, int length) {
        const float hits = static_cast<float>(SIZE) * room / length;
        return static_cast<int>(hits - 2.0f * sqrtf(hits));
    }

    // Return the target for another read of a row, since by this one so many scores passed, too few or too many. What the
    // sample says about scores beyond those that passed is not known to be wrong.
    static __device__ __forceinline__ int better_target(int target, int passed, int wanted, int room, int length) {
        const float aim = min(2 * wanted, (wanted + room) / 2);
        const float better = passed < wanted ? target + (aim - passed) * SIZE / length : target * (aim / passed);
        return max(1, min(SIZE - 1, static_cast<int>(better)));
    }

    // Return the threshold. `counts` is as for block_threshold.
    __device__ __forceinline__ Threshold threshold(int target, int most, int* counts) const {
        const auto key_of = [&](int j) { return bits_key<Code>(Piece::bits_of(vectors[j / SCORES], j % SCORES)); };
        return block_threshold<Block, Vectors * SCORES>(key_of, target, most, counts);
    }

  private:
    static __device__ __forceinline__ const typename Piece::T* place(const Piece& piece, int j) {
        constexpr unsigned PAIRS = Block * Vectors / 2;
        const unsigned thread = thread_anew(), number = (j * Block + thread) / 2;
        unsigned random = (number + 1) * 0x9e3779b1u;
        random = (random ^ random >> 15) * 0x85ebca6bu;
        const unsigned part = ~0u / PAIRS * number + random / PAIRS;  // of 2**32 parts of a row
        const unsigned row_pairs = (piece.tail - piece.head) / SCORES / 2;
        const unsigned vector = 2 * __umulhi(part, row_pairs) + thread % 2;
        return piece.row + piece.head + static_cast<int64_t>(vector) * SCORES;
    }
};
