# SPDX-License-Identifier: Apache-2.0
"""Callbacks that lower layers call and upper layers register; imports nothing."""

from __future__ import annotations

from collections.abc import Callable

# Called with the name of a framework when an array of a new type of it is first seen.
on_first_array: list[Callable[[str], None]] = []

# These return True while code is traced. Then a Router leaves the checks of its arrays to the op of each call.
traced: list[Callable[[], bool]] = []

# These return True during a backward pass, which repeats calls if activations are recomputed. Then a call adds nothing
# to what it would otherwise count in place.
in_backward: list[Callable[[], bool]] = []

# Types of ints that stand for sizes which traced code does not know.
symbolic_ints: list[type] = []
