// SPDX-License-Identifier: Apache-2.0
// From rows of logits that a warp, or a part of one, holds in registers to experts and weights.
//
// LANES threads hold a row, up to 1024 experts and 32 winners. They score all logits and select by order-preserving
// keys of score + bias; lane r writes the expert of rank r and its weight. INTERLEAVED: they select by bounds of the
// scores, several rows to a warp, and compute the scores of the best only.
#pragma once

#include "routing/choose_experts.cuh"
#include "device/num_valid.cuh"
#include "routing/biases.cuh"
#include "routing/given_experts.cuh"
#include "routing/replicas.cuh"
#include "routing/softmax_statistics.cuh"
#include "routing/weigh.cuh"

SPECIALISED int DTYPE = 0;
SPECIALISED int LANES = 32;
SPECIALISED int PER_LANE = 8;
SPECIALISED bool ALIGNED = true;
SPECIALISED bool BIAS_ALIGNED = true;  // both biases are
SPECIALISED bool DENSE = false;        // rows of logits and results follow each other
SPECIALISED int MIN_BLOCKS = 0;        // of a multiprocessor, for ptxas, which may spill to fit more; 0: as it chooses

typedef Scalar<DTYPE>::type logit_t;

typedef LogitRow<logit_t> Row;

static_assert(LANES * PER_LANE >= NUM_EXPERTS, "the lanes hold the row");
constexpr int WINNER_LANES = power_of_two_from(OUTPUTS);
constexpr int ROWS_PER_WARP = 32 / LANES;

// A row of the call and the lanes that share it.
struct Task {
    int lane;
    bool valid;         // the row has experts
    bool selects;       // they are selected
    GivenExpert given;  // else they are these
    const float* expert_scale;
};

// Turn the choice of the row's lanes, unless experts are given, into the expert and the weight of this lane.
__device__ __forceinline__ void weigh_chosen(int column, float value, const Row& row,
                                             const SoftmaxStatistics& statistics, const Task& task,
                                             int64_t (&expert)[1], float (&weight)[1]) {
    const int lane = task.lane;
    if (HAS_GIVEN && task.valid && !task.selects && lane < TOP_K) {
        column = task.given.id;
        value = row[column];
        if (!WEIGHS_LOGITS) value = score_of(value, statistics);
    }
    expert[0] = expert_of(lane, column);
    weight[0] = value;
    if (SHARED_LOGITS && task.valid && lane >= TOP_K && lane < OUTPUTS) weight[0] = row[expert[0]];
    weigh<LaneTeam<WINNER_LANES>>(weight, expert, lane, 0, task.valid, task.expert_scale, row.numbers);
}

// Route by bounds of the scores, then by the exact scores of the best. `selects`: for any row of the warp.
template <typename Choice>
__device__ __forceinline__ void route_by_bounds(const Row& row, const float* bias, const typename Choice::First& first,
                                                bool selects, const Task& task, int64_t (&expert)[1],
                                                float (&weight)[1]) {
    Choice choice = {};
    bool settled = true;
    if (selects) {
        choice.choose(row, bias, first, task.lane, task.selects);
        const bool in_order = choice.in_order(task.lane), complete = choice.complete();
        settled = !__any_sync(FULL_WARP, task.selects && !(in_order && complete));
    }
#pragma unroll 1
    while (true) {  // weights are computed before the choice is known to be right, which it nearly always is
        weigh_chosen(choice.own.column, choice.own.value, row, choice.statistics, task, expert, weight);
        if (!UNLIKELY(!settled)) break;
        choice.sort(task.lane);
        const bool now_complete = choice.complete();
        const unsigned unsure = __ballot_sync(FULL_WARP, task.selects && !now_complete);
        choose_again<LANES>(unsure, row, bias, choice.statistics, choice.own);
        settled = true;
    }
}

