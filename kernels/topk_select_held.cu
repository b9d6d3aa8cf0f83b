// SPDX-License-Identifier: Apache-2.0
// topk_select_many.cu for rows of which a multiprocessor holds several: a block copies its row to shared memory, and
// while it selects, other blocks wait for theirs. No sample is read. A threshold follows from the best scores of groups,
// and gives a list of scores (held_row.cuh). If that is too long, higher thresholds are tried by bisection, and ties at
// the last of them fill up the list. Histograms find the k-th best of the list (pivot.cuh). The k best are written in
// the order of the list, or sorted by score or column (list_sort.cuh).
#include "device/warp.cuh"
#include "long_rows/held_row.cuh"
#include "long_rows/list_sort.cuh"
#include "long_rows/pivot.cuh"
#include "long_rows/result.cuh"

SPECIALISED int DTYPE = 2;
SPECIALISED int BLOCK = 128;
SPECIALISED int BLOCKS = 5;  // on a multiprocessor
SPECIALISED int CAPACITY = 1024;
SPECIALISED int ROW_BYTES = 32768;  // at most
SPECIALISED bool SORTS = true;      // by score or by column
SPECIALISED bool SHORT = true;      // key and column of a score have 32 bits

typedef Scalar<DTYPE>::type score_t;
typedef RankOrder<DTYPE, SHORT> Order;
typedef Order::Rank Rank;
typedef HeldRow<DTYPE, BLOCK, ROW_BYTES, CAPACITY> Held;
typedef RankList<Rank, BLOCK, CAPACITY> List;
typedef ListSort<Rank, BLOCK, CAPACITY> Sort;

