# SPDX-License-Identifier: Apache-2.0
"""Shared by the engines: methods from the attributes of their routers, and arrays as the ops take them."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

from cupy_router.method import RoutingMethod

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")


def require(engine: str, package: str, tried: str) -> None:
    """Import an engine, and let traced calls become ops of PyTorch; ImportError with one sentence if there is none."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        ours = f"cupy_router.integrations.{package}"
        raise ImportError(
            f"{ours} needs {engine} (tried with the sources of {tried}): pip install {package}"
        ) from error
    importlib.import_module("cupy_router.torch")


@lru_cache(maxsize=256)
def method_of(
    num_experts: int,
    top_k: int,
    score: Any,
    *,
    renormalize: bool,
    scale: float,
    index_dtype: Any = "int32",
    groups: tuple[int, int] | None = None,
    sum_of_two: bool = False,
    eps: float = 0.0,
    shared: tuple[int, float] = (0, 1.0),
) -> RoutingMethod | None:
    """Return the method of an engine's router; None if no method has these steps.

    groups: number of groups, and of those that can be chosen from.
    sum_of_two: a group is worth the sum of its best two.
    shared: number of shared experts, and their weight.
    """
    num_groups, top_groups = groups or (1, 1)
    try:
        return RoutingMethod(
            num_experts, top_k, score, renormalize=renormalize, renormalize_eps=eps if renormalize else 0.0,
            scale=scale, num_groups=num_groups, top_groups=top_groups, group_score="top2" if sum_of_two else "max",
            num_shared_experts=shared[0], shared_weight=shared[1], index_dtype=index_dtype,
        )  # fmt: skip
    except (TypeError, ValueError):
        return None


def as_float32(bias: Any) -> Any:
    """Return a bias of a router as a float32 tensor without gradient."""
    return None if bias is None else bias.detach().float().reshape(-1)
