// SPDX-License-Identifier: Apache-2.0
// Copies of 16 bytes from global to shared memory that run while the thread goes
// on; sm_80 and later. Both addresses are multiples of 16 bytes. What a thread copied is there for itself after its
// wait, for others after a barrier behind that.
#pragma once

// The first `bytes` (0 to 16) are copied and the rest of the 16 is zero; nothing is read behind them.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, int bytes = 16) {
#ifdef __CUDACC__
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
#else
    simt::copy_async(shared, global, bytes);
#endif
}

// One aligned word of 4 bytes.
template <typename T>
__device__ __forceinline__ void copy_async4(T* shared, const T* global) {
    static_assert(sizeof(T) == 4, "words of 4 bytes");
#ifdef __CUDACC__
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(global) : "memory");
#else
    *shared = *global;
#endif
}

// Ends a group: all copies that this thread started since the last one.
__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    simt::copy_async_commit();
#endif
}

// Waits until at most PENDING of this thread's latest groups are still under way.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
    simt::copy_async_wait(PENDING);
#endif
}
