// SPDX-License-Identifier: Apache-2.0
// A block sorts the best ranks of a list, by rank or by column, as block_sort.cuh sorts keys but without moving them:
// slower, with so few registers that a multiprocessor has several blocks.
//
// The place of a rank is guessed by interpolation between minimum and maximum. There are as many slots as places; the
// ranks of each slot are counted, and prefix sums of the counts are where slots begin. Within a slot, which holds a few
// ranks, each counts those before it. The ranks of crowded slots are first guessed again within their own bounds: of their
// upper bits, or of the lower ones if the upper ones are equal. So the time depends little on the distribution of scores, and not at all
// on their order.
#pragma once

#include "long_rows/rank.cuh"
#include "long_rows/rank_list.cuh"

template <typename Rank, int Block, int Capacity>
struct ListSort {
    static constexpr int CROWD = 32;  // a slot with more ranks is crowded
    static constexpr int ROUNDS = 4;  // of guesses; slots that are still crowded just take longer
    static constexpr int CROWDS = Capacity / (CROWD + 1) + 1;
    static constexpr int BYTES = 8 * Capacity + 64;
    static_assert(Capacity % 4 == 0 && Capacity <= 65536, "slots of whole vectors, numbered by 16 bits");

    typedef RankList<Rank, Block, Capacity> List;

    int* slots;               // Capacity + 16 words on a 16-byte boundary: counts, then ends
    unsigned short* slot_of;  // of the list's ranks
    unsigned short* order;    // the list's ranks by slot
    int listed;               // number of ranks on the list
    int count;                // of those from `pivot` on, which are sorted
    Rank pivot;
    Rank mask;  // the bits to sort by
    Rank low;   // bounds of these bits
    Rank high;
    int shift;  // from these bits to the upper ones, at most 32

    // `shared` has BYTES bytes on a 16-byte boundary.
    __device__ __forceinline__ ListSort(unsigned char* shared, int listed, int count, Rank pivot, Rank mask, Rank low,
                                        Rank high)
        : slots(reinterpret_cast<int*>(shared)),
          slot_of(reinterpret_cast<unsigned short*>(slots + Capacity + 16)),
          order(slot_of + Capacity),
          listed(listed),
          count(count),
          pivot(pivot),
          mask(mask),
          low(low),
          high(high),
          shift(max(bit_length(high - low) - 32, 0)) {}

    // Call take(place, rank) for every rank from `pivot` on, by descending bits; if only some places are wanted, for
    // those from `first` on. All threads have passed a barrier since the list was written. `tail`: ranks are as dense as
    // in the tail of a distribution; otherwise they are even.
    template <typename Take>
    __device__ __forceinline__ void sort(const List& list, bool tail, Take take) const {
        arrange(list, tail);
        take_slots(list, 0, count, take);
    }

    template <typename Take>
    __device__ __forceinline__ void sort(const List& list, bool tail, int first, int places, Take take) const {
        arrange(list, tail);
        // A slot may begin before these places or end after them.
        const int end = min(first + places, count);
        if (first >= end) return;
        const int first_slot = slot_of[order[first]], last_slot = slot_of[order[end - 1]];
        take_slots(list, first_slot > 0 ? slots[first_slot - 1] : 0, slots[last_slot], [&](int place, Rank rank) {
            if (place >= first && place < end) take(place, rank);
        });
    }

  private:
    // Put the ranks into slots.
    __device__ __forceinline__ void arrange(const List& list, bool tail) const {
        clear();
        __syncthreads();
        const float scale = 1.0f / (static_cast<float>(upper(low)) + 1.0f);
        for_each(list, [&](Rank rank, int i) {
            const float depth = static_cast<float>(upper(rank)) * scale;
            const float share = tail ? guess(depth) : depth;
            enter(i, min(count - 1, static_cast<int>(count * share)));
        });
        bool crowded = counts_to_begins();
#pragma unroll 1
        for (int round = 1; round < ROUNDS && crowded; ++round) {
            guess_again(list);
            crowded = counts_to_begins();
        }
        for_each(list, [&](Rank, int i) { order[atomicAdd(&slots[slot_of[i]], 1)] = i; });
        __syncthreads();
    }

    // Call take(place, rank) for the ranks in these places by slot, with their places by rank.
    template <typename Take>
    __device__ __forceinline__ void take_slots(const List& list, int begin_place, int end_place, Take take) const {
#pragma unroll 1
        for (int i = begin_place + static_cast<int>(threadIdx.x); i < end_place; i += Block) {
            const int number = order[i], slot = slot_of[number], begin = slot > 0 ? slots[slot - 1] : 0;
            const Rank rank = list.ranks[number], bits = rank & mask;
            int place = begin;
#pragma unroll 1
            for (int j = begin; j < slots[slot]; ++j) place += (list.ranks[order[j]] & mask) > bits;
            take(place, rank);
        }
    }

