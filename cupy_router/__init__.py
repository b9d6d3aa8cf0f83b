# SPDX-License-Identifier: Apache-2.0
"""cupy_router: MoE routers as CUDA kernels compiled at run time, for arrays of any framework.

>>> import numpy as np
>>> import cupy_router
>>> routing = cupy_router.activation_topk(np.zeros((2, 256), np.float32), "deepseek-v4-flash")
>>> routing.indices[0]
array([0, 1, 2, 3, 4, 5], dtype=int32)
"""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from typing import Any

from cupy_router import _hooks

__version__ = "0.1.0"

__all__ = [
    "ExpertLayout",
    "LayoutSpec",
    "Router",
    "Routing",
    "RoutingMethod",
    "RoutingPlan",
    "RoutingPlanWithLogits",
    "RoutingWithLogits",
    "ScoreFunction",
    "TopK",
    "activation_topk",
    "compare_score",
    "dense_router",
    "expert_layout",
    "hash_router",
    "layout_capacity",
    "on_compile",
    "permute",
    "presets",
    "topk_select",
    "unpermute",
    "update_bias",
    "warmup",
]

# Each name is imported from its module at its first use, so that `import cupy_router` takes almost no time.
_MODULES = {
    "ExpertLayout": "results",
    "Routing": "results",
    "RoutingPlan": "results",
    "RoutingPlanWithLogits": "results",
    "RoutingWithLogits": "results",
    "TopK": "results",
    "LayoutSpec": "ops._layout",
    "layout_capacity": "ops._layout",
    "Router": "router",
    "RoutingMethod": "method",
    "ScoreFunction": "score_function",
    "compare_score": "score_comparison",
    "on_compile": "kernel_log",
    "presets": "method",
    "activation_topk": "ops.activation_topk",
    "dense_router": "ops.dense_router",
    "expert_layout": "ops.expert_layout",
    "hash_router": "ops.hash_router",
    "permute": "ops.permute",
    "topk_select": "ops.topk_select",
    "unpermute": "ops.unpermute",
    "update_bias": "ops.update_bias",
    "warmup": "warm_up",
}

# Likewise. They are not in __all__, because `import *` would import the frameworks.
_SUBMODULES = ("compiler", "integrations", "jax", "ops", "torch", "typing")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except (ImportError, OSError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                reason = f"install cupy-router[{name}] for its framework ({error})"
            # AttributeError, because `hasattr` catches no other
            raise AttributeError(f"{__name__}.{name} cannot be imported: {reason}") from error
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    if "torch" in sys.modules:  # torch.compile may trace the first call
        with suppress(ImportError, AttributeError):  # an unusable torch; the first tensor raises the error
            _load_package("torch")
    return value


def _load_package(framework: str) -> None:
    """Load the package that registers the ops with a framework."""
    if framework in ("torch", "jax"):
        importlib.import_module(f"{__name__}.{framework}")


_hooks.on_first_array.append(_load_package)


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES, "__version__"])
