// SPDX-License-Identifier: Apache-2.0
// The k largest scores of each row, sorted, exact: descending, equal scores by lower column, NaN last, bit copies out.
//
// LANES threads hold a row in registers, up to 1024 columns and 32 winners; lane r writes the r-th best. Longer rows and
// larger k: topk_select_long.cu, topk_select_large.cu. DEALT: they select on keys that are cut to hold their columns,
// several rows to a warp, and look again at the best.
#include "dealt.cuh"
#include "order.cuh"
#include "row.cuh"
#include "select.cuh"
#include "span.cuh"

#ifndef DTYPE
#define DTYPE 0
#endif
#ifndef TOP_K
#define TOP_K 6
#endif
#ifndef LANES
#define LANES 32
#endif
#ifndef PER_LANE
#define PER_LANE 8
#endif
#ifndef WHOLE_ROWS
#define WHOLE_ROWS 1
#endif
#ifndef ALIGNED
#define ALIGNED 1
#endif
#ifndef ENDS_AT
#define ENDS_AT 1  // lengths of rows are multiples of it
#endif
#ifndef DENSE
#define DENSE 0  // rows of scores and results follow each other
#endif
#ifndef HAS_LENGTHS
#define HAS_LENGTHS 0
#endif
#ifndef HAS_STARTS
#define HAS_STARTS 0
#endif

typedef Scalar<DTYPE>::type score_t;

typedef Deal<score_t, LANES, PER_LANE> Dealt;

// Scores of 16 bits leave room for the column in their keys, so that nothing is cut and the best are known at once.
constexpr bool ROOM_FOR_COLUMN = sizeof(score_t) == 2;
// The winners of a row whose `length` columns are dealt to LANES lanes.
struct DealtTopK : Candidates<TOP_K, LANES> {
    unsigned next;  // the key that no others are above

    __device__ __forceinline__ DealtTopK(const score_t* source, int length, int lane) {
        constexpr int HEADS = dealt_heads(TOP_K, LANES, PER_LANE);
        TaggedHeads<HEADS> heads;
#pragma unroll
        for (int h = 0; h < HEADS; ++h) heads.key[h] = NO_KEY;
        float scores[Dealt::Chunk];
        Dealt::load<WHOLE_ROWS, ALIGNED, ENDS_AT>(source, 0, lane, length, scores);
#pragma unroll
        for (int begin = 0; begin < PER_LANE; begin += Dealt::Chunk) {
            unsigned keys[Dealt::Chunk];
#pragma unroll
            for (int j = 0; j < Dealt::Chunk; ++j) {
                const unsigned tag = Dealt::tag(begin + j);
                keys[j] = ROOM_FOR_COLUMN ? (max(order_key(scores[j]), Dealt::MASK + 1) & ~Dealt::MASK) | tag
                                          : tagged_key_of_bits<Dealt::MASK>(__float_as_uint(scores[j]), tag);
                if (!WHOLE_ROWS && Dealt::column_of(begin + j, lane) >= length) keys[j] = NO_KEY;
            }
            if (begin + Dealt::Chunk < PER_LANE)
                Dealt::load<WHOLE_ROWS, ALIGNED, ENDS_AT>(source, begin + Dealt::Chunk, lane, length, scores);
#pragma unroll
            for (int j = 0; j < Dealt::Chunk; j += 4) heads.insert(keys[j], keys[j + 1], keys[j + 2], keys[j + 3]);
        }
        const Ranked best = rank_heads<ROOM_FOR_COLUMN ? TOP_K : TOP_K + 1, Dealt>(heads, lane);
        next = best.next;
        if (ROOM_FOR_COLUMN) {
            own = {best.key & ~Dealt::MASK, Dealt::column_of(best.key), 0.0f};
            if (next > __shfl_sync(FULL_WARP, best.key, TOP_K - 1, LANES)) next = ~0u;
        } else {
            own = exactly(source, length, best.key, lane < COUNT);
            extra = exactly(source, length, best.last, FULL);
        }
    }

    // What a key stands for, if it is wanted and stands for something.
    static __device__ __forceinline__ Candidate exactly(const score_t* source, int length, unsigned key, bool wanted) {
        Candidate candidate = {NO_KEY, Dealt::column_of(key), 0.0f};
        if (wanted && candidate.column < length) {
            candidate.value = to_float(source[candidate.column]);
            candidate.key = order_key(candidate.value);
        }
        return candidate;
    }

