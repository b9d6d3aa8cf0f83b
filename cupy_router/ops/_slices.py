# SPDX-License-Identifier: Apache-2.0
"""Calls that are enqueued in slices of tokens: the gate product into a buffer, then a kernel on the slice's logits.

Also what serves any number of tokens by a kernel that is made for few. Each is called as a `Launch` is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from cupy_router import compiler, gemm, scratch
from cupy_router.arrays import ITEM_SIZES, View
from cupy_router.launcher import Launch
from cupy_router.tuning import Gpu, gpu_of

_BY_ROW = ("x", "token_ids")  # the inputs with a row for each token


def budget(gpu: Gpu) -> int:
    """Return the bytes of a slice's logits, and of its hidden states where they are converted to float32 first."""
    return gpu.table.slices.bytes


class Slices:
    """Something enqueued slice by slice; `arrays` are those of the op by name, in the order in which they are called.

    views: the inputs by name, None for those left out.
    out_steps: bytes from row to row of the two results.
    """

    def __init__(
        self, views: Mapping[str, View | None], outputs: Sequence[str], out_steps: Sequence[int], rows: int
    ) -> None:
        given = {name: view for name, view in views.items() if view is not None}
        first = next(iter(given.values()))
        self.device = first.device
        self.num_tokens = first.shape[0]
        self.rows = min(rows, self.num_tokens)
        self._names = (*views, *outputs)
        by_row = {name: view for name, view in given.items() if name in _BY_ROW}
        self._steps = {name: view.row_stride * ITEM_SIZES[view.dtype] for name, view in by_row.items()}
        self._steps |= dict(zip(outputs, out_steps, strict=True))
        self._num_slices = -(-self.num_tokens // self.rows)
        self._counts_needed = self._num_slices > 1 and "num_valid" in given
        backend = compiler.backend(self.device[0])
        assert backend is not None, "ops ask for a backend before they plan"
        self._use = backend.use

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        *pointers, number = map(int, varying)
        previous = self._use(self.device[1])
        try:
            self.enqueue(stream, dict(zip(self._names, pointers, strict=True)), number)
        finally:
            if previous is not None:
                self._use(previous)

    def enqueue(self, stream: int, arrays: dict[str, int], number: int) -> None:
        """All slices, one after the other."""
        counts = self._slice_counts(stream, arrays["num_valid"]) if self._counts_needed else 0
        for index in range(self._num_slices):
            begin = index * self.rows
            rows = min(self.rows, self.num_tokens - begin)
            moved = arrays | {name: arrays[name] + begin * step for name, step in self._steps.items()}
            if counts:
                moved["num_valid"] = counts + 4 * index
            self.enqueue_slice(stream, moved, rows, number if number < 0 else min(max(number - begin, 0), rows))

    def enqueue_slice(self, stream: int, arrays: dict[str, int], rows: int, number: int) -> None:
        """One slice: addresses of its first row, its rows, how many of them are valid (-1: all)."""
        raise NotImplementedError

    def _slice_counts(self, stream: int, num_valid: int) -> int:
        counts = scratch.buffer(self.device, stream, "valid rows of each slice", 4 * self._num_slices)
        self._count(stream, (num_valid, counts))
        return counts

    @cached_property
    def _count(self) -> Launch:
        function = compiler.compile("slice_counts", "slice_counts", {}, self.device)
        fixed = {"num_slices": self._num_slices, "slice_rows": self.rows}
        return Launch(function, 1, 128, ("num_valid", "counts"), fixed)


class ByProduct(Slices):
    """The gate product of each slice, then the kernel that `plan(logits)` makes for a view of its logits.

    The kernel takes the arrays `names` in that order, of which "logits" are the product's; a name that the op does not
    know is a null pointer.
    """

    def __init__(
        self,
        views: Mapping[str, View | None],
        outputs: Sequence[str],
        out_steps: Sequence[int],
        x: View,
        weight: View,
        names: Sequence[str],
        plan: Callable[[View], Launch],
    ) -> None:
        num_outputs = weight.shape[0]
        self._product = gemm.product(x.device, _matrix(x), _matrix(weight))
        rows = max(1, min(budget(gpu_of(x.device)) // (4 * num_outputs + self._product.row_bytes), 2**31 - 1))
        super().__init__(views, outputs, out_steps, rows)
        self._row_bytes, self._taken, self._plan = 4 * num_outputs, tuple(names), plan
        self._num_outputs = num_outputs
        self._launches: dict[int, Launch] = {}
        self.function = self._launch(self.rows).function

    def enqueue(self, stream: int, arrays: dict[str, int], number: int) -> None:
        with self._product.lock:
            gate = self._product.prepare(stream, arrays["weight"])
            super().enqueue(stream, arrays | {"weight": gate}, number)

    def enqueue_slice(self, stream: int, arrays: dict[str, int], rows: int, number: int) -> None:
        logits = scratch.buffer(self.device, stream, "logits", rows * self._row_bytes)
        self._product.multiply(stream, arrays["x"], arrays["weight"], logits, rows)
        arrays["logits"] = logits
        self._launch(rows)(stream, [*(arrays.get(name, 0) for name in self._taken), number])

    def _launch(self, rows: int) -> Launch:
        """There are two sizes of slices at most, that of the last one among them."""
        found = self._launches.get(rows)
        if found is None:
            shape = (rows, self._num_outputs)
            logits = View("logits", 0, shape, (self._num_outputs, 1), "float32", self.device, False, None)
            found = self._launches[rows] = self._plan(logits)
        return found


def _matrix(view: View) -> gemm.Matrix:
    return gemm.Matrix(view.dtype, view.shape[0], view.shape[1], view.row_stride)
