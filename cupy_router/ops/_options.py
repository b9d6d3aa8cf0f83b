# SPDX-License-Identifier: Apache-2.0
"""The options of ops, and their text: how they travel through graphs and compiled programs."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from cupy_router.method import as_json, from_text


class Options:
    """Base of the options of an op: frozen dataclasses of methods, options, strings, numbers, bools, None and tuples.

    An op with a :class:`RoutingMethod` has it as the field `method`.
    """

    @property
    def text(self) -> str:
        """The options as JSON, which has the same meaning in every process. Graphs contain it."""
        return self.text_without(())

    def text_without(self, paths: tuple[str, ...]) -> str:
        """Return the text with the defaults of some options, which may be those of options in these."""
        # Plain string operations, because torch.compile traces this.
        names = type(self).__match_args__  # type: ignore[attr-defined]  # those of the fields: subclasses are dataclasses
        fields = []
        for name in names:
            value = getattr(self, name)
            inner = tuple([path[len(name) + 1 :] for path in paths if path.startswith(name + ".")])
            if name in paths:
                text = as_json(getattr(type(self), name))
            else:
                text = value.text_without(inner) if inner and value is not None else as_json(value)
            fields.append(f'"{name}": {text}')
        return "{" + ", ".join(fields) + "}"

    def changed(self, path: str) -> Any:
        """Return one option; None if it is the default, or one of options that are None."""
        first, _, rest = path.partition(".")
        value = getattr(self, first)
        if rest:
            return None if value is None else value.changed(rest)
        return None if value == getattr(type(self), first) else value

    def replaced(self, path: str, value: Any) -> Any:
        """Return the same options but for one."""
        first, _, rest = path.partition(".")
        found = {name: getattr(self, name) for name in type(self).__match_args__}  # type: ignore[attr-defined]
        return type(self)(**(found | {first: found[first].replaced(rest, value) if rest else value}))


@lru_cache(maxsize=4096)
def options_of(kind: Any, text: str) -> Any:
    """Return the options, of a dataclass `kind`, that a text describes."""
    nested: dict[str, Any] = {
        name: option
        for name, hint in get_type_hints(kind).items()
        for option in (hint, *get_args(hint))
        if isinstance(option, type) and issubclass(option, Options)
    }

    def value(name: str, value: Any) -> Any:
        if not isinstance(value, dict):
            return tuple(value) if isinstance(value, list) else value
        text = json.dumps(value)
        return options_of(nested[name], text) if name in nested else from_text(text)

    return kind(**{name: value(name, field) for name, field in json.loads(text, strict=False).items()})
