# SPDX-License-Identifier: Apache-2.0
"""One call of an op with its arrays: running it on a backend, checking its results, saving it to a file."""

from __future__ import annotations

import base64
import json
import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

import cupy_router
from cupy_router import RoutingMethod, TopK
from cupy_router.ops import _cached, _row_lanes, _topk_select_long
from cupy_router.ops.activation_topk_backward import LogitsGradient, activation_topk_backward
from cupy_router.reference import activation_topk, dense_router, hash_router, topk_select
from tests import compare, gradients, methods, oracle
from tests.backends import DTYPES, Backend
from tests.canvas import Canvas
from tests.fuzz import layout_case, replica_case
from tests.topk_calls import by_index, choice

FOLDER = Path(__file__).with_name("cases")
BACKWARD = "activation_topk_backward"


class Columns(NamedTuple):
    """The results of topk_select without values."""

    indices: Any


@dataclass(frozen=True)
class Case:
    """`layouts` has for some arrays the elements between their rows and in front of them; `out_padding` those between
    the rows of preallocated results, -1 for results that the op allocates. With `as_of_rows` the kernel is that for so
    many rows, however few there are; with `plan`, a name among PLANS, that for long rows goes by this plan."""

    op: str
    arrays: dict[str, np.ndarray]
    method: RoutingMethod | None = None
    options: dict[str, Any] = field(default_factory=dict)  # k and other options of topk_select and layouts, num_valid
    layouts: dict[str, tuple[int, int]] = field(default_factory=dict)
    out_padding: int = -1
    as_of_rows: int = 0
    plan: str = ""
    schedule: str = "run_ahead"

    @property
    def shape(self) -> tuple[int, int]:
        """Common to all results but those of layouts, for which it is that of the pairs."""
        if self.op in layout_case.OPS:
            return self.arrays["indices" if self.op == "expert_layout" else "positions"].shape
        if self.op == BACKWARD:
            return self.arrays["logits"].shape
        if self.op == "topk_select":
            return len(self.arrays["scores"]), self.options["k"]
        if self.op == "hash_router":
            width = self.arrays["table"].shape[1]
            return len(self.arrays["token_ids"]), width if self.method is None else self.method.num_columns
        assert self.method is not None
        return len(self.arrays["x" if self.op == "dense_router" else "logits"]), self.method.num_columns

    @property
    def dtypes(self) -> tuple[Any, ...]:
        """Of all results but a layout."""
        if self.op == BACKWARD:
            return (self.arrays["logits"].dtype,)
        if self.op == "topk_select":
            return (self.arrays["scores"].dtype, np.int32)[-len(self.kind._fields) :]
        if self.method is None:
            return np.float32, np.int32
        return DTYPES[self.method.weight_dtype], DTYPES[self.method.index_dtype]

    @property
    def results(self) -> layout_case.Results:
        """Shape and dtype of each result."""
        if self.op in layout_case.OPS:
            return layout_case.results(self.op, self.arrays, self.options)
        own: layout_case.Results = [(self.shape, dtype) for dtype in self.dtypes]
        if self.returns_logits:
            own.append(((self.shape[0], len(self.arrays["weight"])), DTYPES[self.logits_dtype]))
        if "layout" not in self.options:
            return own
        shapes = layout_case.sizes(*self.shape, self.num_counted, self.options["layout"])
        return own + [(shapes[name], np.int32) for name in layout_case.names_of(self.options["layout"])]

    @property
    def num_counted(self) -> int:
        """Number of experts in the layout of a router."""
        assert self.method is not None
        return self.method.num_experts + self.method.num_shared_experts

    @property
    def kind(self) -> Any:
        """The named tuple of the results, or a plain tuple."""
        if self.op in layout_case.OPS or "layout" in self.options:
            return lambda *arrays: arrays
        if self.returns_logits:
            return cupy_router.RoutingWithLogits
        selected = TopK if self.options.get("return_values", True) else Columns
        return {"topk_select": selected, BACKWARD: LogitsGradient}.get(self.op, cupy_router.Routing)

    @property
    def returns_logits(self) -> bool:
        """Return whether the call returns logits."""
        return self.options.get("return_logits", False)

    @property
    def logits_dtype(self) -> str:
        """Dtype of the logits that the call returns."""
        return self.options.get("logits_dtype", "float32")

    @property
    def num_valid(self) -> int:
        """Number of valid rows."""
        if "num_valid" in self.arrays:
            return min(max(int(self.arrays["num_valid"].reshape(())), 0), self.shape[0])
        return self.options.get("num_valid", self.shape[0])

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in self.arrays.items())
        more = {"options": self.options, "layouts": self.layouts, "out_padding": self.out_padding}
        more |= {"as_of_rows": self.as_of_rows, "plan": self.plan}
        return f"Case({self.op}, {{{arrays}}}, {self.method}, {more}, {self.schedule})"


