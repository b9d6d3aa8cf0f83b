# SPDX-License-Identifier: Apache-2.0
"""replace_routers swaps the routers of a Hugging Face model for ours, in place; restore_routers undoes it.

A swapped module keeps its identity, parameters, buffers and hooks. Only its class changes, to a generated subclass
whose forward calls cupy_router. So `state_dict`, `.to()` and `isinstance` work as before.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from cupy_router.method import RoutingMethod
from cupy_router.torch._router_modules import Unsupported, describe_inline_router, describe_router
from cupy_router.torch._swapped import InlineRouter, LogitsOnly, Router, Swapped, restore, swap
from cupy_router.torch._verify import verify


def replace_routers(model: Any) -> int:
    """Swap the routers of a Hugging Face model for those of cupy_router, in place; `restore_routers` undoes it.

    Args:
        model: A module with mixture-of-experts blocks, such as a `PreTrainedModel` of the transformers package, on the
            CPU or on CUDA, in float32, float16 or bfloat16.

    Returns:
        Number of routers swapped by this call.

    Raises:
        TypeError: ``model`` is not a `torch.nn.Module`.

    Warns:
        UserWarning: Once for each kind of router or block that was left unchanged, with its name and the reason.

    Each router keeps its parameters and returns the same results as before, in the same dtypes. Logits are accumulated
    and kept in float32. Experts are selected by these, even where the model's code rounds logits to bfloat16. Of equal
    values the lower index is selected.

    Weights and logits have gradients, computed by the op `activation_topk_backward`. Second derivatives are refused.
    Routers that add noise in training run the model's code in training.

    The routing method comes from the nearest configuration of the block, by `RoutingMethod.from_config`. Copies and
    pickles of the model stay swapped. Reading such a pickle needs cupy_router.

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
    methods: dict[int, tuple[Any, RoutingMethod | str]] = {}  # keeping the configuration alive keeps its id unique
    skipped: dict[tuple[str, str], list[str]] = {}
    swapped = blocks = 0
    for path, block, config in _sparse_blocks(model):
        blocks += 1
        if isinstance(block, Swapped) or any(isinstance(child, Swapped) for child in block.children()):
            continue
        config = _layer_config(config, path)
        if id(config) not in methods:
            methods[id(config)] = config, _method(config)
        method = methods[id(config)][1]
        try:
            if isinstance(method, str):
                raise Unsupported(method)
            _swap_router_of(block, method)
            swapped += 1
        except Unsupported as error:
            skipped.setdefault((type(block).__name__, str(error)), []).append(path)
    if not blocks:
        reason = _method(getattr(model, "config", None))
        skipped[type(model).__name__, reason if isinstance(reason, str) else "no child of it has experts"] = [""]
    for (kind, reason), paths in skipped.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        where = f" ({paths[0]}{more})" if paths[0] else ""
        warnings.warn(f"replace_routers left {kind}{where} as it is: {reason}", stacklevel=2)
    return swapped


def restore_routers(model: Any) -> int:
    """Undo `replace_routers`: restore every router of the model.

    Args:
        model: A module that was passed to `replace_routers`, or a part, a copy or a wrapper of it.

    Returns:
        Number of routers restored; 0 if none was swapped.

    Raises:
        TypeError: ``model`` is not a `torch.nn.Module`.

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


# -- Find the modules --------------------------------------------------------------------------------------------------


def _sparse_blocks(
    module: Any, path: str = "", config: Any = None, seen: set[int] | None = None
) -> Iterator[tuple[str, Any, Any]]:
    """Yield path, module and nearest configuration of each module that has experts as a child."""
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
    """Return True if a module holds experts: by its name, or by a parameter with one matrix per expert."""
    number = getattr(module, "num_experts", None)
    stacked = any(weight.ndim == 3 and len(weight) == number for weight in module.parameters(recurse=False))
    is_block = any(_are_experts(*child) for child in module.named_children())
    return stacked or (name == "experts" and not is_block)


def _layer_config(config: Any, path: str) -> Any:
    """Return the configuration of the layer in the path, if layers have separate ones."""
    try:
        layer = config.per_layer_config[[int(part) for part in path.split(".") if part.isdigit()][-1]]
    except (AttributeError, LookupError, TypeError):
        return config
    return layer if type(layer) is type(config) else config


def _method(config: Any) -> RoutingMethod | str:
    """Return the method of a configuration, or the reason why there is none."""
    if config is None:
        return "it has no config"
    try:
        return RoutingMethod.from_config(config)
    except (TypeError, ValueError) as error:
        return str(error)


def _swap_router_of(block: Any, method: RoutingMethod) -> None:
    others = {name: child for name, child in block.named_children() if not _are_experts(name, child)}
    found = [(child, spec) for child in others.values() if (spec := describe_router(child, method)) is not None]
    if len(found) == 1:
        verify(found[0][0], Router, found[0][1])
        swap(found[0][0], Router, found[0][1])
        return
    inline = describe_inline_router(block, method) if not found else None
    if inline is None:
        raise Unsupported(
            f"{len(found) or 'none'} of its children {', '.join(others)} multiplies with a gate of {method.num_logits} "
            f"rows and returns weights and indices of {method.top_k} experts a token"
        )
    spec, child = inline
    verify(block, InlineRouter, spec)
    swap(child, LogitsOnly, spec)
    try:
        swap(block, InlineRouter, spec)
    except Unsupported:
        restore(child)
        raise
