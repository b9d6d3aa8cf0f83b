// SPDX-License-Identifier: Apache-2.0
// Who runs when: the blocks of a grid one cluster after another, the threads of a cluster taking turns. When nobody can
// go on, the reason is written down thread by thread, and the launch ends with that report.
#pragma once
#include "threads.h"

namespace simt {

static Block* resident = nullptr;  // whose shared memory is in place

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

SIMT_RUNTIME static void enter_block(Block& block) {  // puts its shared memory in place of the last block's
    blockIdx = block.index;
    if (resident == &block) return;
    const size_t bytes = simt_shared_end - simt_shared_begin;
    if (resident) raw_copy(resident->shared.data(), simt_shared_begin, bytes);
    forget_accesses(simt_shared_begin, simt_shared_end, true);
    if (launch->blocks.size() > 1)
        raw_copy(simt_shared_begin, block.shared.data(), bytes);
    else
        raw_fill(simt_shared_begin, 0xFF, bytes);  // a float that nobody wrote reads as NaN
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
    thread.polls = false;
    threadIdx = thread.index;
    switch_fiber(host, thread.fiber);
    self = nullptr;
    return true;
}

// Gives every thread of the block its turns until none of them can go on, or those that can only look at what others
// will write; false if none had one.
SIMT_RUNTIME static bool run_block(Block& block, std::vector<unsigned>& order) {
    bool ran = false;
    enter_block(block);
    for (bool again = true; again;) {
        again = false;
        if (launch->schedule >= Schedule::kShuffled) shuffle(order);
        for (unsigned entry : order) {
            const bool whole_warp = launch->schedule == Schedule::kRunAhead;  // an entry is a warp
            const unsigned last = entry + (whole_warp ? 31 : 0), end = last < block.size ? last + 1 : block.size;
            for (bool more = true; more;) {
                more = false;
                for (unsigned i = entry; i < end; ++i) {
                    if (!resume(block.threads[i])) continue;
                    ran = true;
                    more |= !block.threads[i].polls;
                }
                again |= more;
                more &= whole_warp;
            }
        }
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
    for (unsigned lane : Lanes{thread.mask & launched_lanes(thread)})
        if (!same_collective(thread, lanes[lane])) missing |= 1u << lane;
    return missing;
}

SIMT_RUNTIME static void report_deadlock() {
    bool in_warp = false, at_barrier = false, at_mail = false;
    for (const Thread& thread : launch->threads) {
        in_warp |= thread.wait == Wait::kWarp;
        at_barrier |= thread.wait == Wait::kBlock;
        at_mail |= thread.wait == Wait::kMail;
    }
    say("%s", in_warp      ? "warp collective not reached by all lanes of its mask"
              : at_barrier ? "barrier not reached by all threads"
              : at_mail    ? "mail that does not come"
                           : "cluster barrier not reached by all threads");
    for (const Block& block : launch->blocks) {
        say("%s block (%u, %u, %u)", launch->blocks.size() > 1 ? "\n " : " in", block.index.x, block.index.y,
            block.index.z);
        for (unsigned first = 0, next; first < block.size; first = next) {
            const Thread& thread = block.threads[first];
            for (next = first + 1; next < block.size && same_wait(thread, block.threads[next]);) ++next;
            say(next - first > 1 ? "\n  threads %u-%u" : "\n  thread %u", first, next - 1);
            if (thread.wait == Wait::kExited) say(" exited");
            if (thread.wait == Wait::kNothing) say(" could go on");
            if (thread.wait == Wait::kExited || thread.wait == Wait::kNothing) continue;
            if (thread.wait == Wait::kWarp) say(" (warp %u)", thread.number / 32);
            say(" in %s", thread.operation);
            if (thread.wait == Wait::kWarp)
                say(" with mask 0x%08x, missing lanes 0x%08x", thread.mask, missing_lanes(thread));
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
    launch->num_letters = 0;
    for (unsigned b = 0; b < blocks; ++b) {
        Block& block = launch->blocks[b];
        block.rank = b;
        block.size = size;
        block.index = {first.x + b % cluster.x, first.y + b / cluster.x % cluster.y,
                       first.z + b / cluster.x / cluster.y};
        block.threads = &launch->threads[b * size];
        if (blocks > 1) block.shared.assign(simt_shared_end - simt_shared_begin, (char)0xFF);
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
