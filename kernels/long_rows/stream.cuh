// SPDX-License-Identifier: Apache-2.0
// A block reads a piece of a row by 16-byte loads and lists the scores that reach a key.
//
// A row has a head of single scores up to the first 16-byte boundary, vectors, and a tail of single scores. Pieces
// consist of whole vectors; the first one also has the head, the last one the tail.
#pragma once

#include "device/block_scan.cuh"
#include "device/prefetch.cuh"
#include "select/order_bits.cuh"

// An entry of a list: bits and column of a score.
__device__ __forceinline__ unsigned long long list_entry(unsigned bits, int column) {
    return static_cast<unsigned long long>(bits) << 32 | static_cast<unsigned>(column);
}

// A key that enough scores of a row reach, almost certainly.
struct Threshold {
    unsigned key;
    bool tied;  // too many scores may have this very key
};

// Shared: the row is in shared memory.
template <int Code, int Block, int Loads, bool Shared = false>
struct RowPiece {
    typedef typename Scalar<Code>::type T;
    typedef unsigned long long Entry;
    static constexpr int VECTOR = 16 / sizeof(T);
    static_assert(Loads <= 4, "a bit for each score, those of first and second halves in half a word");
    static_assert(Block >= 2 * VECTOR, "a thread for each single score");

    // Loads vectors, which a thread reads together.
    struct Chunk {
        Words<4> vector[Loads];
    };

    // Return the bits of score e of a vector, at the top of a word.
    static __device__ __forceinline__ unsigned bits_of(const Words<4>& vector, int e) {
        const unsigned word = vector.word[e * sizeof(T) / 4];
        return sizeof(T) == 4 ? word : e % 2 == 0 ? word << 16 : word & 0xffff0000u;
    }

    const T* row;
    int length;
    int head;        // single scores before the vectors
    int tail;        // column of the first single score after them
    int begin, end;  // the vectors of this piece
    bool has_head, has_tail;

    __device__ __forceinline__ RowPiece(const T* row, int length, int number, int pieces) : row(row), length(length) {
        const int misalignment = static_cast<int>(reinterpret_cast<unsigned long long>(row) % 16 / sizeof(T));
        head = min((VECTOR - misalignment) % VECTOR, length);
        const int vectors = (length - head) / VECTOR;
        tail = head + vectors * VECTOR;
        const int share = (vectors + pieces - 1) / pieces;
        begin = min(number * share, vectors);
        end = min(begin + share, vectors);
        has_head = number == 0;
        has_tail = number == pieces - 1;
    }

    __device__ __forceinline__ Words<4> load_vector(int i) const {
        const T* vector = row + head + static_cast<int64_t>(i) * VECTOR;
        if (!Shared) return load_words(vector, Words<4>());
        const uint4 read = *reinterpret_cast<const uint4*>(vector);
        return {{read.x, read.y, read.z, read.w}};
    }

    // Load this thread's vectors of the block's chunk from `first` on.
    __device__ __forceinline__ void load(int first, Chunk& chunk) const {
#pragma unroll
        for (int u = 0; u < Loads; ++u) {
            const int mine = first + u * Block + static_cast<int>(threadIdx.x);
            if (mine < end) chunk.vector[u] = load_vector(mine);
        }
    }

    // Load the first chunk for collect(), possibly long before.
    __device__ __forceinline__ void load_first(Chunk& chunk) const {
        chunk = Chunk();  // so that vectors without a load need no registers before
        load(begin, chunk);
    }

    // Prefetch what load_first() reads.
    __device__ __forceinline__ void prefetch_first() const {
        constexpr int IN_LINE = 128 / 16;
        const int first = begin + static_cast<int>(threadIdx.x) * IN_LINE;
        if (threadIdx.x < Loads * Block / IN_LINE && first < end) {
            prefetch_line(row + head + static_cast<int64_t>(first) * VECTOR);
        }
    }

    // Return a bit for each score of this thread's vectors of the chunk from `first` on that passes.
    __device__ __forceinline__ unsigned passing(const Chunk& chunk, const Passes<Code>& passes, int first) const {
        unsigned found = 0;
        if (passes.everything) {
            found = ~0u >> (sizeof(T) == 4 ? 16 : 0);
        } else {
            test_words<0>(chunk, passes, found);
        }
        const int mine = first + static_cast<int>(threadIdx.x);
        if (mine + (Loads - 1) * Block >= end) {
            const unsigned vectors = max(0, (end - mine + Block - 1) / Block);
            if (vectors < Loads) found &= 0x10001u * ((1u << 4 * vectors) - 1u);
        }
        return found;
    }

