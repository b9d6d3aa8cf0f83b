# SPDX-License-Identifier: Apache-2.0
"""Read single arrays of a safetensors checkpoint into CPU memory. Knows nothing of routing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

INDEX = "model.safetensors.index.json"
_OF_NUMPY = {"BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "F16", "BF16", "F32", "F64", "C64"}


def files_by_key(path: Any) -> dict[str, Path]:
    """Return the file of each key of a checkpoint: a safetensors file, or the folder or index of several.

    Raises:
        TypeError: ``path`` is no path.
        OSError: There is no such file.
        ValueError: It is no safetensors file or index, or two files of a folder have the same key.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be the path of a file or folder, got {type(path).__name__}")
    path = Path(path)
    if path.is_dir():
        return _files_of_index(path / INDEX) if (path / INDEX).is_file() else _files_of_folder(path)
    return _files_of_index(path) if path.suffix == ".json" else dict.fromkeys(_keys(path), path)


def read(path: Path, key: str) -> np.ndarray[Any, Any]:
    """Return the array of one key of a file, in CPU memory.

    Raises:
        TypeError: It has a dtype that NumPy does not know.
        OSError: There is no such file.
        ValueError: It is no safetensors file, or lacks the key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, which should have {key}")
    with _open(path) as file:
        if key not in file.keys():  # noqa: SIM118  # it is no dict
            raise ValueError(f"{path} lacks {key}, which its index says is there")
        dtype = file.get_slice(key).get_dtype()
        if dtype not in _OF_NUMPY:
            raise TypeError(
                f"{key} of {path} must be float32, float16 or bfloat16, got {dtype}: convert it to float32, with its "
                "scales if it has any, and pass the arrays to Router"
            )
        array: np.ndarray[Any, Any] = file.get_tensor(key)
    return array


def unlisted(files: Mapping[str, Path], used: Iterable[Path]) -> dict[str, Path]:
    """Return the keys, with their files, that these files have and the index of the checkpoint does not name."""
    return {key: path for path in used for key in _keys(path) if key not in files}


def _files_of_folder(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        for key in _keys(file):
            if found.setdefault(key, file) != file:
                raise ValueError(f"{key} is in {found[key]} and in {file.name}: pass the path of one of them")
    if not found:
        raise FileNotFoundError(f"there is no safetensors file in {folder}")
    return found


def _files_of_index(path: Path) -> dict[str, Path]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except RecursionError:
        raise ValueError(f"{path} is no index of a checkpoint: it is nested too deeply") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is no JSON file: {error}") from error
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} is no index of a checkpoint, which would have a weight_map from keys to file names")
    for key, name in mapping.items():
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
            raise ValueError(f"{path} says that {key} is in {name!r}, which is no name of a file beside it")
    return {key: path.parent / name for key, name in mapping.items()}


def _keys(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with _open(path) as file:
        return list(file.keys())


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy
        import safetensors
    except ImportError as error:
        raise ImportError(f"reading {path} needs the library safetensors: install cupy-router[safetensors]") from error
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or not the whole of one: {error}") from error
    except OSError as error:
        raise type(error)(f"{path} cannot be read: {error}") from error
