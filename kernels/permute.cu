// SPDX-License-Identifier: Apache-2.0
// Rows of tokens into the order of experts, and the gradients of unpermute, which reads the same rows.
//
// A team of threads reads the row of a token, or a part of it, once and writes it to the rows of its pairs, times their
// weights. The last blocks look for rows without a pair and clear them. Where dot products are wanted, the team also
// reads the rows of y at the same places, so that nothing is read twice.
//
// `order` decides what a row holds; `positions` only lets the team of a token find its rows. It writes to those that
// `order` confirms, and the last blocks copy rows whose pair has its position elsewhere: in a layout there are none.
#include "rows/dots.cuh"

SPECIALISED int ITEM_BYTES = 2;  // of an element of x and rows, which without arithmetic may be anything
SPECIALISED int DTYPE = 2;       // of x
SPECIALISED int Y_DTYPE = DTYPE;
SPECIALISED int RESIDUAL_DTYPE = DTYPE;  // and of its gradient
SPECIALISED bool HAS_ROWS = true;
SPECIALISED bool HAS_DOTS = false;
SPECIALISED bool HAS_SCALED = false;
SPECIALISED bool HAS_RESIDUAL_SCALE = false;
SPECIALISED bool HAS_RESIDUAL_DOTS = false;
SPECIALISED int PADDING_ROWS = 16;  // that a warp looks at
SPECIALISED int SHARED_ORDER = 0;   // rows, if a block reads the whole order while it waits for positions; 0: too many

typedef Scalar<DTYPE>::type scalar_t;
typedef Scalar<Y_DTYPE>::type y_t;
typedef Scalar<RESIDUAL_DTYPE>::type residual_t;

constexpr int BYTES = VECTOR * ITEM_BYTES;  // of a vector of each array
constexpr int Y_BYTES = VECTOR * sizeof(y_t);
constexpr int RESIDUAL_BYTES = VECTOR * sizeof(residual_t);
constexpr bool NEEDS_SUMS = HAS_DOTS || HAS_RESIDUAL_DOTS;
constexpr int SUMS = NEEDS_SUMS ? TOP_K + 1 : 1;  // that of the residual last

static_assert(PADDING_ROWS <= 32 && SLOTS <= 32, "a lane or a bit each");
static_assert(SHARED_ORDER == 0 || (TEAMS == 1 && ONE_GROUP), "all threads of a block wait for the order once");
static_assert(!NEEDS_SUMS || PARTS == 1, "a team has the whole row");

// What moves a row to its place in the order of experts.
struct Call {
    const char* x;
    const int* order;
    const int* positions;
    const weight_t* weights;
    char* rows;
    int num_tokens, capacity;
    int64_t x_bytes, positions_stride, weights_stride, rows_bytes;

    __device__ __forceinline__ char* row(int i) const { return row_at<BYTES * VECTORS>(rows, i, rows_bytes); }

    __device__ __forceinline__ const char* token(int i) const { return row_at<BYTES * VECTORS>(x, i, x_bytes); }
};

__device__ __forceinline__ Vector<BYTES> weighted(const Vector<BYTES>& vector, float weight) {
    return WEIGHTED ? scaled_vector<scalar_t>(vector, weight) : vector;
}

// Clear the rows without a pair among PADDING_ROWS rows from `first` on, and copy those whose pair has its position
// elsewhere. A warp calls it.
__device__ __forceinline__ void finish_rows(const Call& call, int64_t first) {
    const int lane = threadIdx.x % 32, row = static_cast<int>(first) + lane;
    const bool looks = lane < PADDING_ROWS && first + lane < call.capacity;
    const int pair = looks ? __ldg(call.order + row) : -1;
    const bool has_pair = pair >= 0 && pair < call.num_tokens * TOP_K;
    const int token = has_pair ? pair / TOP_K : 0, slot = has_pair ? pair % TOP_K : 0;
    const bool elsewhere = has_pair && __ldg(slots_of(call.positions, token, call.positions_stride) + slot) != row;
    const Vector<BYTES> zeros = {};
    for (unsigned left = __ballot_sync(FULL_WARP, looks && !has_pair); left != 0u; left &= left - 1u) {
        char* target = call.row(static_cast<int>(first) + __ffs(left) - 1);
#pragma unroll 4
        for (int i = lane; i < VECTORS; i += 32) store_vector(target + int64_t(i) * BYTES, zeros);
    }
    for (unsigned left = __ballot_sync(FULL_WARP, elsewhere); UNLIKELY(left != 0u); left &= left - 1u) {
        const int of = __ffs(left) - 1;
        const int from = __shfl_sync(FULL_WARP, token, of), from_slot = __shfl_sync(FULL_WARP, slot, of);
        const float weight = WEIGHTED ? to_float(slots_of(call.weights, from, call.weights_stride)[from_slot]) : 1.0f;
        for (int i = lane; i < VECTORS; i += 32) {
            const Vector<BYTES> vector = load_vector<BYTES>(call.token(from) + int64_t(i) * BYTES);
            store_vector(call.row(static_cast<int>(first) + of) + int64_t(i) * BYTES, weighted(vector, weight));
        }
    }
}

