// SPDX-License-Identifier: Apache-2.0
// The k largest scores of long rows, exact: descending, equal scores by lower column, NaN last. Values are copied bit
// by bit.
//
// A sample of the row gives a threshold that at least k scores reach, and few more than twice as many (sample.cuh). One
// read of the row lists those (stream.cuh), in any order; the list is sorted (block_sort.cuh) and its first k entries
// are written. If too many scores tie at the threshold, the list has those above it, then ties in the order of columns.
// The number of scores is checked: if it is wrong, it says which other threshold of the sample is better, by which the
// row is read again, and at last by the exact key of the k-th best (radix.cuh). So samples decide how long a row takes,
// never the result. Rows of up to CAPACITY scores go on the list as they are.
//
// SPLIT false: a block for each row. While it sorts, it prefetches the start of the row `rows_ahead` of it, whose block
// is among the next to start.
// SPLIT true, for few rows: a row is cut into `pieces`, a block for each, with lists in global memory. The last block
// to arrive (last_block.cuh) does the rest.
#include "long_rows/block_sort.cuh"
#include "device/last_block.cuh"
#include "long_rows/radix.cuh"
#include "long_rows/result.cuh"
#include "long_rows/sample.cuh"
#include "long_rows/stream.cuh"
#include "select/row_range.cuh"

SPECIALISED int DTYPE = 0;
SPECIALISED int BLOCK = 512;
SPECIALISED int BLOCKS = 2;  // on a multiprocessor
SPECIALISED int CAPACITY = 2048;
SPECIALISED int VECTORS = 1;  // that a thread reads of the sample
SPECIALISED int LOADS = 4;
SPECIALISED bool SPLIT = false;
SPECIALISED bool FITS = false;  // no row has more than CAPACITY scores

typedef Scalar<DTYPE>::type score_t;
typedef RowPiece<DTYPE, BLOCK, LOADS> Piece;
typedef RowSample<Piece, DTYPE, BLOCK, VECTORS> Sample;
typedef BlockSort<BLOCK, CAPACITY> Sort;
typedef unsigned long long Entry;

constexpr int SHARED_BYTES = 8 * CAPACITY + 4 * Sort::NUM_SLOTS;

static_assert(!FITS || !SPLIT, "a row that fits is not split");
static_assert(Sort::NUM_SLOTS >= BINS, "slots are also the bins of radix_threshold");

// The contents of a list: scores above the threshold, then ties with it in the order of columns.
struct Found {
    int above;
    int ties;
};

