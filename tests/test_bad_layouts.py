# SPDX-License-Identifier: Apache-2.0
"""Bad input of layouts: the right kind of error, one sentence that names the argument, nothing written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import LayoutSpec, Routing, expert_layout, layout_capacity
from tests.backends import Backend
from tests.bad_layouts import (
    BIG,
    GOOD,
    IDS,
    LAYOUT,
    MAP,
    ROUTERS,
    ROWS,
    Cases,
    E,
    H,
    K,
    N,
    arrays_of_out,
    assert_refused,
    ints,
    leaves,
    many_tokens,
    name_of,
    nested_on_gpu,
    plan,
    poison,
    router_out,
    zeros,
)
from tests.test_bad_input import Impostor, has_cuda

# op, the arguments that differ from a good call, the error, the argument it names, what else it says
LAYOUTS: Cases = [
    *[
        ("expert_layout", {name: value}, error, name, said)
        for name in ("num_experts", "alignment")
        for value, error, said in (
            (0, ValueError, "1..2147483[0-9]+, got 0"),
            (-1, ValueError, "got -1"),
            (BIG, ValueError, f"got {BIG}"),
            (2**70, ValueError, f"got {2**70}"),
            (2.0, TypeError, "must be an int, got float"),
            ("2", TypeError, "must be an int, got str"),
            (None, TypeError, "must be an int, got NoneType"),
            (True, TypeError, "must be an int, got bool"),
            (np.bool_(True), TypeError, "must be an int, got bool"),
            (ints(2), TypeError, "must be an int, got ndarray"),
        )
    ],
    *[
        ("expert_layout", {"capacity": value}, error, "capacity", said)
        for value, error, said in (
            (-4, ValueError, "got -4"),
            (3, ValueError, "a multiple of the alignment 4, got 3"),
            (26, ValueError, "a multiple of the alignment 4, got 26"),
            (BIG, ValueError, f"got {BIG}"),
            (24.0, TypeError, "must be an int, got float"),
            (False, TypeError, "must be an int, got bool"),
            ("24", TypeError, "must be an int, got str"),
        )
    ],
    *[
        ("expert_layout", {"pad": value}, error, "pad", said)
        for value, error, said in (
            (0, ValueError, r"outside of the pairs 0\.\.11 of indices, got 0"),
            (11, ValueError, r"outside of the pairs 0\.\.11 of indices, got 11"),
            (np.int32(5), ValueError, "got 5"),
            (BIG, ValueError, f"got {BIG}"),
            (-BIG - 1, ValueError, f"got {-BIG - 1}"),
            (-1.0, TypeError, "must be an int, got float"),
            (None, TypeError, "must be an int, got NoneType"),
            (True, TypeError, "must be an int, got bool"),
        )
    ],
    *[
        ("expert_layout", {"want": value}, ValueError, "want", said)
        for value, said in (
            ((), "at least one array"),
            ([], "at least one array"),
            ("count", "counts, offsets, ends, order, positions, block_experts, row_experts, got 'count'"),
            (("counts", "rows"), r"got \('counts', 'rows'\)"),
            ((1,), r"got \(1,\)"),
            ((["counts"],), r"got \(\['counts'\],\)"),
            (None, "got None"),
            (7, "got 7"),
            ({"counts": 1}, "got "),
        )
    ],
    # experts in question
    *[
        ("expert_layout", {"experts": value}, error, "experts", said)
        for value, error, said in (
            ((0, 5), ValueError, "num_experts = 4, got first 0, count 5"),
            ((3, 2), ValueError, "num_experts = 4, got first 3, count 2"),
            ((-1, 2), ValueError, "got -1"),
            ((0, -1), ValueError, "got -1"),
            ((5, 0), ValueError, "got 5"),
            ((0,), ValueError, r"\(first, count\), got \(0,\)"),
            ((0, 1, 2), ValueError, r"\(first, count\), got \(0, 1, 2\)"),
            ("02", ValueError, r"\(first, count\), got '02'"),
            (2, ValueError, r"\(first, count\), got 2"),
            (range(2), ValueError, r"\(first, count\), got range"),
            ((0.0, 2), TypeError, "must be an int, got float"),
            ((0, True), TypeError, "must be an int, got bool"),
        )
    ],
    ("expert_layout", {"experts": (0, 2), "expert_map": MAP}, ValueError, "experts and expert_map", "exclude each"),
    ("expert_layout", {"expert_map": MAP}, ValueError, "num_local", "number of experts that expert_map .* got None"),
    ("expert_layout", {"num_local": 2}, ValueError, "num_local", "None without an expert_map, got 2"),
    *[
        ("expert_layout", {"expert_map": MAP, "num_local": value}, error, "num_local", said)
        for value, error, said in (
            (-1, ValueError, "got -1"),
            (BIG, ValueError, f"got {BIG}"),
            (2.0, TypeError, "float"),
            (True, TypeError, "bool"),
        )
    ],
    *[
        ("expert_layout", {"expert_map": value, "num_local": 2}, error, "expert_map", said)
        for value, error, said in (
            (MAP[:3], ValueError, r"\[num_experts\] = \[4\], got int32 \[3\]"),
            (MAP[None], ValueError, r"\[1, 4\]"),
            (MAP.astype(np.int64), TypeError, "int64"),
            (MAP.astype(np.float32), TypeError, "float32"),
            (MAP.tolist(), TypeError, "list"),
            (ints(8)[::2], ValueError, r"strides \[2\]"),
        )
    ],
    # indices
    *[
        ("expert_layout", {"indices": IDS.astype(dtype)}, TypeError, "indices", f"{dtype}.*convert it to int32")
        for dtype in ("int8", "uint32", "uint64", "float32", "bool")
    ],
    ("expert_layout", {"indices": None}, TypeError, "indices", "None"),
    ("expert_layout", {"indices": IDS.tolist()}, TypeError, "indices", "list"),
    ("expert_layout", {"indices": IDS[0]}, ValueError, "indices", r"\[num_tokens, top_k\], got int32 \[2\]"),
    ("expert_layout", {"indices": IDS[None]}, ValueError, "indices", r": call indices.reshape\(-1, 2\)"),
    ("expert_layout", {"indices": ints(N, 2 * K)[:, ::2]}, ValueError, "indices", r"strides \[4, 2\]"),
    *[
        ("expert_layout", {"num_valid": value}, error, "num_valid", said)
        for value, error, said in (
            (7, ValueError, "0..6, got 7"),
            (-(10**5000), ValueError, "at least 0, got an int of 16610 bits"),
            (-1, ValueError, "got -1"),
            (True, TypeError, "bool"),
            (2.0, TypeError, "float"),
            (ints(2), ValueError, r"\[2\]"),
            (ints(1, dtype=np.int64), TypeError, "int64"),
        )
    ],
    # load
    *[
        ("expert_layout", {"load": value}, error, "load", said)
        for value, error, said in (
            (ints(E, dtype=np.int16), TypeError, "int32 or int64, got int16"),
            (zeros(E), TypeError, "int32 or int64, got float32"),
            (ints(E, dtype=np.uint32), TypeError, "uint32"),
            (ints(E + 1), ValueError, r"\[num_experts\] = \[4\], got int32 \[5\]"),
            (ints(1, E), ValueError, r"\[1, 4\]"),
            (ints(2 * E)[::2], ValueError, r"strides \[2\]"),
            ([0] * E, TypeError, "list"),
            (7, TypeError, "int"),
        )
    ],
    # more rows than int32 counts
    (
        "expert_layout",
        {"alignment": 2**29, "out": None},
        ValueError,
        "layout",
        r"at most 2\*\*31 - 1 .* 6 tokens with 2 experts each, and 2147483648 rows",
    ),
    # out
    *[
        ("expert_layout", {"out": value()}, error, name, said)
        for value, error, name, said in (
            (lambda: poison(ROWS), TypeError, "out", "ExpertLayout.*got ndarray"),
            (lambda: tuple(arrays_of_out()), TypeError, "out", "ExpertLayout.*got tuple"),
            (lambda: Routing(poison(E), poison(E)), TypeError, "out", "ExpertLayout.*got Routing"),
            (lambda: arrays_of_out(counts=None), TypeError, r"out\.counts", "None"),
            (lambda: arrays_of_out(ends=None), TypeError, r"out\.ends", "None"),
            (lambda: arrays_of_out(row_experts=poison(ROWS)), TypeError, r"out\.row_experts", "must be None"),
            (lambda: arrays_of_out(order=[0] * ROWS), TypeError, r"out\.order", "list"),
            (lambda: arrays_of_out(order=poison(ROWS + 1)), ValueError, r"out\.order", r"\[capacity\] = \[24\], got"),
            (lambda: arrays_of_out(order=poison(ROWS, dtype=np.int64)), TypeError, r"out\.order", "int32, got int64"),
            (lambda: arrays_of_out(order=poison(2 * ROWS)[::2]), ValueError, r"out\.order", r"strides \[2\]"),
            (lambda: arrays_of_out(order=poison(ROWS)[::-1]), ValueError, r"out\.order", r"strides \[-1\]"),
            (lambda: arrays_of_out(positions=poison(N, K + 1)), ValueError, r"out\.positions", r"= \[6, 2\], got"),
            (lambda: arrays_of_out(positions=poison(N * K)), ValueError, r"out\.positions", r"\[12\]"),
            (lambda: arrays_of_out(offsets=poison(E)), ValueError, r"out\.offsets", r"\[num_local \+ 1\] = \[5\]"),
            (lambda: arrays_of_out(counts=poison(E + 1)), ValueError, r"out\.counts", r"\[num_local\] = \[4\]"),
            (lambda: arrays_of_out(num_tokens=N + 1), ValueError, r"out\.num_tokens", "6 or None, got 7"),
            (lambda: arrays_of_out(top_k=1), ValueError, r"out\.top_k", "2 or None, got 1"),
            (lambda: arrays_of_out(alignment=1), ValueError, r"out\.alignment", "4 or None, got 1"),
            (lambda: arrays_of_out(capacity=0), ValueError, r"out\.capacity", "24 or None, got 0"),
            (lambda: arrays_of_out(capacity=24.0), TypeError, r"out\.capacity", "int or None, got float"),
            (lambda: arrays_of_out(capacity=[24]), TypeError, r"out\.capacity", "int or None, got list"),
            (lambda: arrays_of_out(top_k=True), TypeError, r"out\.top_k", "int or None, got bool"),
        )
    ],
]  # fmt: skip

OF_ROUTERS: Cases = [
    *[
        (op, {"layout": value}, TypeError, "layout", f"LayoutSpec or None, got {type(value).__name__}")
        for op in ROUTERS
        for value in (True, {}, "order", ("order",), LAYOUT, LayoutSpec, 4)
    ],
    *[
        (op, {"layout": LayoutSpec(2**30), "out": None}, ValueError, "layout", r"at most 2\*\*31 - 1")
        for op in ROUTERS
    ],
    ("hash_router", {"method": None}, ValueError, "layout", "needs a method"),
    *[
        (op, {"out": value()}, error, name, said)
        for op in ROUTERS
        for value, error, name, said in (
            (lambda: Routing(*plan()[:2]), TypeError, "out", "RoutingPlan.*got Routing"),
            (lambda: plan(tuple(arrays_of_out())), TypeError, r"out\.layout", "ExpertLayout.*got tuple"),
            (lambda: plan(None), TypeError, r"out\.layout\.counts", "None"),
            (lambda: router_out(counts=None), TypeError, r"out\.layout\.counts", "None"),
            (lambda: router_out(row_experts=poison(12)), TypeError, r"out\.layout\.row_experts", "must be None"),
            (lambda: router_out(capacity=3), ValueError, r"out\.layout\.capacity", "12 or None, got 3"),
            (lambda: router_out(positions=poison(N, K, dtype=np.int64)), TypeError, r"out\.layout\.positions", "int64"),
        )
    ],
    *[(op, {"layout": None}, TypeError, "out", r"Routing\(weights, indices\), got RoutingPlan") for op in ROUTERS],
]  # fmt: skip


@pytest.mark.parametrize("case", [*LAYOUTS, *OF_ROUTERS], ids=name_of)
def test_bad_arguments(case: Any, backend: Backend) -> None:
    op, changes, error, name, said = case
    assert_refused(op, changes, error, name, said, backend)


@pytest.mark.parametrize("op", GOOD)
def test_the_good_calls_are_good(op: str, backend: Backend) -> None:
    function, good = GOOD[op]
    arguments = good()
    if backend.name == "gpu":
        arguments = {key: nested_on_gpu(backend, value) for key, value in arguments.items()}
    function(**arguments)
    for array in leaves(arguments["out"]):
        assert not (backend.numpy(array) == 77).all()


@pytest.mark.backends("reference", "simt")
def test_more_pairs_than_int32_counts() -> None:
    """Without allocating anything: by broadcasting one row."""
    said = r"at most 2\*\*31 - 1 pairs and rows, got 1073741824 tokens with 2 experts each"
    for capacity in (None, 0, 4):
        assert_refused(
            "expert_layout", {"indices": many_tokens(), "capacity": capacity, "out": None}, ValueError, "layout", said
        )


@pytest.mark.parametrize("op", GOOD)
def test_read_only_outs(op: str) -> None:
    def locked(array: Any) -> Any:
        array.flags.writeable = False
        return array

    field = {"permute": "out", "unpermute": "out", "expert_layout": r"out\.order"}.get(op, r"out\.layout\.order")
    out = GOOD[op][1]()["out"]
    if op == "expert_layout":
        out = out._replace(order=locked(out.order))
    elif isinstance(out, tuple):
        out = out._replace(layout=out.layout._replace(order=locked(out.layout.order)))
    else:
        locked(out)
    assert_refused(op, {"out": out}, ValueError, field, "read-only")
    if op == "expert_layout":
        assert_refused(op, {"load": locked(poison(E))}, ValueError, "load", "writable, got a read-only int32")


@pytest.mark.parametrize("op", GOOD)
def test_outs_and_loads_of_jax(op: str, jax_on_the_cpu: None) -> None:
    jnp = pytest.importorskip("jax.numpy")
    if op == "expert_layout":
        out: Any = arrays_of_out(order=jnp.zeros(ROWS, jnp.int32))
        said = r"read-only.*: compute load \+ layout\.counts$"
        assert_refused(op, {"load": jnp.zeros(E, jnp.int32)}, ValueError, "load", said)
    elif op in ROUTERS:
        out = plan(arrays_of_out(order=jnp.zeros(N * K, jnp.int32)))
    else:
        out = jnp.zeros((ROWS if op == "permute" else N, H))
    assert_refused(op, {"out": out}, ValueError, r"out(\.layout)?(\.order)?", "read-only")


@pytest.mark.backends("reference")
def test_loads_inside_jit_are_refused_with_the_remedy(jax_on_the_cpu: None) -> None:
    jax = pytest.importorskip("jax")
    call = jax.jit(lambda ids, load: expert_layout(ids, E, load=load).counts)
    with pytest.raises(ValueError, match=r"^expert_layout: load cannot .* immutable: compute load \+ layout\.counts"):
        call(jax.numpy.asarray(IDS), jax.numpy.zeros(E, "int32"))


# -- Devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.backends("reference")
def test_arrays_on_two_devices() -> None:
    for name, changes in (
        ("load", {"load": Impostor(ints(E))}),
        ("expert_map", {"expert_map": Impostor(MAP), "num_local": 2}),
        ("num_valid", {"num_valid": Impostor(ints(1))}),
        (r"out\.order", {"out": arrays_of_out(order=Impostor(poison(ROWS)))}),
    ):
        assert_refused("expert_layout", changes, ValueError, name, "indices.*cpu.*cuda")


@pytest.mark.skipif(has_cuda(), reason="there is a usable CUDA device")
@pytest.mark.parametrize(("op", "first"), [("expert_layout", "indices"), ("permute", "x"), ("unpermute", "y")])
def test_a_cuda_array_without_cuda_is_an_error_with_advice(op: str, first: str) -> None:
    function, good = GOOD[op]
    with pytest.raises(RuntimeError, match=r"(?i)install|check"):
        function(**{**good(), first: Impostor(good()[first])})


# -- What calls take beside arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((-1, 2, 3), ValueError, "num_tokens must be at least 0, got -1"),
        ((1, -2, 3), ValueError, "top_k must be at least 0, got -2"),
        ((1, 2, -1), ValueError, "num_experts must be at least 0, got -1"),
        ((1, 2, 3, 0), ValueError, "alignment must be at least 1, got 0"),
        ((1.0, 2, 3), TypeError, "num_tokens must be an int, got float"),
        ((1, True, 3), TypeError, "top_k must be an int, got bool"),
        ((1, 2, "3"), TypeError, "num_experts must be an int, got str"),
        ((1, 2, 3, None), TypeError, "alignment must be an int, got NoneType"),
    ],
)
def test_capacities(arguments: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=f"^layout_capacity: {said}$"):
        layout_capacity(*arguments)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"alignment": 0}, ValueError, r"alignment must be in 1\.\.2147483647, got 0"),
        ({"alignment": True}, TypeError, "alignment must be an int, got bool"),
        ({"alignment": 2.0}, TypeError, "alignment must be an int, got float"),
        ({"capacity": -1}, ValueError, "capacity must be in .* got -1"),
        ({"capacity": 5, "alignment": 2}, ValueError, "capacity must be a multiple of the alignment 2, got 5"),
        ({"capacity": 4.0}, TypeError, "capacity must be an int, got float"),
        ({"want": ()}, ValueError, r"want must name at least one array, got \(\)"),
        ({"want": ("rows",)}, ValueError, "want must be names among counts, .* got .*"),
        ({"want": None}, ValueError, "want must be names among .* got None"),
    ],
)
def test_specifications(fields: dict[str, Any], error: Any, said: str) -> None:
    with pytest.raises(error, match=f"^LayoutSpec: {said}$"):
        LayoutSpec(**fields)


def test_numbers_of_numpy_are_numbers() -> None:
    numbers = {
        "alignment": np.int64(4),
        "capacity": np.int32(8),
        "pad": np.int64(-1),
        "experts": (np.uint8(1), np.int16(2)),
    }
    layout = expert_layout(IDS, np.int64(E), **numbers)
    assert layout.capacity == 8
    assert all(type(number) is int for number in layout[-4:])
    assert type(LayoutSpec(np.int64(4), np.int64(8)).alignment) is int
    assert hash(LayoutSpec(np.int64(4))) == hash(LayoutSpec(4, None, ["positions", "order", "offsets", "counts"]))
    assert type(layout_capacity(np.int64(3), np.int8(2), np.uint8(4))) is int


def test_results_are_public_and_immutable() -> None:
    names = {"ExpertLayout", "LayoutSpec", "RoutingPlan", "expert_layout", "permute", "unpermute", "layout_capacity"}
    assert names <= {*cupy_router.__all__}
    with pytest.raises(AttributeError):
        LAYOUT.capacity = 1  # type: ignore[misc]
    with pytest.raises(AttributeError):
        LayoutSpec().alignment = 2  # type: ignore[misc]
