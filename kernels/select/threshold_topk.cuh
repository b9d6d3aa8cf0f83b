// SPDX-License-Identifier: Apache-2.0
// Top-k of a row of 16-bit scores whose words are interleaved over Lanes threads, by a threshold, in three steps that
// treat two scores at once:
//
// 1. Each lane has two maxima, of the scores in the lower and in the upper halves of its words. The TopK-th greatest of
//    the row's 2 * Lanes maxima is a threshold that at least TopK scores reach; of random scores, few more do. While more
//    than 2 * Lanes do, the threshold is the next greater maximum; or, if fewer than TopK scores exceed it, so many of the
//    scores that equal it are left out that TopK remain, those of the highest columns.
// 2. The columns of these scores are compacted in shared memory, two for each lane, which reads their scores.
// 3. Each of them counts those that come before it.
//
// If fewer than TopK scores reach the last threshold, as in a row of NaN, the row is not `complete`.
#pragma once

#include "select/packed_row.cuh"

// Return how many of the 2 * Lanes keys of a row are greater than each of this lane's. Equal keys share a rank.
template <int Lanes>
__device__ __forceinline__ void rank_two(const unsigned (&key)[2], int (&rank)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        rank[i] = 0;
        count_greater(key[1 - i], key[i], rank[i]);
    }
#pragma unroll
    for (int distance = 1; distance < Lanes; ++distance) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const unsigned other = __shfl_xor_sync(FULL_WARP, key[i], distance);
            count_greater(other, key[0], rank[0]);
            count_greater(other, key[1], rank[1]);
        }
    }
}

template <typename T, int Code, int TopK, typename Interleaved>
struct ThresholdTopK {
    static constexpr int Lanes = Interleaved::Lanes, SLOTS = 2 * Lanes;
    typedef PackedRow<T, Interleaved> Row;
    static_assert(TopK <= SLOTS, "there are as many maxima");

    T score[2];  // of this lane's candidates
    int column[2];
    int rank[2];  // winners are those below TopK
    bool complete;

    // `slots`: SLOTS entries for each row of the warp, those of this row.
    __device__ __forceinline__ ThresholdTopK(const T* source, const Row& row, int lane, unsigned short* slots) {
        unsigned best = row.word[0];
#pragma unroll
        for (int w = 1; w < Row::NUM_WORDS; ++w) best = packed_max<Code>(best, row.word[w]);

        unsigned threshold = lowest(at_rank(best));
        Found found = find(row, threshold, packed_reaches<Code>);
        int before, count = count_of(found, lane, before);
        while (UNLIKELY(__any_sync(FULL_WARP, count > SLOTS))) {
            const bool too_many = count > SLOTS;
            const Found above = find(row, threshold, packed_exceeds<Code>);
            const int wanted = TopK - count_of(above, lane, before);
            const bool ties = too_many && wanted > 0;
            if (UNLIKELY(__any_sync(FULL_WARP, ties))) {
                const Found decided = with_first(above, found, wanted, lane);
                if (ties) found = decided;
            }
            const unsigned greater = packed_exceeds<Code>(best, threshold);
            const unsigned next = lowest((best & greater) | (PACKED_NAN & ~greater));
            if (too_many && !ties) {
                threshold = next;  // nothing reaches NaN
                found = find(row, threshold, packed_reaches<Code>);
            }
            count = count_of(found, lane, before);
        }
        complete = count >= TopK;

#pragma unroll
        for (int f = 0; f < FOUND; ++f) {
            unsigned rest = found.bits[f];
            // Nearly all lanes have no more than these, which do not wait for each other.
#pragma unroll
            for (int i = 0; i < 4 / FOUND; ++i) append(slots, before, f, lane, rest);
            while (rest != 0u) append(slots, before, f, lane, rest);
        }
        __syncwarp();
        bool exists[2];
        unsigned bits[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            exists[i] = lane + i * Lanes < count;
            const unsigned found_at = exists[i] ? slots[lane + i * Lanes] : 0u;
            column[i] = Row::column_of(found_at % (32 * FOUND), found_at / (32 * FOUND));
            bits[i] = __ldg(&source[column[i]].bits);
            score[i].bits = static_cast<unsigned short>(bits[i]);
        }
        const unsigned order = packed_order<Code>(bits[0] | bits[1] << 16);
        const unsigned key[2] = {exists[0] ? order << 16 | (0xffffu - column[0]) : NO_KEY,
                                 exists[1] ? (order & 0xffff0000u) | (0xffffu - column[1]) : NO_KEY};
        rank_two<Lanes>(key, rank);
#pragma unroll
        for (int i = 0; i < 2; ++i) rank[i] = exists[i] ? rank[i] : SLOTS;
    }

