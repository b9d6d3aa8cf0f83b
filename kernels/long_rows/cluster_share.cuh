// SPDX-License-Identifier: Apache-2.0
// A thread's share of a row that the blocks of a cluster divide among them, kept in registers.
//
// A row has a head of single scores up to the first 16-byte boundary, vectors, and a tail of single scores. Lines of
// eight vectors (128 bytes) go to the blocks in turn, then to their warps, then to the quarters of each warp. So scores
// that are neighbours in the row are spread over the cluster, whatever is in it.
#pragma once

#include "long_rows/stream.cuh"

// The greatest score of words as they lie in memory: one float32, or two 16-bit floats in each. NaN is ignored.
template <int Code>
struct GreatestWord {
    static constexpr unsigned NONE = Code == 0 ? 0x7fffffffu : 0x7fff7fffu;  // NaN

    unsigned word = NONE;

    __device__ __forceinline__ void take(unsigned other) {
#ifdef __CUDACC__
        // In PTX, since a function for floats would flush subnormals here.
        if (Code == 0) {
            asm("{\n.reg .f32 a, b;\nmov.b32 a, %0;\nmov.b32 b, %1;\nmax.f32 a, a, b;\nmov.b32 %0, a;\n}"
                : "+r"(word)
                : "r"(other));
        } else if (Code == 1) {
            asm("max.f16x2 %0, %0, %1;" : "+r"(word) : "r"(other));
        } else {
            asm("max.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(other));
        }
#else
        const auto greater = [](unsigned a, unsigned b) { return bits_key<Code>(a) >= bits_key<Code>(b) ? a : b; };
        word = Code == 0 ? greater(word, other)
                         : greater(word & 0xffff0000u, other & 0xffff0000u) | greater(word << 16, other << 16) >> 16;
#endif
    }

    // NAN_KEY if there was no score.
    __device__ __forceinline__ unsigned key() const {
        return Code == 0 ? bits_key<Code>(word) : max(bits_key<Code>(word << 16), bits_key<Code>(word & 0xffff0000u));
    }
};

// Held: vectors that a thread holds, at least all that it has.
template <int Code, int Cluster, int Block, int Held>
struct ClusterShare {
    typedef typename Scalar<Code>::type T;
    static constexpr int VECTOR = 16 / sizeof(T), LINE = 8;
    static constexpr int STEP = Cluster * Block;  // from a vector of a thread to its next one
    static_assert(Held * 16 / sizeof(T) <= 32, "a bit for each score");
    static_assert(Block >= 2 * VECTOR, "a thread for each single score");

    const T* row;
    int length;
    int head;                // single scores before the vectors
    int all;                 // vectors of the row
    int first;               // number of this thread's first vector
    int mine;                // vectors of this thread
    int single;              // column of its single score; -1: it has none
    Words<4> vectors[Held];  // those that it does not have are NaN

    __device__ __forceinline__ ClusterShare(const T* row, int length, int rank) : row(row), length(length) {
        const int misalignment = static_cast<int>(reinterpret_cast<unsigned long long>(row) % 16 / sizeof(T));
        head = min((VECTOR - misalignment) % VECTOR, length);
        all = (length - head) / VECTOR;
        const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
        first = (lane / LINE * (STEP / 32) + warp * Cluster + rank) * LINE + lane % LINE;
        mine = first < all ? (all - first + STEP - 1) / STEP : 0;
        const int tail = head + all * VECTOR, in_tail = thread - VECTOR;
        single = thread < VECTOR ? (rank == 0 && thread < head ? thread : -1)
                                 : (rank == Cluster - 1 && in_tail < length - tail ? tail + in_tail : -1);
    }

    __device__ __forceinline__ void load() {
#pragma unroll
        for (int u = 0; u < Held; ++u) {
            const unsigned none = GreatestWord<Code>::NONE;
            vectors[u] = {{none, none, none, none}};
            if (u < mine) vectors[u] = load_vector(u);
        }
    }

