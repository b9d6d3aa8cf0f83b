# SPDX-License-Identifier: Apache-2.0
"""Compilers that change the locale of their thread, as NVRTC before 12.6 does, change nothing for Python."""

from __future__ import annotations

import ast
import ctypes
import locale
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cupy_router import thread_locale

PACKAGE = Path(thread_locale.__file__).parent
LC_ALL_MASK = 0x1FBF  # of glibc
libc = ctypes.CDLL(None)
if not hasattr(locale, "nl_langinfo") or not hasattr(libc, "gnu_get_libc_version"):
    pytest.skip("needs glibc", allow_module_level=True)
libc.newlocale.restype = libc.uselocale.restype = ctypes.c_void_p
libc.newlocale.argtypes, libc.uselocale.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p], [ctypes.c_void_p]


def leave_the_locale_of_c() -> None:
    libc.uselocale(libc.newlocale(LC_ALL_MASK, b"C", None))


@pytest.fixture(autouse=True)
def utf8() -> Iterator[None]:
    """A thread with a UTF-8 locale, whatever that of the process is."""
    before = libc.uselocale(None)
    utf8 = libc.newlocale(LC_ALL_MASK, b"C.UTF-8", None)
    if utf8 is None:
        pytest.skip("there is no locale C.UTF-8")
    libc.uselocale(utf8)
    yield
    libc.uselocale(before)


def test_the_locale_is_restored() -> None:
    assert locale.nl_langinfo(locale.CODESET) == "UTF-8"
    with thread_locale.kept():
        leave_the_locale_of_c()
        assert locale.nl_langinfo(locale.CODESET) != "UTF-8"
    assert locale.nl_langinfo(locale.CODESET) == "UTF-8"

    @thread_locale.kept()
    def fail() -> None:
        leave_the_locale_of_c()
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert locale.nl_langinfo(locale.CODESET) == "UTF-8"


def test_where_there_is_no_locale_of_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_locale, "_uselocale", None)
    with thread_locale.kept():
        pass


def test_every_function_that_compiles_keeps_it() -> None:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and re.search(
                r"ompileProgram\(|\.compile\(log_stream", ast.unparse(node)
            ):
                found[node.name] = "thread_locale.kept()" in map(ast.unparse, node.decorator_list)
    assert found == {"build": True, "_compile": True, "compile": True, "kernel": True}
