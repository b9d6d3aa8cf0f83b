# SPDX-License-Identifier: Apache-2.0
"""A model of tensor cores, bit for bit: products of 16-bit floats added to float32 accumulators.

A tensor core adds the products of a step and the accumulator at once. It aligns them to the largest exponent among
them, or to a least one, cuts off what lies below a fixed number of bits, adds exactly, and truncates the sum to
float32. A sum that is truncated to 0 is +0. So the order within a step does not matter, but small terms beside a large
one do lose bits.

The constants describe Hopper (compute capability 9.0), for `mma.sync` and `wgmma`. They follow published models of
tensor cores (arXiv:2511.10909, arXiv:2512.07004). tests/test_mma_model.py compares the model with what an H200 gave,
tests/gpu/test_mma_model_gpu.py with the GPU at hand. cupy_router/simt/include/tensor_core.h is the same in C++.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

WIDTH = 16  # products that are added at once
FRACTION_BITS = 25  # that an aligned term keeps, from the largest exponent down
LOWEST_EXPONENT = {"float16": -14, "bfloat16": -126, "float32": -126}  # of normal numbers, and of all subnormal ones
LEAST_ALIGNMENT = -133  # terms that are all smaller are aligned to this exponent
NOTHING = -10_000  # exponent of 0: it does not count in an alignment
NAN = np.array(0x7FFFFFFF, np.uint32).view(np.float32)

# The order of the gate GEMM: kernels/gate/gemm_mma.cuh and gemm_wgmma.cuh.
PARTS, STEP = 16, 32  # of hidden, in columns of a step


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a [..., m, k] times b [..., n, k] plus c [..., m, n] float32, as a chain of products along k."""
    total = c.astype(np.float32)
    for begin in range(0, a.shape[-1], WIDTH):
        columns = slice(begin, begin + WIDTH)
        total = _add_products(a[..., :, None, columns], b[..., None, :, columns], total)
    return total


@np.errstate(all="ignore")
def _add_products(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    products = a.astype(np.float64) * b.astype(np.float64)  # exact
    exponents = np.where(products == 0, NOTHING, exponents_of(a) + exponents_of(b))
    largest = np.maximum(exponents.max(-1), np.where(c == 0, NOTHING, exponents_of(c)))
    unit = np.ldexp(1.0, np.maximum(largest, LEAST_ALIGNMENT) - FRACTION_BITS)
    terms = np.trunc(products / unit[..., None]).sum(-1) + np.trunc(c / unit)  # exact: up to 33 bits
    return truncated(terms * unit)


def exponents_of(values: np.ndarray) -> np.ndarray:
    """Return the exponents of floats; subnormal ones and 0 have the lowest."""
    exponents = np.frexp(values.astype(np.float64))[1] - 1
    return np.where(values == 0, NOTHING, exponents).clip(LOWEST_EXPONENT[values.dtype.name], None)


def truncated(values: np.ndarray) -> np.ndarray:
    """Return float64 values as float32, rounded towards +0, from 2**128 on to infinity; NaN has the GPU's bits."""
    rounded = values.astype(np.float32)
    beyond = (np.abs(rounded) > np.abs(values)) & (np.abs(values) < 2.0**128)
    rounded = np.where(beyond, np.nextafter(rounded, np.float32(0)), rounded)
    return np.where(np.isnan(values), NAN, rounded + np.float32(0)).astype(np.float32)


def gate_logits(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the logits [num_tokens, num_experts] of a batch-invariant call for 16-bit floats of one dtype.

    The order of sums is that of docs/batch_invariance.md.
    """
    hidden, steps = x.shape[1], -(-x.shape[1] // STEP)
    x, weight = (np.pad(rows, ((0, 0), (0, steps * STEP - hidden))) for rows in (x, weight))
    zero = np.zeros((len(x), len(weight)), np.float32)
    bounds = [part * steps // PARTS * STEP for part in range(PARTS + 1)]
    sums = [multiply(x[:, begin:end], weight[:, begin:end], zero) for begin, end in pairwise(bounds)]
    total, *others = (add(first, second) for first, second in zip(sums[0::2], sums[1::2], strict=True))
    for more in others:
        total = add(total, more)
    return flushed(total)


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Add as the float32 units of a GPU do with flush-to-zero."""
    return flushed(flushed(a) + flushed(b))


def flushed(values: np.ndarray) -> np.ndarray:
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0), values)
