// SPDX-License-Identifier: Apache-2.0
// From a row's logits to its TOP_K experts: by the exact scores of all, or, where columns are dealt and several rows may
// share a warp, by bounds and the exact scores of the best alone.
#pragma once

#include "bound.cuh"
#include "dealt.cuh"
#include "groups.cuh"
#include "select.cuh"

// The logits of a row, prepared one at a time.
template <typename T>
struct LogitRow {
    const T* logits;
    const float* logit_bias;
    Numbers numbers;

    __device__ __forceinline__ float operator[](int64_t column) const {
        return prepare(to_float(logits[column]), logit_bias, column, numbers);
    }
};

struct Chosen {
    int column;
    float value;  // score, or logit if WEIGHS_LOGITS; without bias
};

// The r-th expert in lane r of Lanes that hold PerLane adjacent columns each. Without a bias the key is the score; with
// one the score is gathered, since biased minus bias loses bits.
template <int Lanes, typename Row, int PerLane>
__device__ __forceinline__ Chosen choose_exactly(const float (&logits)[PerLane], const float (&biases)[PerLane],
                                                 const RowStatistics& statistics, const Row& row, int lane,
                                                 bool valid) {
    constexpr bool KEY_IS_VALUE = !HAS_BIAS && bool(SELECT_ON_LOGITS) == WEIGHS_LOGITS;
    unsigned keys[PerLane];
#pragma unroll
    for (int j = 0; j < PerLane; ++j) {
        const float value = selection_value(logits[j], statistics);
        keys[j] = sum_order_key(HAS_BIAS ? value + biases[j] : value);
        if (Lanes * PerLane != NUM_EXPERTS && lane * PerLane + j >= NUM_EXPERTS) keys[j] = NO_KEY;
    }
    if (NUM_GROUPS > 0) keep_best_groups<Lanes>(keys, lane);
    // After a choice by bounds this one is rare and may take its time.
    const Winner winner = DEALT ? select_exactly<TOP_K, Lanes>(keys, lane) : select_topk<TOP_K, Lanes>(keys, lane);
    float value = sum_key_value(winner.key);
    if (!KEY_IS_VALUE && valid && lane < TOP_K) {
        value = row[winner.column];
        if (!WEIGHS_LOGITS) value = score_of(value, statistics);
    }
    return {winner.column, value};
}

// What a lane reads of a row and of a layer's arrays at once.
template <typename Dealt>
struct Chunk {
    float logits[Dealt::Chunk], logit_biases[Dealt::Chunk], biases[Dealt::Chunk];

    template <bool Aligned, bool BiasAligned, typename T>
    __device__ __forceinline__ void load(const LogitRow<T>& row, const float* bias, int begin, int lane) {
        constexpr bool WHOLE = Dealt::Lanes * Dealt::PerLane == NUM_EXPERTS;
        Dealt::template load<WHOLE, Aligned>(row.logits, begin, lane, NUM_EXPERTS, logits);
        if (HAS_LOGIT_BIAS)
            Dealt::template load<WHOLE, BiasAligned>(row.logit_bias, begin, lane, NUM_EXPERTS, logit_biases);
        if (HAS_BIAS) Dealt::template load<WHOLE, BiasAligned>(bias, begin, lane, NUM_EXPERTS, biases);
    }
};

// The best of a lane's columns by bounds of their selection values.
template <typename Dealt, int Heads, bool Aligned, bool BiasAligned, typename T>
__device__ __forceinline__ TaggedHeads<Heads> best_bounds(const LogitRow<T>& row, const float* bias,
                                                          const RowStatistics& statistics, int lane) {
    TaggedHeads<Heads> heads;
#pragma unroll
    for (int h = 0; h < Heads; ++h) heads.key[h] = NO_KEY;
    Chunk<Dealt> next;
    next.template load<Aligned, BiasAligned>(row, bias, 0, lane);
#pragma unroll
    for (int begin = 0; begin < Dealt::PerLane; begin += Dealt::Chunk) {
        const Chunk<Dealt> chunk = next;
        if (begin + Dealt::Chunk < Dealt::PerLane)
            next.template load<Aligned, BiasAligned>(row, bias, begin + Dealt::Chunk, lane);
        unsigned keys[Dealt::Chunk];
#pragma unroll
        for (int j = 0; j < Dealt::Chunk; ++j) {
            const float logit = prepare(chunk.logits[j], HAS_LOGIT_BIAS ? chunk.logit_biases[j] : 0.0f, row.numbers);
            const float bound = selection_bound(logit, statistics);
            keys[j] = tagged_key<Dealt::MASK>(HAS_BIAS ? bound + chunk.biases[j] : bound, Dealt::tag(begin, j));
            const bool exists =
                Dealt::Lanes * Dealt::PerLane == NUM_EXPERTS || Dealt::column_of(begin, j, lane) < NUM_EXPERTS;
            if (!exists) keys[j] = NO_KEY;
        }
#pragma unroll
        for (int j = 0; j < Dealt::Chunk; j += 4) heads.insert(keys[j], keys[j + 1], keys[j + 2], keys[j + 3]);
    }
    return heads;
}

