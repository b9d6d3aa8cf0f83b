# SPDX-License-Identifier: Apache-2.0
"""An op that uses all that a declaration can say: counts of ids, their order by id, and a copy of some bytes.

It has two kernels, rows that depend on each other, an input that it writes, inputs of integers and of any dtype, and
nested results, one of which exists for some options only and has a size from an option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest

from cupy_router import compiler
from cupy_router.arrays import ITEM_SIZES
from cupy_router.ops._cached import Kernel, launch_of
from cupy_router.ops._declared import ANY, IDS, INTS, NUM_VALID, Arrays, Minimum, Result, layer, row
from cupy_router.ops._op import Op
from cupy_router.ops._options import Options
from cupy_router.ops._run import run
from cupy_router.tuning import Gpu

SOURCE = """// SPDX-License-Identifier: Apache-2.0
#include "device/num_valid.cuh"

SPECIALISED int ID_BYTES = 4;
SPECIALISED int LOAD_BYTES = 4;

template <int BYTES> struct Id { typedef int type; };
template <> struct Id<1> { typedef unsigned char type; };
template <> struct Id<2> { typedef short type; };
template <> struct Id<8> { typedef long long type; };
typedef Id<ID_BYTES>::type id_t;
typedef Id<LOAD_BYTES>::type load_t;

// The id of a pair, token * top_k + column. Rows of ids may lie apart.
__device__ __forceinline__ id_t id_of(const id_t* ids, long long ids_stride, int pair, int top_k) {
    return ids[pair / top_k * ids_stride + pair % top_k];
}

extern "C" __global__ void tally_count(const id_t* ids, load_t* load, int* counts, const int* num_valid,
                                       int num_valid_value, int num_tokens, int top_k, long long ids_stride) {
    const int valid = static_cast<int>(valid_rows(num_valid, num_valid_value, num_tokens)) * top_k;
    const int expert = blockIdx.x;
    int count = 0;
    for (int pair = 0; pair < valid; ++pair) count += id_of(ids, ids_stride, pair, top_k) == expert;
    counts[expert] = count;
    if (load) load[expert] += count;
}

