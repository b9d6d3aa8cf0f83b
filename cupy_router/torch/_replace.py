# SPDX-License-Identifier: Apache-2.0
"""replace_routers swaps the routers of a Hugging Face model for ours, in place; restore_routers undoes it.

A swapped module keeps its identity, parameters, buffers and hooks. Only its class changes, to a generated subclass
whose forward calls cupy_router. So `state_dict`, `.to()` and `isinstance` work as before.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from cupy_router.method import RoutingMethod
from cupy_router.ops._invariant import check_invariant
from cupy_router.ops._method import needs_whole_rows
from cupy_router.torch._experts import register
from cupy_router.torch._experts_swap import check_governed, replace_experts, restore_experts
from cupy_router.torch._router_modules import describe_inline_router, describe_router
from cupy_router.torch._router_spec import Unsupported
from cupy_router.torch._swapped import InlineRouter, LogitsOnly, Router, Swapped, restore, restored_class, swap
from cupy_router.torch._verify import verify


def replace_routers(model: Any, *, experts: bool = False, batch_invariant: bool = False) -> int:
    """Swap the routers of a Hugging Face model for those of cupy_router, in place; `restore_routers` undoes it.

    Args:
        model: A module with mixture-of-experts blocks, such as a `PreTrainedModel` of the transformers package, on the
            CPU or on CUDA, in float32, float16 or bfloat16.
        experts: Also run the experts by `expert_layout`, `permute`, grouped GEMMs of PyTorch and `unpermute`: set the
            experts implementation of the model to "cupy_router". For models whose experts have such implementations
            in transformers.
        batch_invariant: Logits, weights and indices of a token are the same to the bit in any batch, as for
            :func:`cupy_router.dense_router`. Routers for which that cannot be are left unchanged.

    Returns:
        Number of routers swapped by this call.

    Raises:
        TypeError: ``model`` is not a `torch.nn.Module`, or ``experts`` or ``batch_invariant`` is not a bool.

    Warns:
        UserWarning: Once for each kind of router or block that was left unchanged, with its name and the reason.

    Each router keeps its parameters and returns the same results as before, in the same dtypes. Logits are accumulated
    and kept in float32. Experts are selected by these, even where the model's code rounds logits to bfloat16. Of equal
    values the lower index is selected.

    Weights and logits have gradients, computed by the op `activation_topk_backward`. Second derivatives are refused.
    Routers that add noise in training run the model's code in training.

    A router is swapped if its code and ours give the same results for random tokens, in float32 on the CPU. The code of
    the model still runs for what was not compared or did not run there: other numbers of dimensions, other dtypes, or
    training if the results differ in training. Models of transformers 5.0 and later are known.

    The routing method comes from the nearest configuration of the block, by `RoutingMethod.from_config`. Copies and
    pickles of the model stay swapped. Reading such a pickle needs cupy_router.

    The implementation of the experts is named in the configuration of the model, which all of its layers share. It is
    no part of what `save_pretrained` writes. `model.set_experts_implementation` changes it as usual.

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
    >>> replace_routers(model, experts=True)
    0
    >>> model.config._experts_implementation
    'cupy_router'
    >>> restore_routers(model)
    2
    """
    _check("replace_routers", model)
    for name, flag in (("experts", experts), ("batch_invariant", batch_invariant)):
        if not isinstance(flag, bool):
            raise TypeError(f"replace_routers: {name} must be a bool, got {flag!r}")
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
            _swap_router_of(block, method, batch_invariant)
            swapped += 1
        except Unsupported as error:
            skipped.setdefault((type(block).__name__, str(error)), []).append(path)
    if not blocks:
        reason = _method(getattr(model, "config", None))
        skipped[type(model).__name__, reason if isinstance(reason, str) else "no child of it has experts"] = [""]
    elif experts:
        _replace_experts(model, skipped)
    _warn("replace_routers", skipped)
    return swapped


def restore_routers(model: Any) -> int:
    """Undo `replace_routers`: restore every router of the model, and the implementation of its experts.

    Args:
        model: A module that was passed to `replace_routers`, or a part, a copy or a wrapper of it.

    Returns:
        Number of routers restored; 0 if none was swapped.

    Raises:
        TypeError: ``model`` is not a `torch.nn.Module`.

    Warns:
        UserWarning: Once for each kind of router that was left swapped, with its name and the reason. It is one whose
            class other code derived from the swapped one, as in ``class Mine(type(router))``. Give it the class that
            it had before, and call `restore_routers` again.

    Classes that PyTorch derived from the swapped one, as `weight_norm` and any other parametrization or `fully_shard`
    do, are then derived from the original one.

    >>> import torch
    >>> from cupy_router.torch import restore_routers
    >>> restore_routers(torch.nn.Linear(2, 2))
    0
    """
    _check("restore_routers", model)
    skipped: dict[tuple[str, str], list[str]] = {}
    kept: set[Any] = set()
    restored = 0
    for path, module in model.named_modules():
        if not isinstance(module, Swapped) or module in kept:
            continue
        together = [*_gates_of(module), module]
        try:
            for each in together:
                restored_class(each)
        except Unsupported as error:
            skipped.setdefault((type(module).__name__, str(error)), []).append(path)
            kept.update(together)
            continue
        restored += not isinstance(module, LogitsOnly)
        for each in together:
            restore(each)
    restore_experts(model)
    _warn("restore_routers", skipped)
    return restored


def _gates_of(block: Any) -> list[Any]:
    return [child for child in block.children() if isinstance(child, LogitsOnly)]


def _warn(function: str, skipped: dict[tuple[str, str], list[str]]) -> None:
    """Warn once for each kind of module and reason, with the paths of such modules."""
    for (kind, reason), paths in skipped.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        where = f" ({paths[0]}{more})" if paths[0] else ""
        warnings.warn(f"{function} left {kind}{where} as it is: {reason}", stacklevel=3)


def _check(name: str, model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")


def _replace_experts(model: Any, skipped: dict[tuple[str, str], list[str]]) -> None:
    """Set the experts implementation of a model, and note which experts have to stay as they are."""
    found = []
    for path, block, _ in _sparse_blocks(model):
        for name, child in block.named_children():
            if _are_experts(name, child):
                try:
                    check_governed(child, register())
                    found.append(child)
                except Unsupported as error:
                    skipped.setdefault((type(child).__name__, str(error)), []).append(f"{path}.{name}".lstrip("."))
    replace_experts(model, found)


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


def _if_too_old(block: Any) -> str:
    """Return what to add to a message if the block is from a version of transformers that routes in other ways."""
    version = str(getattr(sys.modules.get("transformers"), "__version__", ""))
    old = type(block).__module__.startswith("transformers.") and version[:2] in ("3.", "4.")
    return f"; this is transformers {version}, and replace_routers knows the models of 5.0 and later" if old else ""


def _swap_router_of(block: Any, method: RoutingMethod, batch_invariant: bool) -> None:
    if batch_invariant:
        try:
            check_invariant(method)
        except ValueError as error:
            raise Unsupported(str(error)) from error
    others = {name: child for name, child in block.named_children() if not _are_experts(name, child)}
    failures: list[str] = []
    described = [(child, describe_router(child, method, failures)) for child in others.values()]
    found = [(child, spec) for child, spec in described if spec is not None]
    if len(found) == 1:
        router, spec = found[0]
        spec = replace(spec, batch_invariant=batch_invariant)
        swap(router, Router, verify(router, Router, spec))
        return
    inline = describe_inline_router(block, method, failures) if not found else None
    if inline is None:
        raise Unsupported(
            f"{len(found) or 'none'} of its children {', '.join(others)} multiplies with a gate of {method.num_logits} "
            f"rows and returns weights and indices of {method.top_k} experts a token"
            f"{''.join(failures)}{_if_too_old(block)}"
        )
    spec, child, of_gate = inline
    if batch_invariant and needs_whole_rows(method):
        raise Unsupported("batch_invariant takes no softmax of all logits where the block routes itself")
    of_gate = replace(of_gate, batch_invariant=batch_invariant)
    spec, of_gate = verify(block, InlineRouter, spec), verify(child, LogitsOnly, of_gate)
    swap(child, LogitsOnly, of_gate)
    try:
        swap(block, InlineRouter, spec)
    except Unsupported:
        restore(child)
        raise
