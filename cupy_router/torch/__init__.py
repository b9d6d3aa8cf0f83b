# SPDX-License-Identifier: Apache-2.0
"""The ops in PyTorch: importing this package registers them with torch.library, autograd and torch.compile.

Then the public functions and a Router work under `torch.compile(fullgraph=True)` and `torch.export`. Schemas contain
the method as text, which has the same meaning in every process. Eager calls do not go through PyTorch's dispatcher:
they check whether something is traced or requires grad, and otherwise run as without this package.

    import cupy_router.torch  # not needed if torch was imported before the ops, or once any op was given a tensor

    router = cupy_router.Router("deepseek-v4-flash", weight=weight, bias=bias)
    route = torch.compile(lambda x: router(x), fullgraph=True)

`out=` is an op of the graph as well. `stream=` breaks the graph. Autograd knows of every tensor that is written into.

Traced code may make methods, and Routers of tensors: calls with the same arguments share a graph. docs/frameworks.md
says what each version of PyTorch traces.

The weights of `activation_topk`, `dense_router`, `hash_router` and a Router have gradients with respect to logits, x,
weight, logit_bias and expert_scale, if these require grad. Indices, and a bias that only selects, have none.
`torch.func.grad` and `vmap` work. Second derivatives and forward mode raise errors. `load_balance` computes the terms
of load-balancing losses.

:class:`Gate` is a router as a module, with parameters and buffers of its own. `replace_routers` replaces the routers of
a Hugging Face model. :class:`ExpertParallel` spreads the experts of a layer over the ranks of torch.distributed.
"""

from __future__ import annotations

import torch

from cupy_router import _hooks, router
from cupy_router.ops import _run
from cupy_router.torch import _intercept, _router_op, _state
from cupy_router.torch._expert_parallel import ExpertParallel
from cupy_router.torch._gate import Gate, deepseek_state_dict
from cupy_router.torch._load_balance import LoadBalance, load_balance
from cupy_router.torch._replace import replace_routers, restore_routers

__all__ = [
    "ExpertParallel",
    "Gate",
    "LoadBalance",
    "deepseek_state_dict",
    "load_balance",
    "replace_routers",
    "restore_routers",
]

_run.interceptors.insert(0, _intercept)  # asked first: torch.compile traces it, and need not trace others
router.interceptors.append(_router_op)
_hooks.traced.append(_state.is_tracing)
_hooks.in_backward.append(_state.in_backward)
_hooks.symbolic_ints.append(torch.SymInt)


def __dir__() -> list[str]:
    return __all__
