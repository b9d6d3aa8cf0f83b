# SPDX-License-Identifier: Apache-2.0
"""Physical experts: `replicas`, `replica_counts` and `replica_offset` of activation_topk, dense_router and Router.

Kernels translate the ids as they write them. Of a call in chunks, whose kernels do not know which token a row is, one
more launch translates them in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

from cupy_router import compiler
from cupy_router.arrays import ITEM_SIZES
from cupy_router.method_fields import INDEX_DTYPES
from cupy_router.ops import _checks as check
from cupy_router.ops._cached import Kernel, Work, launch_of, launch_with
from cupy_router.ops._declared import INTS, Arrays, layer
from cupy_router.ops._method import id_macros
from cupy_router.reference.replicas import physical_experts
from cupy_router.tuning import Gpu

REPLICAS = layer("replicas", "num_experts, max_replicas", INTS)
REPLICA_COUNTS = layer("replica_counts", "num_experts", INTS)
NAMES = (REPLICAS.name, REPLICA_COUNTS.name)

_MAX_PHYSICAL, _MAX_TURN = 2**31 - 1, 2**32 - 1
_BLOCK = 256


def num_physical(options: Any) -> int | None:
    """Return the number of physical experts; None if the experts have no replicas."""
    return getattr(options, "num_physical", None)  # not every router has them


def has_replicas(options: Any) -> bool:
    """Return whether indices are physical experts."""
    return num_physical(options) is not None


def num_counted(options: Any) -> int:
    """Return the number of experts of a layout of all columns."""
    method = options.method
    physical = num_physical(options)
    return int((method.num_experts if physical is None else physical) + method.num_shared_experts)


def as_physical(label: str, number: Any, offset: Any) -> tuple[int | None, int]:
    """Return num_physical and replica_offset."""
    found = None if number is None else check.integer(f"{label}: num_physical", number, 1, _MAX_PHYSICAL)
    return found, check.integer(f"{label}: replica_offset", offset, 0, 2**31 - 1)


def given_replicas(replicas: Any, counts: Any, offset: Any, number: Any) -> dict[str, Any]:
    """Return the arguments of physical experts that a caller gave, by name."""
    given = {"replicas": replicas, "replica_counts": counts, "num_physical": number}
    found = {name: value for name, value in given.items() if value is not None}
    return found | ({} if offset == 0 else {"replica_offset": offset})


def check_replicas(options: Any, arrays: Arrays, num_tokens: int) -> None:
    """Refuse some of the arguments without the others, and ids that the method's index_dtype has not."""
    replicas, counts, physical = arrays.replicas, arrays.replica_counts, num_physical(options)
    given = {"replicas": replicas, "replica_counts": counts, "num_physical": physical}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"replicas, replica_counts and num_physical come together, got no {' and no '.join(missing)}")
    if physical is None:
        if options.replica_offset:
            raise ValueError(f"replica_offset needs replicas, got {options.replica_offset} without any")
        return
    if replicas.shape[1] < 1:
        raise ValueError(f"replicas must have at least one column, got {replicas}")
    method = options.method
    most = INDEX_DTYPES[method.index_dtype] - method.num_shared_experts
    if physical > most:
        raise ValueError(f"num_physical must be at most {most} with index_dtype {method.index_dtype!r}, got {physical}")
    if isinstance(num_tokens, int) and num_tokens + options.replica_offset > _MAX_TURN:
        raise ValueError(
            f"the number of tokens and replica_offset must be at most {_MAX_TURN} together, got {num_tokens} and "
            f"{options.replica_offset}"
        )


def replaced_on_host(options: Any, arrays: Arrays, routed: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the results of the reference, with the ids of physical experts in place of those of experts."""
    physical = num_physical(options)
    if physical is None:
        return routed
    weights, indices, *others = routed
    maps = arrays.replicas, arrays.replica_counts
    found = physical_experts(indices, options.method, *maps, options.replica_offset, physical)
    return weights, found, *others


def replica_macros(options: Any, arrays: Arrays) -> dict[str, int]:
    """Return the macros of a kernel that translates ids."""
    physical = num_physical(options)
    if physical is None:
        return {}
    replicas = arrays.replicas
    return {
        "NUM_PHYSICAL": physical,
        "MAX_REPLICAS": replicas.shape[1],
        "REPLICA_STRIDE": replicas.row_stride,
        "REPLICA_BYTES": ITEM_SIZES[replicas.dtype],
        "REPLICA_COUNT_BYTES": ITEM_SIZES[arrays.replica_counts.dtype],
    }


def replica_arguments(options: Any) -> dict[str, int]:
    """Return the fixed parameters of a kernel that translates ids."""
    return {"replica_offset": getattr(options, "replica_offset", 0)}


def without_replicas(options: Any) -> Any:
    """Return the options of the same call for the ids of experts."""
    return replace(options, num_physical=None, replica_offset=0)


def routing_alone(options: Any) -> Any:
    """Return the options of the same call for weights and the ids of experts, without layout and logits."""
    more = {"logits_dtype": None} if hasattr(options, "logits_dtype") else {}
    return replace(without_replicas(options), layout=None, **more)


class RouteThenReplace:
    """The kernels of a router without replicas, followed by one that replaces the ids in place."""

    def __init__(self, op: Any, options: Any, arrays: Arrays, gpu: Gpu) -> None:
        plain, given = without_replicas(options), arrays.replaced(**dict.fromkeys(NAMES))
        device, names = arrays.indices.device, op.parameters(options)
        routed = op.route(plain, given, gpu)
        self._routed: Work = launch_of(op, plain, routed, device) if isinstance(routed, Kernel) else routed
        method, indices = options.method, arrays.indices
        macros = {
            "NUM_EXPERTS": method.num_experts,
            "TOP_K": method.top_k,
            "NUM_SHARED": method.num_shared_experts,
            **id_macros("INDEX", method.index_dtype),
            **replica_macros(options, arrays),
        }
        num_tokens = indices.shape[0]
        grid = min(-(-num_tokens * method.num_columns // _BLOCK), 2**16)
        fixed: dict[str, int | float] = {
            **replica_arguments(options),
            "num_tokens": num_tokens,
            "indices_stride": indices.row_stride,
        }
        kernel = Kernel("physical_experts", "physical_experts", macros, grid, _BLOCK, fixed)
        self._replace = launch_with((*NAMES, "indices"), kernel, device)
        self._pick = itemgetter(*(names.index(name) for name in (*NAMES, "indices")))
        self.function: compiler.Function = self._routed.function

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        self._routed(stream, varying)
        self._replace(stream, self._pick(varying))
