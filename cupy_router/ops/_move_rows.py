# SPDX-License-Identifier: Apache-2.0
"""The kernels of permute and unpermute, and of their gradients, and their launch shapes.

Both kernels divide rows over teams of threads (kernels/rows/team.cuh). The threads of a dot product, and so the order
of its additions, follow from the arrays' columns, dtypes, strides and alignment, never from the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cupy_router.arrays import View, item_bits
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._cached import Kernel
from cupy_router.ops._declared import Arrays
from cupy_router.tuning import Gpu

_WORD = 16  # the most bytes that a thread reads at once
_WARP = 32
_SMALL_TEAMS = 4  # of a warp each in a block, for short rows
_THREADS_WITH_SUMS = 512  # of a multiprocessor, so that a thread can have 128 registers
_SHARED_BYTES = 46 * 1024  # static, for the sums of each warp of a block


class _Team(NamedTuple):
    """Constants of the same names in rows/team.cuh."""

    team: int
    teams: int
    parts: int
    unroll: int

    @property
    def threads(self) -> int:
        return self.team * self.teams

    @property
    def warps(self) -> int:
        return self.threads // _WARP

    def macros(self, sums: bool) -> dict[str, int]:
        """With sums, ptxas is told how many blocks suffice: left to itself it spills registers or fills too many."""
        bounds = {"MIN_BLOCKS": max(1, _THREADS_WITH_SUMS // self.threads)} if sums else {}
        return {"TEAM": self.team, "TEAMS": self.teams, "PARTS": self.parts, "UNROLL": self.unroll, **bounds}


def permute_kernel(options: Any, arrays: Arrays, gpu: Gpu, clears: bool = True) -> Kernel:
    """Return the kernel that computes these results. Unless it clears rows, it writes to those of pairs only."""
    x, positions, rows, residual = arrays.x, arrays.positions, arrays.rows, arrays.residual
    want, tuned = options.want, gpu.table.move_rows
    (num_tokens, hidden), top_k = x.shape, positions.shape[1]
    capacity = arrays.order.shape[0]
    weights = arrays.weights if "rows" in want else None
    has_dots, has_residual_dots = "dots" in want, "residual_dots" in want
    others = [arrays.y] * has_dots + [residual] * has_residual_dots + [arrays.scaled] * ("scaled" in want)
    moved = [x, rows] if "rows" in want else [x]
    macros = {
        "HAS_ROWS": int("rows" in want),
        "HAS_DOTS": int(has_dots),
        "HAS_SCALED": int("scaled" in want),
        "HAS_RESIDUAL_SCALE": int("scaled" in want and arrays.residual_scale is not None),
        "HAS_RESIDUAL_DOTS": int(has_residual_dots),
    }
    if others or weights is not None:
        vector = _vector(hidden, [*moved, *others])
        unroll = _unroll(tuned.dots_unroll if has_dots else tuned.permute_unroll, x, others)
        macros |= {"ITEM_BYTES": _item_bytes(x), "VECTOR": vector, "HIDDEN": hidden} | _dtypes(
            DTYPE=x, Y_DTYPE=arrays.y, RESIDUAL_DTYPE=residual
        )
        vectors = hidden // vector
    else:  # bytes, whatever they mean
        item = _word(hidden, moved)
        vectors, unroll = hidden * _item_bytes(x) // item, tuned.permute_unroll
        macros |= {"ITEM_BYTES": item, "VECTOR": 1, "HIDDEN": vectors}
    team = _team(gpu, vectors, unroll, positions, has_dots or has_residual_dots)
    slots, groups, spread = _slots(gpu, top_k), 1, False
    if has_dots and num_tokens <= gpu.scaled(tuned.spread_tokens):
        slots, spread = min(slots, tuned.spread_slots), True
        groups = max(1, -(-top_k // slots))
    shares_order = "rows" in want and capacity <= tuned.shared_order and team.teams == 1 and (spread or slots >= top_k)
    padding_rows = _padding_rows(gpu, capacity, num_tokens * top_k)
    token_blocks = -(-num_tokens // team.teams) * team.parts * groups
    padding_blocks = -(-capacity // (padding_rows * team.warps)) if "rows" in want and clears else 0
    strided = [positions, weights, *moved, *others, arrays.dots if has_dots else None]
    macros |= team.macros(has_dots or has_residual_dots) | {
        "TOP_K": top_k,
        "SLOTS": slots,
        "SPREAD": int(spread),
        "DENSE": int(_dense(strided)),
        "READ_ONCE": int(has_dots and _read_once(gpu, arrays.y, num_tokens * top_k, tuned.permute_read_once)),
        "PADDING_ROWS": padding_rows,
        "SHARED_ORDER": tuned.shared_order * shares_order,
        **_weights(weights),
    }
    fixed: dict[str, int | float] = {
        "num_tokens": num_tokens,
        "capacity": capacity,
        "token_blocks": token_blocks,
        "x_bytes": _row_bytes(x),
        "positions_stride": positions.row_stride,
        "weights_stride": _row_stride(weights),
        "y_bytes": _row_bytes(arrays.y),
        "residual_bytes": _row_bytes(residual),
        "rows_bytes": _row_bytes(rows),
        "dots_stride": _row_stride(arrays.dots),
        "scaled_bytes": _row_bytes(arrays.scaled),
    }
    grid = max(1, token_blocks + padding_blocks)
    return Kernel("permute", "permute", macros, grid, team.threads, fixed)


def unpermute_kernel(options: Any, arrays: Arrays, gpu: Gpu) -> Kernel:
    """Return the kernel that computes these results."""
    y, positions, residual, x, sums = arrays.y, arrays.positions, arrays.residual, arrays.x, arrays.sums
    want, tuned = options.want, gpu.table.move_rows
    (capacity, hidden), (num_tokens, top_k) = y.shape, positions.shape
    has_sums, has_dots = "sums" in want, "dots" in want
    weights = arrays.weights if has_sums else None
    others = [residual] * (residual is not None) + [x] * has_dots
    moved = [y, sums] if has_sums else [y]
    vector = _vector(hidden, [*moved, *others])
    unroll = _unroll(tuned.dots_unroll if has_dots else tuned.unpermute_unroll, y, others)
    team = _team(gpu, hidden // vector, unroll, positions, has_dots)
    strided = [positions, weights, *moved, *others, arrays.dots if has_dots else None]
    macros = {
        "HAS_SUMS": int(has_sums),
        "HAS_DOTS": int(has_dots),
        "HAS_RESIDUAL": int(residual is not None),
        "HAS_RESIDUAL_SCALE": int(arrays.residual_scale is not None),
        "HIDDEN": hidden,
        "VECTOR": vector,
        **team.macros(has_dots),
        "TOP_K": top_k,
        "SLOTS": _slots(gpu, top_k),
        "READ_ONCE": int(_read_once(gpu, y, num_tokens * top_k, tuned.unpermute_read_once)),
        "DENSE": int(_dense(strided)),
        **_dtypes(DTYPE=y, RESIDUAL_DTYPE=residual, X_DTYPE=x),
        **_weights(weights),
    }
    fixed: dict[str, int | float] = {
        "num_tokens": num_tokens,
        "capacity": capacity,
        "y_bytes": _row_bytes(y),
        "positions_stride": positions.row_stride,
        "weights_stride": _row_stride(weights),
        "residual_bytes": _row_bytes(residual),
        "x_bytes": _row_bytes(x),
        "sums_bytes": _row_bytes(sums),
        "dots_stride": _row_stride(arrays.dots),
    }
    grid = max(1, -(-num_tokens // team.teams) * team.parts)
    return Kernel("unpermute", "unpermute", macros, grid, team.threads, fixed)


# -- Launch shape ------------------------------------------------------------------------------------------------------


def _team(gpu: Gpu, vectors: int, unroll: int, positions: View, sums: bool) -> _Team:
    """Return the threads that share a row of `vectors` 16-byte words. With `sums`, a team has whole rows to sum up.

    Of the tuned numbers of threads, the one that leaves the fewest idle is chosen.
    """
    sizes = gpu.table.move_rows.teams
    wanted = -(-vectors // unroll)  # threads, for a whole row at once
    if wanted <= _WARP:
        team = _Team(_WARP, _SMALL_TEAMS, 1, unroll)
    elif wanted < sizes[0]:
        team = _Team(_WARP * -(-wanted // _WARP), 1, 1, unroll)
    else:
        best = min(sizes, key=lambda size: -(-wanted // size) * size)
        team = _Team(best, 1, 1 if sums else -(-wanted // best), unroll)
    if not sums:
        return team
    bytes_of_warp = 4 * (positions.shape[1] + 1)
    if team.warps * bytes_of_warp <= _SHARED_BYTES:
        return team
    if bytes_of_warp > _SHARED_BYTES:
        most = _SHARED_BYTES // 4 - 1
        raise ValueError(f"{positions.name} must have at most {most} columns for such a gradient, got {positions}")
    return _Team(_WARP, 1, 1, unroll)


def _slots(gpu: Gpu, top_k: int) -> int:
    """Return how many slots of a token are in flight together: all of them, or equal parts."""
    groups = max(1, -(-top_k // gpu.table.move_rows.max_slots))
    return max(1, -(-top_k // groups))


def _padding_rows(gpu: Gpu, capacity: int, num_pairs: int) -> int:
    """Return how many rows a warp checks for padding: one where many are padding for certain, since it clears them."""
    tuned = gpu.table.move_rows
    return 1 if (capacity - num_pairs) * tuned.much_padding > capacity else tuned.padding_rows


def _read_once(gpu: Gpu, rows: View, num_pairs: int, most: int) -> bool:
    """Return whether to mark rows of pairs for eviction as they are read: if their bytes are at most `most` times L2.

    Part of such rows may be in L2 already. Evicting them after their only use leaves space for the others.
    """
    return min(num_pairs, rows.shape[0]) * rows.shape[1] * _item_bytes(rows) <= most * gpu.l2_bytes


# -- Words and strides -------------------------------------------------------------------------------------------------


def _item_bytes(view: View) -> int:
    return item_bits(view.dtype) // 8


def _row_bytes(view: View | None) -> int:
    return 0 if view is None else view.row_stride * _item_bytes(view)


def _row_stride(view: View | None) -> int:
    return 0 if view is None else view.row_stride


def _dense(views: Sequence[View | None]) -> bool:
    """Return whether the rows of all arrays follow each other."""
    return all(view is None or view.row_stride == view.shape[-1] for view in views)


def _vector(hidden: int, views: Sequence[View]) -> int:
    """Return the elements that a thread moves at once: a word of the first array, less where others are misaligned."""
    vector = _WORD // _item_bytes(views[0])
    while vector > 1 and (hidden % vector or not all(_aligned(view, vector * _item_bytes(view)) for view in views)):
        vector //= 2
    return vector


def _word(hidden: int, views: Sequence[View]) -> int:
    """Return the bytes of the largest word of which all rows of these arrays consist."""
    row_bytes = hidden * _item_bytes(views[0])
    word = _WORD
    while row_bytes % word or not all(_aligned(view, word) for view in views):
        word //= 2
    return word


def _aligned(view: View, size: int) -> bool:
    word = min(size, _WORD)
    return view.pointer % word == 0 and _row_bytes(view) % word == 0


def _unroll(unroll: int, first: View, others: Sequence[View]) -> int:
    """Return the vectors that a thread has in flight: one where others are wider, since they fill its registers."""
    return unroll if all(_item_bytes(view) <= _item_bytes(first) for view in others) else 1


def _dtypes(**views: View | None) -> dict[str, int]:
    return {name: row_lanes.DTYPE_CODES[view.dtype] for name, view in views.items() if view is not None}


def _weights(weights: View | None) -> dict[str, int]:
    if weights is None:
        return {}
    return {"WEIGHTED": 1, "WEIGHT_DTYPE": row_lanes.DTYPE_CODES[weights.dtype]}
