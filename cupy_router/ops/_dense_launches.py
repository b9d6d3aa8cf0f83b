# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels that multiply and route: for few tokens, and for any number in chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from cupy_router import gemm, scratch
from cupy_router.method import RoutingMethod
from cupy_router.ops import _dense_decode as decode
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._cached import NUMBER, Kernel, Work, launch_with
from cupy_router.ops._chunks import Chunks
from cupy_router.ops._declared import Arrays
from cupy_router.ops._dense_clusters import by_clusters
from cupy_router.ops._dense_decode import COUNTERS
from cupy_router.ops._given import TOKEN_IDS, given_macros
from cupy_router.ops._layout import ARRAYS as LAYOUT_ARRAYS
from cupy_router.ops._method import bias_macros, headers
from cupy_router.ops._op import Op
from cupy_router.ops._replicas import replica_arguments, replica_macros
from cupy_router.ops._routed import LOGITS
from cupy_router.tensor_map import Maps, Matrix
from cupy_router.tuning import Gpu


def fits_decode(method: RoutingMethod, gpu: Gpu) -> bool:
    """Return whether the kernel for few tokens can route by this method on this GPU, whose instructions it uses."""
    return row_lanes.fits_method(method) and gpu.capability >= (8, 0)


def decodes(path: str | None, num_tokens: int, gpu: Gpu) -> bool:
    """Return whether it is asked for, or faster."""
    return path == "decode" if path else num_tokens <= min(gpu.table.decode.max_tokens, decode.MAX_TOKENS)


def fuses(options: Any, arrays: Arrays, gpu: Gpu) -> bool:
    """Return whether a call of more tokens is faster by one launch than by cuBLAS and a second launch."""
    x, weight = arrays.x, arrays.weight
    gate_bytes = 2 * weight.shape[0] * x.shape[1]
    most = next((tokens for up_to, tokens in gpu.table.decode.fused if gate_bytes <= up_to), 0)
    if options.path is not None or x.shape[0] > most or not fits_decode(options.method, gpu):
        return False
    invariant = replace(options, batch_invariant=True)
    return by_clusters(gpu, x.dtype, weight.dtype, _aligned(invariant, arrays)) and (
        x.shape[0] <= _invariant_rows(invariant, arrays, gpu)
    )


def decode_kernel(
    options: Any,
    num_tokens: int,
    arrays: Arrays,
    gpu: Gpu,
    *,
    with_layout: bool = False,
    more: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Kernel, int, list[Matrix]]:
    """Return the kernel for few tokens, the number of its partial sums, and the matrices that it copies by tiles.

    with_layout: a layout will follow.
    more: further macros.
    """
    method, x, weight, given = options.method, arrays.x, arrays.weight, arrays.given_experts
    hidden = x.shape[1]
    strides = (x.row_stride, weight.row_stride, arrays.weights.row_stride, arrays.indices.row_stride)
    logits = arrays.logits_out
    launch = decode.launch_for(
        gpu, method, x.dtype, weight.dtype, num_tokens, hidden, aligned=_aligned(options, arrays),
        dense=strides == (hidden, hidden, method.num_columns, method.num_columns), given=arrays.given(*decode.INPUTS),
        logits_dtype=None if logits is None else logits.dtype, biases=bias_macros(arrays), with_layout=with_layout,
        batch_invariant=options.batch_invariant,
    )  # fmt: skip
    strides = (*strides, *(0 if view is None else view.row_stride for view in (given, logits)))
    fixed = decode.fixed_arguments(method, num_tokens, *strides) | replica_arguments(options)
    macros = {**launch.macros, **given_macros(options, arrays), **replica_macros(options, arrays), **more}
    kernel = Kernel(
        launch.file, launch.file, macros, launch.grid, launch.block, fixed, headers(method), launch.shared_bytes
    )
    matrices = [
        Matrix(rows, hidden, 2 * view.row_stride, tile_rows)
        for view, rows, tile_rows in zip((x, weight), (num_tokens, method.num_logits), launch.tile_rows, strict=True)
        if tile_rows
    ]
    return kernel, launch.partials, matrices


