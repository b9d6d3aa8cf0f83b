# SPDX-License-Identifier: Apache-2.0
"""Calls of every op with expected results, and kernels that keep a stream busy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk, dense_router, hash_router, topk_select
from tests import compare, frameworks, inputs, oracle
from tests.backends import DTYPES

METHOD = RoutingMethod(256, 6, renormalize_eps=1e-20, scale=1.5)


class Call(NamedTuple):
    """An op with arrays for it; `check` takes its two results as NumPy arrays."""

    op: Callable[..., Any]
    arrays: dict[str, np.ndarray]
    options: dict[str, Any]
    check: Callable[[np.ndarray, np.ndarray], None]

    def __call__(self, arrays: dict[str, Any], **more: Any) -> Any:
        return self.op(**arrays, **self.options, **more)


NAMES = (
    "topk_select", "topk_select of wide rows", "activation_topk", "hash_router", "hash_router of x",
    "dense_router", "dense_router prefill",
)  # fmt: skip


@cache
def call(name: str, seed: int = 0, n: int = 65, dtype: str = "float32") -> Call:
    """Return a call; seeds change the values, not shapes and dtypes."""
    if name.startswith("topk_select"):
        columns, k = (256, 8) if name == "topk_select" else (5000, 600)
        scores = inputs.normal((n, columns), dtype, seed=100 + seed)
        lengths = inputs.rng(101, seed).integers(0, columns + 1, n).astype(np.int32)
        return Call(topk_select, {"scores": scores, "lengths": lengths}, {"k": k}, _exactly(scores, k, lengths))
    if name == "activation_topk":
        logits = inputs.normal((n, 256), dtype, seed=102 + seed)
        bias = inputs.normal((256,), seed=103 + seed, scale=0.1)
        return Call(activation_topk, {"logits": logits, "bias": bias}, {"method": METHOD}, _routes(logits, bias))
    if name.startswith("dense_router"):
        # Small integers, whose products and sums float32 holds exactly, so that every path has the same right answer.
        n, path = (n, "prefill") if name.endswith("prefill") else (min(n, 64), "decode")
        x = (inputs.rng(120, seed).integers(-8, 9, (n, 512)) / 16).astype(DTYPES[dtype])
        weight = (inputs.rng(121, seed).integers(-8, 9, (256, 512)) / 64).astype(DTYPES[dtype])
        bias = inputs.normal((256,), seed=122 + seed, scale=0.1)
        logits = x.astype(np.float32) @ weight.astype(np.float32).T
        arrays = {"x": x, "weight": weight, "bias": bias}
        return Call(dense_router, arrays, {"method": METHOD, "path": path}, _routes(logits, bias))
    ids = inputs.rng(104, seed).integers(0, 500, n).astype(np.int32)
    ids[::9] = -1
    arrays: dict[str, np.ndarray] = {
        "token_ids": ids,
        "table": inputs.rng(105, seed).integers(0, 256, (500, 6), np.int32),
    }
    if name == "hash_router":
        arrays["logits"] = logits = inputs.normal((n, 256), dtype, seed=106 + seed)
        return Call(hash_router, arrays, {"method": METHOD}, _hashes(arrays, logits, 2e-6))
    arrays["x"] = x = inputs.normal((n, 512), dtype, seed=107 + seed)
    arrays["weight"] = weight = inputs.normal((256, 512), dtype, seed=108 + seed, scale=512**-0.5)
    logits = (x.astype(np.float64) @ weight.astype(np.float64).T).astype(np.float32)
    return Call(hash_router, arrays, {"method": METHOD}, _hashes(arrays, logits, 2e-5))


def _exactly(scores: np.ndarray, k: int, lengths: np.ndarray) -> Callable[[np.ndarray, np.ndarray], None]:
    want = oracle.topk(scores, k, lengths)

    def check(values: np.ndarray, indices: np.ndarray) -> None:
        np.testing.assert_array_equal(indices, want[1])
        compare.assert_same_bits(values, want[0])

    return check


def _routes(logits: np.ndarray, bias: np.ndarray) -> Callable[[np.ndarray, np.ndarray], None]:
    want = oracle.route(logits, METHOD, bias)
    return lambda weights, indices: compare.assert_routes(oracle.Routing(weights, indices), want, logits, METHOD, bias)


def _hashes(arrays: dict[str, np.ndarray], logits: np.ndarray, rtol: float) -> Callable[[np.ndarray, np.ndarray], None]:
    want = oracle.hash_route(arrays["token_ids"], arrays["table"], METHOD, logits)

    def check(weights: np.ndarray, indices: np.ndarray) -> None:
        np.testing.assert_array_equal(indices, want.indices)
        compare.assert_weights_close(weights, want.weights, rtol)

    return check


def on_gpu(name: str) -> Any:
    """Return the framework of that name with arrays on the GPU, or skip."""
    framework = frameworks.ON_GPU[name]()
    if name == "torch" and not framework.torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return framework


def upload(framework: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: framework.array(a) for name, a in arrays.items()}


def empty_out(framework: Any, result: Any) -> Any:
    """Return arrays like a result for `out=`, filled with values that no result has."""
    return type(result)(*(framework.array(np.full(a.shape, 77, _dtype(a))) for a in result))


def _dtype(array: Any) -> Any:
    return DTYPES[str(array.dtype).removeprefix("torch.")]


@cache
def _kernel() -> Any:
    import cupy

    source = r"""
    extern "C" __global__ void spin(long long nanoseconds) {
        long long start, now;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
        do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - start < nanoseconds);
    }"""
    return cupy.RawKernel(source, "spin")


def spin(milliseconds: float, stream: Any = None) -> None:
    """Keep a stream (CuPy's current one, or any with `__cuda_stream__`) busy; the first call compiles, with 0."""
    import cupy

    arguments = (np.int64(milliseconds * 1e6),)
    if stream is None:
        _kernel()((1,), (1,), arguments)
        return
    with cupy.cuda.Stream.from_external(stream):
        _kernel()((1,), (1,), arguments)


class Raw:
    """A stream with only its handle."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


# -- Inside jax.jit ----------------------------------------------------------------------------------------------------

# Command buffers by XLA's own choice, wherever it can, and never.
COMMAND_BUFFER_FLAGS = ("", "--xla_gpu_graph_min_graph_size=1", "--xla_gpu_enable_command_buffer=")
LAUNCHED_BY = ("XLA", "handlers")


@contextmanager
def launched_by(how: str, jax: Any) -> Iterator[None]:
    """Compile with kernels launched by XLA itself, or with our handlers."""
    from cupy_router.jax import _lower_ptx, _primitive

    def forget() -> None:
        jax.clear_caches()
        _primitive._jitted.cache_clear()

    if jax.__version_info__ < (0, 8):
        pytest.skip("calls inside jax.jit need JAX 0.8 or later")
    if how == "XLA" and _lower_ptx._gpu() is None:
        pytest.skip("XLA cannot launch our kernels here")
    with pytest.MonkeyPatch.context() as patch:
        if how == "handlers":
            patch.setattr(_lower_ptx, "_gpu", lambda: None)
        forget()
        yield
    forget()


def printed(program: str, flag: str, how: str) -> int:
    """Run a program with a flag of XLA's; it prints "done" and a number."""
    more = {"XLA_FLAGS": flag, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if how == "handlers":
        more["CUPY_ROUTER_JAX_HANDLERS"] = "1"
    environment = {**os.environ, **more}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment)
    if "Unknown flag" in done.stderr:
        pytest.skip(f"this XLA does not know {flag}")
    assert (done.returncode, done.stdout[:5]) == (0, "done "), done.stderr[-3000:]
    return int(done.stdout.split()[1])


def assert_graph_follows(torch: Any, call: Callable[..., Any], arrays: dict[str, Any], name: str, *values: Any) -> None:
    """Assert that replays of a captured call give what eager calls do, whatever one of its arrays holds by then."""
    held = arrays | {name: arrays[name].clone()}
    call(held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(held)
    for value in values:
        held[name].copy_(value)
        graph.replay()
        for found, wanted in zip(captured, call(arrays | {name: value}), strict=True):
            assert torch.equal(found, wanted)
