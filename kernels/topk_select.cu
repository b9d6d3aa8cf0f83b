// SPDX-License-Identifier: Apache-2.0
// The k largest scores of each row, exact: by default descending, equal scores by lower column, NaN last. Values are
// copied bit by bit.
//
// LANES threads hold a row in registers, up to 1024 columns and 32 winners. For longer rows and larger k see
// topk_select_long.cu and topk_select_large.cu. Three ways:
// - a lane holds adjacent columns (select/warp_topk.cuh).
// - INTERLEAVED: keys hold the column, and lose low bits of float32 scores for it. Several rows share a warp, and the
//   exact values of the best are compared. Keys of 16-bit scores lose nothing.
// - BY_THRESHOLD, for 16-bit scores of interleaved rows that share a warp: select/threshold_topk.cuh.
#include "select/threshold_topk.cuh"
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
SPECIALISED bool BY_THRESHOLD = false;
SPECIALISED int MIN_BLOCKS = 0;          // on a multiprocessor
SPECIALISED bool ROW_PER_BLOCK = false;  // of one warp
SPECIALISED bool HAS_LENGTHS = false;
SPECIALISED bool HAS_STARTS = false;
SPECIALISED bool HAS_VALUES = true;
SPECIALISED bool HAS_MAP = false;    // of indices
SPECIALISED bool BY_COLUMN = false;  // winners come by ascending column

typedef Scalar<DTYPE>::type score_t;

typedef InterleavedRow<score_t, LANES, PER_LANE> Interleaved;

constexpr int MOST_THREADS = 256;  // of a block
constexpr bool IS_16_BIT = DTYPE != 0;
constexpr bool MAY_BE_SHORT = HAS_LENGTHS || HAS_STARTS;  // rows may have fewer columns than there are results
static_assert(!BY_THRESHOLD || (INTERLEAVED && IS_16_BIT), "two scores are compared at once");

// The winners of a row whose `length` columns are interleaved over LANES lanes, by keys that hold the column.
template <typename T>
struct InterleavedTopK : Candidates<TOP_K, LANES> {
    typedef Candidates<TOP_K, LANES> Base;
    // Lanes that keep as many keys as there are winners cannot run out.
    static constexpr int ALL_HEADS = min_int(TOP_K, PER_LANE);
    static constexpr bool KEEPS_ALL = IS_16_BIT && ALL_HEADS <= 8;
    static constexpr int HEADS = KEEPS_ALL ? ALL_HEADS : interleaved_heads(TOP_K, LANES, PER_LANE);

    unsigned next;  // all other keys are at most this

    __device__ __forceinline__ InterleavedTopK(const T* source, int length, int lane) {
        TaggedHeads<HEADS> heads;
#pragma unroll
        for (int h = 0; h < HEADS; ++h) heads.key[h] = NO_KEY;
        if constexpr (IS_16_BIT) {
            PackedRow<T, Interleaved> row;
            row.template load<WHOLE_ROWS, ALIGNED, ENDS_AT>(source, lane, length);
            row.template insert_into<DTYPE, WHOLE_ROWS>(heads, lane, length);
            const Ranked best = rank_heads<TOP_K, Interleaved>(heads, lane);
            next = best.next;
            this->own.key = best.key > Interleaved::MASK ? key_of_order(best.key >> 16) : NO_KEY;
            this->own.column = Interleaved::column_of(best.key);
            if (!KEEPS_ALL && next > __shfl_sync(FULL_WARP, best.key, TOP_K - 1, LANES)) next = ~0u;
        } else {
            insert_float32(heads, source, length, lane);
            const Ranked best = rank_heads<TOP_K + 1, Interleaved>(heads, lane);
            next = best.next;
            this->own = exactly(source, length, best.key, lane < Base::COUNT);
            this->extra = exactly(source, length, best.last, Base::FULL);
        }
    }

    // Two chunks of a lane's columns are in flight at a time.
    static __device__ __forceinline__ void insert_float32(TaggedHeads<HEADS>& heads, const T* source, int length,
                                                          int lane) {
        float scores[Interleaved::Chunk];
        Interleaved::load<WHOLE_ROWS, ALIGNED, ENDS_AT>(source, 0, lane, length, scores);
#pragma unroll
        for (int begin = 0; begin < PER_LANE; begin += Interleaved::Chunk) {
            unsigned keys[Interleaved::Chunk];
#pragma unroll
            for (int j = 0; j < Interleaved::Chunk; ++j) {
                keys[j] =
                    tagged_key_of_bits<Interleaved::MASK>(__float_as_uint(scores[j]), Interleaved::tag(begin + j));
                if (!WHOLE_ROWS && Interleaved::column_of(begin + j, lane) >= length) keys[j] = NO_KEY;
            }
            if (begin + Interleaved::Chunk < PER_LANE)
                Interleaved::load<WHOLE_ROWS, ALIGNED, ENDS_AT>(source, begin + Interleaved::Chunk, lane, length,
                                                                scores);
#pragma unroll
            for (int j = 0; j < Interleaved::Chunk; j += 4)
                heads.insert(keys[j], keys[j + 1], keys[j + 2], keys[j + 3]);
        }
    }

    // Return the score of a key with its exact key, if it is wanted and exists.
    static __device__ __forceinline__ Candidate exactly(const T* source, int length, unsigned key, bool wanted) {
        Candidate candidate = {NO_KEY, Interleaved::column_of(key), 0.0f};
        if (wanted && candidate.column < length) {
            candidate.value = to_float(source[candidate.column]);
            candidate.key = order_key(candidate.value);
        }
        return candidate;
    }

