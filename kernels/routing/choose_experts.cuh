// SPDX-License-Identifier: Apache-2.0
// Choose the TOP_K experts of a row: by the exact scores of all, or, where columns are interleaved and several rows
// share a warp, by score bounds and then the exact scores of the best only.
#pragma once

#include "routing/biases.cuh"
#include "routing/score_bound.cuh"
#include "select/row_interleaved.cuh"
#include "routing/groups.cuh"
#include "device/row_load.cuh"
#include "routing/softmax_statistics.cuh"
#include "select/warp_topk.cuh"

// A row of logits, each prepared when it is read.
template <typename T>
struct LogitRow {
    const T* logits;
    const float* logit_bias;
    MethodNumbers numbers;

    __device__ __forceinline__ float operator[](int64_t column) const {
        return prepare(to_float(logits[column]), logit_bias, column, numbers);
    }
};

struct Chosen {
    int column;
    float value;  // score, or logit if WEIGHS_LOGITS; without bias
};

// Return the expert of rank r in lane r; each of Lanes lanes holds PerLane adjacent columns. Without a bias the key
// gives the score. With one the score is computed again, since subtracting the bias would lose bits.
template <int Lanes, typename Row, int PerLane>
__device__ __forceinline__ Chosen choose_exactly(const float (&logits)[PerLane], const float (&biases)[PerLane],
                                                 const SoftmaxStatistics& statistics, const Row& row, int lane,
                                                 bool valid) {
    constexpr bool KEY_IS_VALUE = !HAS_BIAS && bool(SELECT_ON_LOGITS) == WEIGHS_LOGITS;
    unsigned keys[PerLane];
#pragma unroll
    for (int j = 0; j < PerLane; ++j) {
        const float value = selection_value(logits[j], statistics);
        keys[j] = sum_order_key(HAS_BIAS ? __fadd_rn(value, biases[j]) : value);
        if (Lanes * PerLane != NUM_EXPERTS && lane * PerLane + j >= NUM_EXPERTS) keys[j] = NO_KEY;
    }
    if (NUM_GROUPS > 0) keep_best_groups<Lanes>(keys, lane);
    constexpr int USED = (NUM_EXPERTS + PerLane - 1) /
                         PerLane;  // lanes with columns; with groups, the best are in those of the best groups
    constexpr int SPREAD = NUM_GROUPS > 0 ? max_int(USED * TOP_GROUPS / max_int(NUM_GROUPS, 1), 1) : USED;
    // After a choice by bounds this happens rarely and may be slow.
    const Winner winner =
        INTERLEAVED ? select_exactly<TOP_K, Lanes>(keys, lane) : select_topk<TOP_K, Lanes, SPREAD>(keys, lane);
    float value = sum_key_value(winner.key);
    if (!KEY_IS_VALUE && valid && lane < TOP_K) {
        value = row[winner.column];
        if (!WEIGHS_LOGITS) value = score_of(value, statistics);
    }
    return {winner.column, value};
}

// N columns of a row in the registers of a lane: their logits, and their biases.
template <int N>
struct LaneColumns {
    float logits[N], logit_biases[N], biases[N];

    // Load the chunk of interleaved columns that begins with the lane's column `begin`.
    template <typename Interleaved, bool Aligned, bool BiasAligned, typename T>
    __device__ __forceinline__ void load_chunk(const LogitRow<T>& row, const float* bias, int begin, int lane) {
        constexpr bool WHOLE = Interleaved::Lanes * Interleaved::PerLane == NUM_EXPERTS;
        Interleaved::template load<WHOLE, Aligned, NUM_EXPERTS>(row.logits, begin, lane, NUM_EXPERTS, logits);
        if (HAS_LOGIT_BIAS)
            Interleaved::template load<WHOLE, BiasAligned, NUM_EXPERTS>(row.logit_bias, begin, lane, NUM_EXPERTS,
                                                                        logit_biases);
        if (HAS_BIAS)
            Interleaved::template load<WHOLE, BiasAligned, NUM_EXPERTS>(bias, begin, lane, NUM_EXPERTS, biases);
    }

    // Load adjacent columns from `first` on.
    template <bool Whole, bool Aligned, bool BiasAligned, int EndsAt, typename T>
    __device__ __forceinline__ void load_adjacent(const LogitRow<T>& row, const float* bias, int first) {
        if (HAS_BIAS) load_columns<float, N, Whole, BiasAligned, EndsAt>(bias, first, NUM_EXPERTS, biases);
        if (HAS_LOGIT_BIAS)
            load_columns<float, N, Whole, BiasAligned, EndsAt>(row.logit_bias, first, NUM_EXPERTS, logit_biases);
        load_columns<T, N, Whole, Aligned, EndsAt>(row.logits, first, NUM_EXPERTS, logits);
    }