def arguments(case: Case, backend: Backend) -> dict[str, Any]:
    """Return the op's arguments except `out`, with arrays on the backend."""
    given: dict[str, Any] = {name: backend.array(a, *case.layouts.get(name, (0, 0))) for name, a in case.arrays.items()}
    given |= case.options
    return given if case.method is None else given | {"method": case.method}


def run(case: Case, backend: Backend) -> tuple[np.ndarray, ...]:
    """Call the op on the backend and return NumPy arrays. AssertionError if it wrote outside its results."""
    given = arguments(case, backend)
    if case.out_padding < 0:
        result = call(case.op, case.as_of_rows, case.plan, **given)
    else:
        canvases = [Canvas(shape, case.out_padding, dtype, backend) for shape, dtype in case.results]
        out = case.kind(*(canvas.array for canvas in canvases))
        result = call(case.op, case.as_of_rows, case.plan, **given, out=out)
        assert result is out
        assert all(canvas.is_clean() for canvas in canvases), "something beside the results was written"
    for name, array in case.arrays.items():
        compare.assert_same_bits(backend.numpy(given[name]), array)  # inputs are only read
    return tuple(backend.numpy(array) for array in result)


def call(op: str, as_of_rows: int, plan: str = "", /, **given: Any) -> Any:
    """Call the op; `as_of_rows` and `plan` as in a case."""
    with _Chosen(as_of_rows, plan) if as_of_rows or plan else nullcontext():
        return function(op, "layout" in given)(**given)


def function(op: str, with_layout: bool = False) -> Any:
    """Return the op of this name, with results that are all arrays. A router with a layout takes it as a dictionary."""
    if with_layout:
        return layout_case.routed(getattr(cupy_router, op))
    if op in layout_case.OPS:
        return layout_case.function(op)
    return {BACKWARD: activation_topk_backward, "topk_select": _topk_select}.get(op) or getattr(cupy_router, op)


def _topk_select(*, out: Any = None, **given: Any) -> TopK | Columns:
    """Return only the columns if there are no values."""
    if given.get("return_values", True):
        return cupy_router.topk_select(**given, out=out)
    into = None if out is None else TopK(None, out.indices)
    result = cupy_router.topk_select(**given, out=into)
    assert result.values is None
    return out if result is into else Columns(result.indices)


class _Chosen(AbstractContextManager[None]):
    """Within it, kernels are chosen as for so many rows, and long rows go by the plan of this name. What was planned so
    is forgotten afterwards."""

    def __init__(self, rows: int, plan: str) -> None:
        few, lanes = _row_lanes.few, _row_lanes.interleaved_lanes
        self.patches = []
        if rows:
            chosen = {
                "few": lambda gpu, _: few(gpu, rows),
                "interleaved_lanes": lambda gpu, _, *sizes: lanes(gpu, rows, *sizes),
            }
            self.patches.append(mock.patch.multiple(_row_lanes, **chosen))
        if plan:
            self.patches.append(mock.patch.object(_topk_select_long, "choose", choice(plan)))

    def __enter__(self) -> None:
        _cached.forget()
        for patch in self.patches:
            patch.start()

    def __exit__(self, *_: Any) -> None:
        for patch in self.patches:
            patch.stop()
        _cached.forget()


