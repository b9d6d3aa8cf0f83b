// SPDX-License-Identifier: Apache-2.0
// How many of its best keys a lane keeps in order, given how likely many of the best of a row fall into one lane.
#pragma once

// Return how likely one lane of a randomly ordered row has `heads` of its top_k best.
__device__ constexpr double overflow_likelihood(int top_k, int lanes, int heads) {
    return heads == 0 ? lanes : overflow_likelihood(top_k, lanes, heads - 1) * (top_k - heads + 1) / heads / lanes;
}

// Return the fewest heads, at most `most`, for which that is less likely than `likelihood`.
__device__ constexpr int heads_for(double likelihood, int top_k, int lanes, int most, int heads = 1) {
    return heads >= most || overflow_likelihood(top_k, lanes, heads) < likelihood
               ? heads
               : heads_for(likelihood, top_k, lanes, most, heads + 1);
}
