# SPDX-License-Identifier: Apache-2.0
"""Names of a router's arrays in DeepSeek and Hugging Face checkpoints. Works on keys, not on arrays."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cupy_router.method import RoutingMethod

# Path from a prefix (a layer, its sparse block, or the router itself) to the module whose `weight` is the gate: the
# router or a linear layer in it.
_BLOCKS = ("", "mlp.", "ffn.", "block_sparse_moe.", "feed_forward.", "moe.", "mixer.")
_ROUTERS = ("gate.", "router.")
LINEARS = ("wg.", "classifier.", "layer.", "proj.")
_NESTED = ("router.gate.", *(router + linear for router in _ROUTERS for linear in LINEARS))

# Role of each tensor of a router besides the gate, by its name in the checkpoint.
TENSORS = {
    "e_score_correction_bias": "bias",
    "moe_statics.e_score_correction_bias": "bias",
    "experts.e_score_correction_bias": "bias",
    "moe.router.expert_bias": "bias",
    "expert_bias": "bias",
    "router_bias": "bias",
    "bias_vl": "image_bias",  # of DeepSeek-V4.1 and V4-Flash-Vision: the bias of the tokens of images
    "e_score_correction_bias_vl": "image_bias",
    "bias": "logit_bias",  # in DeepSeek's own checkpoints it is the bias that only selects
    "logit_bias": "logit_bias",  # of cupy_router.torch.Gate
    "per_expert_scale": "expert_scale",
    "global_scale": "total_scale",  # factor of all weights
    "scale": "input_scale",  # factor of the input, applied after a norm without weights
    "tid2eid": "table",
}

# A gate anywhere, with the path of its module.
_ANY_GATE = re.compile(rf"((?:.*\.)?(?:{'|'.join(map(re.escape, (*_NESTED, *_ROUTERS)))}))weight")
_ATTENTION = re.compile("attn|attention")


class Keys(NamedTuple):
    """Keys of a router's arrays; None for an array that it does not have."""

    weight: str
    bias: str | None = None
    logit_bias: str | None = None
    expert_scale: str | None = None
    table: str | None = None
    image_bias: str | None = None


def router_keys(keys: Iterable[str], prefix: str, method: RoutingMethod) -> Keys:
    """Return the keys of the router at `prefix`: a layer, its sparse block or the router, with or without a last dot.

    Raises:
        TypeError: The prefix or a key is no str.
        ValueError: There is no gate or more than one, a bias is ambiguous, or the router has a tensor that Router does
            not support.

    >>> keys = ["layers.3.ffn.gate.weight", "layers.3.ffn.gate.bias", "layers.4.ffn.gate.weight"]
    >>> router_keys(keys, "layers.3.ffn", RoutingMethod(8, 2))[:2]
    ('layers.3.ffn.gate.weight', 'layers.3.ffn.gate.bias')
    >>> router_keys(["mlp.router.weight", "mlp.router.bias"], "", RoutingMethod(8, 2, score_after_topk=True)).logit_bias
    'mlp.router.bias'
    """
    known = set(keys)
    for what, name in (("prefix", prefix), *(("a key of state", key) for key in known)):
        if not isinstance(name, str):
            raise TypeError(f"{what} must be a str, got {name!r}")
    start = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    gate = _gate(known, prefix, start)
    # The module of the router. The bias that only selects may also belong to a module above it.
    router = _folder_above(gate) if _is_nested(gate) else gate
    found = {"weight": f"{gate}weight"}
    own = (gate, router)
    roles = {"bias": _folders(gate), **dict.fromkeys(("logit_bias", "expert_scale", "table", "image_bias"), own)}
    for role, folders in roles.items():
        names = [name for name in TENSORS if TENSORS[name] == role and name != "bias"]
        key = next((folder + name for folder in folders for name in names if folder + name in known), None)
        if key is not None:
            found[role] = key
    linear = f"{gate}bias"
    if linear in known:
        found[_role_of_linear_bias(linear, gate, "bias" in found, method)] = linear
    *_, highest = _folders(gate)
    below = min(start, highest, key=len)
    others = sorted(
        key
        for key in known - set(found.values())
        if key.startswith(router) or (key.startswith(below) and _is_of_router(key, below, router, known))
    )
    if others:
        raise ValueError(f"{others[0]} is part of the router of {gate}weight, but nothing that a Router can take")
    return Keys(**found)


def _gate(known: set[str], prefix: str, start: str) -> str:
    """Return the path of the module that holds the gate, with a last dot."""
    if f"{start}weight" in known:  # the router itself
        return start
    gates = [f"{start}{block}{gate}" for block in _BLOCKS for gate in (*_ROUTERS, *_NESTED)]
    if not start or f".{start}".endswith((".gate.", ".router.")):
        gates += [start + linear for linear in LINEARS]
    found = [gate for gate in gates if f"{gate}weight" in known]
    if len(found) > 1:
        raise ValueError(
            f"several gates at prefix {prefix!r}: {found[0]}weight and {found[1]}weight, so name one of them"
        )
    if not found:
        raise ValueError(f"no gate at prefix {prefix!r}: {_what_there_is(known, start)}")
    return found[0]


