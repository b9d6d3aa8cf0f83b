# SPDX-License-Identifier: Apache-2.0
"""What holds for every op: tests made from the declarations, so that a new op needs no line here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_router.ops._op import Op
from cupy_router.ops._run import run
from cupy_router.ops.registry import OPS
from tests import compare
from tests.backends import Backend
from tests.declared import ROWS, arrays, positional, sizes
from tests.tally import OP as TALLY
from tests.tally import add_kernel_file, torch_with_tally


@pytest.fixture(autouse=True)
def _kernel_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_kernel_file(tmp_path, monkeypatch)


EVERY = pytest.mark.parametrize("op", [*OPS.values(), TALLY], ids=str)


def call(op: Op, given: dict[str, Any], options: Any = None) -> tuple[Any, ...]:
    """Return the existing results of an op, for the options of its example if none are given."""
    options = options or op.example()
    return op.flatten(options, run(op, options, positional(op, given), None, None))


def same(got: tuple[Any, ...], want: tuple[Any, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        compare.assert_same_bits(np.asarray(a), np.asarray(b))


@EVERY
def test_results_have_the_declared_shapes_and_dtypes(op: Op) -> None:
    given, options = arrays(op), op.example()
    shapes = [given[name].shape if name in given else None for name in op.names]
    dtypes = [str(given[name].dtype) if name in given else None for name in op.names]
    results = call(op, given)
    assert [(array.shape, str(array.dtype)) for array in results] == list(op.outputs(options, shapes, dtypes))
    assert [result.path for result in op.existing(options)][: len(results)]
    assert op.options_of(options.text) == options


@EVERY
def test_out_is_filled_and_returned(op: Op) -> None:
    given, options = arrays(op), op.example()
    want = call(op, given)
    out = op.pack(options, [np.empty_like(array) for array in want], lambda: sizes(op, given))
    assert run(op, options, positional(op, given), out, None) is out
    same(op.flatten(options, out), want)


@EVERY
def test_rows_that_are_independent_do_not_know_each_other(op: Op) -> None:
    given, want = arrays(op), call(op, arrays(op))
    if op.is_independent(op.example()):
        upper = {name: array[2:] if name in op.by_row else array for name, array in given.items()}
        same(call(op, upper), tuple(array[2:] for array in want))
    assert op.vmap in ("merge", "loop", "refuse")
    assert op.rows_independent or op.vmap != "merge", (
        "rows of several calls cannot be merged if they are not independent"
    )


@EVERY
def test_missing_and_wrong_inputs_are_named(op: Op) -> None:
    given = arrays(op)
    for declared in op.inputs:
        if declared.name not in given:
            continue
        if declared.name != op.names[0]:
            with pytest.raises(TypeError, match=rf"^{op.label}: {declared.shown} must be an array, got None"):
                call(op, given | {declared.name: None})
        with pytest.raises(ValueError, match=rf"^{op.label}: {declared.shown} must have shape"):
            call(op, given | {declared.name: given[declared.name][None]})
        if declared.dtypes:
            with pytest.raises(TypeError, match=rf"^{op.label}: {declared.shown} must be .* got complex128"):
                call(op, given | {declared.name: given[declared.name].astype(complex)})


@EVERY
def test_num_valid_fills_the_rows_after_it(op: Op, backend: Backend) -> None:
    if not op.takes_number or not op.is_independent(op.example()):
        pytest.skip("no num_valid, or rows that depend on each other, whose padding is no rows of results")
    given = {name: backend.array(array) for name, array in arrays(op).items()}
    results = op.flatten(op.example(), run(op, op.example(), positional(op, given), None, None, 2))
    for array, result in zip(results, op.existing(op.example()), strict=True):
        assert (backend.numpy(array)[2:] == result.fill).all()


@pytest.mark.needs_kernels
@pytest.mark.parametrize("valid", ["all rows", "a number", "an array"])
@EVERY
def test_kernels_give_what_the_reference_gives(op: Op, valid: str, backend: Backend) -> None:
    """With rows that lie apart, and with padding by a number and by an array."""
    if valid != "all rows" and not op.takes_number:
        pytest.skip("an op without num_valid")
    given = arrays(op)
    apart = {name: backend.array(array, 3 * (name in op.by_row and array.ndim == 2)) for name, array in given.items()}
    if valid == "an array":
        apart["num_valid"] = backend.array(np.array([2], np.int32))
    number = 2 if valid == "a number" else -1
    results = op.flatten(op.example(), run(op, op.example(), positional(op, apart), None, None, number))
    want = op.reference(op.example(), _host(op, given), ROWS if valid == "all rows" else 2)
    for got, right, result in zip(results, want, op.existing(op.example()), strict=True):
        if valid != "all rows" and op.is_independent(op.example()):
            right[2:] = result.fill
        np.testing.assert_allclose(
            backend.numpy(got).astype(np.float64), right.astype(np.float64), rtol=1e-5, atol=1e-6
        )


def _host(op: Op, given: dict[str, Any]) -> Any:
    from cupy_router.ops._declared import Arrays

    return Arrays(op.names, positional(op, given))


# -- PyTorch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    return torch_with_tally()


@pytest.mark.backends("reference")
@EVERY
def test_torch_gives_the_same_eager_and_mapped(op: Op, torch: Any) -> None:
    hosts = [arrays(op, seed) for seed in (0, 1)]
    tensors = [{name: torch.from_numpy(array) for name, array in host.items()} for host in hosts]
    layer = {name: array for name, array in tensors[0].items() if name not in op.by_row}
    rows = [{name: array for name, array in given.items() if name in op.by_row} for given in tensors]
    want = [call(op, {**given, **layer}) for given in rows]
    same(want[0], call(op, hosts[0]))
    many = {name: torch.stack([given[name] for given in rows]) for name in rows[0]}
    got = torch.func.vmap(lambda given: call(op, {**given, **layer}))(many)
    for i, one in enumerate(want):
        same(tuple(array[i] for array in got), one)


@pytest.mark.backends("reference")
@pytest.mark.slow("seconds", every=4)
@EVERY
def test_torch_gives_the_same_compiled(op: Op, torch: Any) -> None:
    torch.compiler.reset()
    given = {name: torch.from_numpy(array) for name, array in arrays(op).items()}
    options = op.example()
    compiled = torch.compile(lambda given: call(op, given, options), backend="aot_eager", fullgraph=True, dynamic=True)
    same(compiled(given), call(op, given))
    fewer = {name: array[:4] if name in op.by_row else array for name, array in given.items()}
    same(compiled(fewer), call(op, fewer))


@pytest.mark.backends("reference")
@pytest.mark.slow("seconds", every=4)
@EVERY
def test_torch_fills_out_the_same_compiled(op: Op, torch: Any) -> None:
    torch.compiler.reset()
    given = {name: torch.from_numpy(array) for name, array in arrays(op).items()}
    options = op.example()
    want = call(op, given)

    def into(given: dict[str, Any], outs: list[Any]) -> Any:
        return op.flatten(options, run(op, options, positional(op, given), op.pack(options, outs), None))[0] * 2

    outs = [torch.zeros_like(array) for array in want]
    got = torch.compile(into, backend="aot_eager", fullgraph=True, dynamic=True)(given, outs)
    same(tuple(outs), want)
    same((got,), (want[0] * 2,))


# -- JAX ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jax() -> Any:
    jax = pytest.importorskip("jax")
    from cupy_router.jax import _ffi_targets

    if _ffi_targets.why_not() is not None:
        pytest.skip("calls inside jax.jit need a newer JAX")
    return jax


@pytest.mark.backends("reference")
@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_jax_gives_the_same_traced_and_mapped(op: Op, jax: Any) -> None:
    hosts = [arrays(op, seed) for seed in (0, 1)]
    layer = {name: jax.numpy.asarray(array) for name, array in hosts[0].items() if name not in op.by_row}
    rows = [{name: array for name, array in host.items() if name in op.by_row} for host in hosts]
    want = [call(op, {**given, **{name: np.asarray(array) for name, array in layer.items()}}) for given in rows]
    same(jax.jit(lambda given: call(op, {**given, **layer}))(rows[0]), want[0])
    many = {name: np.stack([given[name] for given in rows]) for name in rows[0]}
    got = jax.jit(jax.vmap(lambda given: call(op, {**given, **layer})))(many)
    for i, one in enumerate(want):
        same(tuple(array[i] for array in got), one)
