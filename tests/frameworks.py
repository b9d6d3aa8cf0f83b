# SPDX-License-Identifier: Apache-2.0
"""Conversion of NumPy arrays to each framework's, in CPU or CUDA memory, and back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest


def transformers_with_models() -> Any:
    """Return the package transformers; skip the test or module without it, or if it needs a newer PyTorch."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not transformers.utils.is_torch_available():
        reason = f"transformers {transformers.__version__} needs a newer PyTorch than the one installed"
        pytest.skip(reason, allow_module_level=True)
    return transformers


class NumPy:
    result_type: Any = np.ndarray

    def array(self, host: np.ndarray) -> Any:
        return host.copy()

    def numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)


class PyTorch:
    def __init__(self, device: str = "cpu") -> None:
        self.torch = pytest.importorskip("torch")
        self.result_type = self.torch.Tensor
        self.device = device

    def array(self, host: np.ndarray) -> Any:
        if host.dtype == ml_dtypes.bfloat16:
            return self.torch.from_numpy(host.view(np.int16).copy()).view(self.torch.bfloat16).to(self.device)
        return self.torch.from_numpy(host.copy()).to(self.device)

    def numpy(self, array: Any) -> np.ndarray:
        array = array.detach().cpu()
        if array.dtype == self.torch.bfloat16:
            return np.asarray(array.view(self.torch.int16)).view(ml_dtypes.bfloat16)
        return np.asarray(array)


class JAX:
    """No 64-bit integers: JAX converts them to 32 bits unless configured otherwise."""

    def __init__(self, platform: str = "cpu") -> None:
        self.jax = pytest.importorskip("jax")
        self.result_type = self.jax.Array
        try:
            self.device = self.jax.devices(platform)[0]
        except RuntimeError:
            pytest.skip(f"this JAX has no {platform}")

    def array(self, host: np.ndarray) -> Any:
        return self.jax.device_put(host.copy(), self.device)

    def numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)


class Strict:
    """array-api-strict: an array type with only DLPack and the array API."""

    def __init__(self) -> None:
        self.xp = pytest.importorskip("array_api_strict")
        self.result_type = type(self.xp.asarray([0.0]))

    def array(self, host: np.ndarray) -> Any:
        return self.xp.asarray(host.copy())

    def numpy(self, array: Any) -> np.ndarray:
        return np.from_dlpack(array)


class CuPy:
    def __init__(self) -> None:
        self.cupy = pytest.importorskip("cupy")
        self.result_type = self.cupy.ndarray

    def array(self, host: np.ndarray) -> Any:
        if host.dtype == ml_dtypes.bfloat16:
            return self.cupy.asarray(host.view(np.uint16)).view(host.dtype)
        return self.cupy.asarray(host)

    def numpy(self, array: Any) -> np.ndarray:
        if array.dtype == ml_dtypes.bfloat16:
            array = array.view(np.uint16)
            return np.asarray(self.cupy.asnumpy(array)).view(ml_dtypes.bfloat16)
        return np.asarray(self.cupy.asnumpy(array))


ON_CPU: dict[str, Any] = {"numpy": NumPy, "torch": PyTorch, "jax": JAX, "array_api_strict": Strict}
ON_GPU: dict[str, Any] = {"cupy": CuPy, "torch": lambda: PyTorch("cuda"), "jax": lambda: JAX("gpu")}
