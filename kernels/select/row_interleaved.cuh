// SPDX-License-Identifier: Apache-2.0
// Top-k of a row whose words of Word columns are interleaved over Lanes threads: lane l holds words l, l + Lanes, ...,
// in all PerLane columns.
//
// Several rows share a warp, and each step of their selection serves all of them. Keys lose low bits to hold the column
// there, so that all keys of a row differ and one maximum tells both. That loss is a rounding error: code that selects
// by such keys compares the exact values of those selected, and checks whether any other could have been. Of the
// columns of a lane, two chunks are in flight at a time.
#pragma once

#include "select/heads_per_lane.cuh"
#include "select/order_key.cuh"
#include "device/row_load.cuh"
#include "device/warp.cuh"

SPECIALISED bool INTERLEAVED = false;  // the words of a row are; else a lane has adjacent columns

// Return the largest multiple of 4, at most `most`, that divides per_lane.
__device__ constexpr int largest_divisor(int per_lane, int most) {
    return per_lane % most == 0 ? most : largest_divisor(per_lane, most - 4);
}

// Adjacent: the columns of a lane are one word.
template <typename T, int Lanes_, int PerLane_, bool Adjacent = false>
struct InterleavedRow {
    static constexpr int Lanes = Lanes_, PerLane = PerLane_;
    static constexpr int Word = Adjacent ? PerLane : largest_divisor(PerLane, 16 / sizeof(T));
    static constexpr int Chunk = largest_divisor(PerLane, 8);
    static constexpr unsigned MASK = power_of_two_from(Lanes * PerLane) - 1;  // the bits that hold the column
    static constexpr unsigned LAST_LANE = (Lanes - 1) * Word;
    static_assert(PerLane % Chunk == 0 && (Adjacent || Chunk % Word == 0), "a lane holds whole chunks of whole words");

    // Return the column of entry j in lane 0; below, in any lane.
    static __device__ constexpr int of_first(int j) { return j / Word * (Lanes * Word) + j % Word; }
    static __device__ __forceinline__ int column_of(int j, int lane) { return of_first(j) + lane * Word; }

    // The tag of a key, higher for lower columns. The part of the lane, which makes no difference within a lane, is
    // added later.
    static __device__ __forceinline__ unsigned tag(int j) { return MASK - LAST_LANE - of_first(j); }
    static __device__ __forceinline__ unsigned lane_tag(int lane) { return LAST_LANE - lane * Word; }
    static __device__ __forceinline__ int column_of(unsigned key) { return static_cast<int>(MASK - (key & MASK)); }

    // Load the chunk of a lane's columns that begins with its column `begin`, as float; NaN from `end` on. Whole: all
    // columns exist. Aligned: rows start at whole words. EndsAt divides `end`.
    template <bool Whole, bool Aligned, int EndsAt, typename U>
    static __device__ __forceinline__ void load(const U* row, int begin, int lane, int end, float (&values)[Chunk]) {
        constexpr int PIECE = min_int(Word, 16 / sizeof(U));
#pragma unroll
        for (int j = 0; j < Chunk; j += PIECE)
            load_piece<PIECE, Whole, Aligned, EndsAt>(row, column_of(begin + j, lane), end, values + j);
    }
};

__device__ __forceinline__ void order_two(unsigned& better, unsigned& worse) {
    const unsigned low = min(better, worse);
    better = max(better, worse);
    worse = low;
}

// The best few keys of a lane, in order. Keys hold their columns, so minimum and maximum order two of them.
template <int Heads>
struct TaggedHeads {
    unsigned key[Heads];

    // Sort four keys, then merge them: fewer steps than inserting one after the other.
    __device__ __forceinline__ void insert(unsigned a, unsigned b, unsigned c, unsigned d) {
        order_two(a, b);
        order_two(c, d);
        order_two(a, c);
        order_two(b, d);
        order_two(b, c);
        const unsigned best[4] = {a, b, c, d};
        constexpr int NEW = min_int(Heads, 4);
#pragma unroll
        for (int i = 0; i < NEW; ++i) key[Heads - NEW + i] = max(key[Heads - NEW + i], best[NEW - 1 - i]);
        order_by<power_of_two_from(Heads) / 2>();
    }

    // Sort keys that descend and then ascend: half of a bitonic sort, whose first entries are absent.
    template <int Distance>
    __device__ __forceinline__ void order_by() {
        constexpr int SIZE = power_of_two_from(Heads), ABSENT = SIZE - Heads;
#pragma unroll
        for (int i = ABSENT; i < SIZE - Distance; ++i) {
            if ((i & Distance) == 0) order_two(key[i - ABSENT], key[i - ABSENT + Distance]);
        }
        if constexpr (Distance > 1) order_by<Distance / 2>();
    }

    __device__ __forceinline__ void pop(bool yes) {
#pragma unroll
        for (int h = 0; h < Heads; ++h)
            key[h] = yes ? (h + 1 < Heads ? key[h + 1 < Heads ? h + 1 : h] : NO_KEY) : key[h];
    }
};