def _what_there_is(known: set[str], start: str) -> str:
    """Return what to say about a prefix without a gate: the routers of a checkpoint, those below the prefix first."""
    gates = (match for key in known if (match := _ANY_GATE.fullmatch(key)) and not _ATTENTION.search(key))
    routers = sorted(
        (match[1].rstrip(".") for match in gates), key=lambda path: (not path.startswith(start), _natural(path))
    )
    if routers:
        return f"there are routers at {_listed(routers)}"
    there = sorted((key for key in known if key.startswith(start)), key=_natural)
    if not there:
        return f"no key begins with it, but these are there: {_listed(sorted(known, key=_natural)) or 'none'}"
    looked = f"looked for {start}weight, {start}gate.weight, {start}mlp.gate.weight and the like"
    return f"{looked}, but the keys there are {_listed(there)}"


def _listed(names: list[str], most: int = 4) -> str:
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _is_nested(gate: str) -> bool:
    """Return True if the gate is a linear layer in the router, False if it is the router's own weight."""
    return gate in LINEARS or f".{gate}".endswith(tuple(f".{nested}" for nested in _NESTED))


def _role_of_linear_bias(key: str, gate: str, has_bias: bool, method: RoutingMethod) -> str:
    """Return the role of the `bias` beside the gate: part of a linear layer, or DeepSeek's bias that only selects."""
    if plain_bias_is_of_logits(method):
        return "logit_bias"
    deepseek = not has_bias and not _is_nested(gate) and not f".{gate}".endswith(".router.")
    if deepseek and plain_bias_selects(method):
        return "bias"
    raise ValueError(
        f"{key} may be a bias that only selects (bias) or one that is part of the logits (logit_bias), and neither its "
        "name nor the method says which: give the arrays to Router by these names"
    )


def plain_bias_is_of_logits(method: RoutingMethod) -> bool:
    """Return True if a `bias` beside a gate is part of the logits: the method allows no other."""
    return method.score_after_topk and method.bias_on == "score"


def plain_bias_selects(method: RoutingMethod) -> bool:
    """Return True if a `bias` beside a gate of DeepSeek's only selects: the method selects by such scores."""
    return not method.selects_on_logits and method.score in ("sigmoid", "sqrtsoftplus")


def _is_of_router(key: str, below: str, router: str, known: set[str]) -> bool:
    """Return True if a key outside the router's module is named like a part of a router, and no other module has it."""
    module, name = key[: key.rfind(".") + 1], key[key.rfind(".") + 1 :]
    folders = ["", *module[len(below) :].split(".")[:-1]]
    if "router" not in folders and not _PART.search(name):
        return False
    if _ATTENTION.search(key[len(below) :]) or _is_of_other_module(key, router, known):
        return False
    if "router" in folders or _NAME.search(name):
        return True
    if _EXPERTS.search(" ".join((*folders, name))) or _OTHERS.search(name):
        return False
    is_block = module == _folder_above(router) and not _is_layer(module, known)
    return (
        is_block or bool(_MODULE.search(folders[-1])) or (router.startswith(module) and bool(_OF_ROUTING.search(name)))
    )


# Words in the names of a router's bias, scale or table; of such a tensor wherever it is; of modules that have them; of
# such tensors in a layer; and of tensors of experts, linear layers and norms, which have biases and scales, too.
_PART = re.compile("bias|scal|table|correct|multiplier|temperature|2eid|to_expert", re.IGNORECASE)
_NAME = re.compile("rout(?!ed_expert)|correct|e_score|select|2eid|^(per_)?expert_(bias|scale)(es|s)?$", re.IGNORECASE)
_MODULE = re.compile("(^|_)gate$|rout|moe|correct|select|static")
_OF_ROUTING = re.compile("gat(e|ing)|moe|topk|score|expert|balanc")
_EXPERTS = re.compile(r"experts|expert_?\d|shared|expert\w*_(weight|input|output|act|activation)_")
_OTHERS = re.compile(r"proj|linear|norm|(^|_)(w|fc|mlp)\d|(^|_)(weight|input|output|up|down)_")


def _is_of_other_module(key: str, router: str, known: set[str]) -> bool:
    """Return True if a module of the key that does not have the router has a weight, or a router, of its own."""
    folders = [key[: dot.end()] for dot in re.finditer(r"\.", key) if not router.startswith(key[: dot.end()])]
    own = [f"{folder}{name}" for folder in folders for name in ("weight", "qweight", "weight_packed")]
    if known.isdisjoint(own):
        own = [f"{folder}{gate}weight" for folder in folders for gate in (*_ROUTERS, *_NESTED)]
    stem = re.sub("_(bias|scale)(es|s)?$", "", key)  # experts.gate_up_proj_bias beside experts.gate_up_proj
    if stem != key and f"{stem}." != router:
        own += [stem, f"{stem}.weight", f"{stem}_weight"]
    if key == f"{_folder_above(router)}bias":  # JetMoE's, of the layer after its experts
        own.append(f"{_folder_above(router)}output_linear.weight")
    return not known.isdisjoint(own)


def _is_layer(folder: str, known: set[str]) -> bool:
    """Return True if a module is a whole layer, by its number or its attention."""
    is_numbered = folder[:-1].rpartition(".")[2].isdigit()
    return is_numbered or any(key.startswith(folder) and _ATTENTION.search(key, len(folder)) for key in known)


def _folder_above(folder: str) -> str:
    return folder[: folder.rfind(".", 0, -1) + 1]


def _folders(gate: str) -> Iterator[str]:
    """Yield the path of the gate's module and of up to two modules above it, but none above the layer."""
    folder = gate
    yield folder
    for _ in range(2):
        if not folder or folder.split(".")[-2].isdigit():
            return
        folder = _folder_above(folder)
        yield folder