    // Whether candidates in order begin with the winners.
    __device__ __forceinline__ bool complete() const {
        if (ROOM_FOR_COLUMN) return next != ~0u;
        const unsigned last = last_key(), reach = next | Dealt::MASK;  // -0.0 lies one below 0.0 here
        return !overtaken(last) && reach + (reach < 0x80000000u) < last;
    }
};

// The same of a row of which each lane holds PerLane adjacent columns, surely. Whole: the row is as long as that.
template <int Lanes, int PerLane, bool Whole, bool Aligned>
__device__ __forceinline__ Winner select_adjacent(const score_t* source, int length, int lane) {
    float scores[PerLane];
    load_columns<score_t, PerLane, Whole, Aligned, ENDS_AT>(source, lane * PerLane, length, scores);
    unsigned keys[PerLane];
#pragma unroll
    for (int j = 0; j < PerLane; ++j) keys[j] = Whole || lane * PerLane + j < length ? order_key(scores[j]) : NO_KEY;
    // Of rows that were dealt few come here, which may take their time.
    return DEALT ? select_exactly<TOP_K, Lanes>(keys, lane) : select_topk<TOP_K, Lanes>(keys, lane);
}

// Rows that are not sure, each by the whole warp, one after the other.
__device__ __forceinline__ void select_again(unsigned unsure, const score_t* source, int length, Candidate& winner) {
    constexpr int COLUMNS = (LANES * PER_LANE + 127) / 128 * 4;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int turn = 0; turn < 32 / LANES; ++turn) {
        if (!any_of_turn<LANES>(unsure, turn)) continue;
        const int64_t its_source = __shfl_sync(FULL_WARP, reinterpret_cast<int64_t>(source), turn * LANES);
        const int its_length = __shfl_sync(FULL_WARP, length, turn * LANES);
        const Winner again =
            select_adjacent<32, COLUMNS, false, false>(reinterpret_cast<const score_t*>(its_source), its_length, lane);
        const unsigned key = __shfl_sync(FULL_WARP, again.key, lane % LANES);
        const int column = __shfl_sync(FULL_WARP, again.column, lane % LANES);
        if (lane / LANES == turn) winner = {key, column, key != NO_KEY ? to_float(source[column]) : 0.0f};
    }
}

extern "C" __global__ void __launch_bounds__(256)
    topk_select(const score_t* __restrict__ scores, const int* __restrict__ lengths, const int* __restrict__ starts,
                score_t* __restrict__ values, int* __restrict__ indices, long long num_rows, int num_columns, int k,
                long long scores_stride, long long values_stride, long long indices_stride) {
    if (WHOLE_ROWS) num_columns = LANES * PER_LANE;
    if (DENSE) {
        scores_stride = num_columns;
        values_stride = indices_stride = TOP_K;
    }
    constexpr int ROWS_PER_WARP = 32 / LANES;
    const int lane = threadIdx.x % LANES;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (warp * ROWS_PER_WARP >= num_rows) return;  // whole warps stay together
    const int64_t row = warp * ROWS_PER_WARP + threadIdx.x % 32 / LANES;
    const bool row_exists = row < num_rows;
    const int64_t read_row = min(row, num_rows - 1);  // in the place of a row that does not exist
    const Span span = row_span(HAS_LENGTHS ? lengths : nullptr, HAS_STARTS ? starts : nullptr, read_row, num_columns);
    const score_t* source = scores + read_row * scores_stride + span.start;
    Candidate winner;
    if (DEALT) {
        DealtTopK best(source, span.length, lane);
        const bool in_order = ROOM_FOR_COLUMN || best.in_order(lane), complete = best.complete();
        if (UNLIKELY(__any_sync(FULL_WARP, row_exists && !(in_order && complete)))) {
            if (!ROOM_FOR_COLUMN) best.sort(lane);
            const bool now_complete = best.complete();
            select_again(__ballot_sync(FULL_WARP, row_exists && !now_complete), source, span.length, best.own);
        }
        winner = best.own;
    } else {
        const Winner adjacent = select_adjacent<LANES, PER_LANE, WHOLE_ROWS, ALIGNED>(source, span.length, lane);
        winner = {adjacent.key, adjacent.column, 0.0f};
    }
    if (row_exists && lane < TOP_K) {
        const bool found = winner.key != NO_KEY;
        score_t* value = values + row * values_stride + lane;
        if (!found) {
            *value = minus_infinity<DTYPE>();
        } else if (DEALT && !ROOM_FOR_COLUMN) {
            store_float(value, winner.value);
        } else {
            *value = source[winner.column];
        }
        indices[row * indices_stride + lane] = found ? winner.column : -1;
    }
}