// A row's best by bounds of their selection values, then of the exact values of these alone.
template <typename Dealt, bool Aligned, bool BiasAligned>
struct DealtChoice {
    // One more than asked for: where the last is close to the next, their exact values decide.
    static constexpr int CANDIDATES = min_int(TOP_K + 1, Dealt::Lanes);

    Candidate own;
    unsigned next;  // the key of a bound that no others are above

    template <typename T>
    __device__ __forceinline__ DealtChoice(const LogitRow<T>& row, const float* bias, const RowStatistics& statistics,
                                           int lane, bool valid) {
        constexpr int HEADS = dealt_heads(TOP_K, Dealt::Lanes, Dealt::PerLane);
        TaggedHeads<HEADS> heads = best_bounds<Dealt, HEADS, Aligned, BiasAligned>(row, bias, statistics, lane);
        const Ranked best = rank_heads<CANDIDATES, Dealt>(heads, lane);
        next = best.next;
        own = {NO_KEY, Dealt::column_of(best.key), 0.0f};
        if (valid && lane < CANDIDATES) {
            const float logit = row[own.column];
            const float value = selection_value(logit, statistics);
            own.value = WEIGHS_LOGITS ? logit : value;
            own.key = sum_order_key(HAS_BIAS ? value + bias[own.column] : value);
        }
    }

    __device__ __forceinline__ bool in_order(int lane) const {
        return candidates_in_order<CANDIDATES, Dealt::Lanes>(own, lane);
    }

    // Whether candidates in order begin with the exact choice: none of the others could reach the last of that even if
    // its bound were as far off as it can be.
    __device__ __forceinline__ bool complete(const RowStatistics& statistics) const {
        const float last = sum_key_value(__shfl_sync(FULL_WARP, own.key, TOP_K - 1, Dealt::Lanes));
        return selection_reach(tagged_key_ceiling<Dealt::MASK>(next), statistics) < last - fabsf(last) * 2.5e-7f;
    }
};

// Rows whose choice is not sure, for which lanes of theirs vote `unsure`: one after the other, by the whole warp.
template <int Lanes, typename T>
__device__ __forceinline__ void choose_again(unsigned unsure, const LogitRow<T>& row, const float* bias,
                                             const RowStatistics& statistics, Candidate& chosen) {
    constexpr int COLUMNS = (NUM_EXPERTS + 127) / 128 * 4;
    constexpr bool WHOLE = COLUMNS * 32 == NUM_EXPERTS;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int turn = 0; turn < 32 / Lanes; ++turn) {
        if (!any_of_turn<Lanes>(unsure, turn)) continue;
        const int64_t address = __shfl_sync(FULL_WARP, reinterpret_cast<int64_t>(row.logits), turn * Lanes);
        const LogitRow<T> its_row = {reinterpret_cast<const T*>(address), row.logit_bias, row.numbers};
        float logits[COLUMNS], logit_biases[COLUMNS], biases[COLUMNS];
        load_columns<T, COLUMNS, WHOLE, false>(its_row.logits, lane * COLUMNS, NUM_EXPERTS, logits);
        if (HAS_LOGIT_BIAS)
            load_columns<float, COLUMNS, WHOLE, false>(row.logit_bias, lane * COLUMNS, NUM_EXPERTS, logit_biases);
        if (HAS_BIAS) load_columns<float, COLUMNS, WHOLE, false>(bias, lane * COLUMNS, NUM_EXPERTS, biases);
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j)
            logits[j] = prepare(logits[j], HAS_LOGIT_BIAS ? logit_biases[j] : 0.0f, row.numbers);
        const RowStatistics its_statistics = {__shfl_sync(FULL_WARP, statistics.highest, turn * Lanes),
                                              __shfl_sync(FULL_WARP, statistics.inverse_sum, turn * Lanes)};
        const Chosen again = choose_exactly<32>(logits, biases, its_statistics, its_row, lane, true);
        const int column = __shfl_sync(FULL_WARP, again.column, lane % Lanes);
        const float value = __shfl_sync(FULL_WARP, again.value, lane % Lanes);
        if (lane / Lanes == turn) chosen = {NO_KEY, column, value};
    }
}