// The list, and where it is sorted, take the place of the row.
constexpr int RANKS_BYTES = sizeof(Rank) * CAPACITY;
constexpr int COLUMNS_AT = (max_int(ROW_BYTES + 16, SORTS ? RANKS_BYTES + Sort::BYTES : 0) + 15) / 16 * 16;
constexpr int SHARED_BYTES = COLUMNS_AT + 2 * CAPACITY;

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS)
    topk_select_held(const score_t* __restrict__ scores, const int* __restrict__ lengths,
                     const int* __restrict__ starts, const int* __restrict__ index_map, score_t* __restrict__ values,
                     int* __restrict__ indices, int by_column, int rows_ahead, long long first_row, int num_columns,
                     int k, int page_size, long long scores_stride, long long values_stride, long long indices_stride,
                     long long map_stride) {
#ifdef __CUDACC__
    extern __shared__ __align__(16) unsigned char shared[];
#else
    __shared__ __align__(16) unsigned char shared[SHARED_BYTES];
#endif
    __shared__ __align__(16) Pivot<Rank> pivots;
    __shared__ int sums[2][BLOCK / 32];

    const int64_t row = first_row + blockIdx.x;
    const RowRange range = row_range(lengths, starts, row, num_columns);
    const score_t* source = scores + row * scores_stride + range.start;
    const int* pages = index_map == nullptr ? nullptr : index_map + row * map_stride;
    const int first_page = 32 * static_cast<int>(threadIdx.x);  // in a line of the map
    if (pages != nullptr && first_page * static_cast<int64_t>(page_size) < range.length) {
        prefetch_line(pages + first_page);
    }
    const Held held = {Held::copy(Held::Source(source, range.length, 0, 1), shared),
                       reinterpret_cast<unsigned short*>(shared + COLUMNS_AT)};
    if (blockIdx.x + rows_ahead < gridDim.x) {
        const RowRange next = row_range(lengths, starts, row + rows_ahead, num_columns);
        const score_t* row_ahead = scores + (row + rows_ahead) * scores_stride + next.start;
        Held::prefetch(Held::Source(row_ahead, next.length, 0, 1));
    }

    const int wanted = min(k, range.length);
    const Order order(range.length);
    const bool selects = range.length > CAPACITY;  // else the list has all scores
    Threshold threshold = {NO_KEY, false};
    Extent keys = {~0u, 0u};  // bounds of those on the list
    for (int i = threadIdx.x; i < BINS; i += BLOCK) pivots.histograms[0][i] = 0;
    __syncthreads();
    if (selects) threshold = held.threshold(wanted, pivots.histograms, keys.high);

    int listed;  // scores above the threshold, and ties with it as far as they are needed
    Extent thresholds = {threshold.key, keys.high + Passes<DTYPE>::STEP};  // bounds of those to be tried after a list
#pragma unroll 1
    for (int lists = 0;; ++lists) {
        const int above = held.collect({threshold.key, threshold.tied}, sums[lists % 2]);
        listed = above;
        if (threshold.tied && above < wanted) {
            listed += collect_ties<1>(held.piece, threshold.key, held.columns + above, wanted - above,
                                      [](int column) { return static_cast<unsigned short>(column); });
            break;
        }
        if (above >= wanted && above <= CAPACITY) break;
        (above > CAPACITY ? thresholds.low : thresholds.high) = threshold.key;
        threshold.key = Held::between(thresholds);
        threshold.tied = threshold.key == thresholds.low;
    }
    pivots.clear<BLOCK>();
    __syncthreads();
    OwnRanks<Rank, Held::LISTED> ranks;
    held.take(listed, order, ranks.rank);
    if (!selects) {
#pragma unroll
        for (int j = 0; j < Held::LISTED; ++j) {
            if (ranks.rank[j] != 0)
                keys = {min(keys.low, order.key(ranks.rank[j])), max(keys.high, order.key(ranks.rank[j]))};
        }
        keys = block_extent<BLOCK>(keys);
    } else {
        keys.low = threshold.key;
    }
    const Rank high = order.lowest(keys.high) | order.last_column();
    Rank pivot = max(order.lowest(keys.low), static_cast<Rank>(1));  // no rank is 0
    if (listed > wanted) pivot = pivots.find<BLOCK>(ranks, wanted, pivot, high);

    values = values == nullptr ? nullptr : values + row * values_stride;
    indices += row * indices_stride;
    if (SORTS) {
        const List list = {reinterpret_cast<Rank*>(shared), nullptr};
        __syncthreads();  // all have their ranks, so that these may take the place of the row
#pragma unroll
        for (int j = 0; j < Held::LISTED; ++j) {
            const int i = j * BLOCK + static_cast<int>(threadIdx.x);
            if (i < listed) list.ranks[i] = ranks.rank[j];
        }
        __syncthreads();
        const bool by_score = by_column == 0;
        const Rank last = order.last_column();
        const Sort sort(shared + RANKS_BYTES, listed, wanted, pivot, by_score ? ~static_cast<Rank>(0) : last,
                        by_score ? pivot : last + 1 - range.length, by_score ? high : last);
        sort.sort(list, by_score, [&](int place, Rank rank) {
            const int column = order.column(rank);
            if (values != nullptr) store_value<DTYPE>(values + place, source, order.key(rank), column);
            held.columns[place] = column;
        });
    } else {
        // The best take the first places of the list.
        int best = 0;
#pragma unroll
        for (int j = 0; j < Held::LISTED; ++j) best += ranks.rank[j] >= pivot;
        int total;
        int place = block_prefix<BLOCK>(best, total);
#pragma unroll
        for (int j = 0; j < Held::LISTED; ++j) {
            if (ranks.rank[j] >= pivot) held.columns[place++] = order.column(ranks.rank[j]);
        }
    }
    __syncthreads();
    if (!SORTS && values != nullptr) {
        for (int i = threadIdx.x; i < wanted; i += BLOCK) values[i] = held.piece.row[held.columns[i]];
    }
    write_indices<BLOCK>(held.columns, wanted, ShortRowPages(pages, page_size), indices);
    for (int i = wanted + static_cast<int>(threadIdx.x); i < k; i += BLOCK) {
        if (values != nullptr) values[i] = minus_infinity<DTYPE>();
        indices[i] = -1;
    }
}