extern "C" __global__ void tally_order(const id_t* ids, const unsigned char* payload, int* order, unsigned char* copy,
                                       const int* num_valid, int num_valid_value, int num_tokens, int top_k,
                                       long long ids_stride, int num_experts, int capacity, long long num_bytes) {
    for (int64_t i = 0; i < num_bytes; ++i) copy[i] = payload[i];
    const int valid = static_cast<int>(valid_rows(num_valid, num_valid_value, num_tokens)) * top_k;
    int place = 0;
    for (int expert = 0; order && expert < num_experts; ++expert)
        for (int pair = 0; pair < valid && place < capacity; ++pair)
            if (id_of(ids, ids_stride, pair, top_k) == expert) order[place++] = pair;
    for (; order && place < capacity; ++place) order[place] = -1;
}
"""


class Layout(NamedTuple):
    """counts [num_experts]; order [capacity], None if it was not asked for."""

    counts: Any
    order: Any


class Tally(NamedTuple):
    """A layout, and the copy of the payload."""

    layout: Any
    copy: Any


@dataclass(frozen=True)
class TallyOptions(Options):
    num_experts: int
    capacity: int | None
    with_order: bool


class TallyOp(Op):
    name = "tally"
    options = TallyOptions
    inputs = (
        row("ids", "num_tokens, top_k", IDS, required=True),
        layer("payload", "num_items", ANY, required=True),
        layer("load", "num_experts", INTS, written=True),
        NUM_VALID,
    )
    results = (
        Result("layout.counts", "num_experts", "int32"),
        Result("layout.order", "capacity", "int32", fill=-1, exists=lambda options: options.with_order),
        Result("copy", "num_items", lambda options, dtypes: dtypes["payload"]),
    )
    returns = Tally
    nested: ClassVar[dict[str, Any]] = {"layout": Layout}
    rows_independent = False
    vmap = "loop"

    def example(self) -> TallyOptions:
        return TallyOptions(3, 5, True)

    def sizes(self, options: TallyOptions) -> dict[str, int]:
        return {"num_experts": options.num_experts}

    def result_sizes(self, options: TallyOptions, sizes: Mapping[str, Any], minimum: Minimum = min) -> dict[str, Any]:
        return {"capacity": sizes["num_tokens"] * sizes["top_k"] if options.capacity is None else options.capacity}

    def reference(self, options: TallyOptions, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
        ids = arrays.ids[:num_valid].reshape(-1).astype(np.int64)
        known = (ids >= 0) & (ids < options.num_experts)
        counts = np.bincount(ids[known], minlength=options.num_experts).astype(np.int32)
        if arrays.load is not None:
            arrays.load += counts.astype(arrays.load.dtype)
        if not options.with_order:
            return counts, arrays.payload.copy()
        capacity = arrays.ids.size if options.capacity is None else options.capacity
        order = np.full(capacity, -1, np.int32)
        pairs = np.argsort(np.where(known, ids, options.num_experts), kind="stable")[: known.sum()][:capacity]
        order[: pairs.size] = pairs
        return counts, order, arrays.payload.copy()

    def kernel(self, options: TallyOptions, arrays: Arrays, gpu: Gpu) -> TwoLaunches:
        return TwoLaunches(self, options, arrays)


class TwoLaunches:
    """The counts, then the order."""

    def __init__(self, op: Op, options: TallyOptions, arrays: Arrays) -> None:
        ids, device = arrays.ids, arrays.ids.device
        item_bytes = np.dtype(arrays.payload.host.dtype).itemsize if arrays.payload.host is not None else 4
        macros = {
            "ID_BYTES": ITEM_SIZES[ids.dtype],
            "LOAD_BYTES": 4 if arrays.load is None else ITEM_SIZES[arrays.load.dtype],
            "HAS_NUM_VALID": int(arrays.num_valid is not None),
        }
        fixed = {"num_tokens": ids.shape[0], "top_k": ids.shape[1], "ids_stride": ids.row_stride}
        more = {
            "num_experts": options.num_experts,
            "capacity": 0 if arrays.order is None else arrays.order.shape[0],
            "num_bytes": arrays.payload.shape[0] * item_bytes,
        }
        takes = ("ids", "load", "counts", "num_valid"), ("ids", "payload", "order", "copy", "num_valid")
        count = Kernel("tally", "tally_count", macros, options.num_experts, 1, fixed, takes=takes[0])
        order = Kernel("tally", "tally_order", macros, 1, 1, fixed | more, takes=takes[1])
        self._launches = [launch_of(op, options, kernel, device) for kernel in (count, order)]
        self.function = self._launches[0].function

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        for launch in self._launches:
            launch(stream, varying)


OP = TallyOp()


def tally(
    ids: Any, payload: Any, num_experts: int, *, capacity: int | None = None, with_order: bool = True, load: Any = None,
    num_valid: Any = None, out: Any = None, stream: Any = None,
) -> Tally:  # fmt: skip
    """Count ids, order their pairs by id, and copy a payload."""
    number, count = (num_valid, None) if isinstance(num_valid, int) else (-1, num_valid)
    fields = num_experts, capacity, with_order
    return run(OP, fields, (ids, payload, load, count), out, stream, number)  # type: ignore[no-any-return]


def add_kernel_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler find tally.cu in a folder, during a test."""
    (folder / "tally.cu").write_text(SOURCE)
    folders = [*compiler.kernel_folders(), folder]
    monkeypatch.setattr(compiler, "kernel_folders", lambda: folders)


def torch_with_tally() -> Any:
    """Return PyTorch, which knows the op from now on."""
    torch = pytest.importorskip("torch")
    from cupy_router.torch import _library

    if not hasattr(torch.ops.cupy_router, OP.name):
        _library.define(OP)
    return torch
