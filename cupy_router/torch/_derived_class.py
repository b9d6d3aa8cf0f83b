# SPDX-License-Identifier: Apache-2.0
"""Replace a class within a class that was derived from it at run time.

A parametrization such as `weight_norm` and `fully_shard` change a module's class, too, to a subclass of what they find.
So the class of a swapped module may be below theirs, and theirs below that of a module to be swapped.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch

_SLOTS = ("__dict__", "__weakref__")
# By derived class: modules that share a class still share one afterwards, so that code compiles once.
_made: weakref.WeakKeyDictionary[type, dict[tuple[type, type], type]] = weakref.WeakKeyDictionary()


def written_class(derived: type) -> type:
    """Return the class of a module that is written in some file, below classes that were made at run time."""
    bases = [cls for cls in derived.__mro__ if issubclass(cls, torch.nn.Module)]
    return next((cls for cls in bases if not _made_at_run_time(cls)), derived)


def _made_at_run_time(cls: Any) -> bool:
    """Return True if a class has no forward of its own and cannot be found by its name."""
    found = getattr(sys.modules.get(cls.__module__), cls.__qualname__, None)
    return "forward" not in vars(cls) and found is not cls and "<locals>" not in cls.__qualname__


def with_base(derived: type, old: type, new: type) -> type:
    """Return `derived` with `new` in place of its base class `old`. Other classes keep their order.

    Raises:
        TypeError: Such a class cannot be made.
    """
    if derived is old:
        return new
    if old not in derived.__mro__:
        return derived
    members = _members(derived)
    for member in members.values():
        function: Any = getattr(member, "__func__", getattr(member, "fget", member))
        if "__class__" in getattr(getattr(function, "__code__", None), "co_freevars", ()):
            raise TypeError(f"{derived.__name__}.{function.__name__} uses super(), which names the class")
    made = _made.setdefault(derived, {})
    if (old, new) not in made or _members(made[old, new]) != members:  # another module may have changed its class
        bases = tuple(with_base(base, old, new) for base in derived.__bases__)
        made[old, new] = type(derived)(derived.__name__, bases, members)
    return made[old, new]


def _members(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if name not in _SLOTS}