def wanted(case: Case) -> tuple[np.ndarray, ...]:
    """Return the results of the NumPy reference."""
    arrays, method = case.arrays, case.method
    if case.op in layout_case.OPS:
        return layout_case.wanted(case.op, arrays, case.options, case.num_valid)
    if "num_physical" in case.options:
        return replica_case.wanted(case, wanted(replica_case.without(case)))
    if "layout" in case.options:
        own = wanted(without(case, "layout"))
        ids = {"indices": own[1]}
        options = {**case.options["layout"], "num_experts": case.num_counted}
        return (*own, *layout_case.wanted("expert_layout", ids, options, len(own[1])))
    if case.op == "topk_select":
        given = arrays | case.options
        given.pop("return_values", None)
        return topk_select.topk_select(**given)[-len(case.kind._fields) :]
    bias = arrays.get("bias")
    more: dict[str, Any] = {name: arrays.get(name) for name in ("bias_index", "logit_bias", "expert_scale")}
    more["num_valid"] = case.num_valid
    if case.op != "hash_router":
        more |= {"given_experts": arrays.get("indices"), "unset": case.options.get("unset", "route")}
    if case.op == "activation_topk":
        assert method is not None
        return activation_topk.activation_topk(arrays["logits"], method, bias, **more)
    more["logits_dtype"] = case.logits_dtype if case.returns_logits else None
    if case.op == "dense_router":
        assert method is not None
        return dense_router.dense_router(arrays["x"], arrays["weight"], method, bias, **more)
    more |= {name: arrays.get(name) for name in ("logits", "x", "weight", "bias")}
    return hash_router.hash_router(arrays["token_ids"], arrays["table"], method, **more)


def check(case: Case, got: tuple[np.ndarray, ...]) -> None:
    """Assert that the results are those of the reference, to the bit where no float is rounded."""
    assert [array.shape for array in got] == [shape for shape, _ in case.results]
    if case.op in layout_case.OPS:
        layout_case.check(case.op, case.arrays, case.options, case.num_valid, got)
        return
    if "num_physical" in case.options:
        return check(*replica_case.with_experts(case, got))
    if "layout" in case.options:
        layout_case.check_layout(got[1], case.num_counted, case.options["layout"], got[2:])
        check(without(case, "layout"), got[:2])
        return
    if case.returns_logits:  # products are exact, but for the signs of zeros and NaN
        np.testing.assert_array_equal(got[2].astype(np.float32), wanted(case)[2].astype(np.float32))
        check(without(case, "return_logits", "logits_dtype"), got[:2])
        return
    if case.op == BACKWARD:
        assert case.method is not None
        arrays = case.arrays
        layer = methods.Layer(logit_bias=arrays.get("logit_bias"), expert_scale=arrays.get("expert_scale"))
        given = (arrays[name] for name in ("grad_weights", "indices", "logits"))
        gradients.assert_right(got[0], *given, case.method, layer)
        return
    want = wanted(case)
    if case.op == "topk_select":
        if case.options.get("order") == "any":
            np.testing.assert_array_equal(got[-1] < 0, want[-1] < 0)  # empty entries are last
            got, want = (tuple(by_index(array, results[-1]) for array in results) for results in (got, want))
        np.testing.assert_array_equal(got[-1], want[-1])
        for array, right in zip(got, want, strict=True):
            compare.assert_same_bits(array, right)
        return
    first, indices = got
    valid, arrays, method = case.num_valid, case.arrays, case.method
    compare.assert_same_bits(first[valid:], want[0][valid:])
    compare.assert_same_bits(indices[valid:], want[1][valid:])
    ours, reference = (oracle.Routing(pair[0][:valid], pair[1][:valid]) for pair in (got, want))
    if has_steps(case):
        assert method is not None
        np.testing.assert_array_equal(ours.indices, reference.indices)
        first = reference.indices[:, 0].astype(np.int64)
        good = (first >= 0) & (first < method.num_experts)
        assert_steps_close(ours.weights[good], reference.weights[good], reference.indices[good], case, good)
        compare.assert_same_bits(ours.weights[~good], reference.weights[~good])
        return
    bias, index = arrays.get("bias"), arrays.get("bias_index")
    by_table = case.op == "hash_router"
    selected = ~given_rows(case)[:valid]
    if bias is not None and index is not None:
        index = index[:valid]
        selected &= (index >= by_table) & (index < len(bias))
        bias = bias[index[selected]]
    elif by_table:
        selected[:] = False
    parts = [[oracle.Routing(*(a[rows] for a in pair)) for pair in (ours, reference)] for rows in (selected, ~selected)]
    if selected.any():
        compare.assert_routes(*parts[0], logits(case)[:valid][selected], method, bias)
    assert_looked_up(case, *parts[1], ~selected)


