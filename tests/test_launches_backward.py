# SPDX-License-Identifier: Apache-2.0
"""What activation_topk_backward launches for arrays on a GPU, recorded as in tests.test_launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from cupy_router import RoutingMethod
from cupy_router.arrays import FRAMEWORKS
from cupy_router.ops.activation_topk_backward import LogitsGradient, activation_topk_backward
from tests.recorder import Recorder, recording
from tests.test_launches import METHOD, NUMBERS, Array, Fake, assert_kernel, assert_rows_share_warps, only


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setitem(FRAMEWORKS, Array, Fake())
    with recording("cuda") as recorder:
        yield recorder


@pytest.mark.parametrize("columns", [384, 2000])
def test_activation_topk_backward(recorder: Recorder, columns: int) -> None:
    method = replace(METHOD, num_experts=columns, logit_softcap=30.0, num_groups=4, top_groups=2)
    grad_weights, indices = Array(0x1000, (33, 6), row_stride=7), Array(0x2004, (33, 6), "int64", row_stride=-8)
    logits, logit_bias = Array(0x3008, (33, columns), "bfloat16", row_stride=5000), Array(0x4000, (columns,))
    expert_scale = Array(0x5000, (columns,))
    layer = {"logit_bias": logit_bias, "expert_scale": expert_scale}
    result = activation_topk_backward(grad_weights, indices, logits, method, **layer, dtype="float32", repeated=True)
    launch = only(recorder)
    macros = {
        "NUM_EXPERTS": columns, "TOP_K": 6, "SCORE": 3, "RENORMALIZE": 1, "DTYPE": 2, "GRADIENT_DTYPE": 0,
        "HAS_LOGIT_BIAS": 1, "HAS_EXPERT_SCALE": 1, "LOGIT_CAPPED": 1, "INDEX_BYTES": 8, "REPEATED": 1,
    }  # fmt: skip
    if columns == 384:
        assert_kernel(launch, "activation_topk_backward", "activation_topk_backward", **macros, ALIGNED=1)
        assert_rows_share_warps(launch, 33)
    else:
        assert_kernel(launch, "activation_topk_backward_wide", "activation_topk_backward_wide", **macros)
        assert (launch.grid, launch.block) == ((33, 1, 1), (256, 1, 1))
    assert launch.macros["NUM_GROUPS"] == 0, "groups only select"
    assert launch.arguments == {
        "grad_weights": 0x1000, "indices": 0x2004, "logits": 0x3008, "logit_bias": 0x4000, "expert_scale": 0x5000,
        "grad_logits": result.grad_logits.pointer, "num_tokens": 33, "grad_weights_stride": 7, "indices_stride": -8,
        "logits_stride": 5000, "grad_logits_stride": columns,
        "renormalize_eps": 0.0, "renormalize_min": 0.25, "scale": 2.5, **(NUMBERS | {"logit_softcap": 30.0}),
    }  # fmt: skip
    assert (result.grad_logits.shape, result.grad_logits.dtype) == ((33, columns), "float32")


def test_a_gradient_of_many_rows(recorder: Recorder) -> None:
    """Rows share warps; `out` is filled at its own stride on a given stream, and plans are cached."""
    method = RoutingMethod(256, 6, index_dtype="int64", weight_dtype="bfloat16")
    out = LogitsGradient(Array(0x9000, (70_000, 256), row_stride=260))
    for pointer in (0x1000, 0x2000):
        given = Array(pointer, (70_000, 6), "bfloat16"), Array(0x300, (70_000, 6), "int32"), Array(0x400, (70_000, 256))
        assert activation_topk_backward(*given, method, out=out, stream=77) is out
        assert_rows_share_warps(recorder.launches[-1], 70_000)
        arguments = recorder.launches[-1].arguments
        assert (arguments["grad_weights"], arguments["grad_logits"]) == (pointer, 0x9000)
        assert arguments["grad_logits_stride"] == 260
    assert_kernel(recorder.launches[-1], "activation_topk_backward", "activation_topk_backward", RESULT_DTYPE=2)
    assert recorder.launches[-1].macros["INDEX_BYTES"] == 4, "it is the indices' own dtype that counts"
    assert len(recorder.sources) == 1


@pytest.mark.parametrize("padded", [None, "grad_weights", "indices", "logits", "grad_logits"])
def test_strides_are_compiled_in_only_for_contiguous_rows(recorder: Recorder, padded: str | None) -> None:
    def array(name: str, columns: int, dtype: str = "float32") -> Array:
        return Array(0x1000, (9, columns), dtype, row_stride=columns + 4 * (name == padded))

    given = array("grad_weights", 6), array("indices", 6, "int32"), array("logits", 256)
    activation_topk_backward(*given, RoutingMethod(256, 6), out=LogitsGradient(array("grad_logits", 256)))
    assert only(recorder).macros["DENSE"] == (padded is None)
