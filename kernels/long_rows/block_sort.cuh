// SPDX-License-Identifier: Apache-2.0
// A block sorts 64-bit keys, all of them different, in shared memory in descending order, as far as they are wanted.
//
// The place of a key is guessed by interpolation: from where its upper word lies between minimum and maximum. There are
// as many slots as keys; the keys of each slot are counted, and prefix sums of the counts are where slots begin. Within
// a slot, which holds a few keys, each key counts those above it. The keys of crowded slots are first guessed again
// within their own bounds, or by the lower word if their upper words are equal. So the time depends little on the
// distribution of keys, and not at all on their order.
#pragma once

#include "device/block_scan.cuh"

template <int Block, int Capacity>
struct BlockSort {
    static constexpr int ITEMS = Capacity / Block;
    static constexpr int CROWD = 32;  // a slot with more keys is crowded
    static constexpr int ROUNDS = 4;  // of guesses; slots that are still crowded just take longer
    static constexpr int SPARE = 16;  // slots after those of keys, so that whole vectors can be cleared
    static constexpr int NUM_SLOTS = Capacity + SPARE;
    static constexpr unsigned NO_SLOT = ~0u;
    static_assert(Capacity % (4 * Block) == 0 && Capacity < 65536, "whole words of slots for each thread");

    typedef unsigned long long Key;

    // `slots` are NUM_SLOTS words on a 16-byte boundary. `prepare` turns an entry of `keys` into a key. Keys with equal
    // upper words differ by less than `lower_range` in the lower one, which is at most 0xffffffff. All threads have
    // passed a barrier since `keys` were written, and pass one before they return. After the `wanted` largest keys, the
    // contents are undefined.
    template <typename Prepare>
    static __device__ __forceinline__ void sort(Key* keys, int count, int wanted, int* slots, unsigned lower_range,
                                                Prepare prepare) {
        // A thread has ITEMS entries, whose places in `keys` change. It reads them again, since registers cannot hold
        // them all.
        unsigned slot_place[ITEMS];  // slot in the low half, place within it in the high half
        Extent extent = {~0u, 0u};
        clear(slots, count);
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            const int i = j * Block + threadIdx.x;
            if (i < count) {
                const Key key = prepare(keys[i]);
                keys[i] = key;
                extent = {min(extent.low, upper(key)), max(extent.high, upper(key))};
            }
        }
        extent = block_extent<Block>(extent);
        const float scale = 1.0f / (static_cast<float>(extent.high - extent.low) + 1.0f);
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            const int i = j * Block + threadIdx.x;
            if (i < count) {
                const float depth = (extent.high - upper(keys[i])) * scale;
                enter(slots, slot_place[j], min(count - 1, static_cast<int>(count * guess(depth))));
            }
        }
        __syncthreads();
        bool crowded = counts_to_begins(slots, count);
