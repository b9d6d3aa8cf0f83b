# SPDX-License-Identifier: Apache-2.0
"""After a warm-up, no call in its range compiles: calls on arrays that do not exist, recorded."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import LayoutSpec, Router, RoutingMethod, cli, gemm, scratch, warm_up
from cupy_router.arrays import ITEM_SIZES
from cupy_router.method import resolve
from cupy_router.ops._count import Count, classes
from tests.recorder import Recorder
from tests.test_launches import Array, fake, recorder

__all__ = ["fake", "recorder"]  # fixtures

LAST = 8192
HIDDEN = 1024
EDGES = sorted({n for power in range(14) for n in (2**power - 1, 2**power, 2**power + 1) if 0 < n <= LAST})


@pytest.fixture
def machine(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A GPU with cuBLAS, both recorded."""
    monkeypatch.setattr(recorder, "launch", lambda *arguments: None)  # arguments are looked at elsewhere
    monkeypatch.setattr(gemm, "why_no_cublas", lambda: None)
    monkeypatch.setattr(gemm, "_context", lambda index: SimpleNamespace(lock=threading.RLock()))
    monkeypatch.setattr(gemm.CudaProduct, "multiply", lambda *arguments: None)
    monkeypatch.setattr(scratch, "buffer", lambda *request: 1 << 50)
    monkeypatch.setattr(warm_up, "_cuda", lambda index: ("cuda", index or 0))
    return recorder


class Arrays:
    """Dense arrays on addresses that are multiples of 16 bytes."""

    def __init__(self) -> None:
        self._end = 1 << 30

    def __call__(self, *shape: int, dtype: str = "float32") -> Array:
        self._end += 256 + (int(np.prod(shape)) * ITEM_SIZES[dtype] + 255) // 256 * 256
        return Array(self._end, shape, dtype)


V4, V3, V2 = (resolve(name) for name in ("deepseek-v4-flash", "deepseek-v3", "deepseek-v2"))
WIDE = RoutingMethod(2048, 8)
SHARED = RoutingMethod(64, 6, "sigmoid", num_shared_experts=2, shared_in_normalizer=True, index_dtype="uint8")
SOFTMAX = RoutingMethod(128, 8, "softmax")
new = Arrays()
REPLICAS = {
    "replicas": Array(1 << 36, (256, 3), "int32"), "replica_counts": Array(1 << 37, (256,), "int32"),
    "num_physical": 300, "replica_offset": 5,
}  # fmt: skip
TABLE, WIDE_BIAS = Array(1 << 34, (500, 6), "int64"), Array(1 << 35, (2, 256))

# What is named to the warm-up, and the same of a call with n tokens.
Given = Callable[[int], dict[str, Any]]
DENSE: dict[str, tuple[RoutingMethod, dict[str, Any], Given]] = {
    "bias": (V4, {"bias": True}, lambda n: {"bias": new(256)}),
    "groups": (V3, {"bias": True, "num_valid": True}, lambda n: {"bias": new(256), "num_valid": new(dtype="int32")}),
    "softmax": (V2, {}, lambda n: {}),
    "layout": (V4, {"layout": LayoutSpec(128)}, lambda n: {"layout": LayoutSpec(128)}),
    "layout of groups": (
        V3, {"layout": LayoutSpec(), "num_valid": True},
        lambda n: {"layout": LayoutSpec(), "num_valid": new(1, dtype="int32")},
    ),
    "logits": (V4, {"return_logits": True, "logits_dtype": "bfloat16", "logit_bias": True},
               lambda n: {"return_logits": True, "logits_dtype": "bfloat16", "logit_bias": new(256)}),
    "float32 logits": (V4, {"return_logits": True}, lambda n: {"return_logits": True}),
    "given": (
        V4, {"indices": "int16", "bias": True}, lambda n: {"indices": new(n, 6, dtype="int16"), "bias": new(256)}
    ),
    "given, none unset": (
        V4, {"indices": True, "unset": "empty"}, lambda n: {"indices": new(n, 6, dtype="int32"), "unset": "empty"}
    ),
    "given, with the columns of shared experts": (
        SHARED, {"indices": np.empty((1, 8), np.int16), "unset": "empty"},
        lambda n: {"indices": new(n, 8, dtype="int16"), "unset": "empty"},
    ),
    "several biases": (
        V4, {"bias": np.empty((2, 256), np.float32), "bias_index": True},
        lambda n: {"bias": new(2, 256), "bias_index": new(n, dtype="int32")},
    ),
    "decode": (V4, {"path": "decode"}, lambda n: {"path": "decode"}),
    "prefill": (V4, {"path": "prefill"}, lambda n: {"path": "prefill"}),
    "too many for a warp": (WIDE, {"expert_scale": True}, lambda n: {"expert_scale": new(2048)}),
    "batch invariant": (V4, {"batch_invariant": True, "bias": True, "num_valid": True},
                        lambda n: {"batch_invariant": True, "bias": new(256), "num_valid": new(dtype="int32")}),
    "shared experts": (SHARED, {}, lambda n: {}),
    "replicas": (V4, REPLICAS | {"layout": LayoutSpec()}, lambda n: REPLICAS | {"layout": LayoutSpec()}),
    "replicas in chunks": (
        V4, REPLICAS | {"batch_invariant": True}, lambda n: REPLICAS | {"batch_invariant": True}
    ),
}  # fmt: skip


