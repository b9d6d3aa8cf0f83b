// SPDX-License-Identifier: Apache-2.0
// A row of 16-bit scores whose words are interleaved over lanes (row_interleaved.cuh), in the registers of these lanes.
#pragma once

#include "select/packed_scores.cuh"
#include "select/row_interleaved.cuh"

// A lane's columns; NaN from the end of the row on. All loads are in flight at once.
template <typename T, typename Interleaved>
struct PackedRow {
    static constexpr int NUM_WORDS = Interleaved::PerLane / 2;

    unsigned word[NUM_WORDS];

    template <bool Whole, bool Aligned, int EndsAt>
    __device__ __forceinline__ void load(const T* row, int lane, int end) {
        constexpr int PIECE = Interleaved::Word;
#pragma unroll
        for (int j = 0; j < Interleaved::PerLane; j += PIECE)
            load_piece_packed<PIECE, Whole, Aligned, EndsAt>(row, Interleaved::column_of(j, lane), end, word + j / 2);
    }

    // Return the column of a lane's entry whose position is known at run time only.
    static __device__ __forceinline__ int column_of(unsigned j, unsigned lane) {
        constexpr unsigned WORD = Interleaved::Word;
        return static_cast<int>(j / WORD * (Interleaved::Lanes * WORD) + lane * WORD + j % WORD);
    }

    // Insert the keys of all columns: the order of the score in the upper half, and the tag of the column.
    template <int Code, bool Whole, int Heads>
    __device__ __forceinline__ void insert_into(TaggedHeads<Heads>& heads, int lane, int end) const {
#pragma unroll
        for (int begin = 0; begin < Interleaved::PerLane; begin += 4) {
            const unsigned first = packed_order<Code>(word[begin / 2]),
                           second = packed_order<Code>(word[begin / 2 + 1]);
            unsigned keys[4] = {first << 16, first & 0xffff0000u, second << 16, second & 0xffff0000u};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const unsigned tag = Interleaved::tag(begin + j);
                keys[j] |= tag;
                if (Whole) continue;
                keys[j] = max(keys[j], (Interleaved::MASK + 1) | tag);  // NaN is above what does not exist
                if (Interleaved::column_of(begin + j, lane) >= end) keys[j] = NO_KEY;
            }
            heads.insert(keys[0], keys[1], keys[2], keys[3]);
        }
    }
};