def given_rows(case: Case) -> np.ndarray:
    """Return which rows of a call without num_valid select nothing, because their experts are given."""
    ids = case.arrays.get("indices")
    if ids is None:
        return np.zeros(case.shape[0], bool)
    unset = (ids.astype(np.int64) == -1).all(axis=-1)
    return np.asarray(~unset | (case.options["unset"] == "empty"), bool)


def assert_looked_up(case: Case, ours: oracle.Routing, reference: oracle.Routing, rows: np.ndarray) -> None:
    """Assert that these rows have the experts of a table, or those given, with their weights; or none."""
    method = case.method
    np.testing.assert_array_equal(ours.indices, reference.indices)
    if method is None or not {"logits", "x"} & case.arrays.keys():
        compare.assert_same_bits(ours.weights, reference.weights)
        return
    good = reference.indices[:, 0] >= 0
    compare.assert_same_bits(ours.weights[~good], reference.weights[~good])
    rtol = compare.tolerance(logits(case)[: len(rows)][rows][good], reference.indices[good], method)
    compare.assert_weights_close(ours.weights[good], reference.weights[good], rtol, method.scale)


def without(case: Case, *names: str) -> Case:
    return replace(case, options={name: option for name, option in case.options.items() if name not in names})


def has_steps(case: Case) -> bool:
    """Return True if the method has more steps than score, bias and renormalisation."""
    if case.method is None:
        return False
    plain = {"num_experts", "top_k", "score", "renormalize", "renormalize_eps", "renormalize_min", "scale"}
    more = _set(case.method).keys() - plain or case.arrays.keys() & LAYER
    return bool(more) or not isinstance(case.method.score, str)


LAYER = {"logit_bias", "expert_scale"}


def assert_steps_close(got: np.ndarray, want: np.ndarray, indices: np.ndarray, case: Case, rows: np.ndarray) -> None:
    """Weights of the same experts agree within the rounding of their steps."""
    method = case.method
    assert method is not None
    prepared = oracle.prepare(logits(case)[: case.num_valid][rows], method, case.arrays.get("logit_bias"))
    rtol = compare.step_tolerance(prepared, indices[:, : method.top_k].astype(np.int64), method)
    rtol += 2 * compare.HALF_ULP[method.weight_dtype]  # both were rounded
    scale = case.arrays.get("expert_scale", np.ones(1, np.float32))
    tiny = max(1.0, abs(method.scale)) * max(1.0, float(np.abs(scale).max()))
    if method.weight_dtype == "float16":
        tiny += 2.0**-25 / oracle.TINY  # half of its smallest subnormal
    compare.assert_weights_close(got, want, rtol, tiny)


def logits(case: Case) -> np.ndarray:
    """Return the logits as given, or the products of x and weight, which are exact."""
    arrays = case.arrays
    return arrays["logits"] if "logits" in arrays else oracle.gate_logits(arrays["x"], arrays["weight"])


# -- Files -------------------------------------------------------------------------------------------------------------


def save(case: Case, path: Path) -> None:
    """Write JSON with the bytes of the arrays: a saved case does not depend on how cases are drawn."""
    content = {
        "op": case.op,
        "method": None if case.method is None else _set(case.method),
        "options": case.options,
        "layouts": case.layouts,
        "out_padding": case.out_padding,
        "as_of_rows": case.as_of_rows,
        "plan": case.plan,
        "schedule": case.schedule,
        "arrays": {
            name: {
                "dtype": str(array.dtype),
                "shape": array.shape,
                "zlib": base64.b64encode(zlib.compress(array.tobytes(), 9)).decode(),
            }
            for name, array in case.arrays.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _set(method: RoutingMethod) -> dict[str, Any]:
    """Return the fields of a method that differ from their defaults."""
    return {f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) != f.default}


def load(path: Path) -> Case:
    content = json.loads(path.read_text())
    arrays = {
        name: np.frombuffer(zlib.decompress(base64.b64decode(packed["zlib"])), DTYPES[packed["dtype"]])
        .reshape(packed["shape"])
        .copy()
        for name, packed in content.pop("arrays").items()
    }
    method = content.pop("method")
    layouts = {name: tuple(layout) for name, layout in content.pop("layouts").items()}
    return Case(arrays=arrays, layouts=layouts, method=RoutingMethod(**method) if method else None, **content)