#pragma unroll 1
        for (int round = 1; round < ROUNDS && crowded; ++round) {
            guess_again(keys, slot_place, count, slots, lower_range);
            crowded = counts_to_begins(slots, count);
        }
        // Move keys to their slots, then sort within these. Slots after the wanted keys are left out.
        Key moved[ITEMS];
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            const int i = j * Block + threadIdx.x;
            if (i < count && slots[slot_place[j] & 0xffffu] < wanted) {
                moved[j] = keys[i];
            } else {
                slot_place[j] = NO_SLOT;
            }
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            if (slot_place[j] != NO_SLOT) {
                keys[slots[slot_place[j] & 0xffffu] + (slot_place[j] >> 16)] = moved[j];
            }
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            if (slot_place[j] != NO_SLOT) {
                const int slot = slot_place[j] & 0xffffu, begin = slots[slot], end = slots[slot + 1];
                const unsigned from = begin + (slot_place[j] >> 16);
                const Key key = keys[from];
                unsigned to = begin;
#pragma unroll 1
                for (int i = begin; i < end; ++i) to += keys[i] > key;
                slot_place[j] = from | to << 16;
            }
        }
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            if (slot_place[j] != NO_SLOT) moved[j] = keys[slot_place[j] & 0xffffu];
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            if (slot_place[j] != NO_SLOT) keys[slot_place[j] >> 16] = moved[j];
        }
        __syncthreads();
    }

  private:
    static __device__ __forceinline__ unsigned upper(Key key) { return static_cast<unsigned>(key >> 32); }

    // Return the share of keys above one at this depth (0 at the maximum, 1 at the minimum). The best of many are the
    // tail of a distribution, denser towards the minimum; evenly spread keys still are four to a slot at most.
    static __device__ __forceinline__ float guess(float depth) {
        const float square = depth * depth;
        return 0.25f * depth + 0.75f * square * square;
    }

    static __device__ __forceinline__ void clear(int* slots, int count) {
        const int end = ITEMS <= SPARE ? count + ITEMS : min(count + ITEMS, NUM_SLOTS);
#pragma unroll 1
        for (int i = threadIdx.x; i * 4 < end; i += Block) reinterpret_cast<int4*>(slots)[i] = {0, 0, 0, 0};
    }

    static __device__ __forceinline__ void enter(int* slots, unsigned& slot_place, int slot) {
        slot_place = slot | static_cast<unsigned>(atomicAdd(&slots[slot], 1)) << 16;
    }

    // Turn counts into prefix sums; slots[count] is the total. Return whether a slot is crowded.
    static __device__ __forceinline__ bool counts_to_begins(int* slots, int count) {
        const int first = threadIdx.x * ITEMS;
        int counts[ITEMS];
        int sum = 0, most = 0;
        if (first <= count) {
#pragma unroll
            for (int i = 0; i < ITEMS; i += 4) {
                const int4 four = *reinterpret_cast<const int4*>(slots + first + i);
                counts[i] = four.x, counts[i + 1] = four.y, counts[i + 2] = four.z, counts[i + 3] = four.w;
            }
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                sum += counts[i];
                most = max(most, counts[i]);
            }
        }
        int total;
        int before = block_prefix<Block>(sum, total);
        if (first <= count) {
#pragma unroll
            for (int i = 0; i < ITEMS; i += 4) {
                int4 four;
                four.x = before;
                four.y = four.x + counts[i];
                four.z = four.y + counts[i + 1];
                four.w = four.z + counts[i + 2];
                before = four.w + counts[i + 3];
                *reinterpret_cast<int4*>(slots + first + i) = four;
            }
        }
        if (threadIdx.x == 0 && count == Capacity) slots[count] = count;
        return __syncthreads_or(most > CROWD);
    }

    // Spread the keys of each crowded slot over as many slots as it has keys.
    static __device__ __forceinline__ void guess_again(const Key* keys, unsigned (&slot_place)[ITEMS], int count,
                                                       int* slots, unsigned lower_range) {
        // Bounds of crowded slots only, which begin more than CROWD places apart.
        constexpr int CROWDS = Capacity / (CROWD + 1) + 1;
        __shared__ Extent bounds[CROWDS];
        for (int i = threadIdx.x; i < CROWDS; i += Block) bounds[i] = {~0u, 0u};
        __syncthreads();
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            const int i = j * Block + threadIdx.x;
            if (i < count) {
                const int slot = slot_place[j] & 0xffffu, begin = slots[slot];
                if (slots[slot + 1] - begin > CROWD) {
                    Extent& own = bounds[begin / (CROWD + 1)];
                    atomicMin(&own.low, upper(keys[i]));
                    atomicMax(&own.high, upper(keys[i]));
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            const int i = j * Block + threadIdx.x;
            if (i < count) {
                const int slot = slot_place[j] & 0xffffu, begin = slots[slot], size = slots[slot + 1] - begin;
                int further = 0;
                if (size > CROWD) {
                    const Extent own = bounds[begin / (CROWD + 1)];
                    const bool same = own.low == own.high;
                    const unsigned below = same ? ~static_cast<unsigned>(keys[i]) : own.high - upper(keys[i]);
                    const float range = same ? lower_range : static_cast<float>(own.high - own.low) + 1.0f;
                    further = min(size - 1, static_cast<int>(below * (size / range)));
                }
                slot_place[j] = begin + further;
            }
        }
        __syncthreads();
        clear(slots, count);
        __syncthreads();
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            if (j * Block + threadIdx.x < count) enter(slots, slot_place[j], slot_place[j]);
        }
        __syncthreads();
    }
};
