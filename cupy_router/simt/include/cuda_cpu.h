// SPDX-License-Identifier: Apache-2.0
// Compiled in front of a kernel's text, this makes it C++ for g++ in which every CUDA thread is a fiber.
//   fibers.h    stacks, the switch between them, what the sanitizers are told
//   threads.h   what a CUDA thread is, and how it waits: barriers and warp collectives
//   schedule.h  who runs when; the report when nobody can
//   launch.h    the way in, and out of crashes and endless loops
//   warp.h  memory.h  integers.h  floats.h  vector_types.h    CUDA's built-in functions and types
//   conversions.h  tensor_core.h  twins.h                     for the C++ twins of inline PTX in kernels/*.cuh
#pragma once
#include <stdint.h>

#include <cmath>

#include "conversions.h"
#include "floats.h"
#include "integers.h"
#include "launch.h"
#include "memory.h"
#include "tensor_core.h"
#include "twins.h"
#include "warp.h"

#define CUPY_ROUTER_SIMT 1

// -- CUDA's words: last, since the standard headers use some of them ----------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static __attribute__((used, section("simt_shared")))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)  // checked at the launch
#define __cluster_dims__(...)   // the launch knows
#define __builtin_assume(condition) ((void)0)
#undef assert
#define assert(condition) \
    ((condition) ? (void)0 : simt::fault(simt::Site::here(__FILE__, __LINE__), "assertion", "%s", #condition))
