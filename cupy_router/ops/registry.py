# SPDX-License-Identifier: Apache-2.0
"""All ops by name: the `OP` of each file in this folder. Framework packages and tests are made from this list."""

from __future__ import annotations

import importlib
import pkgutil

from cupy_router.ops._op import Op

_PACKAGE = __name__.rpartition(".")[0]


def _find() -> dict[str, Op]:
    stems = [module.name for module in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__)]
    modules = [importlib.import_module(f"{_PACKAGE}.{stem}") for stem in stems if f"{_PACKAGE}.{stem}" != __name__]
    return {module.OP.name: module.OP for module in modules if hasattr(module, "OP")}


OPS = _find()

# The named tuples that ops return, and those in them.
RESULTS = {kind.__name__: kind for op in OPS.values() for kind in (op.returns, *op.variants, *op.nested.values())}
