// SPDX-License-Identifier: Apache-2.0
// How blocks of one launch hand results over through global memory, without any of them depending on another to run.
//
// A counter in global memory starts at 0 and is 0 again when all blocks have arrived, so that the next launch finds it
// as this one did. Only one thread of a block touches it, between barriers: what the block wrote before is visible to
// whoever reads the counter after, which is cheaper than a fence by every thread.
#pragma once

#ifdef __CUDACC__

// The value before; it counts up to `last` and then wraps around to 0.
__device__ __forceinline__ unsigned increment_acquire_release(unsigned* counter, unsigned last) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(counter)), "r"(last)
                 : "memory");
    return before;
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* counter) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(value)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
    return value;
}

#else

inline unsigned increment_acquire_release(unsigned* counter, unsigned last) {
    __threadfence();
    const unsigned before = atomicInc(counter, last);
    __threadfence();
    return before;
}

inline unsigned load_acquire(const unsigned* counter) {
    const unsigned value = __atomic_load_n(counter, __ATOMIC_RELAXED);
    __threadfence();
    return value;
}

#endif

// Whether this block is the last of `count` to arrive; then it sees all that the others wrote before they arrived.
// Every thread of the block calls it.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned count) {
    __syncthreads();
    const bool last = threadIdx.x == 0 && increment_acquire_release(counter, count - 1) == count - 1;
    return __syncthreads_or(last);
}

// What a block knows after it has arrived where work that is left over can be shared.
enum Arrival { LAST, SEEN_COMPLETE, LEFT };

// As above, but a block that has a share in the work that follows looks for a while whether the others have arrived.
// LAST: they have, and this block was the last; it sees to the shares of blocks that left. SEEN_COMPLETE: they have.
// LEFT: this block has no share, or gave up, which `left` (a flag of its own, else 0) tells the last block. Nobody
// waits for a block that may not be running: without the last block, all others leave. Either the last block sees the
// flag or the one that raised it sees the counter complete, and if both do, then both do the same work with the same
// result.
__device__ __forceinline__ Arrival arrive_and_poll(unsigned* counter, unsigned count, bool has_share, unsigned* left) {
    constexpr int POLLS = 64;  // some 30 microseconds
    __shared__ Arrival arrival;
    __syncthreads();
    if (threadIdx.x == 0) {
        arrival = LEFT;
        if (increment_acquire_release(counter, count - 1) == count - 1) {
            arrival = LAST;
        } else if (has_share) {
            int polls = 0;
            while (load_acquire(counter) != 0 && polls < POLLS) ++polls;
            if (polls < POLLS) {
                arrival = SEEN_COMPLETE;
            } else {
                atomicExch(left, 1u);
                __threadfence();  // raise the flag, then look; the last block counts, then looks at the flag
                if (load_acquire(counter) == 0) {
                    atomicExch(left, 0u);
                    arrival = SEEN_COMPLETE;
                }
            }
        }
    }
    __syncthreads();
    return arrival;
}
