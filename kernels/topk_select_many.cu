// SPDX-License-Identifier: Apache-2.0
// topk_select_long.cu for more rows than multiprocessors: several small blocks on each multiprocessor, so that some read
// while others select. A block has a row.
//
// As there, a sampled threshold (sample.cuh) and one read of the row give a list of scores, at least k and few more than
// twice as many. Here its order does not depend on the run (rank_list.cuh). Histograms find the k-th best of the list
// (pivot.cuh). The k best are written in the order of the list, or sorted by score or column (list_sort.cuh). While a
// block selects, it prefetches the start of the row `rows_ahead` of its own, whose block is among the next to start.
#include "long_rows/list_sort.cuh"
#include "long_rows/pivot.cuh"
#include "long_rows/radix.cuh"
#include "long_rows/rank_list.cuh"
#include "long_rows/result.cuh"
#include "long_rows/sample.cuh"
#include "select/row_range.cuh"

SPECIALISED int DTYPE = 0;
SPECIALISED int BLOCK = 256;
SPECIALISED int BLOCKS = 4;  // on a multiprocessor
SPECIALISED int CAPACITY = 1792;
SPECIALISED int VECTORS = 2;     // that a thread reads of the sample
SPECIALISED bool FITS = false;   // no row has more than CAPACITY scores
SPECIALISED bool SORTS = true;   // by score or by column
SPECIALISED bool SHORT = false;  // 16-bit scores in rows of up to 65536

constexpr int LOADS = 4;

typedef Scalar<DTYPE>::type score_t;
typedef RankOrder<DTYPE, SHORT> Order;
typedef Order::Rank Rank;
typedef RowPiece<DTYPE, BLOCK, LOADS> Piece;
typedef RowSample<Piece, DTYPE, BLOCK, VECTORS> Sample;
typedef RankList<Rank, BLOCK, CAPACITY> List;
typedef ListSort<Rank, BLOCK, CAPACITY> Sort;

constexpr int SHARED_BYTES = sizeof(Rank) * CAPACITY + (SORTS ? Sort::BYTES : 0);

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS)
    topk_select_many(const score_t* __restrict__ scores, const int* __restrict__ lengths,
                     const int* __restrict__ starts, const int* __restrict__ index_map, score_t* __restrict__ values,
                     int* __restrict__ indices, int by_column, int rows_ahead, long long first_row, int num_columns,
                     int k, int page_size, long long scores_stride, long long values_stride, long long indices_stride,
                     long long map_stride) {
#ifdef __CUDACC__
    extern __shared__ __align__(16) unsigned char shared[];
#else
    __shared__ __align__(16) unsigned char shared[SHARED_BYTES];
#endif
    __shared__ Extent warp_extents[List::WARPS];
    __shared__ int sample_counts[33];
    __shared__ __align__(16) Pivot<Rank> pivots;
    const List list = {reinterpret_cast<Rank*>(shared), warp_extents};
    const auto clear = [&] {
        pivots.clear<BLOCK>();
        for (int i = threadIdx.x; i < 33; i += BLOCK) sample_counts[i] = 0;
    };

    // The range is kept in shared memory and read again where it is needed, since registers are scarce.
    __shared__ RowRange row_span;
    const auto this_row = [&] { return first_row + blockIdx.x; };
    const auto piece_of = [&](int64_t row, const RowRange& range) {
        return Piece(scores + row * scores_stride + range.start, range.length, 0, 1);
    };

    Piece::Chunk chunk;
    Threshold threshold = {NO_KEY, false};
    int target = 0;
    {
        const RowRange range = row_range(lengths, starts, this_row(), num_columns);
        const Piece piece = piece_of(this_row(), range);
        const bool samples = !FITS && range.length > CAPACITY;
        Sample sample;
        if (samples) sample.load(piece);
        piece.load_first(chunk);
        if (threadIdx.x == 0) row_span = range;
        const int first_page = 32 * static_cast<int>(threadIdx.x);  // in a line of the map
        if (index_map != nullptr && first_page * static_cast<int64_t>(page_size) < range.length) {
            prefetch_line(index_map + this_row() * map_stride + first_page);
        }
        clear();
        __syncthreads();
        if (samples) {
            target = Sample::target(min(k, range.length), range.length);
            threshold = sample.threshold(target, Sample::most(CAPACITY, range.length), sample_counts);
        }
    }

    int listed;  // scores above the threshold, and ties with it as far as they are needed
#pragma unroll 1
    for (int reads = 1;; ++reads) {
        const RowRange range = row_span;
        const int wanted = min(k, range.length);
        const Order order(range.length);
        const int above = list.collect(piece_of(this_row(), range), chunk, {threshold.key, threshold.tied}, order);
        listed = above;
        if (FITS) break;
        if (threshold.tied && above < wanted) {
            listed += collect_ties<1>(piece_of(this_row(), range), threshold.key, list.ranks + above, wanted - above,
                                      [&](int column) { return order.rank(threshold.key, column); });
        }
        if (above <= CAPACITY && listed >= wanted) break;
        __syncthreads();
        clear();
        __syncthreads();
        const RowRange again = row_span;
        const Piece piece = piece_of(this_row(), again);
        const int better = Sample::better_target(target, above, min(k, again.length), CAPACITY, again.length);
        if (reads < SAMPLED_READS && better != target) {
            target = better;
            Sample sample;
            sample.load(piece);
            threshold = sample.threshold(target, Sample::most(CAPACITY, again.length), sample_counts);
        } else {
            const int wanted = min(k, again.length);
            threshold = {radix_threshold<DTYPE, BLOCK>(piece.row, again.length, wanted, pivots.histograms[1]).key,
                         true};
        }
        piece.load_first(chunk);
    }

    if (blockIdx.x + rows_ahead < gridDim.x) {
        const RowRange next = row_range(lengths, starts, this_row() + rows_ahead, num_columns);
        const Piece row_ahead = piece_of(this_row() + rows_ahead, next);
        if (!FITS && next.length > CAPACITY) Sample::prefetch(row_ahead);
        row_ahead.prefetch_first();
    }

    __syncthreads();
    Extent keys = list.extent();
    if (threshold.tied) keys = {min(keys.low, threshold.key), max(keys.high, threshold.key)};
    const RowRange range = row_span;
    const int64_t row = this_row();
    const int wanted = min(k, range.length);
    const Order order(range.length);
    const Rank high = order.lowest(keys.high) | order.last_column();
    Rank pivot = order.lowest(keys.low);
    if (listed > wanted) {
        pivot = pivots.find<BLOCK>(ListedRanks<Rank, BLOCK>{list.ranks, listed}, wanted, pivot, high);
    }

    const auto write = [&](int place, Rank rank) {
        const unsigned key = order.key(rank);
        const int column = rank == 0 ? -1 : order.column(rank);
        if (values != nullptr) {
            const score_t* source = scores + row * scores_stride + range.start;
            store_value<DTYPE>(values + row * values_stride + place, source, key, column);
        }
        indices[row * indices_stride + place] = mapped_index(index_map, row * map_stride, column, page_size);
    };
    if (SORTS) {
        const Rank last = order.last_column();
        const bool by_score = by_column == 0;
        const Sort sort(shared + sizeof(Rank) * CAPACITY, listed, wanted, pivot,
                        by_score ? ~static_cast<Rank>(0) : last, by_score ? pivot : last + 1 - range.length,
                        by_score ? high : last);
        sort.sort(list, by_score, write);
    } else {
        list.write_best(listed, pivot, write);
    }
    for (int i = wanted + static_cast<int>(threadIdx.x); i < k; i += BLOCK) write(i, 0);
}
