# SPDX-License-Identifier: Apache-2.0
"""Read single arrays of a safetensors checkpoint into CPU memory. Knows nothing of routing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def files_by_key(path: Path) -> dict[str, Path]:
    """Return the file of each key of a checkpoint."""
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if not index.is_file():
            files = sorted(path.glob("*.safetensors"))
            if not files:
                raise FileNotFoundError(f"there is no safetensors file in {path}")
            return {key: file for file in files for key in _keys(file)}
        path = index
    if path.suffix == ".json":
        mapping = json.loads(path.read_text())["weight_map"]
        return {key: path.with_name(name) for key, name in mapping.items()}
    return dict.fromkeys(_keys(path), path)


def _keys(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def read(path: Path, key: str) -> np.ndarray[Any, Any]:
    """Return the array of one key, in CPU memory."""
    with _open(path) as file:
        array: np.ndarray[Any, Any] = file.get_tensor(key)
    return array


def _open(path: Path) -> Any:
    try:
        import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy
        import safetensors
    except ImportError as error:
        raise ImportError(f"reading {path} needs the library safetensors: install cupy-router[safetensors]") from error
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
