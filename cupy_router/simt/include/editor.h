// SPDX-License-Identifier: Apache-2.0
// Included before a kernel that an editor reads by itself. Kernels define these types; a launch has them in a namespace.
#pragma once
#include "cuda_cpu.h"

#define int64_t kernel_int64_t
#define id_t kernel_id_t
