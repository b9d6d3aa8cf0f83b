# SPDX-License-Identifier: Apache-2.0
"""Calls that are enqueued in chunks of tokens: the gate GEMM into a buffer, then a kernel on the chunk's logits.

Chunks also let a kernel for few tokens serve any number of tokens. All are called like a `Launch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cupy_router import compiler, gemm, scratch
from cupy_router.arrays import ITEM_SIZES, View
from cupy_router.launcher import Launch
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._cached import NUMBER, Kernel, Work, dense_view, launch_with
from cupy_router.ops._declared import Arrays
from cupy_router.ops._op import Op
from cupy_router.ops._routed import LOGITS, ROUTING
from cupy_router.tuning import Gpu


def budget(gpu: Gpu) -> int:
    """Return the limit on bytes of a chunk: its logits, and its hidden states if they are converted to float32."""
    return gpu.table.chunks.bytes


class Chunks:
    """A call of an op that routes, enqueued chunk by chunk, each of at most `rows` tokens."""

    def __init__(self, op: Op, arrays: Arrays, rows: int) -> None:
        first: View = getattr(arrays, op.names[0])
        self.device = first.device
        self.num_tokens = first.shape[0]
        self.rows = min(rows, self.num_tokens)
        results = arrays.given(*op.result_names)
        self.names = (*op.names, *results)
        by_row = arrays.given(*(name for name in op.names if name in op.by_row), *results)
        views: dict[str, View] = arrays.named(*by_row)
        self._steps = {name: view.row_stride * ITEM_SIZES[view.dtype] for name, view in views.items()}
        self._num_chunks = -(-self.num_tokens // self.rows)
        self.last_rows = self.num_tokens - (self._num_chunks - 1) * self.rows
        self._count = self._counting() if self._num_chunks > 1 and arrays.num_valid is not None else None
        backend = compiler.backend(self.device[0])
        assert backend is not None, "ops ask for a backend before they choose a kernel"
        self._use = backend.use

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        *pointers, number = map(int, varying)
        previous = self._use(self.device[1])
        try:
            self.enqueue(stream, dict(zip(self.names, pointers, strict=True)), number)
        finally:
            if previous is not None:
                self._use(previous)

    def enqueue(self, stream: int, arrays: dict[str, int], number: int) -> None:
        """Enqueue all chunks in order."""
        counts = 0
        if self._count is not None:
            counts = scratch.buffer(self.device, stream, "valid rows of each chunk", 4 * self._num_chunks)
            self._count(stream, (arrays["num_valid"], counts))
        for index in range(self._num_chunks):
            begin = index * self.rows
            rows = min(self.rows, self.num_tokens - begin)
            moved = arrays | {name: arrays[name] + begin * step for name, step in self._steps.items()}
            if counts:
                moved["num_valid"] = counts + 4 * index
            self.enqueue_chunk(stream, moved, rows, number if number < 0 else min(max(number - begin, 0), rows))

    def enqueue_chunk(self, stream: int, arrays: dict[str, int], rows: int, number: int) -> None:
        """Enqueue one chunk, given the addresses of its first row, its number of rows and of valid rows (-1: all)."""
        raise NotImplementedError  # every subclass defines it

    def _counting(self) -> Launch:
        function = compiler.compile("slice_counts", "slice_counts", {}, self.device)
        fixed = {"num_slices": self._num_chunks, "slice_rows": self.rows}
        return Launch(function, 1, 128, ("num_valid", "counts"), fixed)

    def by_rows(self, make: Callable[[int], Work]) -> Callable[[int], Work]:
        """Return the kernels for a chunk's number of rows, made at once. There are two: the last may be smaller."""
        usual = make(self.rows)
        last = usual if self.last_rows == self.rows else make(self.last_rows)
        return lambda rows: usual if rows == self.rows else last


