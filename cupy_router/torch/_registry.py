# SPDX-License-Identifier: Apache-2.0
"""Integers for what is no tensor: schemas of torch.library know only numbers, strings and tensors.

A method and a Router carry their number, so that a trace reads it as a constant of theirs, with a guard on it.
"""

from __future__ import annotations

from typing import Any

from cupy_router import method, router


def method_of(number: int) -> method.RoutingMethod:
    return method.numbered[number]


def router_of(number: int) -> Any:
    found = router.numbered.get(number)
    if found is None:
        raise RuntimeError("a compiled graph calls a Router that is gone: keep it as long as the graph")
    return found
