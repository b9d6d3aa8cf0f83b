// SPDX-License-Identifier: Apache-2.0
// The k largest scores of each row, sorted, exact: descending, equal scores by lower column, NaN last, bit copies out.
//
// topk_select: LANES threads hold a row in registers, up to 1024 columns and 32 winners; lane r writes the r-th best.
// DEALT: they select on keys that are cut to hold their columns, several rows to a warp, and look again at the best.
// topk_select_wide (WIDE): one block per row for every other size. Four passes over the row find the key of the k-th
// best byte by byte from histograms; a pass in column order then copies what is above it and the first of what equals
// it to the outputs, which are sorted there (in shared memory up to SORT_CAPACITY entries, else in place).
#include "dealt.cuh"
#include "order.cuh"
#include "row.cuh"
#include "select.cuh"

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
#ifndef WIDE
#define WIDE 0
#endif

typedef Scalar<DTYPE>::type score_t;

// The part of a row that is ranked: `length` columns from `start` on, cut to what exists.
struct Span {
    int start;
    int length;
};

__device__ __forceinline__ Span row_span(const int* lengths, const int* starts, int64_t row, int num_columns) {
    const int start = starts != nullptr ? starts[row] : 0;
    if (start < 0 || start >= num_columns) return {0, 0};
    const int rest = num_columns - start;
    return {start, lengths != nullptr ? min(max(lengths[row], 0), rest) : rest};
}

__device__ __forceinline__ score_t minus_infinity() {
    union {
        unsigned bits;
        score_t value;
    };
    bits = DTYPE == 0 ? 0xff800000u : DTYPE == 1 ? 0xfc00u : 0xff80u;
    return value;
}

#if !WIDE

typedef Deal<score_t, LANES, PER_LANE> Dealt;

// Scores of 16 bits leave room for the column in their keys, so that nothing is cut and the best are known at once.
constexpr bool ROOM_FOR_COLUMN = sizeof(score_t) == 2;
constexpr int CANDIDATES = ROOM_FOR_COLUMN ? TOP_K : min_int(TOP_K + 1, LANES);

// The winner of rank `lane`, of a row whose `length` columns are dealt to LANES lanes. True if it is surely that.
__device__ __forceinline__ bool select_dealt(const score_t* source, int length, int lane, Winner& winner) {
    constexpr int HEADS = dealt_heads(TOP_K, LANES, PER_LANE);
    TaggedHeads<HEADS> heads;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) heads.key[h] = NO_KEY;
    float next[Dealt::Chunk];
    Dealt::load<WHOLE_ROWS, ALIGNED>(source, 0, lane, length, next);
#pragma unroll
    for (int begin = 0; begin < PER_LANE; begin += Dealt::Chunk) {
        unsigned keys[Dealt::Chunk];
#pragma unroll
        for (int j = 0; j < Dealt::Chunk; ++j) {
            const unsigned tag = Dealt::tag(begin, j);
            keys[j] = ROOM_FOR_COLUMN ? (max(order_key(next[j]), Dealt::MASK + 1) & ~Dealt::MASK) | tag
                                      : tagged_key_of_bits<Dealt::MASK>(__float_as_uint(next[j]), tag);
            if (!WHOLE_ROWS && Dealt::column_of(begin, j, lane) >= length) keys[j] = NO_KEY;
        }
        if (begin + Dealt::Chunk < PER_LANE)
            Dealt::load<WHOLE_ROWS, ALIGNED>(source, begin + Dealt::Chunk, lane, length, next);
#pragma unroll
        for (int j = 0; j < Dealt::Chunk; j += 4) heads.insert(keys[j], keys[j + 1], keys[j + 2], keys[j + 3]);
    }
    const Ranked best = rank_heads<CANDIDATES, Dealt>(heads, lane);
    Candidate own = {best.key & ~Dealt::MASK, Dealt::column_of(best.key), 0.0f};
    if (!ROOM_FOR_COLUMN) {
        const bool exists = lane < CANDIDATES && own.column < length;
        own.key = exists ? order_key(to_float(source[own.column])) : NO_KEY;
        if (UNLIKELY(__any_sync(FULL_WARP, !candidates_in_order<CANDIDATES, LANES>(own, lane))))
            sort_candidates<CANDIDATES, LANES>(own, lane);
    }
    winner = {own.key, own.column};
    if (ROOM_FOR_COLUMN) return best.next <= __shfl_sync(FULL_WARP, best.key, TOP_K - 1, LANES);
    const unsigned reach = best.next | Dealt::MASK;  // -0.0 lies one below 0.0 here
    return reach + (reach < 0x80000000u) < __shfl_sync(FULL_WARP, own.key, TOP_K - 1, LANES);
}

