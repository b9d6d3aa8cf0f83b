// SPDX-License-Identifier: Apache-2.0
// The way in: what cuLaunchKernel would check, the arguments unpacked by the kernel's own type, the grid block by block;
// and the way out of a crash or an endless loop, as one more report.
#pragma once
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/time.h>
#include <xmmintrin.h>

#include <utility>

#include "schedule.h"

namespace simt {

// -- Floating point as CuPy compiles it: subnormals flushed (-ftz=true) -------------------------------------------------

// Sets the host's float mode for the launch; the fibers share it.
struct FlushSubnormals {
    const unsigned before = _mm_getcsr();
    FlushSubnormals() { _mm_setcsr(before | 0x8040); }  // flush to zero, denormals are zero
    ~FlushSubnormals() { _mm_setcsr(before); }
};

// -- Crashes and endless loops (the sanitizers have their own handlers) -------------------------------------------------

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
static struct sigaction old_actions[4];
static pthread_t launching_thread;
static char signal_stack[64 << 10];

SIMT_RUNTIME static void on_signal(int number, siginfo_t* information, void*) {
    if (!pthread_equal(pthread_self(), launching_thread) && number == SIGVTALRM) {
        pthread_kill(launching_thread, number);
    } else if (number == SIGVTALRM && !self) {
        if (!report_length) say("time limit");  // between two threads: the host sees the report and stops
    } else if (!self || !pthread_equal(pthread_self(), launching_thread)) {
        for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &old_actions[i], nullptr);  // not ours: crash as always
    } else if (number == SIGVTALRM) {
        fault({}, "time limit", "still running");
    } else if (number == SIGFPE) {
        fault({}, "integer division", "division by zero");
    } else {
        fault({}, "memory fault", "bad or misaligned access near address %p", information->si_addr);
    }
}

struct Traps {
    stack_t old_stack;
    itimerval old_timer;
    explicit Traps(double time_limit) {
        launching_thread = pthread_self();
        const stack_t stack = {signal_stack, 0, sizeof signal_stack};
        sigaltstack(&stack, &old_stack);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &old_actions[i]);
        const time_t seconds = (time_t)time_limit;
        const itimerval timer = {{0, 0}, {seconds, (suseconds_t)((time_limit - seconds) * 1e6)}};
        setitimer(ITIMER_VIRTUAL, &timer, &old_timer);
    }
    ~Traps() {
        setitimer(ITIMER_VIRTUAL, &old_timer, nullptr);
        for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
        sigaltstack(&old_stack, nullptr);
    }
};

// -- The launch --------------------------------------------------------------------------------------------------------

struct Geometry {  // as Python passes it
    unsigned grid[3], block[3], cluster[3], max_threads, dynamic_shared;
};

SIMT_RUNTIME static bool acceptable(const Geometry& g) {
    const uint64_t threads = uint64_t{g.block[0]} * g.block[1] * g.block[2];
    if (!threads || threads > 1024 || g.block[2] > 64)
        say("bad launch: block (%u, %u, %u)", g.block[0], g.block[1], g.block[2]);
    else if (g.max_threads && threads > g.max_threads)
        say("bad launch: %u threads a block, but __launch_bounds__(%u)", (unsigned)threads, g.max_threads);
    for (int i = 0; i < 3 && !report_length; ++i)
        if (!g.grid[i] || g.grid[i] > (i ? 65535u : 0x7FFFFFFFu) || g.grid[i] % g.cluster[i])
            say("bad launch: grid (%u, %u, %u) of clusters (%u, %u, %u)", g.grid[0], g.grid[1], g.grid[2], g.cluster[0],
                g.cluster[1], g.cluster[2]);
#ifndef SIMT_SANITIZED  // red zones would count as shared memory
    const size_t shared = simt_shared_end - simt_shared_begin;
    if (!report_length && (shared < g.dynamic_shared || shared > g.dynamic_shared + (48u << 10)))
        say("bad launch: %zu bytes of shared memory, of which %u dynamic; 48 KB may be static", shared,
            g.dynamic_shared);
#endif
    return !report_length;
}

// Nothing but floats, integers and pointers: the parameter's own type says how many bytes are read, as on the device.
template <class... A, size_t... I>
static void call_with(void (*kernel)(A...), void** parameters, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(parameters[I])...);
}
template <class... A>
static void call() {
    call_with(reinterpret_cast<void (*)(A...)>(launch->kernel), launch->parameters, std::index_sequence_for<A...>());
}

template <class... A>
SIMT_RUNTIME static const char* run(void (*kernel)(A...), const Geometry& g, Schedule schedule, uint64_t seed,
                                    double time_limit, void** parameters) {
    report_length = 0;
    report[0] = 0;
    if (!acceptable(g)) return report;
    gridDim = {g.grid[0], g.grid[1], g.grid[2]};
    blockDim = {g.block[0], g.block[1], g.block[2]};
    const dim3 cluster(g.cluster[0], g.cluster[1], g.cluster[2]);
    const dim3 clusters(gridDim.x / cluster.x, gridDim.y / cluster.y, gridDim.z / cluster.z);
    Launch state{};
    state.schedule = schedule;
    state.random = seed * 2 + 1;
    state.kernel = reinterpret_cast<void (*)()>(kernel);
    state.parameters = parameters;
    state.call = call<A...>;
    launch = &state;
#ifdef __SANITIZE_THREAD__
    host.tsan = __tsan_get_current_fiber();
#endif
    std::vector<unsigned> order(clusters.x * clusters.y * clusters.z);
    for (unsigned i = 0; i < order.size(); ++i) order[i] = schedule == Schedule::kReversed ? order.size() - 1 - i : i;
    if (schedule >= Schedule::kShuffled) shuffle(order);

    {
        const Stacks stacks(cluster.x * cluster.y * cluster.z * blockDim.x * blockDim.y * blockDim.z);
        const FlushSubnormals float_mode;
#ifndef SIMT_SANITIZED
        const Traps traps(time_limit);
#endif
        for (unsigned i = 0; i < order.size() && !report_length; ++i) {
            const unsigned x = order[i] % clusters.x, y = order[i] / clusters.x % clusters.y,
                           z = order[i] / clusters.x / clusters.y;
            forget_accesses(stacks.memory, stacks.memory + stacks.bytes, false);
            run_cluster({x * cluster.x, y * cluster.y, z * cluster.z}, cluster, stacks.memory);
        }
    }
    acquire(&state.end_tag);
    return report_length ? report : nullptr;
}

}  // namespace simt
