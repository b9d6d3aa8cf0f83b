// SPDX-License-Identifier: Apache-2.0
// The k largest scores of each row, exact and sorted: descending, equal scores by lower column, NaN last. Values are
// copied bit by bit.
//
// LANES threads hold a row in registers, up to 1024 columns and 32 winners; lane r writes the one of rank r. For longer
// rows and larger k see topk_select_long.cu and topk_select_large.cu. INTERLEAVED: they select by keys that lose low
// bits to hold the column, several rows to a warp, and then compare the exact values of the best.
#include "select/row_interleaved.cuh"
#include "select/order_key.cuh"
#include "device/row_load.cuh"
#include "select/warp_topk.cuh"
#include "select/row_range.cuh"

SPECIALISED int DTYPE = 0;
SPECIALISED int TOP_K = 6;
SPECIALISED int LANES = 32;
SPECIALISED int PER_LANE = 8;
SPECIALISED bool WHOLE_ROWS = true;
SPECIALISED bool ALIGNED = true;
SPECIALISED int ENDS_AT = 1;     // divides the lengths of rows
SPECIALISED bool DENSE = false;  // rows of scores and results follow each other
SPECIALISED bool HAS_LENGTHS = false;
SPECIALISED bool HAS_STARTS = false;

typedef Scalar<DTYPE>::type score_t;

typedef InterleavedRow<score_t, LANES, PER_LANE> Interleaved;

// Keys of 16-bit scores have bits left for the column: they lose nothing, and the best are known at once.
constexpr bool KEY_HOLDS_COLUMN = sizeof(score_t) == 2;
// The winners of a row whose `length` columns are interleaved over LANES lanes.
struct InterleavedTopK : Candidates<TOP_K, LANES> {
    unsigned next;  // all other keys are at most this

    __device__ __forceinline__ InterleavedTopK(const score_t* source, int length, int lane) {
        constexpr int HEADS = interleaved_heads(TOP_K, LANES, PER_LANE);
        TaggedHeads<HEADS> heads;
#pragma unroll
        for (int h = 0; h < HEADS; ++h) heads.key[h] = NO_KEY;
        float scores[Interleaved::Chunk];
        Interleaved::load<WHOLE_ROWS, ALIGNED, ENDS_AT>(source, 0, lane, length, scores);
#pragma unroll
        for (int begin = 0; begin < PER_LANE; begin += Interleaved::Chunk) {
            unsigned keys[Interleaved::Chunk];
#pragma unroll
            for (int j = 0; j < Interleaved::Chunk; ++j) {
                const unsigned tag = Interleaved::tag(begin + j);
                keys[j] = KEY_HOLDS_COLUMN
                              ? (max(order_key(scores[j]), Interleaved::MASK + 1) & ~Interleaved::MASK) | tag
                              : tagged_key_of_bits<Interleaved::MASK>(__float_as_uint(scores[j]), tag);
                if (!WHOLE_ROWS && Interleaved::column_of(begin + j, lane) >= length) keys[j] = NO_KEY;
            }
            if (begin + Interleaved::Chunk < PER_LANE)
                Interleaved::load<WHOLE_ROWS, ALIGNED, ENDS_AT>(source, begin + Interleaved::Chunk, lane, length,
                                                                scores);
#pragma unroll
            for (int j = 0; j < Interleaved::Chunk; j += 4)
                heads.insert(keys[j], keys[j + 1], keys[j + 2], keys[j + 3]);
        }
        const Ranked best = rank_heads<KEY_HOLDS_COLUMN ? TOP_K : TOP_K + 1, Interleaved>(heads, lane);
        next = best.next;
        if (KEY_HOLDS_COLUMN) {
            own = {best.key & ~Interleaved::MASK, Interleaved::column_of(best.key), 0.0f};
            if (next > __shfl_sync(FULL_WARP, best.key, TOP_K - 1, LANES)) next = ~0u;
        } else {
            own = exactly(source, length, best.key, lane < COUNT);
            extra = exactly(source, length, best.last, FULL);
        }
    }

    // Return the score of a key with its exact key, if it is wanted and exists.
    static __device__ __forceinline__ Candidate exactly(const score_t* source, int length, unsigned key, bool wanted) {
        Candidate candidate = {NO_KEY, Interleaved::column_of(key), 0.0f};
        if (wanted && candidate.column < length) {
            candidate.value = to_float(source[candidate.column]);
            candidate.key = order_key(candidate.value);
        }
        return candidate;
    }

    // For sorted candidates: return whether they begin with the winners.
    __device__ __forceinline__ bool complete() const {
        if (KEY_HOLDS_COLUMN) return next != ~0u;
        const unsigned last = last_key(), reach = next | Interleaved::MASK;  // -0.0 is one below 0.0 in these keys
        return !overtaken(last) && reach + (reach < 0x80000000u) < last;
    }
};

// Select from a row of which each lane holds PerLane adjacent columns, exactly. Whole: the row has that many columns.
template <int Lanes, int PerLane, bool Whole, bool Aligned>
__device__ __forceinline__ Winner select_adjacent(const score_t* source, int length, int lane) {
    float scores[PerLane];
    load_columns<score_t, PerLane, Whole, Aligned, ENDS_AT>(source, lane * PerLane, length, scores);
    unsigned keys[PerLane];
#pragma unroll
    for (int j = 0; j < PerLane; ++j) keys[j] = Whole || lane * PerLane + j < length ? order_key(scores[j]) : NO_KEY;
    // Few interleaved rows come here, so this may be slow.
    return INTERLEAVED ? select_exactly<TOP_K, Lanes>(keys, lane) : select_topk<TOP_K, Lanes>(keys, lane);
}

// Select again from rows that are not certain: one after the other, by the whole warp.
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
    const int64_t read_row = min(row, num_rows - 1);  // for a row that does not exist, the last one
    const RowRange range =
        row_range(HAS_LENGTHS ? lengths : nullptr, HAS_STARTS ? starts : nullptr, read_row, num_columns);
    const score_t* source = scores + read_row * scores_stride + range.start;
    Candidate winner;
    if (INTERLEAVED) {
        InterleavedTopK best(source, range.length, lane);
        const bool in_order = KEY_HOLDS_COLUMN || best.in_order(lane), complete = best.complete();
        if (UNLIKELY(__any_sync(FULL_WARP, row_exists && !(in_order && complete)))) {
            if (!KEY_HOLDS_COLUMN) best.sort(lane);
            const bool now_complete = best.complete();
            select_again(__ballot_sync(FULL_WARP, row_exists && !now_complete), source, range.length, best.own);
        }
        winner = best.own;
    } else {
        const Winner adjacent = select_adjacent<LANES, PER_LANE, WHOLE_ROWS, ALIGNED>(source, range.length, lane);
        winner = {adjacent.key, adjacent.column, 0.0f};
    }
    if (row_exists && lane < TOP_K) {
        const bool found = winner.key != NO_KEY;
        score_t* value = values + row * values_stride + lane;
        if (!found) {
            *value = minus_infinity<DTYPE>();
        } else if (INTERLEAVED && !KEY_HOLDS_COLUMN) {
            store_float(value, winner.value);
        } else {
            *value = source[winner.column];
        }
        indices[row * indices_stride + lane] = found ? winner.column : -1;
    }
}
