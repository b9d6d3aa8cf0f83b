# SPDX-License-Identifier: Apache-2.0
"""Callbacks by which upper layers hear of lower ones; imports nothing."""

from __future__ import annotations

from collections.abc import Callable

# Called with the name of a framework when the first array of one of its types is seen.
on_first_array: list[Callable[[str], None]] = []