def sizes(last: int = LAST) -> list[int]:
    """Return numbers of tokens: next to powers of two, and random ones."""
    return [n for n in EDGES if n <= last] + random.Random(0).sample(range(1, last + 1), min(last, 12))


def assert_nothing_compiles(numbers: list[int], call: Callable[[int], Any]) -> None:
    late: list[Any] = []
    stop = cupy_router.on_compile(late.append)
    try:
        for n in numbers:
            call(n)
            assert not late, f"{n} tokens compile {late[0].name} {late[0].specialisation}"
    finally:
        stop()


@pytest.mark.parametrize(
    ("case", "no_cublas"), [*((case, None) for case in DENSE), ("groups", "there is none"), ("layout", "there is none")]
)
def test_dense_calls_after_a_warm_up(
    machine: Recorder, monkeypatch: pytest.MonkeyPatch, case: str, no_cublas: str | None
) -> None:
    method, named, given = DENSE[case]
    monkeypatch.setattr(gemm, "why_no_cublas", lambda: no_cublas)
    last = 64 if case == "decode" else LAST
    dtypes = ("bfloat16", "float32")
    ready = cupy_router.warmup(method, hidden=HIDDEN, dtypes=dtypes, num_tokens=(1, last), **named)
    assert len(ready) == len(machine.sources) == len(set(machine.sources))
    weights = {dtype: new(method.num_logits, HIDDEN, dtype=dtype) for dtype in dtypes}
    for dtype in dtypes:
        assert_nothing_compiles(
            sizes(last),
            lambda n: cupy_router.dense_router(new(n, HIDDEN, dtype=dtype), weights[dtype], method, **given(n)),  # noqa: B023
        )
    assert cupy_router.warmup(method, hidden=HIDDEN, dtypes=dtypes, num_tokens=(1, last), **named) == ()


@pytest.mark.parametrize("name", cupy_router.presets())
def test_logits_of_each_preset_after_a_warm_up(machine: Recorder, name: str) -> None:
    method = resolve(name)
    named = {} if method.score_after_topk else {"bias": True}
    given = {key: new(method.num_experts) for key in named}
    dtypes = ("float32", "float16")
    cupy_router.warmup(name, dtypes=dtypes, **named)
    for dtype in dtypes:
        assert_nothing_compiles(
            sizes(),
            lambda n: cupy_router.activation_topk(new(n, method.num_logits, dtype=dtype), method, **given),  # noqa: B023
        )


