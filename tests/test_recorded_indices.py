# SPDX-License-Identifier: Apache-2.0
"""Indices as a rollout records them: small dtypes, written into a slice of an array of all layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import Router, Routing, RoutingMethod, activation_topk, dense_router, hash_router
from tests import inputs
from tests.backends import DTYPES, Backend

SMALL = ("uint8", "int16", "uint16")
LAYERS, TOKENS, EXPERTS, TOP_K = 3, 21, 64, 6


def plain(index_dtype: str) -> RoutingMethod:
    return RoutingMethod(EXPERTS, TOP_K, "sigmoid", index_dtype=index_dtype)


def record(backend: Backend, dtype: str, by_token: bool) -> tuple[Any, list[Any]]:
    """Return an array of all layers and its slices [num_tokens, top_k], whose rows lie apart if it is by token."""
    shape = (TOKENS, LAYERS, TOP_K) if by_token else (LAYERS, TOKENS, TOP_K)
    whole = backend.upload(np.full(shape, 99, DTYPES[dtype]))
    return whole, [whole[:, layer] if by_token else whole[layer] for layer in range(LAYERS)]


def calls(backend: Backend) -> dict[str, Any]:
    """Return routers of one method, by name; every second token of hash_router has no experts."""
    logits = backend.array(inputs.distinct(TOKENS, EXPERTS))
    x, weight = inputs.normal((TOKENS, 40), seed=1), inputs.normal((EXPERTS, 40), seed=2)
    on = backend.array(x), backend.array(weight)
    ids = backend.array(np.where(np.arange(TOKENS) % 2, -1, 3).astype(np.int32))
    table = backend.array(inputs.rng(3).permutation(EXPERTS)[: 8 * TOP_K].reshape(8, TOP_K).astype(np.int32))
    return {
        "activation_topk": lambda method, **more: activation_topk(logits, method, **more),
        "decode": lambda method, **more: dense_router(*on, method, path="decode", **more),
        "prefill": lambda method, **more: dense_router(*on, method, path=None, **more),
        "Router": lambda method, **more: Router(method, weight=on[1])(on[0], **more),
        "hash_router": lambda method, **more: hash_router(ids, table, method, **more),
    }


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("name", ["activation_topk", "decode", "prefill", "Router", "hash_router"])
def test_a_slice_of_all_layers_gets_the_indices(backend: Backend, name: str, dtype: str, by_token: bool) -> None:
    call = calls(backend)[name]
    want = backend.numpy(call(plain("int32"), num_valid=17).indices)
    whole, slices = record(backend, dtype, by_token)
    out = Routing(backend.upload(np.zeros((TOKENS, TOP_K), np.float32)), slices[1])
    assert call(plain(dtype), num_valid=17, out=out) is out
    np.testing.assert_array_equal(backend.numpy(slices[1]), want.astype(DTYPES[dtype]))
    written = backend.numpy(whole)
    assert (np.delete(written, 1, 1 if by_token else 0) == 99).all(), "other layers are left alone"
    highest = np.array(-1).astype(DTYPES[dtype])
    assert (backend.numpy(slices[1])[17:] == highest).all(), "padding"


def test_out_of_another_dtype_is_refused(backend: Backend) -> None:
    out = Routing(*(backend.upload(np.zeros((TOKENS, TOP_K), dtype)) for dtype in (np.float32, np.int16)))
    with pytest.raises(TypeError, match=r"activation_topk: out\.indices must be uint8, got int16"):
        calls(backend)["activation_topk"](plain("uint8"), out=out)


def test_the_most_experts_of_uint8(backend: Backend) -> None:
    """Ids 0..254, so that 255 can stand for none."""
    method = RoutingMethod(253, 253, "identity", renormalize=False, num_shared_experts=2, index_dtype="uint8")
    logits = backend.array(np.arange(253, 0, -1, dtype=np.float32)[None])
    np.testing.assert_array_equal(backend.numpy(activation_topk(logits, method).indices), [np.arange(255)])
