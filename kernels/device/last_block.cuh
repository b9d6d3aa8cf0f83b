// SPDX-License-Identifier: Apache-2.0
// How the last block of a launch continues with the results of all, without any block waiting for one that may not run.
//
// A counter in global memory starts at 0 and is 0 again when all blocks have arrived, ready for the next launch. Only
// one thread of a block touches it, between barriers. What the block wrote before is then visible to whoever reads the
// counter later; that is cheaper than a fence by every thread.
#pragma once

#ifdef __CUDACC__

// Count up to `last`, then wrap around to 0. Return the value before.
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

// Return true in the last of `count` blocks to arrive, which sees all that the others wrote before they arrived. Every
// thread of the block calls it.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned count) {
    __syncthreads();
    const bool last = threadIdx.x == 0 && increment_acquire_release(counter, count - 1) == count - 1;
    return __syncthreads_or(last);
}

// The answer to a block that arrives, when several blocks share the work that follows.
enum Arrival { LAST, SEEN_COMPLETE, LEFT };

// Arrive, and say to the first thread whether this block is the last. Work that needs nothing of other blocks may follow
// before the block polls.
__device__ __forceinline__ bool arrive(unsigned* counter, unsigned count) {
    __syncthreads();
    return threadIdx.x == 0 && increment_acquire_release(counter, count - 1) == count - 1;
}

// After it has arrived, a block with a share of the work that follows polls for a while whether all have arrived.
// LAST: all have, and this block was the last; it also does the shares of blocks that left. SEEN_COMPLETE: all have.
// LEFT: this block has no share, or gave up, which its flag `left` (otherwise 0) tells the last block.
// No block waits for one that may not be running: until the last block arrives, the others only poll and leave. A block
// that gives up raises its flag before it looks at the counter once more; the last block counts before it looks at the
// flags. So at least one of them sees the other, and if both do, both do the same work with the same result.
__device__ __forceinline__ Arrival poll_arrivals(bool is_last, const unsigned* counter, bool has_share,
                                                 unsigned* left) {
    constexpr int POLLS = 64;  // about 30 microseconds
    __shared__ Arrival arrival;
    if (threadIdx.x == 0) {
        arrival = is_last ? LAST : LEFT;
        if (!is_last && has_share) {
            int polls = 0;
            while (load_acquire(counter) != 0 && polls < POLLS) ++polls;
            if (polls < POLLS) {
                arrival = SEEN_COMPLETE;
            } else {
                atomicExch(left, 1u);
                __threadfence();  // raise the flag, then look at the counter
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

__device__ __forceinline__ Arrival arrive_and_poll(unsigned* counter, unsigned count, bool has_share, unsigned* left) {
    return poll_arrivals(arrive(counter, count), counter, has_share, left);
}