    __device__ __forceinline__ void prepare_all(const MethodNumbers& numbers) {
#pragma unroll
        for (int j = 0; j < N; ++j) logits[j] = prepare(logits[j], HAS_LOGIT_BIAS ? logit_biases[j] : 0.0f, numbers);
    }

    // Return true, for nearly all values, once the columns are loaded. A branch on it keeps their loads before it, where
    // the compiler would move them behind it. If it is false, a warp selects in vain.
    __device__ __forceinline__ bool loaded() const {
        unsigned bits = 0;
#pragma unroll
        for (int j = 0; j < N; j += 4) {
            bits ^= __float_as_uint(logits[j]);
            if (HAS_LOGIT_BIAS) bits ^= __float_as_uint(logit_biases[j]);
            if (HAS_BIAS) bits ^= __float_as_uint(biases[j]);
        }
        return bits != 0x9e3779b9u;
    }
};

// Return the best of a lane's columns by bounds of their selection values.
template <typename Interleaved, int Heads, bool Aligned, bool BiasAligned, typename T>
__device__ __forceinline__ TaggedHeads<Heads> best_bounds(const LogitRow<T>& row, const float* bias, int lane,
                                                          LaneColumns<Interleaved::Chunk> next) {
    TaggedHeads<Heads> heads;
#pragma unroll
    for (int h = 0; h < Heads; ++h) heads.key[h] = NO_KEY;
#pragma unroll
    for (int begin = 0; begin < Interleaved::PerLane; begin += Interleaved::Chunk) {
        const LaneColumns<Interleaved::Chunk> chunk = next;
        if (begin + Interleaved::Chunk < Interleaved::PerLane)
            next.template load_chunk<Interleaved, Aligned, BiasAligned>(row, bias, begin + Interleaved::Chunk, lane);
        unsigned keys[Interleaved::Chunk];
#pragma unroll
        for (int j = 0; j < Interleaved::Chunk; ++j) {
            const float logit = prepare(chunk.logits[j], HAS_LOGIT_BIAS ? chunk.logit_biases[j] : 0.0f, row.numbers);
            const float bound = selection_bound(logit);
            keys[j] =
                tagged_key<Interleaved::MASK>(HAS_BIAS ? bound + chunk.biases[j] : bound, Interleaved::tag(begin + j));
            const bool exists = Interleaved::Lanes * Interleaved::PerLane == NUM_EXPERTS ||
                                Interleaved::column_of(begin + j, lane) < NUM_EXPERTS;
            if (!exists) keys[j] = NO_KEY;
        }
#pragma unroll
        for (int j = 0; j < Interleaved::Chunk; j += 4) heads.insert(keys[j], keys[j + 1], keys[j + 2], keys[j + 3]);
    }
    return heads;
}

// Return the best of a lane's columns where groups lie in adjacent lanes: by exact values, since groups are ranked by
// these, and none of a group that is not kept.
template <typename Interleaved, int Heads>
__device__ __forceinline__ TaggedHeads<Heads> best_of_groups(LaneColumns<Interleaved::PerLane> own, int lane,
                                                             const MethodNumbers& numbers,
                                                             SoftmaxStatistics& statistics) {
    constexpr int N = Interleaved::PerLane;
    own.prepare_all(numbers);
    statistics = softmax_statistics<Interleaved::Lanes>(own.logits);

    TaggedHeads<Heads> heads;
#pragma unroll
    for (int h = 0; h < Heads; ++h) heads.key[h] = NO_KEY;
    BestTwo seen = {NO_KEY, NO_KEY};
#pragma unroll
    for (int begin = 0; begin < N; begin += 4) {
        unsigned keys[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float value = selection_value(own.logits[begin + j], statistics);
            if (HAS_BIAS) value = __fadd_rn(value, own.biases[begin + j]);
            seen.insert(sum_order_key(value));
            keys[j] = tagged_key<Interleaved::MASK>(value, Interleaved::tag(begin + j));
        }
        heads.insert(keys[0], keys[1], keys[2], keys[3]);
    }
    const bool kept = keeps_own_group<Interleaved::Lanes>(seen, lane);
#pragma unroll
    for (int h = 0; h < Heads; ++h) heads.key[h] = kept ? heads.key[h] : NO_KEY;
    return heads;
}

// The best of a row by bounds of their selection values, then by the exact values of these.
template <typename Interleaved, bool Aligned, bool BiasAligned>
struct InterleavedChoice : Candidates<TOP_K, Interleaved::Lanes> {
    typedef Candidates<TOP_K, Interleaved::Lanes> Base;
    // Number of lanes that can hold winners.
    static constexpr int SPREAD =
        NUM_GROUPS > 0 ? Interleaved::Lanes / max_int(NUM_GROUPS, 1) * TOP_GROUPS : Interleaved::Lanes;
    static constexpr int HEADS = interleaved_heads(TOP_K, SPREAD, Interleaved::PerLane);
    // Whether the heads always include TOP_K + 1 experts.
    static constexpr bool ENOUGH = NUM_GROUPS == 0 || SPREAD * HEADS > TOP_K;

