# SPDX-License-Identifier: Apache-2.0
"""Strings for what is no tensor: schemas of torch.library know only numbers, strings and tensors.

A method carries all of it as text, which means the same in every process: Inductor's cache, exported programs. A Router
carries a key of its own. A trace reads either as a constant, with a guard on it.
"""

from __future__ import annotations

from typing import Any

from cupy_router import router
from cupy_router.method import from_text as method_of

__all__ = ["method_of", "router_of"]


def router_of(key: str) -> Any:
    found = router.routers.get(key)
    if found is None:
        raise RuntimeError(
            "a compiled graph calls a Router that is gone: keep it as long as the graph, and export a Router of tensors"
        )
    return found
