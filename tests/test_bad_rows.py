# SPDX-License-Identifier: Apache-2.0
"""Bad input of permute and unpermute: one sentence that names the argument, and nothing written."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_router import LayoutSpec, permute, unpermute
from tests.backends import Backend
from tests.bad_layouts import LAYOUT, ROWS, Cases, H, K, N, assert_refused, ints, name_of, plan, poison, zeros
from tests.test_bad_input import Impostor

ARRAYS_OF_LAYOUTS: Cases = [
    (op, {"layout": value}, error, "layout" if array == "" else rf"layout\.{array}", said)
    for op in ("permute", "unpermute")
    for value, error, array, said in (
        (None, TypeError, "", "ExpertLayout, got NoneType"),
        (tuple(LAYOUT), TypeError, "", "ExpertLayout, got tuple"),
        (LAYOUT.order, TypeError, "", "ExpertLayout, got ndarray"),
        (LayoutSpec(), TypeError, "", "ExpertLayout, got LayoutSpec"),
        (plan(LAYOUT), TypeError, "", "ExpertLayout, got RoutingPlan"),
        (LAYOUT._replace(positions=None), ValueError, "", "positions, got None: name it in want= of expert_layout"),
        (LAYOUT._replace(positions=LAYOUT.positions.tolist()), TypeError, "positions", "list"),
        (LAYOUT._replace(positions=LAYOUT.positions.astype(np.int64)), TypeError, "positions", "int32, got int64"),
        (LAYOUT._replace(order=LAYOUT.order.astype(np.float32)), TypeError, "order", "int32, got float32"),
        (LAYOUT._replace(order=LAYOUT.order[None]), ValueError, "order", r"\[capacity\]"),
        (LAYOUT._replace(order=ints(2 * ROWS)[::2]), ValueError, "order", r"strides \[2\]"),
    )
]

ROWS_AND_TOKENS: Cases = [
    *ARRAYS_OF_LAYOUTS,
    ("permute", {"layout": LAYOUT._replace(order=None)}, ValueError, "layout", "order, got None: name it in want="),
    *[
        (op, {"layout": LAYOUT._replace(positions=array)}, ValueError, r"layout\.positions", said)
        for op in ("permute", "unpermute")
        for array, said in (
            (LAYOUT.positions[:5], r"\[num_tokens, top_k\] = \[6, 2\], got \[5, 2\]"),
            (LAYOUT.positions[:, :1], r"got \[6, 1\]"),
            (LAYOUT.positions.reshape(-1), r"got \[12\]"),
        )
    ],
    *[
        (op, {"layout": LAYOUT._replace(**change)}, ValueError, name, said)
        for op in ("permute", "unpermute")
        for change, name, said in (
            ({"order": LAYOUT.order[:4]}, r"layout\.order", r"\[capacity\] = \[24\], got \[4\]$"),
            ({"order": ints(ROWS + 1)}, r"layout\.order", r"\[capacity\] = \[24\], got \[25\]$"),
            ({"capacity": 20}, r"layout\.order", r"\[capacity\] = \[20\], got \[24\]$"),
            ({"num_tokens": 7}, r"layout\.positions", r"= \[7, 2\], got \[6, 2\]$"),
            ({"top_k": 3}, r"layout\.positions", r"= \[6, 3\], got \[6, 2\]$"),
        )
    ],
    ("permute", {"x": zeros(5, H)}, ValueError, "x", r"each of the 6 tokens of the layout, got float32 \[5, 8\]"),
    ("permute", {"x": zeros(ROWS, H)}, ValueError, "x", r"each of the 6 tokens of the layout, got float32 \[24, 8\]"),
    ("permute", {"x": zeros(H)}, ValueError, "x", r"\[num_tokens, hidden\], got float32 \[8\]"),
    ("permute", {"x": zeros(1, N, H)}, ValueError, "x", r": call x.reshape\(-1, 8\)"),
    ("permute", {"x": zeros(N, 2 * H)[:, ::2]}, ValueError, "x", r"strides \[16, 2\]"),
    ("permute", {"x": [[0.0]]}, TypeError, "x", "list"),
    ("permute", {"x": None}, TypeError, "x", "None"),
    *[
        ("permute", {"x": zeros(N, H, dtype=dtype)}, TypeError, "x", f"byte order .*: call x.astype\\('{dtype[1:]}'\\)")
        for dtype in (">f4", ">i8", ">c16")
    ],
    ("permute", {"x": zeros(N, H, dtype=">U3")}, TypeError, "x", "dtype of numbers of 8 bits or more, got >U3"),
    *[
        ("permute", {"x": zeros(N, H, dtype=dtype), "weights": zeros(N, K), "out": None}, TypeError, "x", said)
        for dtype, said in (
            (np.int32, "where weights are given, got int32"),
            (np.uint8, "where weights are given, got uint8"),
            (np.float64, "where weights are given, got float64"),
            (ml_dtypes.float8_e4m3fn, "where weights are given, got float8_e4m3fn"),
        )
    ],
    ("unpermute", {"y": zeros(ROWS - 1, H)}, ValueError, "y", r"24 rows of the layout, got shape \[23, 8\]"),
    ("unpermute", {"y": zeros(N, H)}, ValueError, "y", r"24 rows of the layout, got shape \[6, 8\]"),
    (
        "unpermute",
        {"y": zeros(N, H), "layout": LAYOUT._replace(order=None)},
        ValueError,
        "y",
        r"24 rows of the layout, got shape \[6, 8\]",
    ),
    ("unpermute", {"y": zeros(ROWS)}, ValueError, "y", r"\[capacity, hidden\], got float32 \[24\]"),
    ("unpermute", {"y": None}, TypeError, "y", "None"),
    *[
        ("unpermute", {"y": zeros(ROWS, H, dtype=dtype)}, TypeError, "y", f"float32 or .* got {np.dtype(dtype)}")
        for dtype in (np.float64, np.int32, np.uint8, ml_dtypes.float8_e5m2, np.complex64)
    ],
    *[
        (op, {"weights": value}, error, "weights", said)
        for op in ("permute", "unpermute")
        for value, error, said in (
            (zeros(N, K, dtype=np.float64), TypeError, "float64.*convert it to float32"),
            (ints(N, K), TypeError, "int32"),
            (zeros(N, K + 1), ValueError, r"\[num_tokens, top_k\] = \[6, 2\], got float32 \[6, 3\]"),
            (zeros(N - 1, K), ValueError, r"got float32 \[5, 2\]"),
            (zeros(ROWS), ValueError, r"got float32 \[24\]"),
            (zeros(N, 2 * K)[:, ::2], ValueError, r"strides \[4, 2\]"),
            ([1.0], TypeError, "list"),
            (0.5, TypeError, "float"),
        )
    ],
    ("unpermute", {"residual_scale": zeros(N)}, ValueError, "residual_scale", "needs a residual, got none"),
    *[
        ("unpermute", {"residual": value}, error, "residual", said)
        for value, error, said in (
            (zeros(N, H, dtype=np.float64), TypeError, "float64"),
            (zeros(ROWS, H), ValueError, r"\[num_tokens, hidden\] = \[6, 8\], got float32 \[24, 8\]"),
            (zeros(N, H - 1), ValueError, r"\[6, 7\]"),
            (zeros(H), ValueError, r"\[8\]"),
        )
    ],
    *[
        ("unpermute", {"residual": zeros(N, H), "residual_scale": value}, error, "residual_scale", said)
        for value, error, said in (
            (zeros(N, dtype=np.float16), TypeError, "float32, got float16"),
            (zeros(N, 1), ValueError, r": call residual_scale.reshape\(-1\)"),
            (zeros(N + 1), ValueError, r"\[num_tokens\] = \[6\], got float32 \[7\]"),
            (zeros(2 * N)[::2], ValueError, r"strides \[2\]"),
            (2.0, TypeError, "float"),
        )
    ],
    *[
        (op, {"out": value()}, error, "out", said)
        for op, shape in (("permute", (ROWS, H)), ("unpermute", (N, H)))
        for value, error, said in (
            (lambda shape=shape: (poison(*shape, dtype=np.float32),), TypeError, "got tuple"),
            (lambda: [[0.0]], TypeError, "got list"),
            (lambda: LAYOUT, TypeError, "got ExpertLayout"),
            (lambda shape=shape: poison(*shape), TypeError, "float32, got int32"),
            (lambda shape=shape: poison(*shape, dtype=np.float64), TypeError, "float32, got float64"),
            (lambda: poison(5, H, dtype=np.float32), ValueError, r"got float32 \[5, 8\]"),
            (lambda: poison(H, dtype=np.float32), ValueError, r"got float32 \[8\]"),
            (lambda shape=shape: poison(*shape[::-1], dtype=np.float32).T, ValueError, "strides"),
        )
    ],
]  # fmt: skip


@pytest.mark.parametrize("case", ROWS_AND_TOKENS, ids=name_of)
def test_bad_arguments(case: Any, backend: Backend) -> None:
    op, changes, error, name, said = case
    assert_refused(op, changes, error, name, said, backend)


@pytest.mark.backends("reference")
def test_arrays_on_two_devices() -> None:
    order, positions = (Impostor(a) for a in (LAYOUT.order, LAYOUT.positions))
    assert_refused("permute", {"layout": LAYOUT._replace(order=order)}, ValueError, r"layout\.order", "x.*cpu.*cuda")
    on_gpu = LAYOUT._replace(order=order, positions=positions)
    assert_refused("unpermute", {"layout": on_gpu}, ValueError, r"layout\.positions", "y.*cpu.*cuda")
    assert_refused("permute", {"weights": Impostor(zeros(N, K))}, ValueError, "weights", "x.*cpu.*cuda")
    assert_refused("unpermute", {"residual": Impostor(zeros(N, H))}, ValueError, "residual", "y.*cpu.*cuda")
    assert_refused("permute", {"out": Impostor(zeros(ROWS, H))}, ValueError, "out", "x.*cpu.*cuda")


@pytest.mark.backends("reference")
def test_tensors_that_require_grad_are_not_written() -> None:
    torch = pytest.importorskip("torch")
    layout = LAYOUT._replace(order=torch.from_numpy(LAYOUT.order), positions=torch.from_numpy(LAYOUT.positions))
    out = torch.zeros(ROWS, H, requires_grad=True)
    with pytest.raises(ValueError, match=r"^permute: out must not require grad unless under torch\.no_grad"):
        permute(torch.zeros(N, H), layout, out=out)
    assert out._version == 0


def test_arrays_of_a_layout_may_be_of_another_framework() -> None:
    torch = pytest.importorskip("torch")
    x = np.arange(N * H, dtype=np.float32).reshape(N, H)
    foreign = LAYOUT._replace(order=torch.from_numpy(LAYOUT.order), positions=torch.from_numpy(LAYOUT.positions))
    rows = permute(x, foreign)
    assert type(rows) is np.ndarray
    np.testing.assert_array_equal(rows, permute(x, LAYOUT))
    np.testing.assert_array_equal(unpermute(rows, foreign), K * x)
