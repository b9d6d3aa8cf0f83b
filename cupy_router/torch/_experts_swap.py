# SPDX-License-Identifier: Apache-2.0
"""Set the experts implementation of a model to "cupy_router", and back.

transformers reads the implementation from the configuration of an experts module. Each module whose configuration was
changed keeps the name that stood there before, so that copies, pickles and parts of the model can be restored, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cupy_router.torch._experts import NAME, prepare_nodes, register
from cupy_router.torch._router_spec import Unsupported

_FIXED = "deepgemm_megamoe"  # it has its own order of the weights, so transformers refuses to leave it


@dataclass(frozen=True)
class Earlier:
    """The implementation that a configuration named before."""

    implementation: str | None

    def __reduce__(self) -> Any:
        return _unpickled, (self.implementation,)


def _unpickled(implementation: str | None) -> Earlier:
    register()  # the model needs it in this process, too
    return Earlier(implementation)


def check_governed(module: Any, registry: Any) -> None:
    """Check that the implementation of an experts module comes from this registry and can be changed.

    Raises:
        Unsupported: This is not so.
    """
    cells = getattr(type(module).forward, "__closure__", None) or ()
    found = [cell.cell_contents for cell in cells if hasattr(type(cell.cell_contents), "get_interface")]
    if not found:
        raise Unsupported("transformers has no experts implementations for it")
    if found[0] is not registry:
        raise Unsupported(f"its implementations are those of {type(found[0]).__name__}, which has none of cupy_router")
    if module.config._experts_implementation == _FIXED:
        raise Unsupported(f"transformers does not leave the implementation {_FIXED}")


def replace_experts(model: Any, experts: Iterable[Any]) -> None:
    """Set the implementation of experts modules, and of the models around them.

    generate() looks at the implementation of the model.
    """
    for module in experts:
        prepare_nodes(module)
    earlier: dict[int, Earlier] = {}  # by configuration: modules share them
    for module in [*experts, *_models(model, set(experts))]:
        config = module.config
        if id(config) not in earlier and config._experts_implementation != NAME:
            earlier[id(config)] = Earlier(config._experts_implementation)
            config._experts_implementation_internal = NAME  # the property would also set the parts of a configuration
        if id(config) in earlier:
            module._cupy_router_experts = earlier[id(config)]


def _models(model: Any, experts: set[Any]) -> Iterator[Any]:
    """Yield the models of transformers that contain some of these experts."""
    for module in model.modules():
        can_set = getattr(module, "_can_set_experts_implementation", None)
        if can_set is not None and can_set() and not experts.isdisjoint(module.modules()):
            yield module


def restore_experts(model: Any) -> None:
    """Set all configurations to what they were, except those that others have set since."""
    for module in model.modules():
        if "_cupy_router_experts" in vars(module):
            if module.config._experts_implementation == NAME:
                module.config._experts_implementation_internal = module._cupy_router_experts.implementation
            del module._cupy_router_experts
