// SPDX-License-Identifier: Apache-2.0
// Values that the blocks of a cluster send into each other's shared memory. The bytes that arrive are counted, so a block
// waits for just those: cheaper than a cluster barrier, whose fence waits for all of memory and clears the L1 cache.
#pragma once

#include "device/cluster.cuh"
#include "device/mbarrier.cuh"

struct Mailbox {
    Mbarrier barrier;

    // Prepare; by one thread, before cluster_arrive_relaxed(). Nothing is sent before cluster_wait().
    __device__ __forceinline__ void prepare() {
#ifdef __CUDACC__
        mbarrier_init(&barrier, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
        barrier = 0;
#endif
    }

    // Expect that many bytes, some of which may have come before; by one thread, once for each wait().
    __device__ __forceinline__ void expect(int bytes) {
#ifdef __CUDACC__
        mbarrier_expect(&barrier, bytes);
#else
        simt::mail_expect(this, bytes);
#endif
    }

    // Wait until they have come; `number` counts these calls from 0.
    __device__ __forceinline__ void wait(int number) {
#ifdef __CUDACC__
        asm volatile(
            "{\n.reg .pred done;\nAGAIN:\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
                shared_address(this)),
            "r"(number % 2)
            : "memory");
#else
        simt::mail_wait(this, number);
#endif
    }

    // Send a value to a __shared__ variable, and this mailbox, of the block of that rank.
    __device__ __forceinline__ void send(int rank, int* variable, int value) {
#ifdef __CUDACC__
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(mapped(variable, rank)),
            "r"(value), "r"(mapped(this, rank))
            : "memory");
#else
        simt::mail_send(this, rank, variable, value);
#endif
    }

    __device__ __forceinline__ void send(int rank, unsigned long long* variable, unsigned long long value) {
#ifdef __CUDACC__
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(mapped(variable, rank)),
            "l"(value), "r"(mapped(this, rank))
            : "memory");
#else
        simt::mail_send(this, rank, variable, value);
#endif
    }

    __device__ __forceinline__ void send(int rank, uint4* variable, uint4 value) {
#ifdef __CUDACC__
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                         mapped(variable, rank)),
                     "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(mapped(this, rank))
                     : "memory");
#else
        simt::mail_send(this, rank, variable, value);
#endif
    }

#ifdef __CUDACC__
  private:
    static __device__ __forceinline__ unsigned mapped(const void* shared, int rank) {
        unsigned mapped;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(shared_address(shared)), "r"(rank));
        return mapped;
    }
#endif
};
