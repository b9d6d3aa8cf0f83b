// SPDX-License-Identifier: Apache-2.0
// A row whose words of Word columns are interleaved over Lanes threads: lane l holds words l, l + Lanes, ..., in all
// PerLane columns.
//
// Several rows share a warp, and each step of their selection serves all of them. Keys are cut to make capacity for the
// column in their low bits, so that all keys of a row differ and one maximum tells both. What they are cut by is an
// error like any other: whoever selects by such keys looks at the exact values of what came out, and at what could have
// been meant to come out. Of a lane's columns two chunks are in flight at a time.
#pragma once

#include "select/heads_per_lane.cuh"
#include "select/order_key.cuh"
#include "device/row_load.cuh"
#include "device/warp.cuh"

SPECIALISED bool INTERLEAVED = false;  // the words of a row are; else a lane has adjacent columns

// The largest multiple of 4 up to `most` that divides per_lane.
__device__ constexpr int largest_divisor(int per_lane, int most) {
    return per_lane % most == 0 ? most : largest_divisor(per_lane, most - 4);
}

// Adjacent: all of a lane's columns are one word.
template <typename T, int Lanes_, int PerLane_, bool Adjacent = false>
struct InterleavedRow {
    static constexpr int Lanes = Lanes_, PerLane = PerLane_;
    static constexpr int Word = Adjacent ? PerLane : largest_divisor(PerLane, 16 / sizeof(T));
    static constexpr int Chunk = largest_divisor(PerLane, 8);
    static constexpr unsigned MASK = power_of_two_from(Lanes * PerLane) - 1;  // of the bits that hold the column
    static constexpr unsigned LAST_LANE = (Lanes - 1) * Word;
    static_assert(PerLane % Chunk == 0 && (Adjacent || Chunk % Word == 0), "a lane holds whole chunks of whole words");

    // The column in lane 0 of its j-th; any lane's j-th.
    static __device__ constexpr int of_first(int j) { return j / Word * (Lanes * Word) + j % Word; }
    static __device__ __forceinline__ int column_of(int j, int lane) { return of_first(j) + lane * Word; }

    // What stands in a key for the column, the higher the lower the column, but for the lane's part, which does not
    // matter within a lane and is added later.
    static __device__ __forceinline__ unsigned tag(int j) { return MASK - LAST_LANE - of_first(j); }
    static __device__ __forceinline__ unsigned lane_tag(int lane) { return LAST_LANE - lane * Word; }
    static __device__ __forceinline__ int column_of(unsigned key) { return static_cast<int>(MASK - (key & MASK)); }

    // The chunk of a lane's columns from its column `begin` on as float, NaN from `end` on. Whole: there are none such.
    // Aligned: rows start at whole words. EndsAt: a number that `end` is a multiple of.
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

// A lane's best few keys in order. Keys that hold their columns need nothing beside them, and the minimum and maximum
// of two order them.
template <int Heads>
struct TaggedHeads {
    unsigned key[Heads];

    // Put four in order, then merge them: fewer steps than inserting one after the other.
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

    // Of keys that go down and up again: half of a bitonic sort, of which the first entries are absent.
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

// So many heads per lane that one row in 30,000 has more of its best in a lane: the call waits for those.
__device__ constexpr int interleaved_heads(int top_k, int lanes, int per_lane) {
    return heads_for(3.3e-5, top_k, lanes, min_int(per_lane, top_k + 1));
}

// The best Count of a row's keys in order, from the best few of each of its lanes.
struct Ranked {
    unsigned key;   // in lane r the r-th
    unsigned last;  // in all lanes the last of Count, for which there may be no lane
    unsigned next;  // no other key of the row is above the highest of these
};

template <int Count, typename Interleaved, int Heads>
__device__ __forceinline__ Ranked rank_heads(TaggedHeads<Heads>& heads, int lane) {
    static_assert(Count <= Interleaved::Lanes + 1, "a lane holds one of the best");
#pragma unroll
    for (int h = 0; h < Heads; ++h) heads.key[h] += Interleaved::lane_tag(lane);
    // The lane's keys after its heads are below the last of them, which counts once it is gone.
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

// One of a row's best, with its exact key and what goes with it.
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

// Whether a row's Count candidates, one in each lane, are in order as far as this lane sees.
template <int Count, int Lanes>
__device__ __forceinline__ bool candidates_in_order(const Candidate& own, int lane) {
    const Candidate next = {__shfl_down_sync(FULL_WARP, own.key, 1, Lanes),
                            __shfl_down_sync(FULL_WARP, own.column, 1, Lanes), 0.0f};
    return is_before(own, next) | (lane + 1 >= Count) | ((own.key | next.key) == NO_KEY);
}

// Put them in order. Neighbours change places until none has to, since hardly ever more than two are out of order.
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

// A row's TopK best by cut keys and the next one: where the last is close to the next, their exact keys decide.
// If there is no lane left for it, all lanes have it.
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

    // Of candidates in order, the key of the last of the best, and whether `extra` may come before it.
    __device__ __forceinline__ unsigned last_key() const { return __shfl_sync(FULL_WARP, own.key, TopK - 1, Lanes); }
    __device__ __forceinline__ bool overtaken(unsigned last_key) const { return FULL && extra.key >= last_key; }
};

// Whether one of the lanes of a warp's row `turn` has voted.
template <int Lanes>
__device__ __forceinline__ bool any_of_turn(unsigned votes, int turn) {
    return (votes >> turn * Lanes & ~0u >> (32 - Lanes)) != 0u;
}
