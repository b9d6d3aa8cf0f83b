// SPDX-License-Identifier: Apache-2.0
// Who runs when: the blocks of a grid one cluster after another, the threads of a cluster taking turns. A thread runs
// until it waits in a barrier or a warp collective; it may go on once all whom it waits for are there. When nobody can
// go on, the reason is written down thread by thread and the launch ends with that report.
#pragma once
#include <stdarg.h>
#include <stdio.h>

#include <vector>

#include "fibers.h"
#include "vector_types.h"

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// __shared__ variables are static and lie in a section of their own, whose ends the linker names.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_simt_shared[], __stop_simt_shared[];

namespace simt {

enum class Schedule : unsigned { kRoundRobin, kReversed, kShuffled, kRunAhead };
enum class Wait : unsigned char { kNothing, kBlock, kCluster, kWarp, kExited };

struct Site {  // a line of a kernel file
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
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
    unsigned num_copies = 0, copy_group = 0;
};

struct Block {
    uint3 index;
    unsigned rank, size;
    Thread* threads;
    unsigned exited = 0, arrived = 0, votes = 0, result = 0, generation = 0;
    Tag tags[2];
    std::vector<char> shared;  // its shared memory while another block of the cluster runs
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
    Tag tags[2], end_tag;
};

static Launch* launch = nullptr;
static Thread* self = nullptr;    // the thread that runs now
static Block* resident = nullptr;  // whose shared memory is in place
static char report[16384];        // empty, or why the launch ended early
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
__attribute__((format(printf, 3, 4))) SIMT_RUNTIME static void fault(Site site, const char* name, const char* format, ...) {
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

SIMT_RUNTIME static uint64_t random_below(uint64_t bound) {
    uint64_t& x = launch->random;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return (x * 0x2545F4914F6CDD1Dull >> 32) % bound;
}

template <class T>
SIMT_RUNTIME static void shuffle(std::vector<T>& order) {
    for (size_t i = order.size(); i > 1; --i) {
        const size_t j = random_below(i);
        const T swapped = order[i - 1];
        order[i - 1] = order[j], order[j] = swapped;
    }
}

SIMT_RUNTIME static unsigned lane() { return self->lane; }

// -- What a thread does when it has to wait ----------------------------------------------------------------------------

SIMT_RUNTIME static void yield() {
    Thread& me = *self;
    switch_fiber(me.fiber, host);
}

SIMT_RUNTIME static int block_barrier(const char* operation, int vote, Site site) {
    Thread& me = *self;
    Block& block = *me.block;
    Tag* tag = &block.tags[block.generation % 2];  // two in turn: who runs ahead to the next barrier uses the other
    me.wait = Wait::kBlock, me.operation = operation, me.site = site;
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

// Waits for exactly the lanes in `mask`, which have to come with the same mask to the same intrinsic. The last to come
// computes for all.
SIMT_RUNTIME static uint64_t collective(const char* operation, unsigned mask, uint64_t value, Combine combine, Site site,
                                        unsigned source = 0) {
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
    for (unsigned lane = 0; complete && lane < 32; ++lane)
        if (members >> lane & 1)
            complete = lanes[lane].wait == Wait::kWarp && lanes[lane].mask == mask && lanes[lane].combine == combine;
    if (complete) {
        acquire(tag);
        combine(lanes, members);
        release(tag);
        for (unsigned lane = 0; lane < 32; ++lane)
            if (members >> lane & 1) lanes[lane].wait = Wait::kNothing;
        lowest.arrived -= __builtin_popcount(members);
        ++lowest.generation;
    }
    yield();
    acquire(tag);
    return me.result;
}

// -- What the host does ------------------------------------------------------------------------------------------------

SIMT_RUNTIME static void enter_block(Block& block) {  // puts its shared memory in place of the last block's
    blockIdx = block.index;
    if (resident == &block) return;
    const size_t bytes = __stop_simt_shared - __start_simt_shared;
    if (resident) raw_copy(resident->shared.data(), __start_simt_shared, bytes);
    forget_accesses(__start_simt_shared, __stop_simt_shared, true);
    if (launch->blocks.size() > 1)
        raw_copy(__start_simt_shared, block.shared.data(), bytes);
    else
        raw_fill(__start_simt_shared, 0xFF, bytes);  // a float that nobody wrote reads as NaN
    resident = &block;
}

SIMT_RUNTIME static void thread_main() {
    arrived_on_fiber();
    launch->call();
    Thread& me = *self;
    me.wait = Wait::kExited;
    ++me.block->exited;
    release(&launch->end_tag);
    switch_fiber(me.fiber, host, true);
}

SIMT_RUNTIME static bool resume(Thread& thread) {
    if (thread.wait != Wait::kNothing || report_length) return false;
    self = &thread;
    threadIdx = thread.index;
    switch_fiber(host, thread.fiber);
    self = nullptr;
    return true;
}

// Gives every thread of the block its turns until none of them can go on; false if none had one.
SIMT_RUNTIME static bool run_block(Block& block, std::vector<unsigned>& order) {
    bool ran = false;
    enter_block(block);
    for (bool again = true; again;) {
        again = false;
        if (launch->schedule >= Schedule::kShuffled) shuffle(order);
        for (unsigned entry : order) {
            if (launch->schedule != Schedule::kRunAhead) {
                again |= resume(block.threads[entry]);
                continue;
            }
            const unsigned end = entry + 32 < block.size ? entry + 32 : block.size;  // an entry is a warp
            for (bool more = true; more;) {
                more = false;
                for (unsigned i = entry; i < end; ++i) more |= resume(block.threads[i]);
                again |= more;
            }
        }
        ran |= again;
    }
    return ran;
}

SIMT_RUNTIME static bool same_wait(const Thread& a, const Thread& b) {
    if (a.wait != b.wait || a.wait == Wait::kExited || a.wait == Wait::kNothing) return a.wait == b.wait;
    if (a.site.line != b.site.line || a.operation != b.operation || a.site.file != b.site.file) return false;
    return a.wait != Wait::kWarp || (a.mask == b.mask && a.number / 32 == b.number / 32);
}

SIMT_RUNTIME static unsigned missing_lanes(const Thread& thread) {
    unsigned missing = 0;
    const Thread* lanes = &thread - thread.lane;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (thread.mask & launched_lanes(thread) & 1u << lane)
            if (lanes[lane].wait != Wait::kWarp || lanes[lane].mask != thread.mask || lanes[lane].combine != thread.combine)
                missing |= 1u << lane;
    return missing;
}

SIMT_RUNTIME static void report_deadlock() {
    bool in_warp = false, at_barrier = false;
    for (const Thread& thread : launch->threads) {
        in_warp |= thread.wait == Wait::kWarp;
        at_barrier |= thread.wait == Wait::kBlock;
    }
    say("%s", in_warp      ? "warp collective not reached by all lanes of its mask"
              : at_barrier ? "barrier not reached by all threads"
                           : "cluster barrier not reached by all threads");
    for (const Block& block : launch->blocks) {
        say("%s block (%u, %u, %u)", launch->blocks.size() > 1 ? "\n " : " in", block.index.x, block.index.y, block.index.z);
        for (unsigned first = 0, next; first < block.size; first = next) {
            const Thread& thread = block.threads[first];
            for (next = first + 1; next < block.size && same_wait(thread, block.threads[next]);) ++next;
            say(next - first > 1 ? "\n  threads %u-%u" : "\n  thread %u", first, next - 1);
            if (thread.wait == Wait::kExited) say(" exited");
            if (thread.wait == Wait::kNothing) say(" could go on");
            if (thread.wait == Wait::kExited || thread.wait == Wait::kNothing) continue;
            if (thread.wait == Wait::kWarp) say(" (warp %u)", thread.number / 32);
            say(" in %s", thread.operation);
            if (thread.wait == Wait::kWarp) say(" with mask 0x%08x, missing lanes 0x%08x", thread.mask, missing_lanes(thread));
            say(" at %s:%d", thread.site.file, thread.site.line);
        }
    }
}

// Runs the blocks of one cluster (one block, where there are no clusters) to their end.
SIMT_RUNTIME static void run_cluster(uint3 first, dim3 cluster, char* stack_memory) {
    const unsigned size = blockDim.x * blockDim.y * blockDim.z, blocks = cluster.x * cluster.y * cluster.z;
    std::vector<Thread>(size * blocks).swap(launch->threads);  // all new, so that no tag remembers the last cluster
    std::vector<Block>(blocks).swap(launch->blocks);
    launch->arrived = launch->generation = 0;
    for (unsigned b = 0; b < blocks; ++b) {
        Block& block = launch->blocks[b];
        block.rank = b;
        block.size = size;
        block.index = {first.x + b % cluster.x, first.y + b / cluster.x % cluster.y, first.z + b / cluster.x / cluster.y};
        block.threads = &launch->threads[b * size];
        if (blocks > 1) block.shared.assign(__stop_simt_shared - __start_simt_shared, (char)0xFF);
        for (unsigned i = 0; i < size; ++i) {
            Thread& thread = block.threads[i];
            thread.block = &block;
            thread.number = i, thread.lane = i % 32;
            thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
            prepare(thread.fiber, stack_memory + (b * size + i) * kStackBytes, thread_main);
        }
    }
    resident = nullptr;

    std::vector<unsigned> order, block_order;
    const unsigned stride = launch->schedule == Schedule::kRunAhead ? 32 : 1;
    for (unsigned i = 0; i < size; i += stride)
        order.push_back(launch->schedule == Schedule::kReversed ? size - 1 - i : i);
    for (unsigned b = 0; b < blocks; ++b) block_order.push_back(b);
    unsigned exited;
    bool progress;
    do {
        exited = 0, progress = false;
        if (launch->schedule >= Schedule::kShuffled) shuffle(block_order);
        for (unsigned b : block_order) {
            progress |= run_block(launch->blocks[b], order);
            exited += launch->blocks[b].exited;
        }
    } while (progress && exited < size * blocks);
    if (exited < size * blocks && !report_length) report_deadlock();
    for (Thread& thread : launch->threads) dismiss(thread.fiber);
    if (blocks > 1) acquire(&launch->end_tag);  // others' shared memory was written to, and is freed now
}

}  // namespace simt
