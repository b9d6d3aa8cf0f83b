# SPDX-License-Identifier: Apache-2.0
"""Replace a class within a class that was derived from it at run time.

A parametrization such as `weight_norm` and `fully_shard` change a module's class, too, to a subclass of what they find.
So the class of a swapped module may be below theirs, and theirs below that of a module to be swapped.
"""

from __future__ import annotations

import sys
import types
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
    """Return True if a class was made by a call of `type` in a module of PyTorch."""
    found = getattr(sys.modules.get(cls.__module__), cls.__qualname__, None)
    of_pytorch = cls.__module__.partition(".")[0] == torch.__name__
    return of_pytorch and found is not cls and "<locals>" not in cls.__qualname__


def with_base(derived: type, old: type, new: type) -> type:
    """Return `derived` with `new` in place of its base class `old`. Other classes keep their order.

    Only classes made by PyTorch are made again. The methods of others may name their class, as `super()` does, and
    their users may.

    Raises:
        TypeError: There is another class between `derived` and `old`, or other code was put into one of these.
    """
    if derived is old:
        return new
    if old not in derived.__mro__:
        return derived
    members = _members(derived)
    if not _made_at_run_time(derived):
        raise TypeError(f"{derived.__name__} is not a class that PyTorch made")
    for name, member in members.items():
        if not _put_by_pytorch(name, member):
            raise TypeError(f"{derived.__name__}.{name} is not what PyTorch put there")
    made = _made.setdefault(derived, {})
    if (old, new) not in made or _members(made[old, new]) != members:  # another module may have changed its class
        bases = tuple(with_base(base, old, new) for base in derived.__bases__)
        made[old, new] = type(derived)(derived.__name__, bases, members)
    return made[old, new]


def _members(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if name not in _SLOTS}


def _put_by_pytorch(name: str, member: Any) -> bool:
    """Return True for a function or property that is defined in PyTorch, without a decorator, and for `__doc__` etc."""
    if isinstance(member, property):
        return all(_put_by_pytorch("", part) for part in (member.fget, member.fset, member.fdel) if part)
    if isinstance(member, types.FunctionType):
        defined_in = str(member.__globals__.get("__name__"))
        return defined_in.partition(".")[0] == torch.__name__ and not hasattr(member, "__wrapped__")
    return name.startswith("__") and not callable(member)
