# SPDX-License-Identifier: Apache-2.0
"""All ops by name. The framework packages and the tests are made from this list."""

from __future__ import annotations

from cupy_router.ops import (
    _hash_layer,
    activation_topk,
    activation_topk_backward,
    dense_router,
    hash_router,
    topk_select,
)
from cupy_router.ops._op import Op

_MODULES = (topk_select, activation_topk, hash_router, dense_router, _hash_layer, activation_topk_backward)

OPS: dict[str, Op] = {module.OP.name: module.OP for module in _MODULES}