def test_a_number_that_was_not_named_compiles_and_is_reported(machine: Recorder) -> None:
    cupy_router.warmup(V4, hidden=HIDDEN, num_tokens=(3, 8), bias=True)
    weight, bias, late = new(256, HIDDEN, dtype="bfloat16"), new(256), []
    stop = cupy_router.on_compile(lambda kernel: late.append((kernel.name, kernel.compiled)))
    for n in range(3, 9):
        cupy_router.dense_router(new(n, HIDDEN, dtype="bfloat16"), weight, V4, bias=bias)
    assert late == []
    cupy_router.dense_router(new(9, HIDDEN, dtype="bfloat16"), weight, V4, bias=bias)
    assert late == [("dense_router_decode", True)]
    unaligned = Array(new(5, HIDDEN).pointer + 2, (5, HIDDEN), "bfloat16")
    cupy_router.dense_router(unaligned, weight, V4, bias=bias)
    assert len(late) == 2
    stop()
    stop()  # once is enough
    cupy_router.dense_router(new(33, HIDDEN, dtype="bfloat16"), weight, V4, bias=bias)
    assert len(late) == 2


HASHED: dict[str, tuple[dict[str, Any], Given]] = {
    "ids": ({}, lambda n: {"token_ids": new(n, dtype="int64")}),
    "int32 ids, layout": (
        {"token_ids": "int32", "layout": LayoutSpec()},
        lambda n: {"token_ids": new(n, dtype="int32"), "layout": LayoutSpec()},
    ),
    "logits": ({"return_logits": True}, lambda n: {"token_ids": new(n, dtype="int64"), "return_logits": True}),
}  # fmt: skip


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("case", HASHED)
def test_hash_routers_after_a_warm_up(machine: Recorder, case: str, several: bool) -> None:
    named, given = HASHED[case]
    weight = new(256, HIDDEN, dtype="bfloat16")
    biases = {"bias": WIDE_BIAS} if several else {}
    several_biases = {"bias_index": True} if several else {}
    router = Router(V4, weight=weight, table=TABLE, **biases)

    def index(n: int) -> dict[str, Any]:
        return {"bias_index": new(n, dtype="int32")} if several else {}

    router.warmup(**named, **several_biases)
    assert_nothing_compiles(sizes(), lambda n: router(new(n, HIDDEN, dtype="bfloat16"), **given(n), **index(n)))
    cupy_router.warmup(V4, hidden=HIDDEN, table=TABLE, **named, **biases, **several_biases)

    def call(n: int) -> None:
        arguments = given(n) | biases | index(n)
        ids = arguments.pop("token_ids")
        cupy_router.hash_router(ids, TABLE, V4, x=new(n, HIDDEN, dtype="bfloat16"), weight=weight, **arguments)

    assert_nothing_compiles(sizes(), call)


def test_tables_without_a_gate_and_given_experts_after_a_warm_up(machine: Recorder) -> None:
    cupy_router.warmup(V4, dtypes="float32", table="int64")

    def ids(n: int) -> Array:
        return new(n, dtype="int64")

    def with_shared(n: int) -> Array:
        return new(n, 8, dtype="int16")

    cupy_router.warmup(SHARED, indices=np.empty((1, 8), np.int16), unset="empty")
    call = partial(cupy_router.activation_topk, method=SHARED, unset="empty")
    assert_nothing_compiles(sizes(), lambda n: call(new(n, 66, dtype="bfloat16"), indices=with_shared(n)))
    assert_nothing_compiles(sizes(), lambda n: cupy_router.hash_router(ids(n), TABLE, V4))
    assert_nothing_compiles(sizes(), lambda n: cupy_router.hash_router(ids(n), TABLE, V4, logits=new(n, 256)))
    alone = Router(V4, table=TABLE)
    alone.warmup()
    assert_nothing_compiles(sizes(), lambda n: alone(new(n, HIDDEN), ids(n)))
    router = Router(V4, weight=new(256, HIDDEN), table=TABLE)
    router.warmup(indices=True)
    given: Callable[[int], Array] = lambda n: new(n, 6, dtype="int32")  # noqa: E731
    assert_nothing_compiles(sizes(), lambda n: router(new(n, HIDDEN), ids(n), indices=given(n)))
    assert_nothing_compiles(sizes(), lambda n: router(new(n, HIDDEN), indices=given(n)))


