# SPDX-License-Identifier: Apache-2.0
"""The ops as citizens of JAX: importing this room registers them with XLA.

From then on the public functions and a Router may be called inside `jax.jit`, `jax.grad`, `jax.vmap` and
`jax.shard_map`. On a GPU kernels are enqueued on XLA's own stream and read and write XLA's own buffers: by XLA itself
where a call is one kernel, else by a handler. On a CPU the NumPy reference does. Calls with arrays that hold values go
on as without this room.

    import cupy_router.jax  # not needed once any op or Router was given an array or a tracer of JAX

    route = jax.jit(lambda logits: cupy_router.activation_topk(logits, "deepseek-v4-flash"))

A Router is a pytree of its arrays, so it can be an argument of what is traced; as part of its closure its arrays
are constants. `jax.vmap` makes one call of the rows of all.

Rows that are sharded over devices are routed where they are inside `jax.shard_map`, and under a mesh with explicit axes
if their types say so; the rest of a layer is gathered, and results are sharded as rows are. Where jit alone knows of a
sharding, as under automatic axes, arrays are gathered before the call.

Weights have first derivatives, in reverse mode, by all float inputs that they depend on; indices and a bias that only
selects have none. What `topk_select` selects from has to pass `jax.lax.stop_gradient`.

`jax.export` needs `disabled_checks` for the targets, which are called as the functions are,
`DisabledSafetyCheck.custom_call("cupy_router.activation_topk")`; that of a hash Router is "cupy_router.hash_layer". A
gradient also needs "cupy_router.activation_topk_backward", and one by expert_scale "cupy_router.hash_router". The
process that loads the program imports this room first.
"""

from __future__ import annotations

from cupy_router.jax import _ffi_targets, _intercept, _tree
from cupy_router.ops import _run

_ffi_targets.register()
_tree.register()
_run.interceptors.append(_intercept)
