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

// A mailbox in shared memory: bytes that are expected and have not come, whether it is told how many come this time, and
// how often all have come.
struct Mail {
    int missing;
    unsigned told : 1, times : 31;
};
static_assert(sizeof(Mail) == 8, "as an mbarrier");

SIMT_RUNTIME static void mail_change(void* mailbox, unsigned rank, int missing, bool tell) {
    Mail& mail = *static_cast<Mail*>(mailbox);
    mail.missing += missing;
    mail.told |= tell;
    release(&launch->mail_tag);
    if (!mail.told || mail.missing != 0) return;
    mail.told = false;
    ++mail.times;
    Block& block = launch->blocks[rank];
    for (unsigned i = 0; i < block.size; ++i) {
        Thread& thread = block.threads[i];
        if (thread.wait == Wait::kMail) thread.wait = Wait::kNothing;  // to look again
    }
}
SIMT_RUNTIME static void mail_expect(void* mailbox, int bytes) { mail_change(mailbox, self->block->rank, bytes, true); }

// Mail is delivered at once under the first two schedules; under the others when a thread waits for its mailbox, so that
// one that does not wait sees old data.
SIMT_RUNTIME static void deliver(const Letter& letter) {
    raw_copy(cluster_map(letter.variable, letter.rank), letter.value, letter.bytes);
    mail_change(cluster_map(letter.mailbox, letter.rank), letter.rank, -static_cast<int>(letter.bytes), false);
}
SIMT_RUNTIME static void deliver_all(const void* mailbox, unsigned rank) {
    unsigned left = 0;
    for (unsigned i = 0; i < launch->num_letters; ++i) {
        const Letter& letter = letters[i];
        if (letter.mailbox == mailbox && letter.rank == rank)
            deliver(letter);
        else
            letters[left++] = letter;
    }
    launch->num_letters = left;
}
template <class T>
SIMT_RUNTIME static void mail_send(void* mailbox, unsigned rank, T* variable, T value) {
    Letter letter{static_cast<char*>(mailbox), reinterpret_cast<char*>(variable), rank, sizeof(T), {}};
    raw_copy(letter.value, reinterpret_cast<const char*>(&value), sizeof(T));
    const bool full = launch->num_letters == kLetters;
    if (launch->schedule <= Schedule::kReversed || launch->blocks[rank].waits_for == mailbox || full)
        deliver(letter);
    else
        letters[launch->num_letters++] = letter;
}
SIMT_RUNTIME static void mail_wait(void* mailbox, unsigned number, Site site = Site::here()) {
    Thread& me = *self;
    me.block->waits_for = mailbox;
    deliver_all(mailbox, me.block->rank);
    while (static_cast<Mail*>(mailbox)->times <= number) {
        me.wait = Wait::kMail, me.operation = "a wait for mail", me.site = site;
        yield();
    }
    acquire(&launch->mail_tag);
}

}  // namespace simt
