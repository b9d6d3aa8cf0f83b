// SPDX-License-Identifier: Apache-2.0
// A block sorts 64-bit keys, all of them different, in shared memory, the largest first.
//
// A key's place is guessed from where its upper word lies between the smallest and the largest, as one looks a name up in
// a telephone book: there are as many slots as keys, a slot's keys are counted, and the sums of the counts are where
// slots begin. Within a slot, which holds a few, each key counts those above it. Slots that are crowded are first guessed
// once more within their own bounds, or by the lower word if all their upper words are equal. So what a sort takes
// depends little on how many keys there are and not at all on the order in which they come.
#pragma once

#include "block_scan.cuh"

template <int Block, int Capacity>
struct BlockSort {
    static constexpr int ITEMS = Capacity / Block;
    static constexpr int CROWD = 32;  // more keys in a slot are guessed again
    static constexpr int ROUNDS = 4;  // guesses; then crowded slots just take longer
    static constexpr int NUM_SLOTS = Capacity + 16;
    static_assert(Capacity % (4 * Block) == 0 && Capacity < 65536, "whole words of slots for each thread");

    typedef unsigned long long Key;

    // `slots`: NUM_SLOTS words on a 16-byte boundary. `prepare` makes an entry of `keys` a key. Keys that tie in the
    // upper word differ by less than `lower_range` in the lower one, which is at most 0xffffffff.
    // All threads have passed a barrier since `keys` were written, and do so again before they return.
    template <typename Prepare>
    static __device__ __forceinline__ void sort(Key* keys, int count, int* slots, unsigned lower_range,
                                                Prepare prepare) {
        Key mine[ITEMS];
        unsigned slot_place[ITEMS];  // the slot, and above it the place in it
        Extent extent = {~0u, 0u};
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            const int i = j * Block + threadIdx.x;
            if (i < count) {
                mine[j] = prepare(keys[i]);
                const unsigned upper = static_cast<unsigned>(mine[j] >> 32);
                extent = {min(extent.low, upper), max(extent.high, upper)};
            }
        }
        clear(slots, count);
        extent = block_extent<Block>(extent);
        const float scale = count / (static_cast<float>(extent.high - extent.low) + 1.0f);
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            if (j * Block + threadIdx.x < count) {
                const unsigned below = extent.high - static_cast<unsigned>(mine[j] >> 32);
                enter(slots, slot_place[j], min(count - 1, static_cast<int>(below * scale)));
            }
        }
        __syncthreads();
        bool crowded = counts_to_begins(slots, count);
#pragma unroll 1
        for (int round = 1; round < ROUNDS && crowded; ++round) {
            guess_again(mine, slot_place, reinterpret_cast<unsigned*>(keys), count, slots, lower_range);
            crowded = counts_to_begins(slots, count);
        }
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            if (j * Block + threadIdx.x < count) {
                keys[slots[slot_place[j] & 0xffffu] + (slot_place[j] >> 16)] = mine[j];
            }
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            if (j * Block + threadIdx.x < count) {
                const int slot = slot_place[j] & 0xffffu;
                const int begin = slots[slot], end = slots[slot + 1];
                int place = begin;
#pragma unroll 1
                for (int i = begin; i < end; ++i) place += keys[i] > mine[j];
                slot_place[j] = place;
            }
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            if (j * Block + threadIdx.x < count) keys[slot_place[j]] = mine[j];
        }
        __syncthreads();
    }

private:
    static __device__ __forceinline__ void clear(int* slots, int count) {
#pragma unroll 1
        for (int i = threadIdx.x; i * 4 < count + ITEMS; i += Block) reinterpret_cast<int4*>(slots)[i] = {0, 0, 0, 0};
    }

    static __device__ __forceinline__ void enter(int* slots, unsigned& slot_place, int slot) {
        slot_place = slot | static_cast<unsigned>(atomicAdd(&slots[slot], 1)) << 16;
    }

    // Counts become the sums of those before; slots[count] is the sum of all. Whether there is a crowd.
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

    // Keys of crowded slots move to slots of their own range, as many as there are keys. `bounds`: the memory of the
    // keys, which all threads hold; what lies behind it is not touched.
    static __device__ __forceinline__ void guess_again(const Key (&mine)[ITEMS], unsigned (&slot_place)[ITEMS],
                                                       unsigned* bounds, int count, int* slots, unsigned lower_range) {
        unsigned* low = bounds;
        unsigned* high = bounds + count;
#pragma unroll 1
        for (int i = threadIdx.x; i < count; i += Block) {
            low[i] = ~0u;
            high[i] = 0u;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            if (j * Block + threadIdx.x < count) {
                const int slot = slot_place[j] & 0xffffu;
                if (slots[slot + 1] - slots[slot] > CROWD) {
                    atomicMin(&low[slot], static_cast<unsigned>(mine[j] >> 32));
                    atomicMax(&high[slot], static_cast<unsigned>(mine[j] >> 32));
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            if (j * Block + threadIdx.x < count) {
                const int slot = slot_place[j] & 0xffffu;
                const int begin = slots[slot], size = slots[slot + 1] - begin;
                int further = 0;
                if (size > CROWD) {
                    const bool same = low[slot] == high[slot];
                    const unsigned below =
                        same ? ~static_cast<unsigned>(mine[j]) : high[slot] - static_cast<unsigned>(mine[j] >> 32);
                    const float range = same ? lower_range : static_cast<float>(high[slot] - low[slot]) + 1.0f;
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
