# SPDX-License-Identifier: Apache-2.0
"""Check the arguments of a Gate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from cupy_router.arrays import _torch as tensors
from cupy_router.arrays import framework_of
from cupy_router.method import RoutingMethod
from cupy_router.ops import _hash_layer as hash_layer
from cupy_router.ops import dense_router
from cupy_router.ops._declared import FLOATS, INTS
from cupy_router.results import Routing


def check_flags(**flags: Any) -> None:
    """Refuse values in the place of flags."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(
                f"{name} must be True or False, got {type(flag).__name__} (load_state_dict and attributes take values)"
            )


def check_table(table: Any, method: RoutingMethod, device: Any) -> None:
    """Check a table, whose values are not looked at."""
    if not isinstance(table, torch.Tensor):
        raise TypeError(f"table must be a PyTorch tensor, got {type(table).__name__}")
    check_dense("table", table)
    found = f"{tensors.name_of(table.dtype)} {list(table.shape)}"
    if tensors.name_of(table.dtype) not in INTS:
        raise TypeError(f"table must be {' or '.join(INTS)}, got {found}")
    if table.ndim != 2 or table.shape[1] != method.top_k:
        raise ValueError(f"table must have shape [vocab_size, top_k] = [vocab_size, {method.top_k}], got {found}")
    if table.is_meta and device.type != "meta":
        raise ValueError(f"table must have values for a gate on {device}, got {found} on meta")


def checked_dtype(dtype: Any) -> Any:
    """Return the dtype of the weight."""
    found = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(found, torch.dtype) or tensors.name_of(found) not in FLOATS:
        default = ", which is PyTorch's default dtype" if dtype is None else ""
        raise TypeError(f"dtype must be torch.{' or torch.'.join(FLOATS)}, got {found!r}{default}")
    return found


def flat_rows(x: Any) -> Any:
    """Return x, whose axes are not two, as [num_tokens, hidden]."""
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:  # before its rows are copied
        raise ValueError(
            f"x must be contiguous along its last axis, got strides {list(x.stride())} of {list(x.shape)}: call "
            "x.contiguous()"
        )
    return x.flatten(0, -2) if x.ndim > 1 else x[None]


def flat_ids(token_ids: Any, axes: Any) -> Any:
    """Return token ids, which have these axes, in one row."""
    if not isinstance(token_ids, torch.Tensor):
        raise TypeError(f"token_ids must be a PyTorch tensor where a table selects, got {type(token_ids).__name__}")
    if token_ids.shape != axes:
        raise ValueError(f"token_ids must have shape {list(axes)} like x, got {list(token_ids.shape)}")
    return token_ids.reshape(-1)


def flat_out(out: Any, shape: tuple[int, ...]) -> Routing:
    """Return views [num_tokens, num_columns] of `out`, which has the shape of the results."""
    if not isinstance(out, Routing):
        raise TypeError(f"out must be a Routing, got {type(out).__name__}")
    rows = []
    for name, array in (("weights", out.weights), ("indices", out.indices)):  # which PyTorch 2.4 traces
        if not isinstance(array, torch.Tensor):
            raise TypeError(f"out.{name} must be a PyTorch tensor, got {type(array).__name__}")
        if array.shape != shape:
            raise ValueError(f"out.{name} must have shape {list(shape)}, got {list(array.shape)}")
        try:
            rows.append(array.view(math.prod(shape[:-1]), shape[-1]))
        except RuntimeError as error:
            raise ValueError(
                f"out.{name} must have rows at equal distances, got strides {list(array.stride())}"
            ) from error
    return Routing(*rows)


def check_dense(name: str, tensor: Any) -> None:
    """Refuse a tensor that has no shape, or no strides, for PyTorch."""
    if (
        isinstance(tensor, (UninitializedBuffer, UninitializedParameter))
        or tensor.is_nested
        or tensor.layout != torch.strided
    ):
        framework_of(name, tensor).view(name, tensor, None)


def as_error_of_gate(error: Exception, x: Any, token_ids: Any, out: Any) -> Exception | None:
    """Return the error of a call, named after Gate; or what is wrong with a tensor that PyTorch stumbled over.

    None if the error is right as it is.
    """
    given = {"x": x, "token_ids": token_ids}
    if isinstance(out, Routing):
        given |= {"out.weights": out.weights, "out.indices": out.indices}
    try:
        for name, tensor in given.items():
            if isinstance(tensor, torch.Tensor):
                check_dense(name, tensor)
    except ValueError as cause:
        return ValueError(f"Gate: {cause}")
    label, _, message = str(error).partition(": ")
    if label in (dense_router.OP.label, hash_layer.OP.label):
        return type(error)(f"Gate: {message}")
    return None if isinstance(error, RuntimeError) else type(error)(f"Gate: {error}")
