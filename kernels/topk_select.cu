// SPDX-License-Identifier: Apache-2.0
// The k largest scores of each row, sorted, exact: descending, equal scores by lower column, NaN last, bit copies out.
//
// LANES threads hold a row in registers, up to 1024 columns and 32 winners; lane r writes the r-th best. Longer rows and
// larger k: topk_select_long.cu, topk_select_large.cu.
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

typedef Scalar<DTYPE>::type score_t;

extern "C" __global__ void __launch_bounds__(256)
    topk_select(const score_t* __restrict__ scores, const int* __restrict__ lengths, const int* __restrict__ starts,
                score_t* __restrict__ values, int* __restrict__ indices, long long num_rows, int num_columns, int k,
                long long scores_stride, long long values_stride, long long indices_stride) {
    const int lane = threadIdx.x % LANES;
    constexpr int ROWS_PER_WARP = 32 / LANES;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
    int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;

    // Whole warps stay together: a row that does not exist goes along as an empty one.
    for (; warp * ROWS_PER_WARP < num_rows; warp += warps) {
        const int64_t row = warp * ROWS_PER_WARP + threadIdx.x % 32 / LANES;
        const bool row_exists = row < num_rows;
        const Span span = row_exists ? row_span(lengths, starts, row, num_columns) : Span{0, 0};
        const score_t* source = scores + row * scores_stride + span.start;
        const int first = lane * PER_LANE;

        unsigned keys[PER_LANE];
        if (row_exists) {
            float columns[PER_LANE];
            load_columns<score_t, PER_LANE, WHOLE_ROWS, ALIGNED>(source, first, span.length, columns);
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j) {
                keys[j] = WHOLE_ROWS || first + j < span.length ? order_key(columns[j]) : NO_KEY;
            }
        } else {
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j) keys[j] = NO_KEY;
        }
        const Winner winner = select_topk<TOP_K, LANES>(keys, lane);
        if (row_exists && lane < TOP_K) {
            const bool found = winner.key != NO_KEY;
            values[row * values_stride + lane] = found ? source[winner.column] : minus_infinity<DTYPE>();
            indices[row * indices_stride + lane] = found ? winner.column : -1;
        }
    }
}