    // Rank the winners by column instead.
    __device__ __forceinline__ void rank_by_column() {
        unsigned key[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) key[i] = rank[i] < TopK ? 0xffffu - column[i] : 0u;
        rank_two<Lanes>(key, rank);
#pragma unroll
        for (int i = 0; i < 2; ++i) rank[i] = key[i] == 0u ? SLOTS : rank[i];
    }

  private:
    static constexpr int FOUND = (Row::NUM_WORDS + 15) / 16;

    // Some entries of a lane: bit w % 16 for the lower score of word w, and bit w % 16 + 16 for the upper one.
    struct Found {
        unsigned bits[FOUND];
    };

    // Return the maxima that fewer than TopK of the row's are greater than, and NaN in the place of the others.
    static __device__ __forceinline__ unsigned at_rank(unsigned best) {
        unsigned greater = packed_exceeds<Code>(swap_halves(best), best) & 0x00010001u;
#pragma unroll
        for (int distance = 1; distance < Lanes; ++distance) {
            const unsigned other = __shfl_xor_sync(FULL_WARP, best, distance);
            greater += (packed_exceeds<Code>(other, best) & 0x00010001u) +
                       (packed_exceeds<Code>(swap_halves(other), best) & 0x00010001u);
        }
        const unsigned low = (greater & 0xffffu) < TopK ? best : PACKED_NAN;
        const unsigned high = (greater >> 16) < TopK ? best : PACKED_NAN;
        return (low & 0xffffu) | (high & 0xffff0000u);
    }

    // Return the lowest of the row's values, in both halves; NaN if all are.
    static __device__ __forceinline__ unsigned lowest(unsigned values) {
        values = packed_min<Code>(values, swap_halves(values));
#pragma unroll
        for (int distance = Lanes / 2; distance > 0; distance /= 2)
            values = packed_min<Code>(values, __shfl_xor_sync(FULL_WARP, values, distance));
        return values;
    }

    // For which of its words a comparison with the threshold is true.
    template <typename Comparison>
    static __device__ __forceinline__ Found find(const Row& row, unsigned threshold, Comparison compare) {
        Found found;
#pragma unroll
        for (int f = 0; f < FOUND; ++f) found.bits[f] = 0;
#pragma unroll
        for (int w = 0; w < Row::NUM_WORDS; ++w)
            found.bits[w / 16] |= compare(row.word[w], threshold) & 0x00010001u << w % 16;
        return found;
    }

    // Add the `wanted` entries of lowest columns of the row's `others` to `found`.
    static __device__ __forceinline__ Found with_first(const Found& found, const Found& others, int wanted, int lane) {
        int end = 0;  // the last of them is in this column
#pragma unroll 1
        for (int step = power_of_two_from(Lanes * Interleaved::PerLane) / 2; step > 0; step /= 2) {
            int ignored;
            const Found first = without(before_column(others, end + step, lane), found);
            if (count_of(first, lane, ignored) < wanted) end += step;
        }
        Found all = before_column(others, end + 1, lane);
#pragma unroll
        for (int f = 0; f < FOUND; ++f) all.bits[f] |= found.bits[f];
        return all;
    }

    static __device__ __forceinline__ Found without(Found entries, const Found& others) {
#pragma unroll
        for (int f = 0; f < FOUND; ++f) entries.bits[f] &= ~others.bits[f];
        return entries;
    }

    static __device__ __forceinline__ Found before_column(Found entries, int end, int lane) {
        constexpr int WORD = Interleaved::Word;
        const int own = end / (Lanes * WORD) * WORD + min(max(end % (Lanes * WORD) - lane * WORD, 0), WORD);
#pragma unroll
        for (int f = 0; f < FOUND; ++f) {
            const int left = min(max(own - 32 * f, 0), 32);
            entries.bits[f] &= ((1u << (left + 1) / 2) - 1u) | ((1u << left / 2) - 1u) << 16;
        }
        return entries;
    }

    // Move the lowest of these bits, if there is one, to the next slot.
    static __device__ __forceinline__ void append(unsigned short* slots, int& next, int f, int lane, unsigned& rest) {
        const unsigned bit = static_cast<unsigned>(__ffs(static_cast<int>(rest)) - 1);
        const unsigned entry = 2 * (f * 16 + bit % 16) + bit % 32 / 16;
        store_shared_if(rest != 0u, slots + next, lane * (32 * FOUND) + entry);
        next += rest != 0u;
        rest &= rest - 1u;
    }

    // Return how many scores of the row are found, and the number of those in lower lanes.
    static __device__ __forceinline__ int count_of(const Found& found, int lane, int& before) {
        int all = 0;
#pragma unroll
        for (int f = 0; f < FOUND; ++f) all += __popc(found.bits[f]);
        before = 0;
#pragma unroll
        for (int distance = 1; distance < Lanes; distance *= 2) {
            const int other = __shfl_xor_sync(FULL_WARP, all, distance);
            before += (lane & distance) != 0 ? other : 0;
            all += other;
        }
        return all;
    }
};