// The same of a row of which each lane holds PerLane adjacent columns, surely. Whole: the row is as long as that.
template <int Lanes, int PerLane, bool Whole, bool Aligned>
__device__ __forceinline__ Winner select_adjacent(const score_t* source, int length, int lane) {
    float scores[PerLane];
    load_columns<score_t, PerLane, Whole, Aligned>(source, lane * PerLane, length, scores);
    unsigned keys[PerLane];
#pragma unroll
    for (int j = 0; j < PerLane; ++j) keys[j] = Whole || lane * PerLane + j < length ? order_key(scores[j]) : NO_KEY;
    // Of rows that were dealt few come here, which may take their time.
    return DEALT ? select_exactly<TOP_K, Lanes>(keys, lane) : select_topk<TOP_K, Lanes>(keys, lane);
}

// Rows that are not sure, each by the whole warp, one after the other.
__device__ __forceinline__ void select_again(unsigned unsure, const score_t* source, int length, Winner& winner) {
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
        if (lane / LANES == turn) winner = {key, column};
    }
}

extern "C" __global__ void __launch_bounds__(256)
    topk_select(const score_t* __restrict__ scores, const int* __restrict__ lengths, const int* __restrict__ starts,
                score_t* __restrict__ values, int* __restrict__ indices, long long num_rows, int num_columns, int k,
                long long scores_stride, long long values_stride, long long indices_stride) {
    const int lane = threadIdx.x % LANES;
    constexpr int ROWS_PER_WARP = 32 / LANES;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
    int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;

    // Whole warps stay together.
    for (; warp * ROWS_PER_WARP < num_rows; warp += warps) {
        const int64_t row = warp * ROWS_PER_WARP + threadIdx.x % 32 / LANES;
        const bool row_exists = row < num_rows;
        const int64_t read_row = min(row, num_rows - 1);  // in the place of a row that does not exist
        const Span span = row_span(lengths, starts, read_row, num_columns);
        const score_t* source = scores + read_row * scores_stride + span.start;
        Winner winner = {NO_KEY, 0};
        if (DEALT) {
            const bool sure = select_dealt(source, span.length, lane, winner);
            const unsigned unsure = __ballot_sync(FULL_WARP, row_exists && !sure);
            if (UNLIKELY(unsure != 0)) select_again(unsure, source, span.length, winner);
        } else {
            winner = select_adjacent<LANES, PER_LANE, WHOLE_ROWS, ALIGNED>(source, span.length, lane);
        }
        if (row_exists && lane < TOP_K) {
            const bool found = winner.key != NO_KEY;
            values[row * values_stride + lane] = found ? source[winner.column] : minus_infinity();
            indices[row * indices_stride + lane] = found ? winner.column : -1;
        }
    }
}

#else

#define BLOCK 512
#define NUM_WARPS (BLOCK / 32)
#define RADIX 256
#define SORT_CAPACITY 4096

static_assert(BLOCK >= RADIX, "a thread for each bin");

struct Threshold {
    unsigned key;  // of the last entry that is taken
    int ties;      // how many entries with that key are taken, the first ones
};

// Exclusive sum over the block's threads of (a, b), and the totals. Every thread takes part.
__device__ __forceinline__ void block_scan(int a, int b, int& before_a, int& before_b, int& total_a, int& total_b) {
    __shared__ int sums[2][NUM_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum_a = a, sum_b = b;
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other_a = __shfl_up_sync(FULL_WARP, sum_a, distance);
        const int other_b = __shfl_up_sync(FULL_WARP, sum_b, distance);
        if (lane >= distance) {
            sum_a += other_a;
            sum_b += other_b;
        }
    }
    if (lane == 31) {
        sums[0][warp] = sum_a;
        sums[1][warp] = sum_b;
    }
    __syncthreads();
    before_a = sum_a - a;
    before_b = sum_b - b;
    total_a = total_b = 0;
    for (int w = 0; w < NUM_WARPS; ++w) {
        before_a += w < warp ? sums[0][w] : 0;
        before_b += w < warp ? sums[1][w] : 0;
        total_a += sums[0][w];
        total_b += sums[1][w];
    }
    __syncthreads();  // sums may be used again
}

// The key of the k-th best of `length` entries, k <= length: its bytes from the highest, each from a histogram of the
// entries that share the bytes above.
__device__ __forceinline__ Threshold find_threshold(const score_t* source, int length, int k) {
    __shared__ int histogram[RADIX];
    __shared__ unsigned chosen_bin;
    __shared__ int chosen_rest;
    unsigned prefix = 0;
    int rest = k;  // entries still to be taken from those that share the prefix
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < RADIX) histogram[threadIdx.x] = 0;
        __syncthreads();
        for (unsigned c = threadIdx.x; c < length; c += BLOCK) {
            const unsigned key = order_key(to_float(source[c]));
            const bool shares = shift == 24 || (key ^ prefix) >> (shift + 8) % 32 == 0;
            if (shares) atomicAdd(&histogram[key >> shift & (RADIX - 1)], 1);
        }
        __syncthreads();
        // Thread t looks at bin 255 - t: entries in better bins come first.
        const unsigned bin = RADIX - 1 - threadIdx.x;
        const int count = threadIdx.x < RADIX ? histogram[bin % RADIX] : 0;
        int better, unused, total, unused_total;
        block_scan(count, 0, better, unused, total, unused_total);
        if (threadIdx.x < RADIX && better < rest && rest <= better + count) {
            chosen_bin = bin;
            chosen_rest = rest - better;
        }
        __syncthreads();
        prefix |= chosen_bin << shift;
        rest = chosen_rest;
    }
    return {prefix, rest};
}