    // Call take(rank, index on the list) for all ranks on the list that are to be sorted.
    template <typename Take>
    __device__ __forceinline__ void for_each(const List& list, Take take) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < listed; i += Block) {
            const Rank rank = list.ranks[i];
            if (rank >= pivot) take(rank, i);
        }
    }

    // Call take(crowd) for every crowded slot that there can be; they begin more than CROWD places apart.
    template <typename Take>
    static __device__ __forceinline__ void for_each_crowd(Take take) {
#pragma unroll 1
        for (int crowd = threadIdx.x; crowd < CROWDS; crowd += Block) take(crowd);
        __syncthreads();
    }

    // Return how far a rank lies below the maximum.
    __device__ __forceinline__ unsigned upper(Rank rank) const {
        return static_cast<unsigned>((high - (rank & mask)) >> shift);
    }

    // Return the share of ranks above one at this depth (0 at the maximum, 1 at the minimum). The best of many are the
    // tail of a distribution, denser towards the minimum; evenly spread ones still are four to a slot at most.
    static __device__ __forceinline__ float guess(float depth) {
        const float square = depth * depth;
        return 0.25f * depth + 0.75f * square * square;
    }

    __device__ __forceinline__ void clear() const {
#pragma unroll 1
        for (int i = threadIdx.x; i * 4 <= count; i += Block) reinterpret_cast<int4*>(slots)[i] = {0, 0, 0, 0};
    }

    __device__ __forceinline__ void enter(int i, int slot) const {
        slot_of[i] = slot;
        atomicAdd(&slots[slot], 1);
    }

    // Turn counts into prefix sums; slots[count] is the total. Return whether a slot is crowded.
    __device__ __forceinline__ bool counts_to_begins() const {
        __syncthreads();
        int before = 0, most = 0;
#pragma unroll 1
        for (int first = 0; first <= count; first += 4 * Block) {
            int4& own = reinterpret_cast<int4*>(slots)[first / 4 + threadIdx.x];
            const bool exists = first + 4 * static_cast<int>(threadIdx.x) <= count;
            const int4 four = exists ? own : int4{0, 0, 0, 0};
            most = max(max(max(most, four.x), max(four.y, four.z)), four.w);
            int total;
            const int begin = before + block_prefix<Block>(four.x + four.y + four.z + four.w, total);
            if (exists) own = {begin, begin + four.x, begin + four.x + four.y, begin + four.x + four.y + four.z};
            before += total;
        }
        return __syncthreads_or(most > CROWD);
    }

    // Spread the ranks of each crowded slot over as many slots as it has ranks: between the bounds of their upper bits or,
    // if these are all equal, of their lower ones.
    __device__ __forceinline__ void guess_again(const List& list) const {
        __shared__ Extent bounds[CROWDS];
        __shared__ bool tied[CROWDS];  // by upper bits
        const auto depth_of = [&](Rank rank, bool by_lower) {
            const Rank lower = (static_cast<Rank>(1) << shift) - 1;
            return by_lower ? static_cast<unsigned>((high - (rank & mask)) & lower) : upper(rank);
        };
        for_each_crowd([&](int crowd) {
            bounds[crowd] = {~0u, 0u};
            tied[crowd] = false;
        });
#pragma unroll 1
        for (int lower = 0; lower < 2; ++lower) {
            for_each(list, [&](Rank rank, int i) {
                const int slot = slot_of[i], begin = slots[slot], crowd = begin / (CROWD + 1);
                if (slots[slot + 1] - begin <= CROWD || (lower != 0 && !tied[crowd])) return;
                const unsigned depth = depth_of(rank, lower != 0);
                atomicMin(&bounds[crowd].low, depth);
                atomicMax(&bounds[crowd].high, depth);
            });
            __syncthreads();
            if (lower != 0) break;
            for_each_crowd([&](int crowd) {
                if (bounds[crowd].low != bounds[crowd].high) return;
                bounds[crowd] = {~0u, 0u};
                tied[crowd] = true;
            });
        }
        for_each(list, [&](Rank rank, int i) {
            const int slot = slot_of[i], begin = slots[slot], size = slots[slot + 1] - begin;
            int further = 0;
            if (size > CROWD) {
                const int crowd = begin / (CROWD + 1);
                const Extent own = bounds[crowd];
                const float range = static_cast<float>(own.high - own.low) + 1.0f;
                further = min(size - 1, static_cast<int>((depth_of(rank, tied[crowd]) - own.low) * (size / range)));
            }
            slot_of[i] = begin + further;
        });
        __syncthreads();
        clear();
        __syncthreads();
        for_each(list, [&](Rank, int i) { atomicAdd(&slots[slot_of[i]], 1); });
    }
};