    // The columns that a lane loads first: a chunk, or all of its columns if experts are in groups.
    typedef LaneColumns<NUM_GROUPS == 0 ? Interleaved::Chunk : Interleaved::PerLane> First;

    unsigned next;  // the keys of all others are at most this
    SoftmaxStatistics statistics;

    template <typename T>
    static __device__ __forceinline__ First load_first(const LogitRow<T>& row, const float* bias, int lane) {
        First first;
        if constexpr (NUM_GROUPS == 0) {
            first.template load_chunk<Interleaved, Aligned, BiasAligned>(row, bias, 0, lane);
        } else {
            first.template load_adjacent<true, Aligned, BiasAligned, 1>(row, bias, lane * Interleaved::PerLane);
        }
        return first;
    }

    template <typename T>
    __device__ __forceinline__ void choose(const LogitRow<T>& row, const float* bias, const First& first, int lane,
                                           bool valid) {
        TaggedHeads<HEADS> heads;
        if constexpr (NUM_GROUPS > 0) {
            heads = best_of_groups<Interleaved, HEADS>(first, lane, row.numbers, statistics);
        } else {
            statistics = {0.0f, 0.0f};
            heads = best_bounds<Interleaved, HEADS, Aligned, BiasAligned>(row, bias, lane, first);
        }
        const Ranked best = rank_heads<TOP_K + 1, Interleaved>(heads, lane);
        next = best.next;
        this->own = exactly(row, bias, best.key, valid && lane < Base::COUNT);
        this->extra = exactly(row, bias, best.last, valid && Base::FULL);
    }

    // Return the expert of a key with its exact value, if it is wanted and exists.
    template <typename T>
    __device__ __forceinline__ Candidate exactly(const LogitRow<T>& row, const float* bias, unsigned key, bool wanted) {
        Candidate candidate = {NO_KEY, Interleaved::column_of(key), 0.0f};
        if (wanted && (ENOUGH || key > Interleaved::MASK)) {
            const float logit = row[candidate.column];
            const float value = selection_value(logit, statistics);
            candidate.value = WEIGHS_LOGITS ? logit : SELECT_ON_LOGITS ? score_of(logit, statistics) : value;
            candidate.key = sum_order_key(HAS_BIAS ? __fadd_rn(value, bias[candidate.column]) : value);
        }
        return candidate;
    }

    // For sorted candidates: return whether they begin with the exact choice, that is, no other expert could reach the
    // last chosen one even at the largest error of its bound.
    __device__ __forceinline__ bool complete() const {
        const unsigned last_key = this->last_key();
        if (this->overtaken(last_key)) return false;
        if (NUM_GROUPS > 0 && next <= Interleaved::MASK) return true;  // there are no others
        const float last = sum_key_value(last_key);
        return selection_reach(tagged_key_ceiling<Interleaved::MASK>(next)) < last - fabsf(last) * 2.5e-7f;
    }
};

// Choose again for rows whose choice is not certain, for which lanes of theirs vote `unsure`: one row after the other,
// by the whole warp.
template <int Lanes, typename T>
__device__ __forceinline__ void choose_again(unsigned unsure, const LogitRow<T>& row, const float* bias,
                                             const SoftmaxStatistics& statistics, Candidate& chosen) {
    constexpr int COLUMNS = (NUM_EXPERTS + 127) / 128 * 4;
    constexpr bool WHOLE = COLUMNS * 32 == NUM_EXPERTS;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int turn = 0; turn < 32 / Lanes; ++turn) {
        if (!any_of_turn<Lanes>(unsure, turn)) continue;
        const int64_t address = __shfl_sync(FULL_WARP, reinterpret_cast<int64_t>(row.logits), turn * Lanes);
        const LogitRow<T> its_row = {reinterpret_cast<const T*>(address), row.logit_bias, row.numbers};
        const float* its_bias = bias;
        if (NUM_BIASES > 0) {
            its_bias =
                reinterpret_cast<const float*>(__shfl_sync(FULL_WARP, reinterpret_cast<int64_t>(bias), turn * Lanes));
        }
        LaneColumns<COLUMNS> columns;
        columns.template load_adjacent<WHOLE, false, false, 1>(its_row, its_bias, lane * COLUMNS);
        columns.prepare_all(row.numbers);
        const SoftmaxStatistics its_statistics = {__shfl_sync(FULL_WARP, statistics.highest, turn * Lanes),
                                                  __shfl_sync(FULL_WARP, statistics.inverse_sum, turn * Lanes)};
        const Chosen again = choose_exactly<32>(columns.logits, columns.biases, its_statistics, its_row, lane, true);
        const int column = __shfl_sync(FULL_WARP, again.column, lane % Lanes);
        const float value = __shfl_sync(FULL_WARP, again.value, lane % Lanes);
        if (lane / Lanes == turn) chosen = {NO_KEY, column, value};
    }
}
