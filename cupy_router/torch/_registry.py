# SPDX-License-Identifier: Apache-2.0
"""Integer keys for what is no tensor: schemas of torch.library know only numbers, strings and tensors."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Hashable, MutableMapping
from typing import Any

_numbers = itertools.count()
_lock = threading.Lock()
_keys: dict[Hashable, int] = {}
_values: dict[int, Any] = {}
_router_keys: MutableMapping[Any, int] = weakref.WeakKeyDictionary()  # a router lives as long as its model
_routers: MutableMapping[int, Any] = weakref.WeakValueDictionary()


def key_of(value: Any) -> int:
    """The number of a hashable value such as a RoutingMethod; equal values have the same."""
    with _lock:
        found = _keys.get(value)
        if found is None:
            found = _keys[value] = next(_numbers)
            _values[found] = value
    return found


def value_of(key: int) -> Any:
    return _values[key]


def router_key(router: Any) -> int:
    with _lock:
        found = _router_keys.get(router)
        if found is None:
            found = _router_keys[router] = next(_numbers)
            _routers[found] = router
    return found


def router_of(key: int) -> Any:
    router = _routers.get(key)
    if router is None:
        raise RuntimeError("a compiled graph calls a Router that is gone: keep it as long as the graph")
    return router


# Evaluated while a call is traced: the graph holds the number, with a guard on the object. This is the mark that
# torch.compiler.assume_constant_result sets, which would import torch._dynamo: seconds that only compiling is worth.
key_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
router_key._dynamo_marked_constant = True  # type: ignore[attr-defined]
