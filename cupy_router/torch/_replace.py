# SPDX-License-Identifier: Apache-2.0
"""replace_routers: the routers of a Hugging Face model become ours, in place, and restore_routers undoes it.

A swapped module keeps its identity, parameters, buffers and hooks; only its class becomes a subclass made here, whose
forward routes by cupy_router. So `state_dict`, `.to()` and whoever looks for instances of the class notice nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from cupy_router.method import RoutingMethod
from cupy_router.torch._router_modules import Unknown, plan_inline, plan_router
from cupy_router.torch._swapped import InlineRouter, LogitsOnly, Router, Swapped, restore, swap
from cupy_router.torch._verify import verify


def replace_routers(model: Any) -> int:
    """Let cupy_router compute the routing of a Hugging Face model, in place; `restore_routers` undoes it.

    Args:
        model: a module with Mixture-of-Experts blocks, such as a `PreTrainedModel` of the transformers package, on the
            CPU or on CUDA, in float32, float16 or bfloat16.

    Returns:
        How many routers were swapped now; those that already were do not count.

    Raises:
        TypeError: ``model`` is no `torch.nn.Module`.

    Warns:
        UserWarning: once for each kind of router or block that was left as it is, by name and with the reason.

    Each router goes on to use its own parameters and returns what it returned before, in the same dtypes. Logits are
    accumulated and kept in float32, and experts are chosen by these, even where the model's own code rounds them to
    bfloat16; of equal values the lower index is chosen.

    Weights and logits have gradients as the model's own have, by the op `activation_topk_backward`; second derivatives
    are refused. Routers that add noise in training run their own code there.

    The routing method is read from the configuration that is nearest to the block, with `RoutingMethod.from_config`.
    Copies and pickles of the model stay swapped; pickles need cupy_router to be read.

    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from cupy_router.torch import replace_routers, restore_routers
    >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2)
    >>> config = MixtralConfig(vocab_size=100, num_hidden_layers=2, num_local_experts=4, **sizes)
    >>> model = MixtralForCausalLM(config).eval()
    >>> replace_routers(model)
    2
    >>> with torch.no_grad():
    ...     model(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 100])
    >>> restore_routers(model)
    2
    """
    _check("replace_routers", model)
    methods: dict[int, tuple[Any, RoutingMethod | str]] = {}  # with what they are of, which keeps its id from others
    left: dict[tuple[str, str], list[str]] = {}
    swapped = blocks = 0
    for path, block, config in _sparse_blocks(model):
        blocks += 1
        if isinstance(block, Swapped) or any(isinstance(child, Swapped) for child in block.children()):
            continue
        config = _of_layer(config, path)
        if id(config) not in methods:
            methods[id(config)] = config, _method(config)
        method = methods[id(config)][1]
        try:
            if isinstance(method, str):
                raise Unknown(method)
            _swap_router_of(block, method)
            swapped += 1
        except Unknown as error:
            left.setdefault((type(block).__name__, str(error)), []).append(path)
    if not blocks:
        reason = _method(getattr(model, "config", None))
        left[type(model).__name__, reason if isinstance(reason, str) else "no child of it has experts"] = [""]
    for (kind, reason), paths in left.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        where = f" ({paths[0]}{more})" if paths[0] else ""
        warnings.warn(f"replace_routers left {kind}{where} as it is: {reason}", stacklevel=2)
    return swapped


def restore_routers(model: Any) -> int:
    """Undo `replace_routers`: every router of the model is again as it was.

    Args:
        model: a module that was given to `replace_routers`, or a part, a copy or a wrapper of it.

    Returns:
        How many routers were restored; 0 if none was swapped.

    Raises:
        TypeError: ``model`` is no `torch.nn.Module`.

    >>> import torch
    >>> from cupy_router.torch import restore_routers
    >>> restore_routers(torch.nn.Linear(2, 2))
    0
    """
    _check("restore_routers", model)
    restored = 0
    for module in model.modules():
        if isinstance(module, Swapped):
            restored += not isinstance(module, LogitsOnly)
            restore(module)
    return restored


def _check(name: str, model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")


# -- Which modules -----------------------------------------------------------------------------------------------------


def _sparse_blocks(
    module: Any, path: str = "", config: Any = None, seen: set[int] | None = None
) -> Iterator[tuple[str, Any, Any]]:
    """Path, module and nearest configuration of each module that has experts for a child."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    config = getattr(module, "config", None) or config
    if any(_are_experts(name, child) for name, child in module.named_children()):
        yield path, module, config
    for name, child in module.named_children():
        yield from _sparse_blocks(child, f"{path}.{name}".lstrip("."), config, seen)


def _are_experts(name: str, module: Any) -> bool:
    """Experts by their name, or one matrix for each of them in a single parameter."""
    number = getattr(module, "num_experts", None)
    stacked = any(weight.ndim == 3 and len(weight) == number for weight in module.parameters(recurse=False))
    is_block = any(_are_experts(*child) for child in module.named_children())
    return stacked or (name == "experts" and not is_block)


def _of_layer(config: Any, path: str) -> Any:
    """The configuration of the layer that a path leads through, where layers have their own."""
    try:
        own = config.per_layer_config[[int(part) for part in path.split(".") if part.isdigit()][-1]]
    except (AttributeError, LookupError, TypeError):
        return config
    return own if type(own) is type(config) else config


def _method(config: Any) -> RoutingMethod | str:
    """The method of a configuration, or why there is none."""
    if config is None:
        return "it has no config"
    try:
        return RoutingMethod.from_config(config)
    except (TypeError, ValueError) as error:
        return str(error)


def _swap_router_of(block: Any, method: RoutingMethod) -> None:
    others = {name: child for name, child in block.named_children() if not _are_experts(name, child)}
    found = [(child, plan) for child in others.values() if (plan := plan_router(child, method)) is not None]
    if len(found) == 1:
        verify(found[0][0], Router, found[0][1])
        swap(found[0][0], Router, found[0][1])
        return
    inline = plan_inline(block, method) if not found else None
    if inline is None:
        raise Unknown(
            f"{len(found) or 'none'} of its children {', '.join(others)} multiplies with a gate of {method.num_logits} "
            f"rows and returns weights and indices of {method.top_k} experts a token"
        )
    plan, child = inline
    verify(block, InlineRouter, plan)
    swap(child, LogitsOnly, plan)
    try:
        swap(block, InlineRouter, plan)
    except Unknown:
        restore(child)
        raise