    // Return the column of the score of such a bit. Bits 0 to 15 stand for words, or for their first halves.
    __device__ __forceinline__ int column_of(int first, int bit) const {
        const int word = bit % 16;
        const int in_vector = sizeof(T) == 4 ? word % 4 : word % 4 * 2 + bit / 16;
        return head + (first + static_cast<int>(threadIdx.x) + word / 4 * Block) * VECTOR + in_vector;
    }

    __device__ __forceinline__ bool has_single_scores() const {
        return (has_head && head > 0) || (has_tail && tail < length);
    }

    // Return the column of the single score of this thread; -1: none.
    __device__ __forceinline__ int single_score() const {
        const int i = threadIdx.x;
        if (i < VECTOR) return has_head && i < head ? i : -1;
        return has_tail && i - VECTOR < length - tail ? tail + i - VECTOR : -1;
    }

    // List the scores that pass, in any order, up to the capacity. `count` is in shared memory and 0 before. Afterwards
    // it is their number; if that exceeds the capacity, it may be too low but exceeds it as well. A thread marks the
    // scores of its chunk that pass by bits, asks for the next chunk, and then reads those few scores again.
    __device__ __forceinline__ void collect(Chunk& chunk, const Passes<Code>& passes, Entry* list, int capacity,
                                            int* count) const {
        const int single = single_score();
        if (single >= 0) {
            const unsigned bits = score_bits(row[single]);
            if (passes.by_bits(bits)) {
                const int place = atomicAdd(count, 1);
                if (place < capacity) list[place] = list_entry(bits, single);
            }
        }
        if (passes.nothing) return;
#pragma unroll 1
        for (int first = begin; first < end; first += Loads * Block) {
            unsigned found = passing(chunk, passes, first);
            load(first + Loads * Block, chunk);

            const unsigned total = warp_sum(__popc(found));
            if (total == 0) continue;
            int place = threadIdx.x % 32 == 0 ? atomicAdd(count, static_cast<int>(total)) : 0;
            place = __shfl_sync(FULL_WARP, place, 0);
            if (place >= capacity) break;
#pragma unroll 1
            for (unsigned lanes = ~0u; (lanes = __ballot_sync(FULL_WARP, found != 0)) != 0; place += __popc(lanes)) {
                if (found == 0) continue;
                const int bit = __ffs(found) - 1;
                const int my_place = place + __popc(lanes & ((1u << threadIdx.x % 32) - 1u));
                found &= found - 1;
                const int column = column_of(first, bit);
                if (my_place < capacity) list[my_place] = list_entry(score_bits(row[column]), column);
            }
        }
    }

  private:
    template <int Word>
    static __device__ __forceinline__ void test_words(const Chunk& chunk, const Passes<Code>& passes, unsigned& found) {
        passes.template by_word<Word>(chunk.vector[Word / 4].word[Word % 4], found);
        if constexpr (Word + 1 < 4 * Loads) test_words<Word + 1>(chunk, passes, found);
    }
};

// List the first `wanted` scores of a piece that have this very key, by column, as rank_of(column). Return how many there
// are. A thread loads Vectors vectors at once.
template <int Vectors, int Code, int Block, int Loads, bool Shared, typename Rank, typename RankOf>
__device__ __forceinline__ int collect_ties(const RowPiece<Code, Block, Loads, Shared>& piece, unsigned key, Rank* list,
                                            int wanted, RankOf rank_of) {
    typedef RowPiece<Code, Block, Loads, Shared> Piece;
    constexpr int VECTOR = Piece::VECTOR;
    int taken = 0;
    const auto take = [&](unsigned ties, int column) {  // `ties`: a bit for each score from this column on
        int total;
        int place = taken + block_prefix<Block>(__popc(ties), total);
#pragma unroll 1
        for (; ties != 0 && place < wanted; ties &= ties - 1) list[place++] = rank_of(column + __ffs(ties) - 1);
        taken += total;
    };
    const auto is_tie = [&](bool exists, int column) {
        return exists && bits_key<Code>(score_bits(piece.row[column])) == key;
    };
    const int i = threadIdx.x;
    if (piece.has_head && piece.head > 0) take(is_tie(i < piece.head, i), i);
#pragma unroll 1
    for (int first = piece.begin; first < piece.end && taken < wanted; first += Vectors * Block) {
        const int mine = first + Vectors * i;
        unsigned ties = 0;
#pragma unroll
        for (int u = 0; u < Vectors; ++u) {
            if (mine + u >= piece.end) break;
            const Words<4> vector = piece.load_vector(mine + u);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                ties |= bits_key<Code>(Piece::bits_of(vector, e)) == key ? 1u << (u * VECTOR + e) : 0u;
            }
        }
        take(ties, piece.head + mine * VECTOR);
    }
    if (piece.has_tail && piece.tail < piece.length && taken < wanted) {
        take(is_tie(i < piece.length - piece.tail, piece.tail + i), piece.tail + i);
    }
    return min(taken, wanted);
}