// Heads per lane, so that only 1 row in 30,000 has more of its best in one lane. These hold up the whole call.
__device__ constexpr int interleaved_heads(int top_k, int lanes, int per_lane) {
    return heads_for(3.3e-5, top_k, lanes, min_int(per_lane, top_k + 1));
}

// The best Count keys of a row in order, from the heads of its lanes.
struct Ranked {
    unsigned key;   // of rank r, in lane r
    unsigned last;  // of the last rank, in all lanes, since there may be no lane for it
    unsigned next;  // the maximum over the lanes bounds all other keys
};

template <int Count, typename Interleaved, int Heads>
__device__ __forceinline__ Ranked rank_heads(TaggedHeads<Heads>& heads, int lane) {
    static_assert(Count <= Interleaved::Lanes + 1, "a lane holds one of the best");
#pragma unroll
    for (int h = 0; h < Heads; ++h) heads.key[h] += Interleaved::lane_tag(lane);
    // Keys that a lane did not keep are below its last head, which bounds them once it is gone.
    const unsigned last = Heads < Interleaved::PerLane ? heads.key[Heads - 1] : NO_KEY;
    Ranked ranked = {NO_KEY, NO_KEY, NO_KEY};
#pragma unroll
    for (int round = 0; round < Count; ++round) {
        ranked.last = lanes_max<Interleaved::Lanes>(heads.key[0]);
        ranked.key = lane == round ? ranked.last : ranked.key;
        heads.pop(heads.key[0] == ranked.last);
    }
    ranked.next = max(lanes_max<Interleaved::Lanes>(heads.key[0]), last);
    return ranked;
}

// One of the best of a row, with its exact key and a value that goes with it.
struct Candidate {
    unsigned key;
    int column;
    float value;
};

__device__ __forceinline__ bool is_before(const Candidate& a, const Candidate& b) {
    return (a.key > b.key) | ((a.key == b.key) & (a.column < b.column));
}

template <int Lanes>
__device__ __forceinline__ Candidate candidate_of(const Candidate& own, int lane) {
    return {__shfl_sync(FULL_WARP, own.key, lane, Lanes), __shfl_sync(FULL_WARP, own.column, lane, Lanes),
            __shfl_sync(FULL_WARP, own.value, lane, Lanes)};
}

// Return false if the candidate of this lane and the next one, of Count in all, are out of order.
template <int Count, int Lanes>
__device__ __forceinline__ bool candidates_in_order(const Candidate& own, int lane) {
    const Candidate next = {__shfl_down_sync(FULL_WARP, own.key, 1, Lanes),
                            __shfl_down_sync(FULL_WARP, own.column, 1, Lanes), 0.0f};
    return is_before(own, next) | (lane + 1 >= Count) | ((own.key | next.key) == NO_KEY);
}

// Sort candidates by swapping neighbours until none is out of order: hardly ever more than two are.
template <int Count, int Lanes>
__device__ __forceinline__ void sort_candidates(Candidate& own, int lane) {
#pragma unroll 1
    do {
#pragma unroll 1
        for (int parity = 0; parity < 2; ++parity) {
            const bool is_first = lane % 2 == parity;
            const int partner = is_first ? lane + 1 : lane - 1;
            const bool paired = partner >= 0 && max(lane, partner) < Count;
            const Candidate other = candidate_of<Lanes>(own, paired ? partner : lane);
            if (paired && is_before(other, own) == is_first) own = other;
        }
    } while (__any_sync(FULL_WARP, !candidates_in_order<Count, Lanes>(own, lane)));
}

// The TopK best of a row by rounded keys and the next one: where the last is close to the next, their exact keys
// decide. If no lane is left for the next one, all lanes have it.
template <int TopK, int Lanes>
struct Candidates {
    static constexpr bool FULL = TopK == Lanes;
    static constexpr int COUNT = FULL ? TopK : TopK + 1;  // a lane has one each

    Candidate own;
    Candidate extra;  // if FULL

    __device__ __forceinline__ bool in_order(int lane) const { return candidates_in_order<COUNT, Lanes>(own, lane); }

    __device__ __forceinline__ void sort(int lane) {
        sort_candidates<COUNT, Lanes>(own, lane);
        if (!FULL) return;
        Candidate last = extra;
        if (lane == TopK - 1 && is_before(extra, own)) {
            last = own;
            own = extra;
        }
        extra = candidate_of<Lanes>(last, TopK - 1);
        sort_candidates<COUNT, Lanes>(own, lane);
    }

    // For sorted candidates: the key of the last of the best, and whether `extra` may come before it.
    __device__ __forceinline__ unsigned last_key() const { return __shfl_sync(FULL_WARP, own.key, TopK - 1, Lanes); }
    __device__ __forceinline__ bool overtaken(unsigned last_key) const { return FULL && extra.key >= last_key; }
};

// Return whether a lane of row `turn` of this warp has voted.
template <int Lanes>
__device__ __forceinline__ bool any_of_turn(unsigned votes, int turn) {
    return (votes >> turn * Lanes & ~0u >> (32 - Lanes)) != 0u;
}