// Concatenate the lists of all pieces of a row, at most 32, in `entries`. Return false if they do not fit or have too
// few entries.
__device__ __forceinline__ bool gather(const Found* found, const Entry* lists, int pieces, int capacity, int wanted,
                                       Entry* entries, Found& all) {
    // Every warp adds up by itself, with a piece per lane.
    const int lane = threadIdx.x % 32;
    const bool exists = lane < pieces;
    const int above = exists ? __ldcg(&found[lane].above) : 0, ties = exists ? __ldcg(&found[lane].ties) : 0;
    const int above_end = warp_prefix(above), ties_end = warp_prefix(ties);
    all = {__shfl_sync(FULL_WARP, above_end, 31), __shfl_sync(FULL_WARP, ties_end, 31)};
    const bool too_long = __any_sync(FULL_WARP, above > capacity) || all.above > CAPACITY;
    if (too_long || all.above + all.ties < wanted) return false;

    // Each piece gets the same number of threads.
    const int threads = BLOCK / pieces, piece = threadIdx.x / threads, first = threadIdx.x % threads;
    const int source = piece % 32;
    const int count = __shfl_sync(FULL_WARP, above, source), at = __shfl_sync(FULL_WARP, above_end, source) - count;
    const int tie_count = __shfl_sync(FULL_WARP, ties, source);
    const int ties_at = all.above + __shfl_sync(FULL_WARP, ties_end, source) - tie_count;
    if (piece < pieces) {
        const Entry* list = lists + static_cast<int64_t>(piece) * capacity;
#pragma unroll 4
        for (int i = first; i < count; i += threads) entries[at + i] = __ldcg(list + i);
#pragma unroll 4
        for (int i = first; i < min(tie_count, wanted - ties_at); i += threads) {
            entries[ties_at + i] = __ldcg(list + count + i);
        }
    }
    __syncthreads();
    return true;
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS)
    topk_select_long(const score_t* __restrict__ scores, const int* __restrict__ lengths,
                     const int* __restrict__ starts, const int* __restrict__ index_map, score_t* __restrict__ values,
                     int* __restrict__ indices, unsigned* counters, int* piece_counts, long long* lists, int pieces,
                     int list_capacity, int rows_ahead, long long first_row, int sorted, int num_columns, int k,
                     int page_size, long long scores_stride, long long values_stride, long long indices_stride,
                     long long map_stride) {
#ifdef __CUDACC__
    extern __shared__ __align__(16) unsigned char shared[];
#else
    __shared__ __align__(16) unsigned char shared[SHARED_BYTES];
#endif
    Entry* entries = reinterpret_cast<Entry*>(shared);
    int* slots = reinterpret_cast<int*>(shared + 8 * CAPACITY);
    __shared__ int count;

    const int64_t row = first_row + (SPLIT ? blockIdx.x / pieces : blockIdx.x);
    const int number = SPLIT ? blockIdx.x % pieces : 0;
    const RowRange range = row_range(lengths, starts, row, num_columns);
    const score_t* source = scores + row * scores_stride + range.start;
    const int wanted = min(k, range.length);

    Piece piece(source, range.length, number, SPLIT ? pieces : 1);
    Piece::Chunk chunk;
    Sample sample;
    if (!FITS && range.length > CAPACITY) sample.load(piece);
    piece.load_first(chunk);
    if (threadIdx.x == 0) count = 0;
    if (threadIdx.x < 33) slots[threadIdx.x] = 0;
    __syncthreads();
    Threshold threshold = {NO_KEY, false};
    int target = Sample::target(wanted, range.length);
    if (!FITS && range.length > CAPACITY) {
        threshold = sample.threshold(target, Sample::most(CAPACITY, range.length), slots);
    }

    bool split = SPLIT;  // the list is that of a piece
    Found found;
#pragma unroll 1
    for (int reads = 1;; ++reads) {
        Entry* list =
            split ? reinterpret_cast<Entry*>(lists) + static_cast<int64_t>(blockIdx.x) * list_capacity : entries;
        const int capacity = split ? list_capacity : CAPACITY;
        piece.collect(chunk, {threshold.key, threshold.tied}, list, capacity, &count);
        __syncthreads();
        found = {count, 0};
        if (FITS) break;
        if (threshold.tied && found.above < wanted) {
            const Piece ties(source, range.length, split ? number : 0, split ? pieces : 1);
            found.ties = collect_ties<2>(ties, threshold.key, list + found.above, min(wanted, capacity) - found.above,
                                         [&](int column) { return rank_key(threshold.key, column); });
        }
        if (split) {
            Found* row_found = reinterpret_cast<Found*>(piece_counts) + row * pieces;
            if (threadIdx.x == 0) row_found[number] = found;
            if (!is_last_block(&counters[row], pieces)) break;
            const Entry* row_lists = reinterpret_cast<Entry*>(lists) + row * pieces * list_capacity;
            split = false;  // from here on as if it had not been
            if (gather(row_found, row_lists, pieces, list_capacity, wanted, entries, found)) break;
        } else if (found.above <= CAPACITY && found.above + found.ties >= wanted) {
            break;
        }
        __syncthreads();
        if (threadIdx.x == 0) count = 0;
        if (threadIdx.x < 33) slots[threadIdx.x] = 0;
        __syncthreads();
        if (SPLIT) piece = Piece(source, range.length, 0, 1);
        const int better = Sample::better_target(target, found.above, wanted, CAPACITY, range.length);
        if (reads < SAMPLED_READS && better != target) {
            target = better;
            // Read the range again: values that both samples need would stay in registers, of which there are not
            // enough.
            const RowRange again = row_range(lengths, starts, row, num_columns);
            sample.load(Piece(source, again.length, 0, 1));
            threshold = sample.threshold(target, Sample::most(CAPACITY, again.length), slots);
        } else {
            threshold = {radix_threshold<DTYPE, BLOCK>(source, range.length, wanted, slots).key, true};
        }
        piece.load_first(chunk);
    }
    if (split) return;  // another block does the rest

    if (!SPLIT && blockIdx.x + rows_ahead < gridDim.x) {
        const RowRange next = row_range(lengths, starts, row + rows_ahead, num_columns);
        const Piece row_ahead(scores + (row + rows_ahead) * scores_stride + next.start, next.length, 0, 1);
        if (!FITS && next.length > CAPACITY) Sample::prefetch(row_ahead);
        row_ahead.prefetch_first();
    }

    const int column_shift = max(16 - __clz(range.length), 0);
    // Sort by key; if the result is not to be sorted, then sort the best by column.
    __syncthreads();
#pragma unroll 1
    for (int pass = sorted; pass < 2; ++pass) {
        const bool by_key = pass == sorted;
        Sort::sort(entries, by_key ? found.above : wanted, wanted, slots, range.length, [&](Entry entry) {
            const unsigned upper = static_cast<unsigned>(entry >> 32), lower = static_cast<unsigned>(entry);
            if (!by_key) return entry << 32 | upper;
            // The low half of a 16-bit score's key is free: it holds the high bits of the column, which spread ties
            // over slots.
            const unsigned tie_breaker = DTYPE == 0 ? 0u : 0xffffu - (lower >> column_shift);
            return rank_key(bits_key<DTYPE>(upper) | tie_breaker, lower);
        });
    }
    for (int i = threadIdx.x; i < k; i += BLOCK) {
        const Entry entry = i < wanted ? entries[i] : 0;
        const Entry rank = sorted ? entry : entry << 32 | entry >> 32;
        const unsigned key = static_cast<unsigned>(rank >> 32) & (DTYPE == 0 ? ~0u : 0xffff0000u);
        const int column = i < wanted ? static_cast<int>(column_of(rank)) : -1;
        if (values != nullptr) store_value<DTYPE>(values + row * values_stride + i, source, key, column);
        indices[row * indices_stride + i] = mapped_index(index_map, row * map_stride, column, page_size);
    }
}
