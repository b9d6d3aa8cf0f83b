// SPDX-License-Identifier: Apache-2.0
// Compiled in front of a kernel's text, this makes it C++ for g++ in which every CUDA thread is a fiber.
//   fibers.h       stacks and the switch between them         conversions.h  half and bfloat16
//   schedule.h     who runs when, who waits for whom, reports  warp.h         barriers, shuffles, votes, reductions
//   launch.h       the way in, and out of crashes              intrinsics.h   memory, integers, floats
#pragma once
#include <stdint.h>

#include <cmath>

#include "intrinsics.h"
#include "launch.h"

// -- For the C++ twins of inline PTX in kernels/*.cuh -------------------------------------------------------------------

#define CUPY_ROUTER_SIMT 1

namespace simt {

SIMT_RUNTIME static unsigned cluster_rank() { return self->block->rank; }
SIMT_RUNTIME static unsigned cluster_size() { return (unsigned)launch->blocks.size(); }

// Where another block of the cluster keeps the variable. Good until that block runs, and right again whenever this runs.
template <class T>
SIMT_RUNTIME static T* cluster_map(T* shared, unsigned rank) {
    if (rank >= cluster_size()) fault({}, "no such block in the cluster", "rank %u of %u", rank, cluster_size());
    if (rank == self->block->rank) return shared;
    return reinterpret_cast<T*>(launch->blocks[rank].shared.data() + ((char*)shared - __start_simt_shared));
}

// Asynchronous copies run at once under the first two schedules and as late as allowed under the others: a kernel that
// does not wait sees old data there, one that reuses the target too early sees new data here.
inline void perform(Copy copy) {
    memcpy(copy.to, copy.from, copy.bytes);
    memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
}
SIMT_RUNTIME static void copy_async_wait(unsigned groups_under_way) {
    Thread& me = *self;
    unsigned left = 0;
    for (unsigned i = 0; i < me.num_copies; ++i) {
        if (me.copies[i].group + groups_under_way < me.copy_group)
            perform(me.copies[i]);
        else
            me.copies[left++] = me.copies[i];
    }
    me.num_copies = left;
}
SIMT_RUNTIME static void copy_async(void* to, const void* from, unsigned bytes, Site site = Site::here()) {
    Thread& me = *self;
    if (((uintptr_t)to | (uintptr_t)from) % 16) fault(site, "misaligned asynchronous copy", "%p from %p", to, from);
    const Copy copy = {to, from, bytes, me.copy_group};
    if (launch->schedule <= Schedule::kReversed || me.num_copies == sizeof me.copies / sizeof copy)
        perform(copy);
    else
        me.copies[me.num_copies++] = copy;
}
SIMT_RUNTIME static void copy_async_commit() { ++self->copy_group; }

}  // namespace simt

// -- CUDA's words: last, since the standard headers use some of them ----------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static __attribute__((used, section("simt_shared")))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)  // checked at the launch
#define __cluster_dims__(...)   // the launch knows
#define __builtin_assume(condition) ((void)0)
#define assert(condition) \
    ((condition) ? (void)0 : simt::fault(simt::Site::here(__FILE__, __LINE__), "assertion", "%s", #condition))
