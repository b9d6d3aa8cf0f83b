// SPDX-License-Identifier: Apache-2.0
// The k largest scores of each row, exact, for k whose list does not fit in shared memory: one block per row, slow.
//
// Four passes over the row find the key of the k-th best from histograms (radix.cuh). A pass in the order of columns
// writes the columns above it, and the first of those that tie with it, to the indices of the row. They are sorted
// there, if wanted. Values are written last, and indices through their map.
#include "long_rows/radix.cuh"
#include "long_rows/result.cuh"
#include "select/row_range.cuh"

SPECIALISED int DTYPE = 0;

constexpr int BLOCK = 1024;

typedef Scalar<DTYPE>::type score_t;

// Bitonic sort of any number of entries, best first. The first step of each merge compares mirror images and the others
// neighbours at a distance, always moving the better one forward. So entries after the end would never move, and are
// left out.
template <typename Rank>
__device__ __forceinline__ void sort_columns(int* columns, int count, Rank rank_of) {
    for (int level = 0; count > 1 && 1ll << level < count; ++level) {
        for (int bit = level; bit >= 0; --bit) {
            const int64_t distance = 1ll << bit;
            for (int64_t pair = threadIdx.x;; pair += BLOCK) {
                const int64_t low = pair >> bit << (bit + 1) | (pair & (distance - 1));
                if (low >= count) break;
                const int64_t high = bit == level ? low ^ (2 * distance - 1) : low + distance;
                if (high >= count) continue;
                const int a = columns[low], b = columns[high];
                if (rank_of(a) < rank_of(b)) {
                    columns[low] = b;
                    columns[high] = a;
                }
            }
            __syncthreads();
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    topk_select_large(const score_t* __restrict__ scores, const int* __restrict__ lengths,
                      const int* __restrict__ starts, const int* __restrict__ index_map, score_t* __restrict__ values,
                      int* indices, long long num_rows, int sorted, int num_columns, int k, int page_size,
                      long long scores_stride, long long values_stride, long long indices_stride,
                      long long map_stride) {
    __shared__ __align__(16) int histogram[BINS];
    for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
        const RowRange range = row_range(lengths, starts, row, num_columns);
        const score_t* source = scores + row * scores_stride + range.start;
        int* row_indices = indices + row * indices_stride;
        const auto key_of = [&](unsigned column) { return bits_key<DTYPE>(score_bits(source[column])); };

        const int wanted = min(k, range.length);
        int ties = 0;
        unsigned threshold = NO_KEY;  // all keys are above it
        if (wanted < range.length) {
            const KthKey kth = radix_threshold<DTYPE, BLOCK>(source, range.length, wanted, histogram);
            threshold = kth.key;
            ties = kth.ties;
        }
        int taken = 0, taken_ties = 0;
        for (unsigned begin = 0; begin < range.length && taken < wanted; begin += BLOCK) {
            const unsigned column = begin + threadIdx.x;
            const unsigned key = column < range.length ? key_of(column) : NO_KEY;
            int more_ties, more;
            const int tie = taken_ties + block_prefix<BLOCK>(key == threshold && key != NO_KEY, more_ties);
            const bool takes = key > threshold || (key == threshold && key != NO_KEY && tie < ties);
            const int place = taken + block_prefix<BLOCK>(takes, more);
            if (takes) row_indices[place] = column;
            taken_ties += more_ties;
            taken += more;
        }
        __syncthreads();
        if (sorted) {
            sort_columns(row_indices, wanted, [&](int column) { return rank_key(key_of(column), column); });
        }
        for (int i = threadIdx.x; i < k; i += BLOCK) {
            const int column = i < wanted ? row_indices[i] : -1;
            if (values != nullptr) {
                values[row * values_stride + i] = column < 0 ? minus_infinity<DTYPE>() : source[column];
            }
            row_indices[i] = mapped_index(index_map, row * map_stride, column, page_size);
        }
        __syncthreads();
    }
}
