// SPDX-License-Identifier: Apache-2.0
// Barriers in shared memory, each for a number of arrivals, after which its next phase begins; sm_90. Threads that arrive
// go on at once. A thread that waits for a phase sees what was written before its arrivals. Phases alternate between
// parity 0, the first one, and 1. A phase may also wait for bytes of copies, see tensor_map.cuh.
#pragma once

typedef unsigned long long Mbarrier;

#ifdef __CUDACC__

__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// By one thread, before a barrier of the block and all other calls.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive. The phase then also waits until this many bytes have been copied.
__device__ __forceinline__ void mbarrier_expect(Mbarrier* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Make the initialisation visible to copies; before a barrier of the block.
__device__ __forceinline__ void mbarrier_init_done() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Wait until the phase of this parity is complete. The one before it is.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
    unsigned done;
    do {
        asm volatile(
            "{\n.reg .pred complete;\nmbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
            "selp.u32 %0, 1, 0, complete;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!done);
}

#else

// Arrivals of a phase and those that are missing, 15 bits each; the parity; as 32 bits, the bytes that are missing.
inline Mbarrier mbarrier_after(Mbarrier old, unsigned arrivals, long long bytes) {
    const Mbarrier now = (old - (static_cast<Mbarrier>(arrivals) << 15)) + (static_cast<Mbarrier>(bytes) << 32);
    return (now & ~0x40007fffull) != 0 ? now : (now ^ 1ull << 30) | (now & 0x7fff) << 15;
}
inline void mbarrier_change(Mbarrier* barrier, unsigned arrivals, long long bytes) {
    __threadfence();
    simt_atomic(barrier, [=](Mbarrier old) { return mbarrier_after(old, arrivals, bytes); });
}

inline void mbarrier_init(Mbarrier* barrier, unsigned arrivals) { *barrier = arrivals | arrivals << 15; }
inline void mbarrier_init_done() {}
inline void mbarrier_arrive(Mbarrier* barrier) { mbarrier_change(barrier, 1, 0); }
inline void mbarrier_expect(Mbarrier* barrier, unsigned bytes) { mbarrier_change(barrier, 1, bytes); }
inline void mbarrier_complete(Mbarrier* barrier, unsigned bytes) {
    mbarrier_change(barrier, 0, -static_cast<long long>(bytes));
}

inline void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
    while ((__atomic_load_n(barrier, __ATOMIC_RELAXED) >> 30 & 1) == parity) __nanosleep(0);
    __threadfence();
}

#endif
