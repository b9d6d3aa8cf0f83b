// SPDX-License-Identifier: Apache-2.0
// Maximum and sum of the softmax of a row that Lanes threads hold.
#pragma once

#include "routing/method.cuh"

// Return the statistics of prepared logits, NaN where a lane has no column.
template <int Lanes, int PerLane>
__device__ __forceinline__ SoftmaxStatistics softmax_statistics(const float (&logits)[PerLane]) {
    SoftmaxStatistics row = {0.0f, 0.0f};
    if (!WHOLE_ROW_SOFTMAX) return row;
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
