// SPDX-License-Identifier: Apache-2.0
// What the C++ twins of inline PTX in kernels/*.cuh stand on: clusters and asynchronous copies.
#pragma once
#include "threads.h"

namespace simt {

SIMT_RUNTIME static unsigned cluster_rank() { return self->block->rank; }
SIMT_RUNTIME static unsigned cluster_size() { return (unsigned)launch->blocks.size(); }

// Where another block of the cluster keeps the variable. Good until that block runs, and right again whenever this runs.
template <class T>
SIMT_RUNTIME static T* cluster_map(T* shared, unsigned rank) {
    if (rank >= cluster_size()) fault({}, "no such block in the cluster", "rank %u of %u", rank, cluster_size());
    if (rank == self->block->rank) return shared;
    return reinterpret_cast<T*>(launch->blocks[rank].shared.data() + ((char*)shared - simt_shared_begin));
}

// Asynchronous copies run at once under the first two schedules and as late as allowed under the others: a kernel that
// does not wait sees old data there, one that reuses the target too early sees new data here.
inline void perform(Copy copy) { memcpy(copy.to, copy.from, copy.bytes); }
SIMT_RUNTIME static void copy_async_wait(unsigned groups_in_flight) {
    Thread& me = *self;
    unsigned left = 0;
    for (unsigned i = 0; i < me.num_copies; ++i) {
        if (me.copies[i].group + groups_in_flight < me.copy_group)
            perform(me.copies[i]);
        else
            me.copies[left++] = me.copies[i];
    }
    me.num_copies = left;
}
SIMT_RUNTIME static void copy_async(void* to, const void* from, unsigned bytes, Site site = Site::here()) {
    Thread& me = *self;
    if (((uintptr_t)to | (uintptr_t)from) % bytes) fault(site, "misaligned asynchronous copy", "%p from %p", to, from);
    const Copy copy = {to, from, bytes, me.copy_group};
    if (launch->schedule <= Schedule::kReversed || me.num_copies == sizeof me.copies / sizeof copy)
        perform(copy);
    else
        me.copies[me.num_copies++] = copy;
}
SIMT_RUNTIME static void copy_async_commit() { ++self->copy_group; }

}  // namespace simt
