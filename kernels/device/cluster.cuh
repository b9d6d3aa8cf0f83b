// SPDX-License-Identifier: Apache-2.0
// Blocks that run together and reach each other's shared memory: sm_90 and later, in kernels with __cluster_dims__.
#pragma once

// Return the rank of this block in its cluster; below, the number of blocks of the cluster.
__device__ __forceinline__ unsigned cluster_rank() {
#ifdef __CUDACC__
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return simt::cluster_rank();
#endif
}

__device__ __forceinline__ unsigned cluster_size() {
#ifdef __CUDACC__
    unsigned size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
#else
    return simt::cluster_size();
#endif
}

// Wait for all threads of all blocks of the cluster; each then sees what the others wrote before. Needed before the
// first access to another block, which may not have started yet, and after the last, since that block may be gone.
__device__ __forceinline__ void cluster_barrier() {
#ifdef __CUDACC__
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    simt::cluster_barrier();
#endif
}

// The same in two halves, between which a thread may do what needs nothing of the other blocks. The threads of a warp
// need not arrive together.
__device__ __forceinline__ void cluster_arrive() {
#ifdef __CUDACC__
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

// The first half, where the others need not see what was written before.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#ifdef __CUDACC__
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#ifdef __CUDACC__
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
    simt::cluster_barrier();
#endif
}

// Return the address of the same __shared__ variable in the block of that rank, for loads, stores and atomics.
template <typename T>
__device__ __forceinline__ T* cluster_map(T* shared, unsigned rank) {
#ifdef __CUDACC__
    T* mapped;
    asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(shared), "r"(rank));
    return mapped;
#else
    return simt::cluster_map(shared, rank);
#endif
}
