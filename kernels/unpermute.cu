// SPDX-License-Identifier: Apache-2.0
// The weighted sum of the rows of a token's pairs, and the gradients of permute, which reads the same rows.
//
// A team of threads has a token, or a part of its row: the places of its rows first, then all loads in flight, then
// float32 sums in the order of slots. Rows without a pair are never read.
#include "rows/dots.cuh"

SPECIALISED int DTYPE = 2;  // of y and the sums
SPECIALISED int RESIDUAL_DTYPE = DTYPE;
SPECIALISED int X_DTYPE = DTYPE;
SPECIALISED bool HAS_SUMS = true;
SPECIALISED bool HAS_DOTS = false;
SPECIALISED bool HAS_RESIDUAL = false;
SPECIALISED bool HAS_RESIDUAL_SCALE = false;

typedef Scalar<DTYPE>::type scalar_t;
typedef Scalar<RESIDUAL_DTYPE>::type residual_t;
typedef Scalar<X_DTYPE>::type x_t;

constexpr int BYTES = VECTOR * sizeof(scalar_t);  // of a vector of each array
constexpr int RESIDUAL_BYTES = VECTOR * sizeof(residual_t);
constexpr int X_BYTES = VECTOR * sizeof(x_t);
constexpr int DOTS = HAS_DOTS && TOP_K > 0 ? TOP_K : 1;

static_assert(!SPREAD, "a sum is of all slots");
static_assert(!HAS_DOTS || PARTS == 1, "a team has the whole row");

extern "C" __global__ void __launch_bounds__(TEAM* TEAMS, MIN_BLOCKS)
    unpermute(const char* __restrict__ y, const int* __restrict__ positions, const weight_t* __restrict__ weights,
              const char* __restrict__ residual, const float* __restrict__ residual_scale, const char* __restrict__ x,
              char* __restrict__ sums, float* __restrict__ dots, int num_tokens, int capacity, long long y_bytes,
              long long positions_stride, long long weights_stride, long long residual_bytes, long long x_bytes,
              long long sums_bytes, long long dots_stride) {
    const int token = static_cast<int>(blockIdx.x / SHARES) * TEAMS + threadIdx.x / TEAM, lane = threadIdx.x % TEAM;
    const int part = static_cast<int>(blockIdx.x % SHARES);
    if (token >= num_tokens) return;

    const int* token_positions = slots_of(positions, token, positions_stride);
    const weight_t* token_weights = WEIGHTED ? slots_of(weights, token, weights_stride) : nullptr;
    Slots slots;
    if (ONE_GROUP) slots.load(token_positions, token_weights, 0, capacity);
    const float scale = HAS_RESIDUAL_SCALE ? __ldg(residual_scale + token) : 1.0f;
    const char* added_row = row_at<RESIDUAL_BYTES * VECTORS>(residual, token, residual_bytes);
    const char* other_row = row_at<X_BYTES * VECTORS>(x, token, x_bytes);
    char* target = row_at<BYTES * VECTORS>(sums, token, sums_bytes);

    __shared__ float parts[HAS_DOTS ? TEAM * TEAMS / 32 : 1][DOTS];
    TeamSums<DOTS> team_sums = {parts};
    if (HAS_DOTS) team_sums.clear();
    float products[SLOTS] = {};

#pragma unroll 1
    for (int first = part * STEP + lane; first - lane < VECTORS; first += PARTS * STEP) {
        Vector<RESIDUAL_BYTES> added[UNROLL];
        Vector<X_BYTES> others[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int64_t i = first + u * TEAM;
            added[u] = {};
            others[u] = {};
            if (!exists(first + u * TEAM)) continue;
            if (HAS_RESIDUAL) added[u] = load_vector<RESIDUAL_BYTES>(added_row + i * RESIDUAL_BYTES);
            if (HAS_DOTS) others[u] = load_vector<X_BYTES>(other_row + i * X_BYTES);
        }
        float values[UNROLL][VECTOR] = {};
#pragma unroll 1
        for (int group = 0; group < GROUPS; ++group) {
            if (!ONE_GROUP) slots.load(token_positions, token_weights, group, capacity);
            Vector<BYTES> found[SLOTS][UNROLL];
#pragma unroll
            for (int s = 0; s < SLOTS; ++s) {
                const char* source = row_at<BYTES * VECTORS>(y, slots.row[s], y_bytes);
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) {
                    const int i = first + u * TEAM;
                    found[s][u] = {};
                    if (slots.has(s) && exists(i))
                        found[s][u] = load_vector<BYTES, READ_ONCE>(source + int64_t(i) * BYTES);
                }
            }
#pragma unroll
            for (int s = 0; s < SLOTS; ++s) {
                if (!slots.has(s)) continue;
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
                    for (int j = 0; j < VECTOR; ++j) {
                        const float value = element<scalar_t>(found[s][u], j);
                        values[u][j] = WEIGHTED ? fmaf(value, slots.weight[s], values[u][j]) : values[u][j] + value;
                    }
                    if (HAS_DOTS) products[s] = dot<scalar_t, x_t, VECTOR>(found[s][u], others[u], products[s]);
                }
            }
            if (HAS_DOTS && !ONE_GROUP) {
                team_sums.add(products, group * SLOTS);
#pragma unroll
                for (int s = 0; s < SLOTS; ++s) products[s] = 0.0f;
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int i = first + u * TEAM;
            if (HAS_RESIDUAL) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    values[u][j] = fmaf(element<residual_t>(added[u], j), scale, values[u][j]);
                }
            }
            if (HAS_SUMS && exists(i)) store_vector(target + int64_t(i) * BYTES, rounded<scalar_t>(values[u]));
        }
    }
    if (HAS_DOTS) {
        if (ONE_GROUP) team_sums.add(products, 0);
        team_sums.finish();
        for (int s = lane; s < TOP_K; s += TEAM) dots[token * dots_stride + s] = team_sums.sum(s);
    }
}