    // Return the key of the best of this thread's vectors.
    __device__ __forceinline__ unsigned best() const {
        GreatestWord<Code> greatest;
#pragma unroll
        for (int w = 0; w < 4 * Held; ++w) greatest.take(vectors[w / 4].word[w % 4]);
        return greatest.key();
    }

    // Lines count from the first vector; the head belongs to the first one.
    __device__ __forceinline__ unsigned line(int u) const { return (first + u * STEP) / LINE; }
    __device__ __forceinline__ unsigned line_of(int column) const { return max(column - head, 0) / (LINE * VECTOR); }

    // Return the first column of a line, the length after the last.
    __device__ __forceinline__ int first_column(unsigned line) const {
        return line == 0 ? 0 : min(head + static_cast<int>(line) * LINE * VECTOR, length);
    }

    // Return a bit for each score that passes. In 16 bits, those of second halves of words come last.
    __device__ __forceinline__ unsigned passing(const Passes<Code>& passes) const {
        unsigned found = 0;
        if (passes.nothing) return 0;
        if (passes.everything) return bits_of_vectors(mine);
        test_words<0>(passes, vectors, found);
        return found;
    }

    // Return the same, but load the scores again, so that they occupy no registers before.
    __device__ __forceinline__ unsigned passing_again(const Passes<Code>& passes) const {
        if (passes.nothing) return 0;
        if (passes.everything) return bits_of_vectors(mine);
        unsigned all_found = 0;
#pragma unroll 1
        for (int u = 0; u < mine; ++u) {
            unsigned found = 0;
            const Words<4> vector[1] = {load_vector(u)};
            test_words<0>(passes, vector, found);
            all_found |= found << 4 * u;
        }
        return all_found;
    }

    // Return the bits of the first `count` vectors, at most Held.
    static __device__ __forceinline__ unsigned bits_of_vectors(int count) {
        const int words = 4 * min(max(count, 0), Held);
        if (sizeof(T) == 2) return 0x10001u * ((1u << words) - 1u);
        return words == 32 ? ~0u : (1u << words) - 1u;
    }

    // Return the bits of vector u.
    static __device__ __forceinline__ unsigned bits_of_vector(int u) {
        return (sizeof(T) == 2 ? 0xf000fu : 0xfu) << 4 * u;
    }

    // List the scores of the bits, in the order of bits, by list_entry(). From registers: each score has its code.
    __device__ __forceinline__ void list(unsigned found, unsigned long long* target) const {
        constexpr int WORDS = 4 * Held, HALVES = 4 / sizeof(T);
        const int first_column = head + first * VECTOR;
#pragma unroll
        for (int i = 0; i < WORDS * HALVES; ++i) {
            const int w = i % WORDS, half = i / WORDS;
            const unsigned word = vectors[w / 4].word[w % 4];
            const unsigned bits = HALVES == 1 ? word : half == 0 ? word << 16 : word & 0xffff0000u;
            const unsigned here = found >> (w + 16 * half) & 1u;
            if (here != 0) *target = list_entry(bits, first_column + w / 4 * (STEP * VECTOR) + w % 4 * HALVES + half);
            target += here;
        }
    }

    // Return the column of the score of a bit.
    __device__ __forceinline__ int column(int bit) const {
        const int word = sizeof(T) == 4 ? bit : bit % 16;
        const int in_vector = sizeof(T) == 4 ? word % 4 : word % 4 * 2 + bit / 16;
        return head + (first + word / 4 * STEP) * VECTOR + in_vector;
    }

  private:
    __device__ __forceinline__ Words<4> load_vector(int u) const {
        return load_words(row + head + static_cast<int64_t>(first + u * STEP) * VECTOR, Words<4>());
    }

    template <int Word, int Vectors>
    static __device__ __forceinline__ void test_words(const Passes<Code>& passes, const Words<4> (&tested)[Vectors],
                                                      unsigned& found) {
        passes.template by_word<Word>(tested[Word / 4].word[Word % 4], found);
        if constexpr (Word + 1 < 4 * Vectors) test_words<Word + 1>(passes, tested, found);
    }
};
