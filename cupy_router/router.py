# SPDX-License-Identifier: Apache-2.0
"""Router: a routing method together with the arrays of one layer."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cupy_router import _hooks, checkpoint, huggingface
from cupy_router.arrays import view_of
from cupy_router.layer_arrays import as_float32, described, stacked, to_gpu
from cupy_router.method import RoutingMethod, resolve
from cupy_router.ops import _checks as check
from cupy_router.ops import _hash_layer, dense_router
from cupy_router.ops._given import EMPTY, ROUTE, as_unset
from cupy_router.ops._layout import LayoutSpec
from cupy_router.ops._method import check_layer
from cupy_router.ops._replicas import given_replicas
from cupy_router.ops._run import Interceptor
from cupy_router.unique_keys import new_key
from cupy_router.warm_up import CanWarmUp

if TYPE_CHECKING:
    from typing import Self

    from cupy_router.typing import Array, Preset

# Every router of this process by its key: graphs of PyTorch carry strings, not objects.
routers: MutableMapping[str, Router] = weakref.WeakValueDictionary()


class Router(CanWarmUp):
    """Router of one layer: ``router(x)`` calls ``dense_router``, or ``hash_router`` with a table and token ids.

    Args:
        method: A :class:`RoutingMethod`, or the name of a preset such as "deepseek-v4-flash".
        weight: The gate, [num_experts, hidden] float32, float16 or bfloat16. A hash router without it gives uniform
            weights.
        bias: [num_experts] float32, added for the selection only; or [num_biases, num_experts], of which `bias_index`
            names one for each token of a call. Beside a table only several are allowed: tokens with an index above 0
            leave the table, as in :func:`cupy_router.hash_router`.
        logit_bias: [num_experts] float32, added to the logits. Needs ``weight``.
        expert_scale: [num_experts] float32, factor of each expert's weight. Needs ``weight``.
        table: [vocab_size, top_k] int32 or int64, the experts of each token id. Makes this a hash router.

    The router keeps the arrays without a copy, so later writes to them take effect. They have to be on one device, but
    may belong to different frameworks.

    A Router is for arrays that stay where they are, as in an inference engine, and for JAX, CuPy and NumPy. It does not
    follow a PyTorch module whose tensors are replaced, as by `.to`, `load_state_dict(assign=True)` or
    `functional_call`: in a module use :class:`cupy_router.torch.Gate`, which owns its arrays.

    Raises:
        TypeError: An argument is not an array, or its dtype is not allowed.
        ValueError: Shapes, strides or devices are wrong, or two arguments exclude each other.

    >>> import numpy as np
    >>> from cupy_router import Router, RoutingMethod
    >>> router = Router(RoutingMethod(3, 2), weight=np.array([[3, 0], [0, 1], [0, 2]], np.float32))
    >>> router
    Router(RoutingMethod(num_experts=3, top_k=2, score='sqrtsoftplus'), weight=float32 [3, 2] on cpu)
    >>> router(np.array([[1.0, 2.0]], np.float32)).indices
    array([[2, 0]], dtype=int32)
    """

    def __init__(
        self,
        method: RoutingMethod | Preset,
        *,
        weight: Array | None = None,
        bias: Array | None = None,
        logit_bias: Array | None = None,
        expert_scale: Array | None = None,
        table: Array | None = None,
    ) -> None:
        self.method = resolve(method)
        self.weight: Any = weight
        self.bias: Any = bias
        self.logit_bias: Any = logit_bias
        self.expert_scale: Any = expert_scale
        self.table: Any = table
        self.follows_inputs = False  # True: copy the arrays to the device of x
        self._copies: dict[tuple[str, int], tuple[tuple[Any, ...], Router]] = {}
        self._check_arguments()
        if any(is_traced() for is_traced in _hooks.traced):
            self.key = ""
        else:
            with check.named("Router"):
                self._validate()
            self._enter()

    @classmethod
    def of_leaves(cls, method: RoutingMethod, arrays: Mapping[str, Any]) -> Router:
        """Return a router with these arrays, unchecked, since the leaves of a pytree may be any objects."""
        router = cls.__new__(cls)
        router.method = method
        for name, array in arrays.items():
            setattr(router, name, array)
        router.follows_inputs, router._copies = False, {}
        router._enter()
        return router

    def _enter(self) -> None:
        self.key = new_key()
        routers[self.key] = self

    # A copy is a separate router and gets a new key.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "key"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.follows_inputs:
            self._make_read_only()
        self._enter()

    def _check_arguments(self) -> None:
        """Refuse arguments that are missing, or that exclude each other."""
        if self.table is None and self.weight is None:
            raise TypeError("Router: weight must be an array, got None")
        if self.weight is None and (self.logit_bias is not None or self.expert_scale is not None):
            raise ValueError("Router: logit_bias and expert_scale need a weight, without which weights are uniform")
        shape = getattr(self.bias, "shape", None)  # other objects get one when they become arrays
        if self.table is not None and shape is not None:
            with check.named("Router"):
                _check_bias_of_table(shape)
        if self.bias is not None and self.weight is None:
            raise ValueError("Router: bias needs a weight, by whose scores experts are chosen")

    def _validate(self) -> None:
        """Check the arrays."""
        views = {name: view_of(name, array) for name, array in self.arrays().items() if array is not None}
        check_layer(self.method, views)
        if "table" in views and "bias" in views:
            _check_bias_of_table(views["bias"].shape)
        check.one_device(list(views.values()))
        for view in views.values():
            check.strides(view)

    def arrays(self) -> dict[str, Any]:
        """Return the arrays of the layer by argument name, with None for those it does not have."""
        return {name: getattr(self, name) for name in ("weight", "bias", "logit_bias", "expert_scale", "table")}

    @property
    def is_hash(self) -> bool:
        """True if a table selects the experts."""
        return self.table is not None

    def __repr__(self) -> str:
        arrays = (f"{name}={described(name, array)}" for name, array in self.arrays().items() if array is not None)
        return f"Router({', '.join((repr(self.method), *arrays))})"

    def __call__(
        self,
        x: Any,
        token_ids: Any = None,
        *,
        indices: Any = None,
        unset: str = ROUTE,
        bias_index: Any = None,
        replicas: Any = None,
        replica_counts: Any = None,
        replica_offset: int = 0,
        num_physical: int | None = None,
        return_logits: bool = False,
        batch_invariant: bool = False,
        layout: LayoutSpec | None = None,
        num_valid: Any = None,
        out: Any = None,
        stream: Any = None,
    ) -> Any:  # Routing, RoutingWithLogits, or with a layout RoutingPlan, RoutingPlanWithLogits
        """Return the experts of each token and their weights.

        Args:
            x: [num_tokens, hidden] float32, float16 or bfloat16.
            token_ids: [num_tokens] int32 or int64. Required by a hash router, ignored by others.
            indices, unset: The experts of each token, in place of a selection, and what becomes of a row of -1: as for
                :func:`cupy_router.dense_router`. A hash router needs no token ids then; without, a row of -1 is empty.
            bias_index: [num_tokens] int32, the bias of each token. Required if there are several biases.
            replicas, replica_counts, replica_offset, num_physical: As for :func:`activation_topk`, not of hash routers.
            return_logits, batch_invariant, layout, num_valid, out, stream: As for :func:`cupy_router.dense_router`, or
                for :func:`cupy_router.hash_router` with a table. Logits are float32.

        Returns:
            Routing, or what :func:`cupy_router.dense_router` returns, of arrays of the framework of x, on its device.
        """
        if not isinstance(unset, str):  # what has no truth value is not compared
            as_unset("Router", unset)
        physical = given_replicas(replicas, replica_counts, replica_offset, num_physical)
        wanted = (layout, return_logits, unset, batch_invariant, physical)
        inputs = (x, token_ids, bias_index, indices, num_valid)
        for interceptor in interceptors:
            if interceptor.wants(self, (x, token_ids)):
                return interceptor.run(self, wanted, inputs, out, stream, -1)
        return self.route(inputs, wanted, out, stream)

    def route(self, inputs: tuple[Any, ...], wanted: tuple[Any, ...], out: Any, stream: Any) -> Any:
        """Return the results of a call that no interceptor takes as a whole; its op still goes through them.

        inputs: x, token_ids, bias_index, indices, num_valid; wanted: layout, return_logits, unset, batch_invariant, and
        the arguments of physical experts.
        """
        x, token_ids, bias_index, indices, num_valid = inputs
        layout, return_logits, unset, batch_invariant, physical = wanted
        if physical and self.table is not None:
            raise ValueError(f"Router: a router with a table takes no {' and no '.join(physical)}")
        if self.follows_inputs:
            return self.beside(x).route(inputs, wanted, out, stream)
        is_given = self.weight is not None and indices is not None and (token_ids is None or unset == EMPTY)
        if self.table is None or is_given:  # with both, the table says nothing
            chosen: Any = {"bias": self.bias, "bias_index": bias_index, "unset": unset}
            try:
                return dense_router.dense_router(
                    x, self.weight, self.method, **(chosen if self.table is None else {"unset": EMPTY}),
                    logit_bias=self.logit_bias, expert_scale=self.expert_scale, indices=indices,
                    return_logits=return_logits, batch_invariant=batch_invariant, layout=layout, num_valid=num_valid,
                    out=out, stream=stream, **physical,
                )  # fmt: skip
            except (TypeError, ValueError, RuntimeError) as error:
                label, _, message = str(error).partition(": ")
                if label != dense_router.OP.label:
                    raise
                raise type(error)(f"Router: {message}") from error
        return _hash_layer.hash_layer(
            self.method, x, token_ids, self.table, self.weight, self.bias, bias_index, self.logit_bias,
            self.expert_scale, layout, num_valid, out, stream, return_logits, indices, unset, batch_invariant,
        )  # fmt: skip

    # -- Checkpoints ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], prefix: str, method: RoutingMethod | Preset) -> Self:
        """Return the router at `prefix` of a state dict with the names of DeepSeek or Hugging Face.

        Args:
            state: Arrays of any framework by key.
            prefix: Path of a layer, its sparse block or the router: "layers.3", "layers.3.ffn" or "layers.3.ffn.gate"
                for a gate "layers.3.ffn.gate.weight"; likewise "model.layers.3.mlp". A last dot is optional.
            method: As for the constructor.

        The bias is `e_score_correction_bias` or a similar name, `expert_scale` is `per_expert_scale`, the table is
        `tid2eid`, and `logit_bias` is that of :class:`cupy_router.torch.Gate`. A `bias` beside the gate is the
        `logit_bias` of methods with `score_after_topk`, like that of gpt-oss, because they have no scores to add a bias
        to. `gate.bias` is the bias of methods that select by sigmoid or sqrtsoftplus scores, as in DeepSeek's
        checkpoints. A `bias` is refused otherwise, like any tensor of the router that would be ignored, and like any
        other tensor below the prefix with the name of a router's bias, scale or table. All arrays but the gate and the
        table are converted to float32.

        With a `bias_vl` or `e_score_correction_bias_vl`, as in DeepSeek-V4.1 and V4-Flash-Vision, `bias` has two rows:
        tokens of images have a `bias_index` of 1. In a hash layer, row 0 is unused.

        Raises:
            TypeError, ValueError: A key is missing, unknown or ambiguous, or its array has the wrong shape or dtype.
                The message names it.

        >>> import numpy as np
        >>> identity = np.eye(4, dtype=np.float32)
        >>> state = {"layers.3.ffn.gate.weight": identity, "layers.3.ffn.gate.bias": np.zeros(4, np.float32)}
        >>> Router.from_state_dict(state, "layers.3", RoutingMethod(4, 2))(identity[2:3]).indices
        array([[2, 0]], dtype=int32)
        """
        with check.named("Router.from_state_dict"):
            method = resolve(method)
            if not isinstance(state, Mapping):
                raise TypeError(
                    f"state must map keys to arrays, as model.state_dict() does, got {type(state).__name__}"
                )
            return cls._from_keys(state, huggingface.router_keys(state, prefix, method), {}, method)

    @classmethod
    def from_safetensors(cls, path: Any, prefix: str, method: RoutingMethod | Preset) -> Self:
        """Return the router at `prefix` of a safetensors file, or of the folder or index of a checkpoint.

        Only the arrays of this router are read, into CPU memory. The first x on a GPU copies them to that GPU. They are
        read-only, since a copy would not follow what is written into them. Other arrays may be assigned instead; if
        they are writable, each call copies them.

        Raises:
            ImportError: The library `safetensors` is missing: install cupy-router[safetensors].
            OSError: There is no such file.
            TypeError, ValueError: As for :meth:`from_state_dict`, or a file is not a safetensors file or index, or the
                index leaves out an array of the router that one of its files has. The message names the file, too.
        """
        with check.named("Router.from_safetensors", OSError):
            method = resolve(method)
            files = checkpoint.files_by_key(path)
            try:
                keys = huggingface.router_keys(files, prefix, method)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            state = {key: checkpoint.read(files[key], key) for key in keys if key is not None}
            more = checkpoint.unlisted(files, {files[key] for key in state})
            for key in huggingface.router_keys([*files, *more], prefix, method):
                if key in more:
                    raise ValueError(
                        f"{more[key]} has {key}, which the index does not name: mend it, or pass that file"
                    )
            router = cls._from_keys(state, keys, {key: f"{key} of {files[key]}" for key in state}, method)
        router._make_read_only()
        router.follows_inputs = True
        return router

    @classmethod
    def _from_keys(
        cls, state: Mapping[str, Any], keys: huggingface.Keys, named: Mapping[str, str], method: RoutingMethod
    ) -> Self:
        """Return the router of these keys; `named` has what messages call them, if not by the key alone."""
        found = {name: key for name, key in keys._asdict().items() if key is not None}
        arrays = {name: state[key] for name, key in found.items()}
        for name in arrays.keys() - {"weight", "table"}:
            arrays[name] = as_float32(named.get(found[name], found[name]), arrays[name], method.num_experts)
        if "image_bias" in arrays:
            of_images = named.get(found["image_bias"], found["image_bias"]), arrays.pop("image_bias")
            of_text = of_images  # unused in a hash layer
            if "bias" in arrays:
                of_text = named.get(found["bias"], found["bias"]), arrays["bias"]
            elif "table" not in arrays:
                raise ValueError(f"{of_images[0]} is the bias of image tokens, but there is none of the others")
            arrays["bias"] = stacked(method.num_experts, of_text, of_images)
        try:
            return cls(method, **arrays)
        except (TypeError, ValueError) as error:
            # The message starts with the argument's name: add the key of that argument.
            message = str(error).removeprefix("Router: ")
            name = message.partition(" ")[0]
            key = found.get(name)
            raise type(error)(message if key is None else f"{named.get(key, key)} is the {name}: {message}") from error

    def _make_read_only(self) -> None:
        for array in self.arrays().values():
            if isinstance(array, np.ndarray):
                array.flags.writeable = False

    def beside(self, x: Any) -> Router:
        """Return this router with its arrays on the device of x. Only arrays from a file are moved."""
        if not self.follows_inputs:
            return self
        device, held = view_of("x", x).device, (self.method, *self.arrays().values())
        copied, found = self._copies.get(device, ((), None))
        may_change = any(isinstance(array, np.ndarray) and array.flags.writeable for array in held)
        if found is None or may_change or any(a is not b for a, b in zip(held, copied, strict=True)):
            move = to_gpu(device[1]) if device[0] == "cuda" else (lambda array: array)
            moved = {name: None if array is None else move(array) for name, array in self.arrays().items()}
            found = Router(self.method, **moved)
            self._copies[device] = held, found
        return found


# Framework packages add what takes the call of a Router as a whole.
interceptors: list[Interceptor] = []


def _check_bias_of_table(shape: Sequence[Any]) -> None:
    if len(shape) != 2:
        raise ValueError(
            "bias and table do not go together: a table alone decides which experts are chosen, but for tokens with "
            "another one of several biases [num_biases, num_experts]"
        )
