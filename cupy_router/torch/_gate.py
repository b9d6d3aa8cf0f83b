# SPDX-License-Identifier: Apache-2.0
"""Gate: a router as a module of PyTorch, which owns its parameters and buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from cupy_router.method import RoutingMethod, resolve
from cupy_router.ops import _checks as check
from cupy_router.ops import dense_router
from cupy_router.ops._hash_layer import hash_layer
from cupy_router.ops._method import check_bias
from cupy_router.results import Routing
from cupy_router.torch._gate_arguments import (
    as_error_of_gate,
    check_flags,
    check_table,
    checked_dtype,
    flat_ids,
    flat_out,
    flat_rows,
)
from cupy_router.torch._gate_names import BIAS, FLOAT32, as_deepseek, as_float32, logit_bias_name, named_as_ours
from cupy_router.warm_up import NUM_TOKENS, KernelReady, Progress, warm_up_layer


class Gate(torch.nn.Module):  # type: ignore[misc]  # PyTorch is untyped to us
    """Router of one layer as a module: ``gate(x)`` returns the experts of each token and their weights.

    A :class:`cupy_router.Router` keeps the arrays that it was given. A Gate owns its arrays, so whatever PyTorch does
    to a module concerns it: `.to`, `load_state_dict`, `functional_call`, `fully_shard`, export, parametrizations. Use a
    Gate as a part of a model, and a Router for arrays that nobody replaces.

    Args:
        hidden: Number of columns of x. None for a gate with a table and no weight, whose weights are uniform.
        method: A :class:`cupy_router.RoutingMethod`, or the name of a preset such as "deepseek-v4-flash".
        bias: Add a bias that is used for the selection only. Not allowed with a table.
        logit_bias: Add a bias of the logits, like that of a linear layer.
        expert_scale: Add a factor of each expert's weight.
        table: [vocab_size, top_k] int32 or int64 tensor, the experts of each token id; copied. Makes this a hash gate.
        dtype: torch.float32, float16 or bfloat16, the dtype of the weight. By default, PyTorch's default dtype.
        device: Device of all arrays. By default, PyTorch's default device. On "meta" they have no values, until
            `to_empty` and then `load_state_dict` or `reset_parameters`; `reset_parameters` does not know the table.

    The arrays have the names of Hugging Face's checkpoints, as attributes and in the state dict:

    ===================================  ================================  =========  =============
    `weight`                             [num_logits, hidden] in `dtype`   parameter  as `nn.Linear`
    `e_score_correction_bias` (`bias`)   [num_experts] float32             buffer     0
    `logit_bias` or `bias`               [num_experts] float32             parameter  0
    `per_expert_scale` (`expert_scale`)  [num_experts] float32             parameter  1
    `tid2eid` (`table`)                  [vocab_size, top_k] int           buffer     the table
    ===================================  ================================  =========  =============

    One that the gate does not have is None. The bias of the logits is `bias` with `score_after_topk`, as in gpt-oss,
    unless the method has `bias_on="logits"`: such methods have no other bias. With all others it is `logit_bias`, since
    there `bias` is DeepSeek's name of the bias that only selects. The float32 arrays keep dtype and values under
    `.to(torch.bfloat16)`, `.half()` and the like; only their device changes. If one has another dtype all the same, as
    under a mixed-precision policy of FSDP, the forward pass converts it to float32.

    `load_state_dict` also takes other names of checkpoints, such as `expert_bias`, or `wg.weight` and `wg.bias`,
    converts to float32, and takes a bias of shape [1, num_experts]. A plain `bias` is the bias of the logits in a gate
    that has no other, except with methods that select by sigmoid or sqrtsoftplus scores. With these it is DeepSeek's
    bias that only selects; a gate with logit_bias takes it only beside a `logit_bias` and raises an error otherwise.
    :func:`deepseek_state_dict` saves it.

    :meth:`cupy_router.Router.from_state_dict` takes the state dict of a gate, unless the gate has no weight: a
    checkpoint without one may be incomplete. Use `Router(gate.method, table=gate.tid2eid)` then.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: There is no such preset, a size is wrong, or two arguments exclude each other.

    >>> import torch
    >>> from cupy_router.torch import Gate
    >>> gate = Gate(16, "deepseek-v4-flash", bias=True, dtype=torch.bfloat16)
    >>> gate
    Gate(16, RoutingMethod(num_experts=256, top_k=6, score='sqrtsoftplus', renormalize_eps=1e-20, scale=1.5), bias=True)
    >>> weights, indices = gate(torch.randn(2, 3, 16))
    >>> weights.shape, indices.dtype
    (torch.Size([2, 3, 6]), torch.int32)
    >>> {name: tensor.dtype for name, tensor in gate.state_dict().items()}
    {'weight': torch.bfloat16, 'e_score_correction_bias': torch.float32}
    """

    def __init__(
        self,
        hidden: int | None,
        method: RoutingMethod | str,
        *,
        bias: bool = False,
        logit_bias: bool = False,
        expert_scale: bool = False,
        table: Any = None,
        dtype: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        device = torch.empty(0, device=device).device  # also the default of a context
        with check.named("Gate"):
            self.method = resolve(method)
            check_flags(bias=bias, logit_bias=logit_bias, expert_scale=expert_scale)
            check_bias(self.method, bias or None)
            if table is None or hidden is not None:
                hidden = check.integer("hidden", hidden, 1)
            elif logit_bias or expert_scale:
                raise ValueError("logit_bias and expert_scale need hidden, without which weights are uniform")
            if table is not None:
                check_table(table, self.method, device)
                if bias:
                    raise ValueError("bias and table do not go together: a table alone selects the experts")
            dtype = None if hidden is None else checked_dtype(dtype)

        new, parameter, size = partial(torch.empty, device=device), torch.nn.Parameter, self.method.num_experts
        weight = None if hidden is None else parameter(new((self.method.num_logits, hidden), dtype=dtype))
        if table is not None:
            table = table.detach().to(device, copy=True, memory_format=torch.contiguous_format)
        self.register_parameter("weight", weight)
        self.register_buffer("e_score_correction_bias", new(size, dtype=torch.float32) if bias else None)
        self._logit_bias = logit_bias_name(self.method)
        self.register_parameter("bias", None)
        self.register_parameter("logit_bias", None)
        if logit_bias:
            self.register_parameter(self._logit_bias, parameter(new(size, dtype=torch.float32)))
        self.register_parameter("per_expert_scale", parameter(new(size, dtype=torch.float32)) if expert_scale else None)
        self.register_buffer("tid2eid", table)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial values: the weight as in `torch.nn.Linear`, biases 0, scales 1. The table stays as it is."""
        if self.weight is not None:
            torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        for name, value in FLOAT32.items():
            if getattr(self, name) is not None:
                torch.nn.init.constant_(getattr(self, name), value)

    def extra_repr(self) -> str:
        hidden = None if self.weight is None else self.weight.shape[-1]
        given = {"bias": BIAS, "logit_bias": self._logit_bias, "expert_scale": "per_expert_scale"}
        flags = [f"{argument}=True" for argument, name in given.items() if getattr(self, name) is not None]
        table = [] if self.tid2eid is None else [f"table={list(self.tid2eid.shape)}"]
        return ", ".join([str(hidden), repr(self.method), *flags, *table])

    def forward(
        self,
        x: Any,
        token_ids: Any = None,
        *,
        batch_invariant: bool = False,
        num_valid: Any = None,
        out: Any = None,
        stream: Any = None,
    ) -> Routing:
        """Return the experts of each token and their weights.

        Args:
            x: [..., hidden] float32, float16 or bfloat16 tensor; also [hidden] alone. Its rows are the tokens. The last
                axis must be contiguous; rows that do not lie at equal distances are copied.
            token_ids: [...] int32 or int64 tensor. Required by a hash gate, ignored by others.
            batch_invariant: As for :func:`cupy_router.dense_router`.
            num_valid: As for :func:`cupy_router.dense_router`. It counts the rows of x.reshape(-1, hidden).
            out: A :class:`cupy_router.Routing` of tensors with the shape of the results, filled in place and returned.
            stream: As for :func:`cupy_router.dense_router`.

        Returns:
            Routing of tensors [..., top_k + num_shared_experts] on the device of x.

        Raises:
            TypeError: An argument is no tensor, or its dtype is not allowed.
            ValueError: A shape, a stride, a device or num_valid is wrong.
            RuntimeError: As for :func:`cupy_router.dense_router`.
        """
        try:
            weight = self.weight
            hidden = "hidden" if weight is None else weight.shape[-1]
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"x must be a PyTorch tensor, got {type(x).__name__}")
            if x.ndim == 0 or (weight is not None and x.shape[-1] != hidden):
                raise ValueError(f"x must have shape [..., {hidden}], got {list(x.shape)}")
            if x.ndim == 2:  # the shape that the functions take, without the cost of others
                more = batch_invariant, num_valid, out, stream
                routed: Routing = self._route(x, weight, token_ids, x.shape[:1], *more)
                return routed
            axes = x.shape[:-1]
            shape = (*axes, self.method.num_columns)
            rows = flat_rows(x)
            given_out = None if out is None else flat_out(out, shape)
            more = batch_invariant, num_valid, given_out, stream
            routing = self._route(rows, weight, token_ids, axes, *more)
            return Routing(*(array.view(shape) for array in routing)) if out is None else out
        except (TypeError, ValueError, RuntimeError) as error:
            named = as_error_of_gate(error, x, token_ids, out)
            if named is None:
                raise
            raise named from error

    def _route(
        self,
        rows: Any,
        weight: Any,
        token_ids: Any,
        axes: Any,
        batch_invariant: bool,
        num_valid: Any,
        out: Any,
        stream: Any,
    ) -> Any:
        """Return the routing of x [num_tokens, hidden], with token ids of the given axes."""
        logit_bias = as_float32(getattr(self, self._logit_bias))
        scale, table = as_float32(self.per_expert_scale), self.tid2eid
        if table is None:
            return dense_router.dense_router(
                rows, weight, self.method, bias=as_float32(self.e_score_correction_bias), logit_bias=logit_bias,
                expert_scale=scale, batch_invariant=batch_invariant, num_valid=num_valid, out=out, stream=stream,
            )  # fmt: skip
        ids = flat_ids(token_ids, axes)
        return hash_layer(
            self.method, rows, ids, table, weight, None, None, logit_bias, scale, None, num_valid, out, stream,
            batch_invariant=batch_invariant,
        )  # fmt: skip

    def warmup(
        self,
        *,
        dtypes: Sequence[str] | None = None,
        num_tokens: tuple[int, int] = NUM_TOKENS,
        progress: Progress | None = None,
        **arrays_given: Any,
    ) -> tuple[KernelReady, ...]:
        """Compile all kernels that forward passes of this gate need, for every number of tokens in a range.

        As :meth:`cupy_router.Router.warmup`; of the arguments of calls, a gate has `token_ids`, `num_valid` and
        `batch_invariant`. Call it after the gate has got its final device and dtype.

        >>> from cupy_router.torch import Gate
        >>> Gate(16, "deepseek-v4-flash", device="cpu").warmup(batch_invariant=True)
        ()
        """
        arrays = {
            "weight": self.weight,
            "bias": as_float32(self.e_score_correction_bias),
            "logit_bias": as_float32(getattr(self, self._logit_bias)),
            "expert_scale": as_float32(self.per_expert_scale),
            "table": self.tid2eid,
        }
        known = ("token_ids", "num_valid", "batch_invariant")
        return warm_up_layer(
            "Gate.warmup", self.method, arrays, False, dtypes, num_tokens, progress, arrays_given, known
        )

    # -- What PyTorch does to modules ----------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        """Move and convert the arrays, as `.to`, `.half` and `.cuda` do. The float32 ones only move."""
        kept = {id(tensor) for tensor in self._kept_in_float32()}

        def move(tensor: Any) -> Any:
            moved = fn(tensor)
            if id(tensor) in kept and moved.dtype != torch.float32:
                return tensor.to(moved.device, torch.float32)  # of the original, which `fn` may have rounded
            return moved

        return super()._apply(move, recurse)

    def _kept_in_float32(self) -> Iterator[Any]:
        """Yield these arrays and their gradients, also where a parametrization computes one from others."""
        for path, tensor in (*self.named_parameters(), *self.named_buffers()):
            if path.removeprefix("parametrizations.").partition(".")[0] in FLOAT32:
                yield tensor
                if tensor.grad is not None:
                    yield tensor.grad

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load the arrays from their names in any checkpoint. Other keys are reported as for any module."""
        names = [name for name in ("weight", *FLOAT32, "tid2eid") if getattr(self, name) is not None]
        *_, error_msgs = args
        ours = named_as_ours(state_dict, prefix, names, self.method, error_msgs)
        super()._load_from_state_dict(ours, prefix, *args)


def deepseek_state_dict(model: Any) -> dict[str, Any]:
    """Return `model.state_dict()` with the name of DeepSeek's checkpoints for the bias of each :class:`Gate`.

    There `gate.bias` is the bias that only selects, which Hugging Face names `gate.e_score_correction_bias`. All other
    names are the same. `load_state_dict` and :meth:`cupy_router.Router.from_state_dict` take both.

    Args:
        model: A Gate, or a module with Gates.

    Raises:
        TypeError: The model is no module.
        ValueError: The method of a Gate with bias=True does not select by sigmoid or sqrtsoftplus scores, so that a
            `bias` would be taken for another one.

    >>> from cupy_router.torch import Gate, deepseek_state_dict
    >>> list(deepseek_state_dict(Gate(8, "deepseek-v3", bias=True)))
    ['weight', 'bias']
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"deepseek_state_dict: model must be a PyTorch module, got {type(model).__name__}")
    state: dict[str, Any] = model.state_dict()
    names = {}
    for path, module in model.named_modules(remove_duplicate=False):
        key = ".".join(part for part in (*path.split("."), BIAS) if part not in _HIDDEN)
        if isinstance(module, Gate) and key in state:
            names[key] = as_deepseek(key, module.method)
    for key in list(state) if names else ():  # in place: keeps the order, and what PyTorch keeps beside the keys
        state[names.get(key, key)] = state.pop(key)
    return state


_HIDDEN = ("", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # not in the keys of state dicts
