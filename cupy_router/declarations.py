# SPDX-License-Identifier: Apache-2.0
"""Read the declarations in a kernel's text: the constants that specialise it, and its parameters.

A constant is declared once, in a line of its own, with a default: `SPECIALISED int LANES = 32;  // that share a row`.
The value of a specialisation takes the default's place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

_CONSTANT = re.compile(r"^SPECIALISED (\w+(?: \w+)*) (\w+) = ([^;]+);", re.M)
_COMMENT = re.compile(r"//[^\n]*")
_ATTRIBUTES = r"(?:__cluster_dims__\s*\([^)]*\)\s*)?(?:__launch_bounds__\s*\([^)]*\)\s*)?"
_KERNEL = rf'extern\s+"C"\s+__global__\s+void\s+({_ATTRIBUTES}){{name}}\s*\(([^)]*)\)'
TENSOR_MAP = "T"  # in a format, for the 128 bytes of a TensorMap
_TYPES = {"*": "P", "int": "i", "long long": "q", "float": "f", "TensorMap": TENSOR_MAP}


class CompileError(RuntimeError):
    """A kernel file did not compile; the message holds the compiler's lines, each with its file and line."""


# -- Constants ---------------------------------------------------------------------------------------------------------


def with_constants(text: str, values: Mapping[str, int]) -> tuple[str, list[str]]:
    """Return the text with these values of its constants, and the names that it does not declare."""
    unknown = dict(values)

    def declared(declaration: re.Match[str]) -> str:
        kind, name, default = declaration.groups()
        value = unknown.pop(name, None)
        return f"SPECIALISED {kind} {name} = {default if value is None else _literal(kind, value)};"

    return _CONSTANT.sub(declared, text), list(unknown)


def _literal(kind: str, value: int) -> str:
    """Return a value in C++; that of an enumeration by its number."""
    if kind == "bool":
        return "true" if value else "false"
    return str(value) if kind == "int" else f"{kind}({value})"


def constants(source: str) -> dict[str, int]:
    """Return the constants of a text with their values, without those that are no numbers, such as the default of an
    enumeration."""
    found: dict[str, int] = {}
    for kind, name, text in _CONSTANT.findall(source):
        if text in found:  # the same as another
            found[name] = found[text]
        elif text in ("true", "false"):
            found[name] = int(text == "true")
        elif number := re.fullmatch(rf"(?:{kind}\()?(-?\d+)\)?", text):
            found[name] = int(number[1])
    return found


# -- Parameters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signature:
    """A kernel's parameters as its file declares them; `format` has a `struct` code for each, or TENSOR_MAP.

    A parameter that is a struct counts as its members. Where there is one, `members` is how many each parameter has.
    """

    function: str
    names: tuple[str, ...]
    format: str
    members: tuple[int, ...] = ()


class Parameter(NamedTuple):
    """One parameter: as a device function declares it, its type without qualifiers ("*" for pointers), its name."""

    text: str
    kind: str
    name: str


class Declaration(NamedTuple):
    """`extern "C" __global__ void function(...)` in a text: from where to where, its attributes, its parameters."""

    begin: int
    end: int
    bounds: str
    parameters: tuple[Parameter, ...]


def declaration(source: str, function: str) -> Declaration | None:
    """Return the declaration of a kernel; None if the text has no such kernel."""
    found = re.search(_KERNEL.format(name=function), _without_comments(source))
    if found is None:
        return None
    parameters = []
    for text in found[2].split(","):
        kind, name = re.fullmatch(r"\s*(.*?)(\w+)\s*", text, re.S).groups()  # type: ignore[union-attr]  # never empty
        kind = " ".join(re.sub(r"\bconst\b|__restrict__|__grid_constant__", "", kind).split())
        text = " ".join(text.replace("__grid_constant__", "").split())
        parameters.append(Parameter(text, "*" if "*" in kind else kind, name))
    return Declaration(*found.span(), (found[1] or "").strip(), tuple(parameters))


def _without_comments(source: str) -> str:
    """Replace comments by spaces, so that everything else keeps its place."""
    return _COMMENT.sub(lambda comment: " " * len(comment[0]), source)


def signature_in(text: str, function: str) -> Signature | None:
    """Return the parameters of a kernel; None if the text has no such kernel. CompileError for other types."""
    found = declaration(text, function)
    if found is None:
        return None
    names: list[str] = []
    codes, counts = "", []
    for _, kind, name in found.parameters:
        if kind in _TYPES:
            fields = [name]
            codes += _TYPES[kind]
        else:
            fields = members(text, kind)
            codes += "f" * len(fields)
        if not fields:
            allowed = ", ".join(kind for kind in _TYPES if kind != "*")
            raise CompileError(
                f"{function}: parameter {name} has type {kind}; allowed are pointers, {allowed} and structs of floats"
            )
        names += fields
        counts.append(len(fields))
    return Signature(function, tuple(names), codes, tuple(counts) if len(counts) < len(names) else ())


def members(text: str, kind: str) -> list[str]:
    """Return the names of the members of a struct of floats; an empty list for other types."""
    found = re.search(rf"\bstruct {kind} \{{([^{{}}]*)\}};", _without_comments(text))
    fields = re.sub(r"\s+", " ", found[1]).strip().split("; ") if found else []
    matched = [re.fullmatch(r"float (\w+);?", field) for field in fields]
    return [match[1] for match in matched if match] if all(matched) else []
