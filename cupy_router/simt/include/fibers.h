// SPDX-License-Identifier: Apache-2.0
// A fiber is a stack and the place where it left off. Every CUDA thread is one; the host is one more.
// The sanitizers are told about each switch, so that they follow every CUDA thread's stack and history.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SIMT_SANITIZED 1
#endif

// The machinery itself is not instrumented: it touches all stacks and all shared memory, on purpose.
#define SIMT_RUNTIME __attribute__((no_sanitize("address", "thread", "undefined")))

#ifndef SIMT_UCONTEXT
#define SIMT_FAST_SWITCH 1
// Ten lines of assembly instead of swapcontext, which makes a system call each time: about 19 times faster. With
// -DSIMT_UCONTEXT the portable one is used, a start for other processors.
extern "C" void simt_switch(void** save, void* load);
__asm__(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size simt_switch, .-simt_switch
)");
#endif

namespace simt {

#ifdef SIMT_SANITIZED
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kPageBytes = 4096;

struct Fiber {
#ifdef SIMT_FAST_SWITCH
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    const void* stack = nullptr;  // lowest address, and size, as AddressSanitizer asks for them
    size_t stack_bytes = 0;
    void* fake_stack = nullptr;
    void* tsan = nullptr;
};

static Fiber host;

SIMT_RUNTIME static void prepare(Fiber& fiber, char* stack, void (*entry)()) {
    fiber.stack = stack;
    fiber.stack_bytes = kStackBytes;
    fiber.fake_stack = nullptr;
#ifdef SIMT_FAST_SWITCH
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;                         // the return address of `entry`, which never returns
    *--top = reinterpret_cast<void*>(entry);  // where the `ret` of the first switch goes
    top -= 6;                                 // six saved registers of any value
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#endif
#ifdef __SANITIZE_THREAD__
    fiber.tsan = __tsan_create_fiber(0);  // ordered after the host's past, but after no other fiber's
#endif
}

// Destroying a fiber of ThreadSanitizer makes its accesses unreportable, keeping it costs a megabyte: the latest 512 stay.
static void* dismissed[512];
static unsigned num_dismissed = 0;
SIMT_RUNTIME static void dismiss(Fiber& fiber) {
#ifdef __SANITIZE_THREAD__
    void*& oldest = dismissed[num_dismissed++ % 512];
    if (oldest) __tsan_destroy_fiber(oldest);
    oldest = fiber.tsan;
#endif
    (void)fiber;
}

SIMT_RUNTIME static void switch_fiber(Fiber& from, Fiber& to, bool for_good = false) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef SIMT_FAST_SWITCH
    simt_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
    (void)for_good;
}

// The first thing that a fiber does: AddressSanitizer tells here where the host's stack lies.
SIMT_RUNTIME static void arrived_on_fiber() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &host.stack, &host.stack_bytes);
#endif
}

// What ThreadSanitizer takes for synchronisation. A tag is just an address of its own.
typedef uint64_t Tag;
SIMT_RUNTIME static inline void release(Tag* tag) {
#ifdef __SANITIZE_THREAD__
    __tsan_release(tag);
#endif
    (void)tag;
}
SIMT_RUNTIME static inline void acquire(Tag* tag) {
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(tag);
#endif
    (void)tag;
}

SIMT_RUNTIME static void raw_fill(char* to, int byte, size_t count) {
    for (volatile char* p = to; p < to + count; ++p) *p = (char)byte;
}
SIMT_RUNTIME static void raw_copy(char* to, const char* from, size_t count) {
    for (volatile char* p = to; p < to + count; ++p) *p = *from++;
}

// Memory that the next block uses anew: ThreadSanitizer forgets who touched it, the contents stay. Nothing but a new
// mapping makes it forget without ordering the next block after the last one, which would hide missing fences.
SIMT_RUNTIME static void forget_accesses(char* begin, char* end, bool keep_contents) {
#ifdef __SANITIZE_THREAD__
    char* first = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(begin) & ~(kPageBytes - 1));
    const size_t bytes = (end - first + kPageBytes - 1) & ~(kPageBytes - 1);
    const int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    char* saved = nullptr;  // all of the pages: other variables may lie on them as well, those of this file among them
    if (keep_contents) {
        saved = static_cast<char*>(mmap(nullptr, bytes, protection, flags, -1, 0));
        raw_copy(saved, first, bytes);
    }
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    mmap(first, bytes, protection, flags | MAP_FIXED, -1, 0);
    if (saved) raw_copy(first, saved, bytes);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    if (saved) munmap(saved, bytes);
#endif
    (void)begin, (void)end, (void)keep_contents;
}

// The stacks of all threads that live at once, for the time of a launch: hundreds of kernels may be loaded.
struct Stacks {
    char* memory;
    size_t bytes;
    SIMT_RUNTIME explicit Stacks(size_t count) : bytes(count * kStackBytes) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        memory = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0));
#ifndef __SANITIZE_THREAD__
        for (size_t i = 0; i < count; ++i)
            mprotect(memory + i * kStackBytes, kPageBytes, PROT_NONE);  // catches overflow
#endif
    }
    SIMT_RUNTIME ~Stacks() {
#ifdef __SANITIZE_ADDRESS__
        ASAN_UNPOISON_MEMORY_REGION(memory, bytes);  // a launch that ended early leaves frames behind
#endif
        munmap(memory, bytes);
    }
};

}  // namespace simt