class Decode:
    """A kernel for few tokens, with scratch memory of the stream on which it is called.

    arrays: the parameters for the arrays that a call passes. Others are null.
    """

    def __init__(
        self,
        kernel: Kernel,
        partials: int,
        matrices: Sequence[Matrix],
        device: tuple[str, int],
        arrays: Sequence[str],
        counters: int = COUNTERS,
    ) -> None:
        layout = [name for name in arrays if name in LAYOUT_ARRAYS]
        maps = decode.MAPS[: len(matrices)]
        varying = (*decode.ARRAYS, LOGITS, *layout, *decode.SCRATCH, NUMBER, *maps)
        if TOKEN_IDS in arrays:
            varying, kernel = (*varying, TOKEN_IDS), by_token_id(kernel)
        self._launch = launch_with(varying, kernel, device, (*arrays, *decode.SCRATCH, NUMBER, *maps))
        self._device, self._use = device, "decode" if counters == COUNTERS else "decode by groups"
        self._counter_bytes, self._scratch_bytes = 4 * counters, 4 * (counters + partials)  # in one buffer
        self.function = self._launch.function
        encode = self.function.backend.tensor_map
        self._maps = [
            (arrays.index(name), Maps(encode, matrix)) for name, matrix in zip(("x", "weight"), matrices, strict=False)
        ]

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        counters = scratch.buffer(self._device, stream, self._use, self._scratch_bytes)
        maps = [map_of(int(varying[place])) for place, map_of in self._maps]
        self._launch(stream, (*varying[:-1], counters, counters + self._counter_bytes, varying[-1], *maps))


def by_token_id(kernel: Kernel) -> Kernel:
    """Return a kernel that takes token ids in each call."""
    return kernel._replace(fixed={name: value for name, value in kernel.fixed.items() if name != TOKEN_IDS})


def fused_chunks(
    op: Op,
    options: Any,
    arrays: Arrays,
    gpu: Gpu,
    parameters: Callable[[Sequence[str]], Sequence[str]] = tuple,
    more: Mapping[str, int] = MappingProxyType({}),
) -> Work:
    """Return the fused kernel for any number of tokens, used for batch invariance or if there is no cuBLAS.

    op: the op that is called.
    parameters: returns the parameters of the kernel for the names of its arrays.
    more: further macros.
    """
    if not fits_decode(options.method, gpu):
        limits = f"{decode.MAX_EXPERTS} experts, {decode.MAX_K} columns of results, {decode.MAX_K} groups"
        obstacle = gemm.why_not(arrays.x.device)
        raise RuntimeError(f"more than {limits}, or a compute capability below 8.0, need cuBLAS: {obstacle}")
    return _DecodeChunks(op, options, arrays, gpu, parameters, more)


def _aligned(options: Any, arrays: Arrays) -> bool:
    """Return whether rows are read by words of 16 bytes; not those that overlap if they may be copied by tiles."""
    views, hidden = (arrays.x, arrays.weight), arrays.x.shape[1]
    both = all(row_lanes.aligned(view.pointer, view.row_stride, view.dtype, 8) for view in views)
    overlap = options.batch_invariant and any(view.row_stride < hidden for view in views)
    return both and hidden % 8 == 0 and not overlap


def _invariant_rows(options: Any, arrays: Arrays, gpu: Gpu) -> int:
    x, weight = arrays.x, arrays.weight
    num_biases = bias_macros(arrays).get("NUM_BIASES", 1)
    of = options.method.num_logits, x.shape[1], x.dtype, weight.dtype
    return decode.invariant_rows(gpu, *of, aligned=_aligned(options, arrays), num_biases=num_biases)


class _DecodeChunks(Chunks):
    def __init__(
        self,
        op: Op,
        options: Any,
        arrays: Arrays,
        gpu: Gpu,
        parameters: Callable[[Sequence[str]], Sequence[str]],
        more: Mapping[str, int],
    ) -> None:
        most = _invariant_rows(options, arrays, gpu) if options.batch_invariant else decode.MAX_TOKENS
        super().__init__(op, arrays, most)
        names = parameters(self.names)

        def make(rows: int) -> Work:
            counters = COUNTERS if rows <= decode.MAX_TOKENS else decode.GROUP_COUNTERS
            return Decode(*decode_kernel(options, rows, arrays, gpu, more=more), self.device, names, counters)

        self._work = self.by_rows(make)
        self.function = self._work(self.rows).function

    def enqueue_chunk(self, stream: int, arrays: dict[str, int], rows: int, number: int) -> None:
        self._work(rows)(stream, [*(arrays[name] for name in self.names), number])
