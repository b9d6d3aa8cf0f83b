// SPDX-License-Identifier: Apache-2.0
// A row that a block holds in shared memory, and a list of the scores that reach a threshold: as many as are wanted, and
// few more unless many tie or the best are in few groups. Of `wanted` groups the best score reaches the threshold. A
// thread has eight groups, each with two (float32) or four (16 bits) scores of every four vectors of the thread.
//
// A block is done soon, so the time is what a thread waits for: its marks and ranks are in registers, and several loads
// are in flight.
#pragma once

#include "device/async_copy.cuh"
#include "long_rows/histogram.cuh"
#include "long_rows/rank.cuh"
#include "long_rows/stream.cuh"
#include "select/packed_scores.cuh"

// Return the greater scores of two words; NaN only if both are.
template <int Code>
__device__ __forceinline__ unsigned greater_scores(unsigned a, unsigned b) {
    if constexpr (Code != 0) {
        return packed_max<Code>(a, b);
    } else {
#ifdef __CUDACC__
        float greater;  // without .ftz, which fmaxf would have
        asm("max.f32 %0, %1, %2;" : "=f"(greater) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
        return __float_as_uint(greater);
#else
        return bits_key<Code>(a) >= bits_key<Code>(b) ? a : b;
#endif
    }
}

// RowBytes: of a row, at most. Capacity: of the list.
template <int Code, int Block, int RowBytes, int Capacity>
struct HeldRow {
    static constexpr int LOADS = 4, CHUNKS = (RowBytes / 16 + LOADS * Block - 1) / (LOADS * Block);
    typedef typename Scalar<Code>::type T;
    typedef RowPiece<Code, Block, LOADS> Source;
    typedef RowPiece<Code, Block, LOADS, true> Piece;
    static constexpr int VECTOR = Piece::VECTOR, SETS = Code == 0 ? 2 : 1, KEYS = SETS * VECTOR;
    static constexpr int LISTED = (Capacity + Block - 1) / Block;  // ranks of a thread
    static constexpr int ZERO_BITS = Code == 0 ? 0 : 16;           // low bits that are 0 in every key but NAN_KEY
    static_assert(RowBytes / sizeof(T) <= 32768, "columns of 16 bits, and of ShortRowPages");

    Piece piece;
    unsigned short* columns;  // of the scores on the list, in shared memory

    // Copy a row to `memory`, on a 16-byte boundary and with 16 bytes more than the row. A thread then sees the vectors
    // that it reads; a barrier has to follow before it sees others.
    static __device__ __forceinline__ Piece copy(const Source& source, unsigned char* memory) {
        const int misalignment = static_cast<int>(reinterpret_cast<unsigned long long>(source.row) % 16);
        T* row = reinterpret_cast<T*>(memory + misalignment);
        T* to = row + source.head;
        const T* from = source.row + source.head;
        int vector = threadIdx.x;
#pragma unroll 1
        for (; vector + (LOADS - 1) * Block < source.end; vector += LOADS * Block) {
#pragma unroll
            for (int u = 0; u < LOADS; ++u) {
                const int column = (vector + u * Block) * VECTOR;
                copy_async16(to + column, from + column);
            }
        }
#pragma unroll 1
        for (; vector < source.end; vector += Block) copy_async16(to + vector * VECTOR, from + vector * VECTOR);
        copy_async_commit();
        const int single = source.single_score();
        if (single >= 0) row[single] = source.row[single];
        copy_async_wait<0>();
        return Piece(row, source.length, 0, 1);
    }

    // Return a threshold within the range, the lower bound if there is none between the bounds. The list of the lower
    // bound is too long, that of the upper one too short.
    static __device__ __forceinline__ unsigned between(Extent range) {
        const unsigned half = (range.high - range.low) / 2 & ~0u << ZERO_BITS;
        return half == 0 ? range.low : (range.low + half) & ~0u << ZERO_BITS;  // NAN_KEY has other low bits
    }

    // Prefetch a row to L2.
    static __device__ __forceinline__ void prefetch(const Source& source) {
        const char* end = reinterpret_cast<const char*>(source.row + source.length);
        const char* line = reinterpret_cast<const char*>(source.row) + 128 * threadIdx.x;
#pragma unroll 1
        for (; line < end; line += 128 * Block) prefetch_line(line);
    }

    // Return a threshold that at least `wanted` scores reach, for a row with more scores than the list can have, and in
    // `highest` the highest key. At most an eighth more groups than `wanted` reach it, unless it is tied: so many groups
    // have just this key that the list takes the scores above it, and of the ties as many as are wanted. `histograms`
    // are three of BINS words on a 16-byte boundary, the first of them 0.
    __device__ __forceinline__ Threshold threshold(int wanted, int (*histograms)[BINS], unsigned& highest) const {
        Words<4> best[SETS];
#pragma unroll
        for (int set = 0; set < SETS; ++set) best[set] = {{~0u, ~0u, ~0u, ~0u}};  // NaN

        int stretch = 0;  // number of a stretch of the row, which has as many vectors as there are threads
#pragma unroll 1
        for (; (stretch + LOADS) * Block <= piece.end; stretch += LOADS) {
            Words<4> vectors[LOADS];
#pragma unroll
            for (int u = 0; u < LOADS; ++u) vectors[u] = piece.load_vector(member(stretch + u));
#pragma unroll
            for (int u = 0; u < LOADS; ++u) improve(best[u % SETS], vectors[u], u);
        }
#pragma unroll 1
        for (; stretch * Block < piece.end; ++stretch) {
            if (member(stretch) < piece.end) improve(best[0], piece.load_vector(member(stretch)), 0);
        }
        unsigned keys[KEYS];
        Extent range = {~0u, 0u};
#pragma unroll
        for (int j = 0; j < KEYS; ++j) {
            keys[j] = bits_key<Code>(Piece::bits_of(best[j / VECTOR], j % VECTOR));
            range = {min(range.low, keys[j]), max(range.high, keys[j])};
        }
        const int single = piece.single_score();
        if (single >= 0) range.high = max(range.high, key_of(single));
        range = block_extent<Block>(range);
        highest = range.high;
        range.low &= ~0u << ZERO_BITS;
        int rest = wanted, round = 0;
#pragma unroll 1
        for (;;) {
            const int shift = max(bit_length(range.high - range.low) - 8, ZERO_BITS);
            int* histogram = histograms[round];
            round = round == 2 ? 0 : round + 1;  // a warp may still read the one before
            for (int i = threadIdx.x; i < BINS; i += Block) histograms[round][i] = 0;
#pragma unroll
            for (int j = 0; j < KEYS; ++j) {
                const unsigned above = keys[j] - range.low;
                if (above <= range.high - range.low) atomicAdd(&histogram[above >> shift], 1);
            }
            __syncthreads();
            const ChosenBin chosen = choose_bin(histogram, rest);
            range.low += static_cast<unsigned>(chosen.bin) << shift;
            const bool few_more = chosen.count - chosen.rest <= wanted / 8;
            if (few_more || shift == ZERO_BITS) return {max(range.low, NAN_KEY), !few_more};
            const unsigned last = (1u << shift) - 1;
            if (range.high - range.low > last) range.high = range.low + last;
            rest = chosen.rest;
        }
    }

    // List the scores that pass, by threads. Return their number; if it exceeds the capacity, none is on the list. A
    // barrier has to follow. `sums` has a word for each warp.
    __device__ __forceinline__ int collect(const Passes<Code>& passes, int* sums) const {
        unsigned marks[CHUNKS];
        const int single = piece.single_score();
        const bool single_passes = single >= 0 && key_of(single) >= passes.key;
        int found = single_passes;
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j) {
            const int first = j * LOADS * Block;
            marks[j] = 0;
            if (first < piece.end && !passes.nothing) {
                typename Piece::Chunk chunk;
                piece.load(first, chunk);
                marks[j] = piece.passing(chunk, passes, first);
            }
            found += __popc(marks[j]);
        }
        int total;
        int place = block_prefix_once<Block>(found, total, sums);
        if (total > Capacity) return total;
        if (single_passes) columns[place++] = single;
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j) {
#pragma unroll 1
            for (; marks[j] != 0; marks[j] &= marks[j] - 1) {
                columns[place++] = piece.column_of(j * LOADS * Block, __ffs(marks[j]) - 1);
            }
        }
        return total;
    }

    // Take this thread's ranks from a list of `count`: every Block-th one; after the last one, 0.
    template <typename Order, typename Rank>
    __device__ __forceinline__ void take(int count, const Order& order, Rank (&ranks)[LISTED]) const {
#pragma unroll
        for (int j = 0; j < LISTED; ++j) {
            const int i = j * Block + static_cast<int>(threadIdx.x);
            const int column = count > 0 ? columns[i < count ? i : 0] : 0;
            const Rank rank = order.rank(key_of(column), column);
            ranks[j] = i < count ? rank : 0;
        }
    }

  private:
    // Return the vector of a stretch that is in the groups of this thread. Its place differs from stretch to stretch, so
    // that groups are not in step with a row that repeats itself.
    static __device__ __forceinline__ int member(int stretch) {
        static_assert((Block & (Block - 1)) == 0, "a power of two");
        return stretch * Block + ((threadIdx.x + 37 * stretch) & (Block - 1));
    }

    // Take the scores of a vector into the best of the groups, with its words turned likewise.
    static __device__ __forceinline__ void improve(Words<4>& best, const Words<4>& vector, int turn) {
#pragma unroll
        for (int w = 0; w < 4; ++w) best.word[w] = greater_scores<Code>(best.word[w], vector.word[(w + turn) % 4]);
    }

    __device__ __forceinline__ unsigned key_of(int column) const {
        return bits_key<Code>(score_bits(piece.row[column]));
    }
};