// Return a bit for each slot whose row has this very pair; `pair` is that of the first slot.
__device__ __forceinline__ unsigned confirmed_slots(const Slots& slots, const int* order, int pair) {
    int found[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
        found[s] = !slots.has(s) ? -1 : SHARED_ORDER > 0 ? order[slots.row[s]] : __ldg(order + slots.row[s]);
    }
    unsigned confirmed = 0u;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) confirmed |= (slots.has(s) && found[s] == pair + s ? 1u : 0u) << s;
    return confirmed;
}

extern "C" __global__ void __launch_bounds__(TEAM* TEAMS, MIN_BLOCKS)
    permute(const char* __restrict__ x, const int* __restrict__ order, const int* __restrict__ positions,
            const weight_t* __restrict__ weights, const char* __restrict__ y, const char* __restrict__ residual,
            const float* __restrict__ residual_scale, char* __restrict__ rows, float* __restrict__ dots,
            char* __restrict__ scaled, float* __restrict__ residual_dots, int num_tokens, int capacity,
            int token_blocks, long long x_bytes, long long positions_stride, long long weights_stride,
            long long y_bytes, long long residual_bytes, long long rows_bytes, long long dots_stride,
            long long scaled_bytes) {
    const Call call = {x,        order,   positions,        weights,        rows,      num_tokens,
                       capacity, x_bytes, positions_stride, weights_stride, rows_bytes};
    if (blockIdx.x >= token_blocks) {
        const int64_t warp = int64_t(blockIdx.x - token_blocks) * (TEAM * TEAMS / 32) + threadIdx.x / 32;
        if (HAS_ROWS) finish_rows(call, warp * PADDING_ROWS);
        return;
    }
    const int token = static_cast<int>(blockIdx.x / SHARES) * TEAMS + threadIdx.x / TEAM, lane = threadIdx.x % TEAM;
    const int share = static_cast<int>(blockIdx.x % SHARES), part = SPREAD ? 0 : share, only_group = SPREAD ? share : 0;
    if (TEAMS > 1 && token >= num_tokens) return;

    const char* source = call.token(token);
    const int* token_positions = slots_of(positions, token, positions_stride);
    const weight_t* token_weights = WEIGHTED ? slots_of(weights, token, weights_stride) : nullptr;
    const float scale = HAS_RESIDUAL_SCALE ? __ldg(residual_scale + token) : 1.0f;
    Slots slots;
    if (ONE_GROUP) slots.load(token_positions, token_weights, only_group, capacity);

    __shared__ float parts[NEEDS_SUMS ? TEAM * TEAMS / 32 : 1][SUMS];
    TeamSums<SUMS> sums = {parts};
    if (NEEDS_SUMS) sums.clear();
    float products[SLOTS] = {}, residual_product[1] = {};
    __shared__ int shared_order[SHARED_ORDER > 0 ? SHARED_ORDER : 1];
    int staged[SHARED_ORDER > 0 ? (SHARED_ORDER + TEAM - 1) / TEAM : 1];
    if (HAS_ROWS && SHARED_ORDER > 0) {
#pragma unroll
        for (int i = 0; i < SHARED_ORDER; i += TEAM) {
            staged[i / TEAM] = i + lane < capacity ? __ldg(order + i + lane) : -1;
        }
    }
    unsigned confirmed = 0u;

#pragma unroll 1
    for (int first = part * STEP + lane; first - lane < VECTORS; first += PARTS * STEP) {
        Vector<BYTES> moved[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int i = first + u * TEAM;
            moved[u] = {};
            if (exists(i)) moved[u] = load_vector<BYTES>(source + int64_t(i) * BYTES);
        }
        if (HAS_ROWS && ONE_GROUP && first - lane == part * STEP) {  // once, while x is in flight
            if (SHARED_ORDER > 0) {
#pragma unroll
                for (int i = 0; i < SHARED_ORDER; i += TEAM) {
                    if (i + lane < SHARED_ORDER) shared_order[i + lane] = staged[i / TEAM];
                }
                __syncthreads();
            }
            confirmed =
                confirmed_slots(slots, SHARED_ORDER > 0 ? shared_order : order, token * TOP_K + only_group * SLOTS);
        }
        if (HAS_RESIDUAL_DOTS && only_group == 0) {
            const char* other = row_at<RESIDUAL_BYTES * VECTORS>(residual, token, residual_bytes);
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int i = first + u * TEAM;
                if (!exists(i)) continue;
                const Vector<RESIDUAL_BYTES> vector = load_vector<RESIDUAL_BYTES>(other + int64_t(i) * RESIDUAL_BYTES);
                residual_product[0] = dot<scalar_t, residual_t, VECTOR>(moved[u], vector, residual_product[0]);
            }
        }
        if (HAS_SCALED && only_group == 0) {
            char* target = row_at<RESIDUAL_BYTES * VECTORS>(scaled, token, scaled_bytes);
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int i = first + u * TEAM;
                if (!exists(i)) continue;
                float values[VECTOR];
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) values[j] = element<scalar_t>(moved[u], j) * scale;
                store_vector(target + int64_t(i) * RESIDUAL_BYTES, rounded<residual_t>(values));
            }
        }
