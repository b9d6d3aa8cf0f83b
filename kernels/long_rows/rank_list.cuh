// SPDX-License-Identifier: Apache-2.0
// A list, in shared memory, of the scores of a row that reach a key, as ranks. Its order is the same on every run.
#pragma once

#include "long_rows/rank.cuh"
#include "long_rows/stream.cuh"

// The first ranks of a list.
template <typename Rank, int Block>
struct ListedRanks {
    const Rank* ranks;
    int count;

    // Call take(rank) for those of a thread.
    template <typename Take>
    __device__ __forceinline__ void for_each(Take take) const {
#pragma unroll 4
        for (int i = threadIdx.x; i < count; i += Block) take(ranks[i]);
    }
};

template <typename Rank, int Block, int Capacity>
struct RankList {
    static constexpr int WARPS = Block / 32;

    // In shared memory.
    Rank* ranks;
    Extent* extents;  // of the keys that each warp has added

    // Return the bounds of all keys.
    __device__ __forceinline__ Extent extent() const {
        const int lane = threadIdx.x % 32;
        const Extent own = lane < WARPS ? extents[lane] : Extent{~0u, 0u};
        return {warp_min(own.low), warp_max(own.high)};
    }

    // Call take(place, rank) for the ranks from `pivot` on, in the order of the list. All threads have passed a barrier
    // since it was written.
    template <typename Take>
    __device__ __forceinline__ void write_best(int count, Rank pivot, Take take) const {
        const int share = (count + Block - 1) / Block | 1;  // of a thread; an odd number spreads threads over banks
        const int begin = min(static_cast<int>(threadIdx.x) * share, count), end = min(begin + share, count);
        int best = 0;
#pragma unroll 4
        for (int i = begin; i < end; ++i) best += ranks[i] >= pivot;
        int total;
        int place = block_prefix<Block>(best, total);
#pragma unroll 1
        for (int i = begin; i < end; ++i) {
            if (ranks[i] >= pivot) take(place++, ranks[i]);
        }
    }

    // List the ranks of the scores that pass, in an order that depends on nothing but the shape and alignment of the
    // piece. Return their number; if it exceeds the capacity, not all of them are on the list. A barrier has to follow.
    // The threads mark by bits which scores of a window of some chunks pass, and number the marks by prefix sums. They
    // list the columns first, so that then all scores can be read again at once. A window is so short that they come
    // from L2.
    template <int Code, int Loads, typename Order>
    __device__ __forceinline__ int collect(const RowPiece<Code, Block, Loads>& piece,
                                           typename RowPiece<Code, Block, Loads>::Chunk& chunk,
                                           const Passes<Code>& passes, const Order& order) const {
        typedef RowPiece<Code, Block, Loads> Piece;
        constexpr int MARKS = sizeof(typename Piece::T) == 4 ? 16 : 32;  // bits of a chunk
        constexpr int STEP = Loads * Block, WINDOW = 64 / MARKS;
        int count = 0;
        Extent keys = {~0u, NO_KEY};
        const auto columns_to_ranks = [&](int total) {
            const int end = count + total <= Capacity ? count + total : 0;
            __syncthreads();
#pragma unroll 4
            for (int i = count + static_cast<int>(threadIdx.x); i < end; i += Block) {
                const int column = static_cast<int>(ranks[i]);
                const unsigned key = bits_key<Code>(score_bits(piece.row[column]));
                keys = {min(keys.low, key), max(keys.high, key)};
                ranks[i] = order.rank(key, column);
            }
            count += total;
        };
        if (piece.has_single_scores()) {
            const int column = piece.single_score();
            const bool passed = column >= 0 && passes.by_bits(score_bits(piece.row[column]));
            int total;
            const int place = block_prefix<Block>(passed, total);
            if (passed && place < Capacity) ranks[place] = column;
            columns_to_ranks(total);
        }
        const int end = passes.nothing ? piece.begin : piece.end;
#pragma unroll 1
        for (int window = piece.begin; window < end; window += WINDOW * STEP) {
            unsigned long long marks = 0;
#pragma unroll 1
            for (int i = 0; i < WINDOW && window + i * STEP < end; ++i) {
                const unsigned found = piece.passing(chunk, passes, window + i * STEP);
                marks |= static_cast<unsigned long long>(found) << MARKS * i;
                piece.load(window + (i + 1) * STEP, chunk);
            }
            int total;
            int place = count + block_prefix<Block>(__popcll(marks), total);
            if (total == 0) continue;
            if (count + total > Capacity) marks = 0;  // only count
#pragma unroll 1
            for (; marks != 0; marks &= marks - 1) {
                const int mark = __ffsll(marks) - 1;
                ranks[place++] = static_cast<Rank>(piece.column_of(window + mark / MARKS * STEP, mark % MARKS));
            }
            columns_to_ranks(total);
        }
        keep_extent(keys);
        return count;
    }

  private:
    // Keep the bounds of the keys that the lanes of this warp have added.
    __device__ __forceinline__ void keep_extent(const Extent& keys) const {
        const Extent extent = {warp_min(keys.low), warp_max(keys.high)};
        if (threadIdx.x % 32 == 0) extents[threadIdx.x / 32] = extent;
    }
};
