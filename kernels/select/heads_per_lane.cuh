// SPDX-License-Identifier: Apache-2.0
// How many of its best entries a lane keeps in order, given how likely a row's best are to crowd into one lane.
#pragma once

// How likely a row of random order has `heads` of its top_k best in one of its lanes.
__device__ constexpr double overflow_likelihood(int top_k, int lanes, int heads) {
    return heads == 0 ? lanes : overflow_likelihood(top_k, lanes, heads - 1) * (top_k - heads + 1) / heads / lanes;
}

// The fewest heads, up to `most`, for which it is less likely than that.
__device__ constexpr int heads_for(double likelihood, int top_k, int lanes, int most, int heads = 1) {
    return heads >= most || overflow_likelihood(top_k, lanes, heads) < likelihood
               ? heads
               : heads_for(likelihood, top_k, lanes, most, heads + 1);
}
