// SPDX-License-Identifier: Apache-2.0
// What a CUDA thread is here, what it shares with its block and cluster, and how it waits: a thread runs until it stands
// in a barrier or a warp collective, and may go on once all whom it waits for are there.
#pragma once
#include <stdarg.h>
#include <stdio.h>

#include <vector>

#include "fibers.h"
#include "vector_types.h"

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// __shared__ variables are static and lie in a section of their own, whose ends the linker names (device.py tells it).
extern "C" __attribute__((visibility("hidden"))) char simt_shared_begin[], simt_shared_end[];

namespace simt {

enum class Schedule : unsigned { kRoundRobin, kReversed, kShuffled, kRunAhead };
enum class Wait : unsigned char { kNothing, kBlock, kCluster, kMail, kWarp, kExited };

struct Site {  // a line of a kernel file
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct Lanes {  // for (unsigned lane : Lanes{mask})
    unsigned mask;
    SIMT_RUNTIME Lanes begin() const { return *this; }
    SIMT_RUNTIME Lanes end() const { return {0}; }
    SIMT_RUNTIME unsigned operator*() const { return __builtin_ctz(mask); }
    SIMT_RUNTIME void operator++() { mask &= mask - 1; }
    SIMT_RUNTIME bool operator!=(Lanes other) const { return mask != other.mask; }
};

struct Copy {  // an asynchronous copy under way
    void* to;
    const void* from;
    unsigned bytes, group;
};

struct Thread;
typedef void (*Combine)(Thread* lanes, unsigned mask);  // what a warp collective computes, once for all its lanes

struct Thread {
    Fiber fiber;
    struct Block* block;
    unsigned number, lane;
    uint3 index;
    Wait wait = Wait::kNothing;
    // what it waits in
    const char* operation;
    Site site;
    unsigned mask;
    Combine combine;
    // what it brings to a warp collective and takes from it
    uint64_t value, result;
    unsigned source;
    // the collectives whose lowest lane it is: lanes arrived, collectives done, and tags for four collectives in turn
    int arrived = 0;
    unsigned generation = 0;
    Tag tags[4];
    Copy copies[16];
    bool polls = false;  // it looks again when the others have had a turn
    unsigned num_copies = 0, copy_group = 0;
};

constexpr unsigned kLetters = 1 << 15;
struct Letter {  // what a block sends into the shared memory of the block of that rank
    char *mailbox, *variable;
    unsigned rank, bytes;
    char value[16];
};

struct Block {
    uint3 index;
    unsigned rank, size;
    Thread* threads;
    unsigned exited = 0, arrived = 0, votes = 0, result = 0, generation = 0;
    Tag tags[2];
    Site barrier;               // the one that its threads come to
    void* waits_for = nullptr;  // the mailbox that its threads waited for last
    std::vector<char> shared;   // its shared memory while another block of the cluster runs
};

struct Launch {
    Schedule schedule;
    uint64_t random;
    void (*kernel)();
    void** parameters;
    void (*call)();
    std::vector<Block> blocks;  // of the cluster that runs now
    std::vector<Thread> threads;
    unsigned arrived, generation;  // at the cluster's barrier
    Tag tags[2], end_tag, mail_tag;
    unsigned num_letters;  // not yet delivered
};

static Launch* launch = nullptr;
static Letter letters[kLetters];
static Thread* self = nullptr;  // the thread that runs now
static char report[16384];      // empty, or why the launch ended early
static size_t report_length = 0;

__attribute__((format(printf, 1, 2))) SIMT_RUNTIME static void say(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const size_t room = sizeof report - report_length;
    const int length = vsnprintf(report + report_length, room, format, arguments);
    va_end(arguments);
    report_length += (size_t)length < room ? (size_t)length : room - 1;
}

// The running thread gives up the launch: first line the name of the fault, then who and where.
__attribute__((format(printf, 3, 4))) SIMT_RUNTIME static void fault(Site site, const char* name, const char* format,
                                                                     ...) {
    char detail[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(detail, sizeof detail, format, arguments);
    va_end(arguments);
    say("%s in block (%u, %u, %u)\n  thread %u (warp %u, lane %u): %s", name, blockIdx.x, blockIdx.y, blockIdx.z,
        self->number, self->number / 32, self->lane, detail);
    if (site.line) say(" at %s:%d", site.file, site.line);
    Thread& left_behind = *self;
    self = nullptr;
    switch_fiber(left_behind.fiber, host);
}

SIMT_RUNTIME static unsigned lane() { return self->lane; }

// -- What a thread does when it has to wait ----------------------------------------------------------------------------

SIMT_RUNTIME static void yield() {
    Thread& me = *self;
    switch_fiber(me.fiber, host);
}

SIMT_RUNTIME static void poll() {
    self->polls = true;
    yield();
}

SIMT_RUNTIME static int block_barrier(const char* operation, int vote, Site site) {
    Thread& me = *self;
    Block& block = *me.block;
    Tag* tag = &block.tags[block.generation % 2];  // two in turn: who runs ahead to the next barrier uses the other
    me.wait = Wait::kBlock, me.operation = operation, me.site = site;
    if (block.arrived == 0) block.barrier = site;
    if (block.barrier.line != site.line || strcmp(block.barrier.file, site.file) != 0)
        fault(site, "threads at different barriers", "in %s, and others at %s:%d", operation, block.barrier.file,
              block.barrier.line);
    block.votes += vote != 0;
    release(tag);
    if (++block.arrived == block.size) {
        for (unsigned i = 0; i < block.size; ++i) block.threads[i].wait = Wait::kNothing;
        block.result = block.votes;
        block.votes = block.arrived = 0;
        ++block.generation;
    }
    yield();
    acquire(tag);
    return (int)block.result;
}

SIMT_RUNTIME static void cluster_barrier(Site site = Site::here()) {
    Thread& me = *self;
    Tag* tag = &launch->tags[launch->generation % 2];
    me.wait = Wait::kCluster, me.operation = "the cluster barrier", me.site = site;
    release(tag);
    if (++launch->arrived == launch->threads.size()) {
        for (Thread& thread : launch->threads) thread.wait = Wait::kNothing;
        launch->arrived = 0;
        ++launch->generation;
    }
    yield();
    acquire(tag);
}

// Lanes of the thread's warp that were launched: fewer than 32 in the last warp of an odd block.
SIMT_RUNTIME static unsigned launched_lanes(const Thread& thread) {
    const unsigned count = thread.block->size - (thread.number - thread.lane);
    return count < 32 ? (1u << count) - 1 : 0xFFFFFFFFu;
}

SIMT_RUNTIME static bool same_collective(const Thread& a, const Thread& b) {
    return a.wait == Wait::kWarp && b.wait == Wait::kWarp && a.mask == b.mask && a.combine == b.combine &&
           (a.operation == b.operation || strcmp(a.operation, b.operation) == 0);
}

// Waits for exactly the lanes in `mask`, which have to come with the same mask to the same intrinsic. The last to come
// computes for all.
SIMT_RUNTIME static uint64_t collective(const char* operation, unsigned mask, uint64_t value, Combine combine,
                                        Site site, unsigned source = 0) {
    Thread& me = *self;
    if (!(mask >> me.lane & 1)) fault(site, "lane outside its own mask", "%s with mask 0x%08x", operation, mask);
    Thread* lanes = &me - me.lane;
    const unsigned members = mask & launched_lanes(me);
    Thread& lowest = lanes[__builtin_ctz(members)];
    Tag* tag = &lowest.tags[lowest.generation % 4];
    me.wait = Wait::kWarp, me.operation = operation, me.site = site, me.mask = mask, me.combine = combine;
    me.value = value, me.source = source;
    release(tag);
    bool complete = ++lowest.arrived >= __builtin_popcount(members);
    if (complete)
        for (unsigned lane : Lanes{members}) complete &= same_collective(me, lanes[lane]);
    if (complete) {
        acquire(tag);
        combine(lanes, members);
        release(tag);
        for (unsigned lane : Lanes{members}) lanes[lane].wait = Wait::kNothing;
        lowest.arrived -= __builtin_popcount(members);
        ++lowest.generation;
    }
    yield();
    acquire(tag);
    return me.result;
}

}  // namespace simt
