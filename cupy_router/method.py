# SPDX-License-Identifier: Apache-2.0
"""RoutingMethod: a description of a router as plain data, without arrays or devices."""

from __future__ import annotations

import json
import math
import operator
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from cupy_router import _hooks, huggingface_configs
from cupy_router.method_fields import INDEX_DTYPES, boolean, check_index_dtype, integer, one_of, real
from cupy_router.score_function import ScoreFunction, score_of_key

if TYPE_CHECKING:
    from cupy_router.typing import BiasTarget, GroupScore, IndexDtype, Score, WeightDtype

SCORES = ("sqrtsoftplus", "sigmoid", "softmax", "identity")

MAX_EXPERTS = 2**31 - 1  # indices are int32

BIAS_TARGETS = ("score", "logits")
GROUP_SCORES = ("max", "top2")
WEIGHT_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, eq=False, repr=False)
class RoutingMethod:
    """Describe how a router turns a token's logits into experts and weights.

    The router scores each logit, adds the call's bias, if any, and selects the ``top_k`` experts with the highest sums.
    The weights are the scores of these experts, without the bias. docs/methods.md has the mathematics.

    Args:
        num_experts: Number of experts to select from, 1 to 2**31 - 1.
        top_k: Number of experts per token, 1 to ``num_experts``.
        score: Score of a logit x: ``"sqrtsoftplus"`` is sqrt(log(1 + exp(x))), ``"sigmoid"`` is 1 / (1 + exp(-x)),
            ``"softmax"`` is exp(x) divided by the sum of exp over the token's logits, ``"identity"`` is x. A
            :class:`ScoreFunction` defines any other.
        logit_scale: Multiply the logits by this, after adding the call's ``logit_bias``.
        logit_softcap: Then replace each logit by c * tanh(logit / c) with this c > 0.
        score_after_topk: Select by logits and score only the selected ones. Softmax is then over these alone.
        bias_on: Add the call's ``bias`` to the ``"score"`` or to the ``"logits"``, and select by the sum. With
            ``score_after_topk`` only ``"logits"`` allows a bias.
        num_groups: Split the experts into this many contiguous groups of equal size; a divisor of ``num_experts``.
        top_groups: Select experts from this many best groups only; 1 to ``num_groups``.
        group_score: Rank groups by the ``"max"`` of their selection values, or by the sum of their ``"top2"``.
        renormalize: Divide a token's weights by their sum.
        renormalize_eps: Add this to the sum; 0 or more.
        renormalize_min: Clamp the sum to at least this; 0 or more, and only where ``renormalize_eps`` is 0.
        scale: Multiply every weight by this at the end.
        num_shared_experts: Number of experts that process every token. Each adds a column to the results, with an index
            from ``num_experts`` on.
        shared_weight: Weight of each shared expert.
        shared_in_normalizer: Give shared experts logits too, in the columns after the others. The weight of selected
            and shared experts is then sigmoid(logit) divided by the sum of these, times ``scale``. Needs sigmoid scores
            and ``renormalize``.
        weight_dtype: Dtype of the weights: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        index_dtype: Dtype of the indices: ``"int32"``, ``"int64"``, ``"int16"``, ``"uint16"`` or ``"uint8"``. An
            unsigned one has its highest value where the others have -1, so no expert, shared ones included, may have
            this id.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range or unknown, or two fields exclude each other.

    A method is immutable, compares by its fields and can be a dictionary key.

    >>> method = RoutingMethod(num_experts=8, top_k=2, score="softmax")
    >>> method
    RoutingMethod(num_experts=8, top_k=2, score='softmax')
    >>> method == RoutingMethod(8, 2, "softmax", scale=1)
    True
    >>> RoutingMethod(num_experts=8, top_k=9)
    Traceback (most recent call last):
    ...
    ValueError: RoutingMethod: top_k is 9, but must be from 1 to num_experts = 8
    """

    num_experts: int
    top_k: int
    score: Score | ScoreFunction = "sqrtsoftplus"
    _: KW_ONLY
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    score_after_topk: bool = False
    bias_on: BiasTarget = "score"
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    renormalize: bool = True
    renormalize_eps: float = 0.0
    renormalize_min: float | None = None
    scale: float = 1.0
    num_shared_experts: int = 0
    shared_weight: float = 1.0
    shared_in_normalizer: bool = False
    weight_dtype: WeightDtype = "float32"
    index_dtype: IndexDtype = "int32"

    # Every call looks its method up in caches by this text, so it is computed once. It is no field.
    text: ClassVar[str]  # the fields as JSON, see `from_text`

    # torch.compile traces this where a traced function makes a method: plain Python that writes nothing but `self`.
    def __post_init__(self) -> None:
        num_experts = integer("num_experts", self.num_experts, 1, MAX_EXPERTS, "2**31 - 1")
        top_k = integer("top_k", self.top_k, 1, num_experts, f"num_experts = {num_experts}")
        checked: dict[str, Any] = {
            "num_experts": num_experts,
            "top_k": top_k,
            "score": self.score if isinstance(self.score, ScoreFunction) else one_of("score", self.score, SCORES),
            "logit_scale": real("logit_scale", self.logit_scale),
            "bias_on": one_of("bias_on", self.bias_on, BIAS_TARGETS),
            "num_groups": integer("num_groups", self.num_groups, 1, num_experts, f"num_experts = {num_experts}"),
            "group_score": one_of("group_score", self.group_score, GROUP_SCORES),
            "renormalize_eps": real("renormalize_eps", self.renormalize_eps, nonnegative=True),
            "scale": real("scale", self.scale),
            "num_shared_experts": integer(
                "num_shared_experts", self.num_shared_experts, 0, MAX_EXPERTS - num_experts, "2**31 - 1 - num_experts"
            ),
            "shared_weight": real("shared_weight", self.shared_weight),
            "weight_dtype": one_of("weight_dtype", self.weight_dtype, WEIGHT_DTYPES),
            "index_dtype": one_of("index_dtype", self.index_dtype, tuple(INDEX_DTYPES)),
        }
        for name in ("score_after_topk", "renormalize", "shared_in_normalizer"):
            checked[name] = boolean(name, getattr(self, name))
        num_groups = checked["num_groups"]
        top_groups = integer("top_groups", self.top_groups, 1, num_groups, f"num_groups = {num_groups}")
        checked["top_groups"] = top_groups
        if self.logit_softcap is not None:
            checked["logit_softcap"] = real("logit_softcap", self.logit_softcap, nonnegative=True)
            if checked["logit_softcap"] == 0.0:
                raise ValueError("RoutingMethod: logit_softcap is 0, but must be more than 0, or None")
        if self.renormalize_min is not None:
            checked["renormalize_min"] = real("renormalize_min", self.renormalize_min, nonnegative=True)
        if num_experts % num_groups:
            raise ValueError(
                f"RoutingMethod: num_groups is {num_groups}, but must divide num_experts = {num_experts} evenly"
            )
        eligible = num_experts // num_groups * top_groups
        if top_k > eligible:
            raise ValueError(
                f"RoutingMethod: top_k is {top_k}, but the best {top_groups} of {num_groups} groups have only "
                f"{eligible} of the {num_experts} experts"
            )
        if checked["renormalize_eps"] != 0.0 and self.renormalize_min is not None:
            raise ValueError(
                f"RoutingMethod: renormalize_eps is {self.renormalize_eps!r} and renormalize_min is "
                f"{self.renormalize_min!r}, but only one of them may be set"
            )
        if checked["shared_in_normalizer"]:
            _check_shared_in_normalizer(checked)
        check_index_dtype(checked["index_dtype"], num_experts + checked["num_shared_experts"])
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._keep_text()

    def _keep_text(self) -> None:
        """Compute the text, unless traced: torch.compile of PyTorch 2.11 would compare it as one field more."""
        if not any(is_traced() for is_traced in _hooks.traced):
            object.__setattr__(self, "text", _text_of(self))

    def __getattr__(self, name: str) -> str:
        if name != "text":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._keep_text()
        return _text_of(self)

    @classmethod
    def from_config(cls, config: Any) -> RoutingMethod:
        """Return the method of a model's routers, from the configuration of Hugging Face or of DeepSeek's own code.

        The method covers the steps from logits to the weights that the router returns. A factor that the model applies
        later, to the sum of its experts, is not in ``scale``. For DeepSeek-V4 it describes the layers with a gate; the
        hash layers compute scores and weights in the same way.

        Args:
            config: A configuration object, its dict, or the dict of a config.json. If it has parts, like that of a
                model for text and images, the part with experts is used.

        Raises:
            TypeError: ``config`` is neither a configuration object nor a dict, or has a number of another type.
            ValueError: The model has no experts, its routing cannot be expressed, or the configuration is incomplete or
                states a step that the routers of its ``model_type`` do not have. The message names the feature.

        >>> config = {"model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False}
        >>> RoutingMethod.from_config(config)
        RoutingMethod(num_experts=64, top_k=8, score='softmax', renormalize=False)
        """
        return cls(**huggingface_configs.routing_fields(config))

    @property
    def num_logits(self) -> int:
        """Number of columns of the logits and rows of the gate: all experts, and shared experts that have logits."""
        return self.num_experts + (self.num_shared_experts if self.shared_in_normalizer else 0)

    @property
    def num_columns(self) -> int:
        """Number of columns of the results: top_k selected experts, then the shared ones."""
        return self.top_k + self.num_shared_experts

    @property
    def selects_on_logits(self) -> bool:
        """True if experts are selected by logits, False if by scores."""
        return self.score_after_topk or self.bias_on == "logits"

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return self.text == other.text if isinstance(other, RoutingMethod) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        """Show the first three fields and those that differ from their defaults."""
        shown = (f for i, f in enumerate(fields(self)) if i < 3 or getattr(self, f.name) != f.default)
        return f"RoutingMethod({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    # String hashes differ between processes, so pickles and copies carry only the fields.
    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


