# SPDX-License-Identifier: Apache-2.0
"""The ops in PyTorch: importing this package registers them with torch.library, autograd and torch.compile.

From then on the public functions and a Router may be called in what `torch.compile(fullgraph=True)` or `torch.export`
traces; a method travels through the schemas as text, which means the same in every process. Eager calls do not pass
PyTorch's dispatcher: they ask whether something is traced or requires grad, and go on as without this package.

    import cupy_router.torch  # not needed if torch was imported before the ops, or once any op was given a tensor

    router = cupy_router.Router("deepseek-v4-flash", weight=weight, bias=bias)
    route = torch.compile(lambda x: router(x), fullgraph=True)

The weights of `activation_topk`, `dense_router`, `hash_router` and a Router have gradients by logits, x, weight,
logit_bias and expert_scale, where these require grad; indices, and a bias that only selects, have none. Second
derivatives are refused, and so is forward mode; `torch.func.grad` and `vmap` work. `load_balance` has what losses for
the load of experts are made of.

`replace_routers` gives a Hugging Face model our routers.
"""

from __future__ import annotations

from cupy_router import router
from cupy_router.ops import _run
from cupy_router.torch import _intercept, _router_op
from cupy_router.torch._load_balance import LoadBalance, load_balance
from cupy_router.torch._replace import replace_routers, restore_routers

__all__ = ["LoadBalance", "load_balance", "replace_routers", "restore_routers"]

_run.interceptors.append(_intercept)
router.interceptors.append(_router_op)
