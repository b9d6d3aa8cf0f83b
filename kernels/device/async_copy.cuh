// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory that run while the thread goes on; sm_80 and later. The thread that copied sees
// the data after its wait, other threads after a barrier that follows it.
#pragma once

// Copy one word of 4 bytes; both addresses are multiples of 4.
template <typename T>
__device__ __forceinline__ void copy_async4(T* shared, const T* global) {
    static_assert(sizeof(T) == 4, "words of 4 bytes");
#ifdef __CUDACC__
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(global) : "memory");
#else
    simt::copy_async(shared, global, 4);
#endif
}

// Copy 16 bytes; both addresses are multiples of 16.
__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
#ifdef __CUDACC__
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
#else
    simt::copy_async(shared, global, 16);
#endif
}

// End a group: all copies that this thread has started since the last one.
__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    simt::copy_async_commit();
#endif
}

// Wait until at most PENDING of this thread's latest groups are still in flight.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
    simt::copy_async_wait(PENDING);
#endif
}
