# SPDX-License-Identifier: Apache-2.0
"""Compare a router with ours on a few random tokens on the CPU, before it is swapped.

The code of a model may interpret its configuration differently. Then the user gets a warning, not a wrong result.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from cupy_router.torch._router_modules import roles
from cupy_router.torch._router_spec import FLAT, SORTED, RouterSpec, Unsupported, by_role
from cupy_router.torch._swapped import LogitsOnly, swapped_class
from cupy_router.torch._trial import TOKENS, trial_of, zeros_for

_COLUMNS = 8  # nonzero columns of hidden states and gate, so that large routers take no longer than small ones


def verify(module: Any, kind: type, spec: RouterSpec) -> RouterSpec:
    """Compare a module with its replacement, in float32, and return the description for which they are equal.

    It has the ranks of hidden states for which this was seen. For others the swapped module runs the model's code.

    Raises:
        Unsupported: The results differ, or the model's code does not run.
    """
    if (torch.float32, torch.float32) not in spec.results:
        raise Unsupported(f"its {type(module).__name__} does not run in float32")
    random = torch.Generator("cpu").manual_seed(0)
    reasons = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trial = trial_of(module, spec, torch.float32, "cpu")
        for tensor in itertools.chain(trial.parameters(), trial.buffers()):
            if tensor.device.type == "cpu":
                _fill(tensor, spec, random)
        for candidate in _candidates(trial, kind, spec):
            try:
                ranks = _equal_ranks(trial.eval(), kind, candidate)
            except Unsupported as error:
                reasons.append(error)
                continue
            return replace(candidate, ranks=ranks, in_training=_equal_in_training(trial, kind, candidate))
    raise reasons[0]


def _candidates(trial: Any, kind: type, spec: RouterSpec) -> Iterator[RouterSpec]:
    """Yield what the module may do: the most likely first."""
    if kind is LogitsOnly:
        yield replace(spec, outputs=("logits",))
        yield replace(spec, outputs=FLAT)
        return
    yield spec
    if "logits" in spec.outputs:  # some call probabilities logits
        yield replace(spec, outputs=tuple(name.replace("logits", "probabilities") for name in spec.outputs))
    *others, (role, name) = spec.arguments
    if _may_be_left_out(trial, spec):  # some ignore it
        yield replace(spec, arguments=(*others, (f"ignored {role}", name)))


def _may_be_left_out(trial: Any, spec: RouterSpec) -> bool:
    """Return True if the last argument is None by default."""
    return inspect.signature(getattr(trial, spec.call)).parameters[spec.arguments[-1][1]].default is None


def _equal_in_training(trial: Any, kind: type, spec: RouterSpec) -> bool:
    if any(getattr(trial, name, None) for name in spec.noise):
        return True  # with noise, the model's code runs anyway
    try:
        return bool(_equal_ranks(trial.train(), kind, spec))
    except Unsupported:
        return False


def _equal_ranks(trial: Any, kind: type, spec: RouterSpec) -> tuple[int, ...]:
    """Return the numbers of dimensions of the hidden states, or logits, for which results are equal.

    Raises:
        Unsupported: They differ, or there are none.
    """
    name, ranks, failures = type(trial).__name__, [], []
    for rank, left_out in itertools.product((2, 3), (0, 1) if _may_be_left_out(trial, spec) else (0,)):
        try:
            given = _random(trial, spec, rank)[: len(spec.arguments) - left_out]
            theirs = getattr(trial, spec.call)(*given)
        except Exception as error:  # that of the model's code, which such calls will raise after the swap, too
            failures.append(f"{type(error).__name__}: {error}")
            continue
        if kind is not LogitsOnly and not roles(theirs, spec.method):
            continue
        different = _different(trial, kind, spec, given, theirs)
        if different:
            raise Unsupported(f"for random tokens the {different} of its {name} are not those of {spec.method}")
        ranks.append(rank if spec.call == "forward" else by_role(spec, tuple(given), {})["logits"].ndim)
    if not ranks:
        raise Unsupported(f"for random tokens on the CPU its {name} raises {', '.join(failures) or 'nothing'}")
    return tuple(dict.fromkeys(ranks))


def _random(trial: Any, spec: RouterSpec, rank: int) -> list[Any]:
    given = zeros_for(trial, spec, torch.float32, torch.float32, "cpu", rank)
    random = torch.Generator("cpu").manual_seed(1)
    for tensor in given:
        _fill(tensor, spec, random)
    return given


def _different(trial: Any, kind: type, spec: RouterSpec, given: list[Any], theirs: Any) -> str:
    """Return the name of a result that differs, or ""."""
    original = trial.__class__
    trial.__class__ = swapped_class(original, kind)
    trial._cupy_router = spec
    try:
        ours = getattr(trial, spec.call)(*given)
    except Exception as error:
        raise Unsupported(f"{type(error).__name__}: {error}") from error
    finally:
        trial.__class__ = original
    pairs = zip(_comparable(spec, ours).items(), _comparable(spec, theirs).values(), strict=True)
    return next((name for (name, our), their in pairs if not _close(our, their)), "")


def _close(our: Any, their: Any) -> bool:
    return our.shape == their.shape and bool(torch.allclose(our.float(), their.float(), rtol=1e-5, atol=1e-6))


def _fill(tensor: Any, spec: RouterSpec, random: Any) -> None:
    """Fill a tensor with random values. Token ids and tables cover the first few tokens."""
    if tensor.is_floating_point() and tensor.ndim > 1:
        width = spec.method.num_logits if tensor.shape[-1] == spec.method.num_logits else _COLUMNS
        tensor[..., :width].normal_(std=0.7, generator=random)
    elif tensor.is_floating_point():
        tensor.uniform_(0.5, 1.5, generator=random)
    elif tensor.ndim == 2:
        experts = torch.rand(
            TOKENS, spec.method.num_experts, generator=random, device="cpu", dtype=torch.float32
        ).argsort(dim=-1)
        tensor[:TOKENS] = experts[: len(tensor), : tensor.shape[1]]
    else:
        tensor.copy_(torch.arange(len(tensor), device="cpu") % TOKENS)


def _comparable(spec: RouterSpec, results: Any) -> dict[str, Any]:
    """Return the results by name, with each token's experts sorted by index."""
    named = dict(zip(spec.outputs, results if isinstance(results, tuple) else (results,), strict=True))
    if spec.outputs == SORTED:
        sizes = torch.tensor(named["sizes"], device="cpu")
        experts = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
        weights = torch.zeros_like(named["logits"]).index_put((named["rows"], experts), named["gates"])
        return {"weights": weights, "logits": named["logits"]}
    if "indices" in named:
        order = named["indices"].argsort(dim=-1)
        named |= {name: named[name].gather(1, order) for name in ("indices", "weights")}
    return named