#pragma unroll 1
        for (int group = 0; group < (SPREAD ? 1 : GROUPS); ++group) {
            if (!ONE_GROUP) {
                slots.load(token_positions, token_weights, group, capacity);
                if (HAS_ROWS) confirmed = confirmed_slots(slots, order, token * TOP_K + group * SLOTS);
            }
            Vector<Y_BYTES> others[HAS_DOTS ? SLOTS : 1][UNROLL];
            if (HAS_DOTS) {
#pragma unroll
                for (int s = 0; s < SLOTS; ++s) {
                    const char* other = row_at<Y_BYTES * VECTORS>(y, slots.row[s], y_bytes);
#pragma unroll
                    for (int u = 0; u < UNROLL; ++u) {
                        const int i = first + u * TEAM;
                        others[s][u] = {};
                        if (slots.has(s) && exists(i)) {
                            others[s][u] = load_vector<Y_BYTES, READ_ONCE>(other + int64_t(i) * Y_BYTES);
                        }
                    }
                }
            }
            if (HAS_ROWS) {
#pragma unroll
                for (int s = 0; s < SLOTS; ++s) {
                    if ((confirmed >> s & 1u) == 0u) continue;
                    char* target = call.row(slots.row[s]);
#pragma unroll
                    for (int u = 0; u < UNROLL; ++u) {
                        const int i = first + u * TEAM;
                        if (exists(i)) store_vector(target + int64_t(i) * BYTES, weighted(moved[u], slots.weight[s]));
                    }
                }
            }
            if (HAS_DOTS) {
#pragma unroll
                for (int s = 0; s < SLOTS; ++s) {
                    if (!slots.has(s)) continue;
#pragma unroll
                    for (int u = 0; u < UNROLL; ++u) {
                        products[s] = dot<scalar_t, y_t, VECTOR>(moved[u], others[s][u], products[s]);
                    }
                }
                if (!ONE_GROUP) {
                    sums.add(products, group * SLOTS);
#pragma unroll
                    for (int s = 0; s < SLOTS; ++s) products[s] = 0.0f;
                }
            }
        }
    }
    if (HAS_DOTS && ONE_GROUP) sums.add(products, only_group * SLOTS);
    if (HAS_RESIDUAL_DOTS) sums.add(residual_product, TOP_K);
    if (NEEDS_SUMS) sums.finish();
    if (HAS_DOTS) {
        const int from = only_group * SLOTS, to = SPREAD ? min(from + SLOTS, TOP_K) : TOP_K;
        for (int s = from + lane; s < to; s += TEAM) dots[token * dots_stride + s] = sums.sum(s);
    }
    if (HAS_RESIDUAL_DOTS && only_group == 0 && lane == 0) residual_dots[token] = sums.sum(TOP_K);
}
