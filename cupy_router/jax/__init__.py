# SPDX-License-Identifier: Apache-2.0
"""The ops in JAX: importing this package registers them with XLA.

Then the public functions and a Router may be called inside `jax.jit`, `jax.grad`, `jax.vmap` and `jax.shard_map`. On a
GPU, kernels are enqueued on XLA's stream and read and write XLA's buffers. XLA launches a call of one kernel itself; a
handler in Python runs all others. On a CPU the NumPy reference runs. Eager calls of arrays are not affected by this
package. Objects with `__jax_array__`, such as parameters of Flax, stand for the array that they return.

    import cupy_router.jax  # not needed once any op or Router was given an array or a tracer of JAX

    route = jax.jit(lambda logits: cupy_router.activation_topk(logits, "deepseek-v4-flash"))

A Router is a pytree of its arrays, so it can be an argument of a traced function. The arrays of a Router in the closure
of a traced function are constants. `jax.vmap` merges the rows of all calls into one call, and loops over layouts and
the rows of experts.

An ExpertLayout is a pytree of its arrays. Its ints are static: layouts of other sizes are traced anew. This is so as
soon as this package is imported; before, JAX takes a layout of NumPy arrays for a named tuple with eleven leaves.

Rows that are sharded over devices are routed on their device inside `jax.shard_map`, and under a mesh with explicit
axes if their types have the sharding. The other arrays of a layer are gathered, and results are sharded like the rows.
Under automatic axes, where only the compiler knows the sharding, arrays are gathered before the call. A layout inside
`jax.shard_map` is that of the device's tokens, and outside of it that of all tokens. :func:`expert_parallel` spreads
the experts of a layer over the devices of a mesh axis.

Weights, and logits that are returned, have first derivatives in reverse mode with respect to all float inputs that they
depend on. Indices, and a bias that only selects, have none. Pass the scores of `topk_select` through
`jax.lax.stop_gradient`. `permute` and `unpermute` have them with respect to x or y, weights, residual and its scale.

`jax.export` needs `disabled_checks` for the custom-call targets, which are named after the functions, such as
`DisabledSafetyCheck.custom_call("cupy_router.activation_topk")`. The target of a hash Router, and of a `hash_router`
that returns logits, is "cupy_router.hash_layer". A gradient also needs "cupy_router.activation_topk_backward", and a
gradient with respect to expert_scale "cupy_router.hash_router". `layout=` also needs "cupy_router.expert_layout", and
gradients of permute and unpermute "cupy_router.permute_backward" and "cupy_router.unpermute_backward". A process that
loads the program imports this package first, which also registers Router and the types of results. docs/frameworks.md
has an example.
"""

from __future__ import annotations

from cupy_router.jax import _ffi_targets, _intercept, _tree
from cupy_router.jax._expert_parallel import expert_parallel
from cupy_router.ops import _run

__all__ = ["expert_parallel"]

_ffi_targets.register()
_tree.register()
_run.interceptors.append(_intercept)


def __dir__() -> list[str]:
    return __all__