def _check_shared_in_normalizer(checked: dict[str, Any]) -> None:
    """Check the fields that must have their default: the weights are a softmax of log(sigmoid(logit))."""
    needed = {"score": "sigmoid", "renormalize": True, "renormalize_eps": 0.0, "renormalize_min": None}
    wrong = [name for name, value in needed.items() if checked.get(name) != value]
    if wrong:
        raise ValueError(
            f"RoutingMethod: shared_in_normalizer needs {wrong[0]} = {needed[wrong[0]]!r}, got {checked[wrong[0]]!r}"
        )
    if checked["num_shared_experts"] == 0:
        raise ValueError("RoutingMethod: shared_in_normalizer needs num_shared_experts of 1 or more, got 0")


def as_json(value: Any) -> str:
    """Return the JSON of a string, number, bool, None, a tuple of these, or what has a `text`.

    Plain string operations, because torch.compile traces this.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(operator.index(value))  # makes a constant of a symbolic int of torch.compile
    if isinstance(value, float):
        (value,) = {value}  # the same for a symbolic float
        return "Infinity" if value == math.inf else "-Infinity" if value == -math.inf else repr(value)
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return "[" + ", ".join([as_json(item) for item in value]) + "]"
    return value.text  # type: ignore[no-any-return]  # a method, or options


def _text_of(method: RoutingMethod) -> str:
    """Return the fields that differ from their defaults as JSON."""
    changed = []
    for name, default in _DEFAULTS.items():
        value = getattr(method, name)
        if isinstance(value, ScoreFunction):  # has no text
            value = (value.key,)
        if value != default:
            changed.append(f'"{name}": {as_json(value)}')
    return "{" + ", ".join(changed) + "}"


_DEFAULTS = {field.name: None if field.default is MISSING else field.default for field in fields(RoutingMethod)}


@lru_cache(maxsize=4096)
def from_text(text: str) -> RoutingMethod:
    """Return the method of a `text`. Graphs and compiled programs carry texts, also into other processes."""
    values = json.loads(text)
    if isinstance(values.get("score"), list):
        values["score"] = score_of_key(*values["score"])
    return RoutingMethod(**values)


_PRESETS = {
    "deepseek-v4-flash": RoutingMethod(256, 6, "sqrtsoftplus", renormalize_eps=1e-20, scale=1.5),
    "deepseek-v4-pro": RoutingMethod(384, 6, "sqrtsoftplus", renormalize_eps=1e-20, scale=2.5),
    "deepseek-v3": RoutingMethod(
        256, 8, "sigmoid", num_groups=8, top_groups=4, group_score="top2", renormalize_eps=1e-20, scale=2.5
    ),
    "deepseek-v2": RoutingMethod(160, 6, "softmax", num_groups=8, top_groups=3, renormalize=False, scale=16.0),
    "deepseek-v2-lite": RoutingMethod(64, 6, "softmax", renormalize=False),
    "kimi-k2": RoutingMethod(384, 8, "sigmoid", renormalize_eps=1e-20, scale=2.827),
    "glm-4.5": RoutingMethod(160, 8, "sigmoid", renormalize_eps=1e-20, scale=2.5),
    "qwen3-moe": RoutingMethod(128, 8, "softmax"),
    "qwen2-moe": RoutingMethod(60, 4, "softmax", renormalize=False),
    "mixtral": RoutingMethod(8, 2, "softmax"),
    "gpt-oss": RoutingMethod(32, 4, "softmax", score_after_topk=True, renormalize=False),
    "gpt-oss-120b": RoutingMethod(128, 4, "softmax", score_after_topk=True, renormalize=False),
    "llama4": RoutingMethod(16, 1, "sigmoid", score_after_topk=True, renormalize=False),
    "llama4-maverick": RoutingMethod(128, 1, "sigmoid", score_after_topk=True, renormalize=False),
    "granite-moe": RoutingMethod(32, 8, "softmax", score_after_topk=True, renormalize=False),
    "granite-moe-3b": RoutingMethod(40, 8, "softmax", score_after_topk=True, renormalize=False),
    "minimax-m2": RoutingMethod(256, 8, "sigmoid"),
    "ernie-4.5": RoutingMethod(64, 6, "softmax", renormalize_min=1e-12),
    "ernie-4.5-300b": RoutingMethod(64, 8, "softmax", renormalize_min=1e-12),
    "olmoe": RoutingMethod(64, 8, "softmax", renormalize=False),
}


def presets() -> dict[str, RoutingMethod]:
    """Return the routing methods of known models by name, as a new dictionary. docs/methods.md lists them.

    >>> list(presets())
    ['deepseek-v4-flash', 'deepseek-v4-pro', 'deepseek-v3', 'deepseek-v2', 'deepseek-v2-lite', 'kimi-k2', 'glm-4.5',
     'qwen3-moe', 'qwen2-moe', 'mixtral', 'gpt-oss', 'gpt-oss-120b', 'llama4', 'llama4-maverick', 'granite-moe',
     'granite-moe-3b', 'minimax-m2', 'ernie-4.5', 'ernie-4.5-300b', 'olmoe']
    >>> presets()["deepseek-v4-flash"]
    RoutingMethod(num_experts=256, top_k=6, score='sqrtsoftplus', renormalize_eps=1e-20, scale=1.5)
    """
    return dict(_PRESETS)


def resolve(method: RoutingMethod | str) -> RoutingMethod:
    """Return the method, or the preset of that name.

    Raises:
        TypeError: ``method`` is neither a RoutingMethod nor a string.
        ValueError: No preset has that name.

    >>> resolve("deepseek-v4-pro").num_experts
    384
    """
    if isinstance(method, RoutingMethod):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method must be a RoutingMethod or the name of a preset, got {type(method).__name__}")
    try:
        return _PRESETS[method]
    except KeyError:
        import difflib  # only needed for this message

        near = [name for name in _PRESETS if method and name.startswith(method)]
        near = near or difflib.get_close_matches(method, _PRESETS, cutoff=0.5)
        nearest = f", the nearest are {', '.join(map(repr, near))}" if near else ""
        raise ValueError(
            f"method is {method!r}, but must be the name of a preset{nearest} (cupy_router.presets() lists all)"
        ) from None