    // For sorted candidates: return whether they begin with the winners.
    __device__ __forceinline__ bool complete() const {
        if (IS_16_BIT) return next != ~0u;
        const unsigned last = this->last_key(),
                       reach = next | Interleaved::MASK;  // -0.0 is one below 0.0 in these keys
        return !this->overtaken(last) && reach + (reach < 0x80000000u) < last;
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
        if (lane / LANES != turn) continue;
        winner = {NO_KEY, column, 0.0f};
        if (key == NO_KEY) continue;
        winner.key = bits_key<DTYPE>(score_bits(source[column]));
        winner.value = to_float(source[column]);
    }
}

// Where the results of a row go.
struct RowResults {
    const score_t* source;
    score_t* values;
    int* indices;
    const int* pages;
    int page_size;

    // Write an entry, or what fills a place that has none.
    __device__ __forceinline__ void put(int place, bool exists, int column, unsigned bits) const {
        if (HAS_VALUES) store_bits(values + place, exists ? bits : 0x80000000u | infinity_bits<DTYPE>());
        if (HAS_MAP && exists) column = pages[column / page_size] * page_size + column % page_size;
        indices[place] = exists ? column : -1;
    }

    // Write the winner of rank r that lane r has. All lanes of the warp take part; those of no row do not write.
    __device__ __forceinline__ void put_ranked(const Candidate& winner, int lane, bool row_exists) const {
        const bool exists = !MAY_BE_SHORT || winner.key != NO_KEY;
        int place = lane;
        if (BY_COLUMN) {
            int before = 0;
#pragma unroll
            for (int r = 0; r < TOP_K; ++r) {
                const int other = __shfl_sync(FULL_WARP, exists ? winner.column : 0x7fffffff, r, LANES);
                before += other < winner.column;
            }
            place = exists ? before : lane;
        }
        if (row_exists && lane < TOP_K) put(place, exists, winner.column, exists && HAS_VALUES ? bits_of(winner) : 0u);
    }

    __device__ __forceinline__ unsigned bits_of(const Candidate& winner) const {
        if (INTERLEAVED && !IS_16_BIT) return __float_as_uint(winner.value);
        return INTERLEAVED && key_tells_bits(winner.key) ? key_bits(winner.key) : score_bits(source[winner.column]);
    }
};

// Select from a row that the threads around this one share, of which this is lane `lane`. All rows of a warp take part.
template <typename T>
__device__ __forceinline__ void select_row(const T* source, int length, int lane, bool row_exists,
                                           const RowResults& results) {
    if constexpr (BY_THRESHOLD) {
        source = computed_now(source);
        typedef ThresholdTopK<T, DTYPE, TOP_K, Interleaved> Selected;
        __shared__ unsigned short slots[MOST_THREADS / LANES][Selected::SLOTS];
        typename Selected::Row row;
        row.template load<WHOLE_ROWS, ALIGNED, ENDS_AT>(source, lane, length);
        Selected best(source, row, lane, slots[threadIdx.x / LANES]);
        if (BY_COLUMN) best.rank_by_column();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (row_exists && best.complete && best.rank[i] < TOP_K)
                results.put(best.rank[i], true, best.column[i], score_bits(best.score[i]));
        }
        const unsigned unsure = __ballot_sync(FULL_WARP, row_exists && !best.complete);
        if (UNLIKELY(unsure != 0u)) {
            Candidate winner = {NO_KEY, 0, 0.0f};
            select_again(unsure, source, length, winner);
            results.put_ranked(winner, lane, row_exists && !best.complete);
        }
    } else if constexpr (INTERLEAVED) {
        InterleavedTopK<T> best(source, length, lane);
        const bool in_order = IS_16_BIT || best.in_order(lane), complete = best.complete();
        if (!best.KEEPS_ALL && UNLIKELY(__any_sync(FULL_WARP, row_exists && !(in_order && complete)))) {
            if (!IS_16_BIT) best.sort(lane);
            const bool now_complete = best.complete();
            select_again(__ballot_sync(FULL_WARP, row_exists && !now_complete), source, length, best.own);
        }
        results.put_ranked(best.own, lane, row_exists);
    } else {
        const Winner winner = select_adjacent<LANES, PER_LANE, WHOLE_ROWS, ALIGNED>(source, length, lane);
        results.put_ranked({winner.key, winner.column, 0.0f}, lane, row_exists);
    }
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, MIN_BLOCKS)
    topk_select(const score_t* __restrict__ scores, const int* __restrict__ lengths, const int* __restrict__ starts,
                const int* __restrict__ index_map, score_t* __restrict__ values, int* __restrict__ indices,
                long long num_rows, int num_columns, int k, int page_size, long long scores_stride,
                long long values_stride, long long indices_stride, long long map_stride) {
    if (WHOLE_ROWS) num_columns = LANES * PER_LANE;
    if (DENSE) {
        scores_stride = num_columns;
        values_stride = indices_stride = TOP_K;
    }
    constexpr int ROWS_PER_WARP = 32 / LANES;
    const int lane = threadIdx.x % LANES;
    const int64_t warp =
        ROW_PER_BLOCK ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (!ROW_PER_BLOCK && warp * ROWS_PER_WARP >= num_rows) return;  // whole warps stay together
    const int64_t row = warp * ROWS_PER_WARP + threadIdx.x % 32 / LANES;
    const bool row_exists = ROWS_PER_WARP == 1 || row < num_rows;
    const int64_t read_row = row_exists ? row : num_rows - 1;
    const RowRange range =
        row_range(HAS_LENGTHS ? lengths : nullptr, HAS_STARTS ? starts : nullptr, read_row, num_columns);
    const score_t* source = scores + read_row * scores_stride + range.start;
    const RowResults results = {source, values + row * values_stride, indices + row * indices_stride,
                                index_map + row * map_stride, page_size};
    select_row(source, range.length, lane, row_exists, results);
}