// Whether entry a stands behind entry b, of outputs that are being sorted.
__device__ __forceinline__ bool behind(const score_t* values, const int* indices, int a, int b) {
    return rank_key(order_key(to_float(values[a])), indices[a]) < rank_key(order_key(to_float(values[b])), indices[b]);
}

// Bitonic sort of any number of entries, best first. The first step of each merge compares mirror images and the others
// neighbours at a distance, always the better one forward; so entries beyond the end would never move and are left out.
template <typename Behind, typename Swap>
__device__ __forceinline__ void block_sort(int count, Behind is_behind, Swap swap) {
    for (int level = 0; count > 1 && 1ll << level < count; ++level) {
        for (int bit = level; bit >= 0; --bit) {
            const int64_t distance = 1ll << bit;
            for (int64_t pair = threadIdx.x;; pair += BLOCK) {
                const int64_t low = pair >> bit << (bit + 1) | (pair & (distance - 1));
                if (low >= count) break;
                const int64_t high = bit == level ? low ^ (2 * distance - 1) : low + distance;
                if (high < count && is_behind(low, high)) swap(low, high);
            }
            __syncthreads();
        }
    }
}

__device__ __forceinline__ void sort_outputs(score_t* values, int* indices, const score_t* source, int count) {
    if (count <= SORT_CAPACITY) {
        __shared__ unsigned long long ranks[SORT_CAPACITY];
        for (int i = threadIdx.x; i < count; i += BLOCK) {
            ranks[i] = rank_key(order_key(to_float(values[i])), indices[i]);
        }
        __syncthreads();
        block_sort(
            count, [&](int a, int b) { return ranks[a] < ranks[b]; },
            [&](int a, int b) {
                const unsigned long long rank = ranks[a];
                ranks[a] = ranks[b];
                ranks[b] = rank;
            });
        for (int i = threadIdx.x; i < count; i += BLOCK) {
            const unsigned column = column_of(ranks[i]);
            values[i] = source[column];
            indices[i] = column;
        }
        __syncthreads();  // ranks may be used again
    } else {
        block_sort(
            count, [&](int a, int b) { return behind(values, indices, a, b); },
            [&](int a, int b) {
                const score_t value = values[a];
                const int index = indices[a];
                values[a] = values[b];
                indices[a] = indices[b];
                values[b] = value;
                indices[b] = index;
            });
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    topk_select_wide(const score_t* __restrict__ scores, const int* __restrict__ lengths,
                     const int* __restrict__ starts, score_t* values, int* indices, long long num_rows, int num_columns,
                     int k, long long scores_stride, long long values_stride, long long indices_stride) {
    for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
        const Span span = row_span(lengths, starts, row, num_columns);
        const score_t* source = scores + row * scores_stride + span.start;
        score_t* row_values = values + row * values_stride;
        int* row_indices = indices + row * indices_stride;

        const int count = min(k, span.length);
        Threshold threshold = {NO_KEY, 0};  // all keys are above: everything is taken
        if (count < span.length) threshold = find_threshold(source, span.length, count);
        const int above = count - threshold.ties;

        int taken_above = 0, taken_ties = 0;
        for (unsigned begin = 0; begin < span.length && taken_above + taken_ties < count; begin += BLOCK) {
            const unsigned column = begin + threadIdx.x;
            const unsigned key = column < span.length ? order_key(to_float(source[column])) : NO_KEY;
            const bool is_above = key > threshold.key, is_tie = key == threshold.key && key != NO_KEY;
            int before_above, before_ties, more_above, more_ties;
            block_scan(is_above, is_tie, before_above, before_ties, more_above, more_ties);
            const int tie = taken_ties + before_ties;
            const int place = is_above ? taken_above + before_above : above + tie;
            if (is_above || (is_tie && tie < threshold.ties)) {
                row_values[place] = source[column];
                row_indices[place] = column;
            }
            taken_above += more_above;
            taken_ties = min(taken_ties + more_ties, threshold.ties);
        }
        for (int i = count + threadIdx.x; i < k; i += BLOCK) {
            row_values[i] = minus_infinity();
            row_indices[i] = -1;
        }
        __syncthreads();
        sort_outputs(row_values, row_indices, source, count);
    }
}

#endif
