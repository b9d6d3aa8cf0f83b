// SPDX-License-Identifier: Apache-2.0
// What routing does to a row that Lanes threads hold, before and after the selection.
#pragma once

#include "score.cuh"

// Of the row's logits, NaN where a lane has no column.
template <int Lanes, int PerLane>
__device__ __forceinline__ RowStatistics row_statistics(const float (&logits)[PerLane]) {
    RowStatistics row = {0.0f, 0.0f};
    if (SCORE != SOFTMAX) return row;
    float highest = __uint_as_float(0xff800000u);
#pragma unroll
    for (int j = 0; j < PerLane; ++j) highest = fmaxf(highest, logits[j]);
    row.highest = lanes_max<Lanes>(highest);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < PerLane; ++j) {
        const float share = softmax_share(logits[j], row.highest);
        sum += is_nan(share) ? 0.0f : share;
    }
    row.inverse_sum = 1.0f / lanes_sum<Lanes>(sum);
    return row;
}

// The weight of each lane's winner from its score, which is 0 in lanes that have none.
template <int Lanes>
__device__ __forceinline__ float winner_weight(float score, float renormalize_eps, float renormalize_min, float scale) {
    const total_t total = RENORMALIZE ? lanes_sum<Lanes>(summand(score)) : total_t(0);
    return weight_of(score, total, renormalize_eps, renormalize_min, scale);
}