class GateChunks(Chunks):
    """The gate GEMM of each chunk, followed by another op on its logits.

    op: the op that is called.
    target: the op on the logits. It gets the arrays of `op` by name, and the chunk's "logits"; the others are left out.
        If logits are returned, the address of those of the chunk comes last.
    make: returns the kernels of `target` for a view of the logits. Float32 logits without a bias are multiplied into
        the result, and then it gets the view of that.
    """

    def __init__(self, op: Op, arrays: Arrays, gpu: Gpu, target: Op, make: Callable[[View], Work]) -> None:
        weight: View = arrays.weight
        num_outputs = weight.shape[0]
        self._returned: View | None = getattr(arrays, LOGITS, None)
        in_place = self._returned is not None and arrays.logit_bias is None and _can_be_product(self._returned)
        self._target = self._returned if in_place else None
        stride = None if self._target is None else self._target.row_stride
        self._product = gemm.product(weight.device, _matrix(arrays.x), _matrix(weight), stride)
        rows = max(1, min(budget(gpu) // (4 * num_outputs + self._product.row_bytes), 2**31 - 1))
        super().__init__(op, arrays, rows)
        self._row_bytes, self._num_outputs = 4 * num_outputs, num_outputs
        self._taken, self._make = (*target.names, *ROUTING), make
        self._work = self.by_rows(self._on_logits)
        self.function = self._work(self.rows).function

    def enqueue(self, stream: int, arrays: dict[str, int], number: int) -> None:
        with self._product.lock:
            gate = self._product.prepare(stream, arrays["weight"])
            super().enqueue(stream, arrays | {"weight": gate}, number)

    def enqueue_chunk(self, stream: int, arrays: dict[str, int], rows: int, number: int) -> None:
        if self._target is None:
            logits = scratch.buffer(self.device, stream, "logits", rows * self._row_bytes)
        else:
            logits = arrays[LOGITS]
        self._product.multiply(stream, arrays["x"], arrays["weight"], logits, rows)
        arrays["logits"] = logits
        varying = [*(arrays.get(name, 0) for name in self._taken), number]
        self._work(rows)(stream, varying if self._returned is None else [*varying, arrays[LOGITS]])

    def _on_logits(self, rows: int) -> Work:
        """Return the kernels on the logits of a chunk."""
        shape = (rows, self._num_outputs)
        if self._target is None:
            return self._make(dense_view("logits", 0, shape, "float32", self.device))
        return self._make(replace(self._target, shape=shape))


def launch_with_logits(op: Op, kernel: Kernel, arrays: Arrays) -> Work:
    """Return the launch of a target of :class:`GateChunks` that also fills `arrays.logits_out`, whose address is last.

    If the logits of the chunk are in this array, only rows of padding are written.
    """
    takes = (*op.names, *ROUTING) if kernel.takes is None else kernel.takes
    passed = (*op.names, *ROUTING, NUMBER, LOGITS)
    return launch_with((*takes, NUMBER, LOGITS), with_logits(kernel, arrays), arrays.indices.device, passed)


def with_logits(kernel: Kernel, arrays: Arrays) -> Kernel:
    """Return a kernel that also fills `arrays.logits_out`, if that is not None."""
    returned: View | None = arrays.logits_out
    if returned is None:
        return kernel._replace(fixed=kernel.fixed | {f"{LOGITS}_stride": 0})
    macros = {
        "LOGITS_OUT": row_lanes.DTYPE_CODES[returned.dtype],
        "LOGITS_IN_PLACE": int(arrays.logits.name == returned.name),
    }
    stride = {f"{LOGITS}_stride": returned.row_stride}
    return kernel._replace(macros=kernel.macros | macros, fixed=kernel.fixed | stride)


def _can_be_product(logits: View) -> bool:
    """Return whether the gate GEMM can write into an array: in float32, rows that do not overlap."""
    return logits.dtype == "float32" and logits.shape[1] <= logits.row_stride < 2**31


def _matrix(view: View) -> gemm.Matrix:
    return gemm.Matrix(view.dtype, view.shape[0], view.shape[1], view.row_stride)