// Route by the exact scores of all experts. `selects`: for any row of the warp.
__device__ __forceinline__ void route_by_scores(const Row& row, LaneColumns<PER_LANE>& own, bool selects,
                                                const Task& task, int64_t (&expert)[1], float (&weight)[1]) {
    SoftmaxStatistics statistics = {};
    Chosen chosen = {};
    if (selects) {
        own.prepare_all(row.numbers);
        statistics = softmax_statistics<LANES>(own.logits);
        chosen = choose_exactly<LANES>(own.logits, own.biases, statistics, row, task.lane, task.selects);
    }
    weigh_chosen(chosen.column, chosen.value, row, statistics, task, expert, weight);
}

// Route rows by the first `routing_warps()` warps of each block, and pass each expert on: `keep(token, place, expert)`.
// The other parameters are those of the kernel.
template <typename Warps, typename Keep>
__device__ __forceinline__ void route_rows(const logit_t* logits, const float* bias, const int* bias_index,
                                           const float* logit_bias, const float* expert_scale,
                                           const given_t* given_experts, const Replicas& replicas, const int* num_valid,
                                           weight_t* weights, index_t* indices, int num_valid_value,
                                           const given_token_t* token_ids, int64_t num_tokens,
                                           const MethodNumbers numbers, int64_t logits_stride, int64_t weights_stride,
                                           int64_t indices_stride, int64_t given_stride, Warps routing_warps,
                                           Keep keep) {
    if (DENSE) {
        logits_stride = NUM_LOGITS;
        weights_stride = indices_stride = OUTPUTS;
    }
    const int lane = threadIdx.x % LANES;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * routing_warps() + threadIdx.x / 32;
    if (warp * ROWS_PER_WARP >= num_tokens) return;
    // Whole warps stay together: lanes of a row that does not exist go along, without reading it or with row 0 in its
    // place.
    const int64_t token = warp * ROWS_PER_WARP + threadIdx.x % 32 / LANES;
    const int64_t num_routed = valid_rows(num_valid, num_valid_value, num_tokens);
    const bool exists = token < num_tokens;
    const int id = given_id(given_experts, given_stride, token_ids, token, lane, exists);
    const BiasRow its_bias = bias_of_token(bias, bias_index, exists ? token : 0);
    int64_t expert[1];
    float weight[1];
    Task task = {lane, false, false, {}, expert_scale};
    // Lanes load their columns first, of padding too, so that these loads do not wait for num_valid or the given ids.
    const auto selects_any = [&](bool loaded) {
        task.given = given_expert<LANES>(id, its_bias, lane);
        task.valid = token < num_routed && (task.given.is_set ? task.given.exists : its_bias.exists);
        task.selects = task.valid && !task.given.is_set;
        return !HAS_GIVEN || WHOLE_ROW_SOFTMAX || __any_sync(FULL_WARP, task.selects | !loaded);
    };
    if constexpr (INTERLEAVED) {
        typedef InterleavedRow<logit_t, LANES, PER_LANE, (NUM_GROUPS > 0)> Layout;
        typedef InterleavedChoice<Layout, ALIGNED, BIAS_ALIGNED> Choice;
        const Row row = {logits + (exists ? token * logits_stride : 0), logit_bias, numbers};
        const typename Choice::First first = Choice::load_first(row, its_bias.bias, lane);
        const bool selects = selects_any(!HAS_GIVEN || first.loaded());
        route_by_bounds<Choice>(row, its_bias.bias, first, selects, task, expert, weight);
    } else {
        constexpr bool WHOLE = LANES * PER_LANE == NUM_EXPERTS;
        const Row row = {logits + token * logits_stride, logit_bias, numbers};
        LaneColumns<PER_LANE> own = {};
        if (exists)
            own.template load_adjacent<WHOLE, ALIGNED, BIAS_ALIGNED, NUM_EXPERTS>(row, its_bias.bias, lane * PER_LANE);
        const bool selects = selects_any(!HAS_GIVEN || own.loaded());
        route_by_scores(row, own, selects, task, expert, weight);
    }
    if (lane < OUTPUTS && exists) {
        store_float(weights + token * weights_stride + lane, task.valid ? weight[0] : 0.0f);
        const index_t id = task.valid ? written_id(expert[0], lane, token, replicas) : index_t(-1);
        indices[token * indices_stride + lane] = id;
        keep(token, lane, id);
    }
}
