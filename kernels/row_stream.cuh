// SPDX-License-Identifier: Apache-2.0
// A block reads a piece of a row, 16 bytes a load, and puts the scores that reach a key on a list.
//
// A row of any alignment is a head of single scores up to the first 16-byte boundary, vectors, and a tail of single
// scores. Pieces are of whole vectors; the first piece has the head and the last the tail.
#pragma once

#include "block_scan.cuh"
#include "score_bits.cuh"

// A score on a list: its bits and its column.
__device__ __forceinline__ unsigned long long list_entry(unsigned bits, int column) {
    return static_cast<unsigned long long>(bits) << 32 | static_cast<unsigned>(column);
}

template <int Code, int Block, int Loads>
struct RowPiece {
    typedef typename Scalar<Code>::type T;
    typedef unsigned long long Entry;
    static constexpr int VECTOR = 16 / sizeof(T);
    static_assert(Loads * VECTOR <= 32, "a bit for each score");
    static_assert(Block >= 2 * VECTOR, "a thread for each single score");

    // What a thread reads at once: Loads vectors.
    struct Chunk {
        Words<4> vector[Loads];

        // The bits of score e, which stand at the top of a word.
        __device__ __forceinline__ unsigned bits(int e) const {
            const unsigned word = vector[e / VECTOR].word[e % VECTOR * sizeof(T) / 4];
            return sizeof(T) == 4 ? word : e % 2 == 0 ? word << 16 : word & 0xffff0000u;
        }
    };

    const T* row;
    int length;
    int head;        // single scores before the vectors
    int tail;        // the column of the first single score behind them
    int begin, end;  // the vectors of this piece
    bool has_head, has_tail;

    __device__ __forceinline__ RowPiece(const T* row, int length, int number, int pieces) : row(row), length(length) {
        const int misalignment = static_cast<int>(reinterpret_cast<unsigned long long>(row) % 16 / sizeof(T));
        head = min((VECTOR - misalignment) % VECTOR, length);
        const int vectors = (length - head) / VECTOR;
        tail = head + vectors * VECTOR;
        begin = static_cast<int>(static_cast<int64_t>(vectors) * number / pieces);
        end = static_cast<int>(static_cast<int64_t>(vectors) * (number + 1) / pieces);
        has_head = number == 0;
        has_tail = number == pieces - 1;
    }

    // The vectors `step` apart from vector `first` on.
    __device__ __forceinline__ void load(int first, int step, Chunk& chunk) const {
#pragma unroll
        for (int u = 0; u < Loads; ++u) {
            if (first + u * step < end) {
                const T* source = row + head + static_cast<int64_t>(first + u * step) * VECTOR;
                chunk.vector[u] = load_words(source, Words<4>());
            }
        }
    }

    // The chunk that collect() begins with, which may be on its way long before.
    __device__ __forceinline__ void load_first(Chunk& chunk) const { load(begin + threadIdx.x, Block, chunk); }

    // Put the scores that reach the key on the list, in any order, as far as it has room. `count`, in shared memory and
    // 0 before, is how many there are, or more than the list has room for: then it may be too low.
    __device__ __forceinline__ void collect(Chunk& chunk, AtLeast<Code> wanted, Entry* list, int room, int* count) const {
        const int single = single_score();
        if (single >= 0) {
            const unsigned bits = score_bits(row[single]);
            if (wanted.by_key(bits)) {
                const int place = atomicAdd(count, 1);
                if (place < room) list[place] = list_entry(bits, single);
            }
        }
        const bool is_range = wanted.is_range();
        for (int first = begin; first < end; first += Loads * Block) {
            if (first != begin) load(first + threadIdx.x, Block, chunk);
            unsigned found = 0;
#pragma unroll
            for (int u = 0; u < Loads; ++u) {
                unsigned found_here = 0;
                if (is_range) {
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) {
                        found_here |= wanted.by_range(chunk.bits(u * VECTOR + e)) ? 1u << u * VECTOR + e : 0u;
                    }
                } else {
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) {
                        found_here |= wanted.by_key(chunk.bits(u * VECTOR + e)) ? 1u << u * VECTOR + e : 0u;
                    }
                }
                found |= first + u * Block + static_cast<int>(threadIdx.x) < end ? found_here : 0u;
            }
            const int sum = warp_prefix(__popc(found)), total = __shfl_sync(FULL_WARP, sum, 31);
            if (total == 0) continue;
            int place = threadIdx.x % 32 == 0 ? atomicAdd(count, total) : 0;
            place = __shfl_sync(FULL_WARP, place, 0);
            if (place >= room) break;
            place += sum - __popc(found);
            const int column = head + (first + static_cast<int>(threadIdx.x)) * VECTOR;
#pragma unroll
            for (int e = 0; e < Loads * VECTOR; ++e) {
                if (found >> e & 1u) {
                    if (place < room) {
                        list[place] = list_entry(chunk.bits(e), column + e / VECTOR * Block * VECTOR + e % VECTOR);
                    }
                    ++place;
                }
            }
        }
    }

    // Put the first `wanted` scores that have this very key on the list, by column; as rank keys. How many there are.
    __device__ __forceinline__ int collect_ties(unsigned key, Entry* list, int wanted) const {
        int taken = 0;
        const auto take = [&](unsigned ties, int column) {  // a bit for each of the scores from this column on
            int total;
            int place = taken + block_prefix<Block>(__popc(ties), total);
#pragma unroll 1
            for (; ties != 0 && place < wanted; ties &= ties - 1) list[place++] = rank_key(key, column + __ffs(ties) - 1);
            taken += total;
        };
        const auto is_tie = [&](bool exists, int column) {
            return exists && bits_key<Code>(score_bits(row[column])) == key;
        };
        const int i = threadIdx.x;
        if (has_head && head > 0) take(is_tie(i < head, i), i);
#pragma unroll 1
        for (int first = begin; first < end && taken < wanted; first += Loads * Block) {
            Chunk chunk;
            const int mine = first + Loads * i;
            load(mine, 1, chunk);
            unsigned ties = 0;
#pragma unroll
            for (int e = 0; e < Loads * VECTOR; ++e) {
                const bool tie = mine + e / VECTOR < end && bits_key<Code>(chunk.bits(e)) == key;
                ties |= tie ? 1u << e : 0u;
            }
            take(ties, head + mine * VECTOR);
        }
        if (has_tail && tail < length && taken < wanted) take(is_tie(i < length - tail, tail + i), tail + i);
        return min(taken, wanted);
    }

private:
    // The column of the head or tail that is this thread's; -1: none.
    __device__ __forceinline__ int single_score() const {
        const int i = threadIdx.x;
        if (i < VECTOR) return has_head && i < head ? i : -1;
        return has_tail && i - VECTOR < length - tail ? tail + i - VECTOR : -1;
    }
};
