# SPDX-License-Identifier: Apache-2.0
"""Constants and launch shapes of kernels/hash_router.cu, and of kernels/given_experts.cu."""

from __future__ import annotations

from cupy_router.arrays import ITEM_SIZES
from cupy_router.launcher import MAX_GRID
from cupy_router.method import RoutingMethod
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._cached import Kernel
from cupy_router.ops._declared import Arrays
from cupy_router.ops._method import headers, id_macros, method_arguments, method_macros, needs_whole_rows
from cupy_router.tuning import Gpu

_UNIFORM, _LOGITS, _PRODUCTS = 0, 1, 2  # source of the weights

_MAX_PRODUCTS = 8192  # per token; a float of shared memory each
_UNKNOWN_EXPERTS = 0  # as many as int32 indices can name
_TAKES = (
    "token_ids", "table", "logits", "x", "weight", "logit_bias", "expert_scale", "num_valid", "weights", "indices",
)  # fmt: skip


def table_kernel(method: RoutingMethod | None, arrays: Arrays, gpu: Gpu, *, shared_block: bool = False) -> Kernel:
    """Choose the kernel for the source of the weights, without parameters for logits_out.

    method: None for uniform weights.
    arrays: those of `hash_router` by name. Without token ids, the table has a row for each token.
    shared_block: as many tokens as possible should share a block.
    """
    token_ids, table = arrays.token_ids, arrays.table
    logits, x, weight = arrays.logits, arrays.x, arrays.weight
    out_strides = arrays.weights.row_stride, arrays.indices.row_stride
    # Results have the tokens of the whole call, also in a chunk.
    of_tokens = next(view for view in (logits, x, token_ids, table) if view is not None)
    num_tokens, top_k = of_tokens.shape[0], table.shape[1] if method is None else method.top_k
    if token_ids is None:
        name, of_table = "given_experts", {"given_stride": table.row_stride}
        macros = {"BY_TOKEN_ID": 0, "TOKEN_ID_BYTES": 8, **id_macros("TABLE", table.dtype)}
    else:
        name, of_table = "hash_router", {"vocab_size": table.shape[0], "table_stride": table.row_stride}
        macros = {"TOKEN_ID_BYTES": ITEM_SIZES[token_ids.dtype], "TABLE_BYTES": ITEM_SIZES[table.dtype]}
    macros |= {
        "TOP_K": top_k,
        "NUM_EXPERTS": _UNKNOWN_EXPERTS if method is None else method.num_experts,
        "HAS_NUM_VALID": int(arrays.num_valid is not None),
    }
    fixed: dict[str, int | float] = {
        "num_tokens": num_tokens,
        **method_arguments(method),  # next to other early arguments, because constants are loaded by cache line
        **of_table,
        "hidden": 0 if x is None else x.shape[1],
        "logits_stride": 0 if logits is None else logits.row_stride,
        "x_stride": 0 if x is None else x.row_stride,
        "weight_stride": 0 if weight is None else weight.row_stride,
        "weights_stride": out_strides[0],
        "indices_stride": out_strides[1],
    }
    if method is not None:
        macros |= method_macros(method, arrays.given("logit_bias", "expert_scale"))
    if x is not None and weight is not None and method is not None:
        both_aligned = all(row_lanes.aligned(view.pointer, view.row_stride, view.dtype, 8) for view in (x, weight))
        macros |= {
            "SOURCE": _PRODUCTS,
            "DTYPE": row_lanes.DTYPE_CODES[x.dtype],
            "WEIGHT_DTYPE": row_lanes.DTYPE_CODES[weight.dtype],
            "ALIGNED": int(both_aligned and x.shape[1] % 8 == 0),
        }
        whole_rows, hidden = needs_whole_rows(method), x.shape[1]
        tuned = gpu.table.hash_products
        if method.num_columns > _MAX_PRODUCTS:
            raise ValueError(f"top_k + num_shared_experts must be at most {_MAX_PRODUCTS} with x, got {method}")
        if (
            whole_rows
            or method.shared_in_normalizer
            or method.num_columns > row_lanes.MAX_LANES
            or num_tokens > MAX_GRID
        ):
            warps = min(method.num_experts if whole_rows else top_k, tuned.max_warps)
        else:
            steps = max(1, -(-hidden // 256))
            rounds = -(-steps // tuned.sharing_warps)
            warps = -(-steps // rounds)
            in_flight = tuned.loads_in_flight // (2 if weight.dtype == "float32" else 1)
            macros |= {"GROUP": min(top_k, in_flight), "HIDDEN": hidden}
        macros["WARPS"] = warps
        grid = min(num_tokens, MAX_GRID)
        return Kernel(name, name, macros, grid, 32 * warps, fixed, headers(method), takes=_TAKES)
    lanes, tuned_table = row_lanes.MAX_LANES, gpu.table.hash_router
    holds_row = (
        not shared_block
        and method is not None
        and logits is not None
        and num_tokens <= gpu.scaled(tuned_table.max_tokens_held)
        and method.num_logits <= tuned_table.max_logits_held
        and method.num_columns <= lanes
    )
    if not holds_row and (method is None or logits is None or not needs_whole_rows(method)):
        while lanes // 2 >= (top_k if method is None else method.num_columns):
            lanes //= 2
    columns = (top_k, top_k if method is None else method.num_columns)
    dense = (table.row_stride, *out_strides) == (columns[0], columns[1], columns[1])
    macros |= {"SOURCE": _UNIFORM if logits is None else _LOGITS, "LANES": lanes, "HOLDS_ROW": int(holds_row)}
    if method is not None and logits is not None:
        macros["DTYPE"] = row_lanes.DTYPE_CODES[logits.dtype]
        dense = dense and logits.row_stride == method.num_logits
    macros["DENSE"] = int(dense)
    block = tuned_table.held_block if holds_row else tuned_table.block
    grid = -(-num_tokens * lanes // block)
    return Kernel(name, name, macros, grid, block, fixed, headers(method), takes=_TAKES)