def test_progress_counts_every_kernel(machine: Recorder) -> None:
    seen: list[tuple[int, int]] = []
    ready = cupy_router.warmup("deepseek-v4-flash", hidden=4096, bias=True, progress=lambda *at: seen.append(at))
    assert seen == [(done, len(ready)) for done in range(len(ready) + 1)]
    assert len(ready) == 10  # of one layer


def test_a_router_in_cpu_memory_has_nothing_to_compile() -> None:
    router = Router(RoutingMethod(4, 2), weight=np.ones((4, 8), np.float32))
    assert router.warmup(num_tokens=(1, 100), num_valid=True) == ()
    assert router.warmup(token_ids=True) == ()  # ignored, as in a call


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"bias": True}, TypeError, "there is no argument 'bias'; calls have token_ids, "),
        ({"layout": True}, TypeError, "layout must be a LayoutSpec or None, got bool"),
        ({"bias_index": True}, ValueError, "bias_index needs a bias [num_biases, num_experts], got none"),
        ({"indices": np.zeros((6, 3), np.int32)}, ValueError, "indices must have shape [num_tokens, top_k or top_k +"),
        ({"replicas": True}, ValueError, "replicas must be an array, since its number of columns matters"),
        ({"unset": "no"}, ValueError, "unset must be 'route' or 'empty', got 'no'"),
        ({"dtypes": ()}, ValueError, "dtypes must have at least one of float32, float16, bfloat16, got ()"),
        ({"progress": 3}, TypeError, "progress must be a function or None, got int"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_a_router(
    machine: Recorder, on_gpu: bool, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    router = Router(RoutingMethod(4, 2), weight=new(4, 8) if on_gpu else np.ones((4, 8), np.float32))
    with pytest.raises(kind) as raised:
        router.warmup(**arguments)
    assert str(raised.value).startswith(f"Router.warmup: {message}")
    assert machine.sources == []


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"biass": True}, TypeError, "warmup: there is no argument 'biass'; calls have weight, bias"),
        ({"num_tokens": 8}, TypeError, "num_tokens must be the least and the greatest number, got 8"),
        ({"num_tokens": (8, 4)}, ValueError, r"num_tokens\[1\]"),
        ({"num_tokens": (0, 4)}, ValueError, r"num_tokens\[0\]"),
        ({"dtypes": ("float64",)}, ValueError, "dtypes must be among float32, float16, bfloat16, got 'float64'"),
        ({"dtypes": ()}, ValueError, r"dtypes must have at least one of float32, float16, bfloat16, got \(\)"),
        ({"dtypes": None}, TypeError, "dtypes must be names, such as 'bfloat16', got None"),
        ({"dtypes": np.float32}, TypeError, "dtypes must be names, such as 'bfloat16', got <class 'numpy.float32'>"),
        ({"dtypes": (np.float32,)}, TypeError, "dtypes must be by name, such as 'bfloat16', got <class 'numpy"),
        ({"progress": 3}, TypeError, "progress must be a function or None, got int"),
        ({"hidden": 0}, ValueError, "hidden"),
        ({"hidden": 64, "weight": False}, TypeError, "weight must be True, .* or an array like it, got False"),
        ({"hidden": 64, "table": True, "path": "decode"}, ValueError, "calls with a table have no path"),
        ({"indices": np.zeros((6, 3), np.int32)}, ValueError, r"indices must have shape .* = \[1, 2\], got"),
        ({"indices": np.zeros(6, np.int32)}, ValueError, r"indices must have shape .*, got int32 \[1\]"),
        ({"unset": "no"}, ValueError, "unset must be 'route' or 'empty', got 'no'"),
        ({"hidden": 64, "batch_invariant": 1}, TypeError, "batch_invariant must be a bool, got 1"),
        ({"hidden": 64, "logits_dtype": "int8"}, ValueError, "logits_dtype must be 'float32' or .*, got 'int8'"),
        ({"hidden": 64, "path": "decode"}, ValueError, "path 'decode' takes at most 64 tokens"),
        ({"hidden": 64, "path": "fast"}, ValueError, "path must be None, 'decode' or 'prefill', got 'fast'"),
        ({"token_ids": True}, ValueError, "token_ids is no argument of activation_topk"),
        ({"bias": "float16"}, TypeError, "bias must be float32, got float16"),
        ({"bias_index": True}, ValueError, "bias_index needs a bias"),
        ({"table": True, "bias": np.empty((2, 8), np.float32), "bias_index": True}, ValueError, "table must be an"),
        ({"path": "decode"}, ValueError, "return_logits and path need hidden"),
        ({"layout": 128}, TypeError, "layout must be a LayoutSpec"),
    ],
)  # fmt: skip
def test_wrong_arguments(machine: Recorder, arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as raised:
        cupy_router.warmup(RoutingMethod(8, 2), **arguments)
    assert re.match("warmup: (?!warmup)", str(raised.value))
    assert machine.sources == []


def test_on_compile_takes_a_function() -> None:
    with pytest.raises(TypeError, match="on_compile: callback must be a function, got int"):
        cupy_router.on_compile(3)  # type: ignore[arg-type]


# -- Counts ------------------------------------------------------------------------------------------------------------


def planned(n: Any) -> tuple[Any, ...]:
    """Compute and compare in each way that planners do."""
    blocks = -(-n // 7)
    rest = n - (blocks - 1) * 7
    first = next((size for size in (1, 4, 16, 64) if size >= n), 256)
    rounded = int(32 << (-(-n * 6 // 32) - 1).bit_length())
    few = 3 * n <= 100 or n % 5 == 2
    several = "one" if blocks == 1 else "few" if blocks < 9 else "many"
    return min(n, 50) == n, rest == 7, first, rounded, few, several, bool(n - 3), max(0, abs(20 - n) - 4) > 2


def test_counts_plan_as_each_of_their_numbers() -> None:
    plans: dict[int, Any] = {}
    classes_seen = 0
    for count in classes(1, 400):
        plan = planned(count)
        classes_seen += 1
        alike = count.same.numbers[count.same.left].tolist()
        assert not plans.keys() & alike, "a number has one class"
        plans |= dict.fromkeys(alike, plan)
    assert plans == {n: planned(n) for n in range(1, 401)}
    assert classes_seen < 100


def test_counts_as_keys_and_plain_ints_are_alone() -> None:
    for plan in (lambda n: {2: "two"}.get(n), lambda n: [*range(9)][int(n)], lambda n: hash(n)):
        assert len([plan(count) for count in classes(1, 8)]) == 8


def test_counts_refuse_what_would_be_the_result_of_one_number() -> None:
    (count,) = list(classes(1, 1))
    assert isinstance(count, Count)
    with pytest.raises(NotImplementedError, match="Count has no truediv"):
        count / 2


# -- Command line ------------------------------------------------------------------------------------------------------


def test_the_command_compiles_and_says_so(machine: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["warmup", "--preset", "deepseek-v4-flash", "--hidden", "1024", "--bias", "--dtype", "float32"]
    assert cli.main([*arguments, "--weight", "bfloat16", "--tokens", "1", "2"]) == 0
    printed = capsys.readouterr()
    assert re.match(r"2 kernels ready in \d\.\d s, of which 2 were compiled; kept in ", printed.out)
    assert printed.err == ""
    assert cli.main(["warmup", "--preset", "no-such"]) == 1
    assert capsys.readouterr().err.startswith("cupy-router warmup: ")


def test_the_command_draws_a_bar_for_a_person(
    machine: Recorder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert cli.main(["warmup", "--preset", "mixtral", "--tokens", "1", "1"]) == 0
    drawn = capsys.readouterr().err.split("\r")
    assert [line.split("  ")[-1] for line in drawn[1:]] == ["0 of 1", "1 of 1\n"]
