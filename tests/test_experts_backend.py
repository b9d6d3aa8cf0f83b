# SPDX-License-Identifier: Apache-2.0
"""The experts implementation "cupy_router" against those of transformers, and how it is set and restored."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = frameworks.transformers_with_models()

from transformers.integrations import finegrained_fp8  # noqa: E402

from cupy_router.torch import _experts, replace_routers, restore_routers  # noqa: E402
from tests import moe_configs, moe_experts  # noqa: E402
from tests.moe_experts import FORMS, assert_close, experts, inputs, run  # noqa: E402

EXACT, ROUNDED = 2e-6, 2e-2  # of the largest value: sums in another order; bfloat16, rounded once or more often


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with moe_configs.seeded_on_one_thread():
        _experts.register()
        yield


# -- One module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 40])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, num_tokens: int) -> None:
    module, given = experts(form), inputs(num_tokens)
    want = run(module, "grouped_mm", given)
    assert_close(run(module, "cupy_router", given), want, EXACT)
    with torch.no_grad():
        assert_close({"output": module(*given)}, {"output": want["output"]}, EXACT)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_one_token_by_gathered_weights(form: str, dtype: Any, weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is for GPUs, but gives the same on a CPU."""
    module, given = experts(form, dtype=dtype), inputs(1, dtype=dtype)
    given[2] = given[2].to(weights)
    asked = []
    monkeypatch.setattr(_experts, "_gathers", lambda *call: asked.append(call) or True)
    monkeypatch.setattr(_experts, "expert_layout", None)
    module.config._experts_implementation = "cupy_router"
    for knows_of_others in (True, False):
        if not knows_of_others:
            del module._is_expert_parallel
            given[1][0, 0], given[2][0, 0] = moe_experts.EXPERTS, 0
        with torch.no_grad():
            found = module(*given)
        module._is_expert_parallel = not knows_of_others
        want = run(module, "grouped_mm", given)["output"]
        module.config._experts_implementation = "cupy_router"
        assert_close({"": found}, {"": want}, EXACT if dtype == torch.float32 == weights else ROUNDED)
    assert len(asked) == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_bfloat16(form: str, weights: Any) -> None:
    module, given = experts(form, dtype=torch.bfloat16), inputs(40, dtype=torch.bfloat16)
    given[2] = given[2].to(weights)
    assert_close(run(module, "cupy_router", given), run(module, "grouped_mm", given), ROUNDED)


@pytest.mark.parametrize("form", FORMS)
def test_experts_that_are_elsewhere(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of such pairs are never written by GEMMs, neither there nor back."""
    module, given = experts(form), inputs(40, elsewhere=True)
    module._is_expert_parallel = True
    want = run(module, "grouped_mm", given)
    assert not want["weights"][given[1] == moe_experts.EXPERTS].any()
    monkeypatch.setattr(_experts, "_grouped_mm", moe_experts.grouped_mm_with_garbage)
    assert_close(run(module, "cupy_router", given), want, EXACT)
    last = run(module, "cupy_router", [array[-1:] for array in given])
    assert not any(value.any() for value in last.values())
    with torch.no_grad():
        assert_close({"output": module(*given)}, {"output": want["output"]}, EXACT)


def test_any_memory_layout_and_integer() -> None:
    module, given = experts("gated"), inputs(40)
    want = run(module, "grouped_mm", given)
    apart = [given[0].T.contiguous().T, given[1].T.contiguous().T.int(), given[2].T.contiguous().T]
    assert_close(run(module, "cupy_router", apart), want, EXACT)


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.bfloat16), ("cpu", torch.float64)])
def test_tensors_that_have_no_ops_of_ours(device: str, dtype: Any) -> None:
    """They go the way that they would have gone without us, which ends in an error of PyTorch for float64."""
    module, given = experts("gated", device, dtype), inputs(40, device, dtype)
    module.config._experts_implementation = "cupy_router"
    if device == "meta":
        assert module(*given).shape == (40, moe_experts.HIDDEN)
    else:
        with pytest.raises(RuntimeError, match="got Double"):
            module(*given)


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_autocast(hidden: Any, parameters: Any) -> None:
    module, given = experts("gated", dtype=parameters), inputs(40, dtype=hidden)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (run(module, name, given) for name in ("cupy_router", "grouped_mm"))
    assert_close(ours, theirs, EXACT if hidden == parameters == torch.float32 else ROUNDED)
    if hidden == torch.float32:  # the sum is not rounded to the dtype of the experts before
        assert_close({"": ours["output"]}, {"": theirs["output"]}, EXACT)


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("form", FORMS)
def test_compiled_for_any_number_of_tokens(form: str) -> None:
    module = experts(form)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (5, 40, 41):
        given = inputs(num_tokens)
        want = run(module, "cupy_router", given)
        with torch.compiler.set_stance("default" if num_tokens == 5 else "fail_on_recompile"):
            assert_close(run(module, "cupy_router", given, compiled), want, EXACT)


# -- Models ------------------------------------------------------------------------------------------------------------


def small(name: str = "Mixtral") -> Any:
    """A model with random weights, whose routers have something to choose."""
    model = moe_configs.build(getattr(transformers, f"{name}ForCausalLM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


TOKENS = torch.arange(6, 36)[None]


def step(model: Any) -> dict[str, Any]:
    """Return logits and gradients."""
    model.zero_grad()
    logits = model(TOKENS).logits
    logits.float().square().mean().backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.slow("seconds", every=5)
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Qwen3Moe", "DeepseekV3"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_of_a_model(name: str, checkpointed: bool) -> None:
    model = small(name)
    if checkpointed:
        model.train().gradient_checkpointing_enable()
    found = {}
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        found[implementation] = step(model)
    assert replace_routers(model, experts=True) == 2
    ours = step(model)
    assert any(name.endswith("down_proj") for name in ours)
    for theirs in found.values():
        assert_close(ours, theirs, 5e-5)
    assert restore_routers(model) == 2
    assert_close(step(model), found["grouped_mm"], 0.0)


def test_generate() -> None:
    model = small("Qwen3Moe")
    own = model.generate(TOKENS[:, :4], max_new_tokens=8, do_sample=False)
    replace_routers(model, experts=True)
    assert torch.equal(model.generate(TOKENS[:, :4], max_new_tokens=8, do_sample=False), own)
    assert model.config._experts_implementation == "cupy_router"


@pytest.mark.slow("seconds")
def test_a_compiled_model_is_one_graph() -> None:
    model = small("Qwen3Moe")
    want = model(TOKENS).logits
    replace_routers(model, experts=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close({"": compiled(TOKENS).logits}, {"": want}, 1e-5)


# -- Swapping and restoring --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", ["eager", "batched_mm", "grouped_mm"])
def test_restoring_gives_back_what_the_configuration_named(earlier: str) -> None:
    model = small()
    model.set_experts_implementation(earlier)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [replace_routers(model), replace_routers(model, experts=True)] == [2, 0]
        assert model.get_experts_implementation() == {"": "cupy_router"}
        assert replace_routers(model, experts=True) == 0
        assert restore_routers(model) == 2
    assert model.get_experts_implementation() == {"": earlier}
    assert not [name for module in model.modules() for name in vars(module) if "cupy" in name]


def test_an_implementation_that_was_set_later_stays() -> None:
    model = small()
    replace_routers(model, experts=True)
    model.set_experts_implementation("batched_mm")
    assert restore_routers(model) == 2
    assert model.config._experts_implementation == "batched_mm"
    replace_routers(model, experts=True)  # registered by now
    restore_routers(model)
    model.set_experts_implementation("cupy_router")
    assert restore_routers(model) == 0
    assert model.config._experts_implementation == "cupy_router"


def test_models_with_parts() -> None:
    """generate() looks at the configuration of the whole, the experts at that of the part."""
    model = moe_configs.build(transformers.Qwen3VLMoeForConditionalGeneration)
    before = model.get_experts_implementation()
    assert before["text_config"] == "grouped_mm"
    replace_routers(model, experts=True)
    during = model.get_experts_implementation()
    assert during["text_config"] == during[""] == "cupy_router"
    restore_routers(model)
    assert model.get_experts_implementation() == before


def test_what_is_saved_is_as_before(tmp_path: Path) -> None:
    model = small("Qwen3Moe")
    model.save_pretrained(tmp_path / "before")
    replace_routers(model, experts=True)
    model.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes(), path.name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert loaded.config._experts_implementation == "grouped_mm"


def test_copies_and_parts() -> None:
    model = small()
    replace_routers(model, experts=True)
    want = model(TOKENS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TOKENS).logits, want)
        assert restore_routers(other) == 2
        assert other.config._experts_implementation == "grouped_mm"
        assert model.config._experts_implementation == "cupy_router"
    assert restore_routers(model.model.layers[0]) == 1
    assert restore_routers(model) == 1
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.slow("process")
def test_a_pickle_runs_in_another_process(tmp_path: Path) -> None:
    model = small()
    replace_routers(model, experts=True)
    (tmp_path / "model").write_bytes(pickle.dumps((model, TOKENS, model(TOKENS).logits)))
    program = """
import pickle, sys
model, tokens, want = pickle.load(open(sys.argv[1], "rb"))
assert model.config._experts_implementation == "cupy_router"
assert (model(tokens).logits == want).all()
"""
    subprocess.run([sys.executable, "-c", program, tmp_path / "model"], check=True)


# -- Experts that stay as they are -------------------------------------------------------------------------------------


def test_a_registry_of_float8_is_left_alone() -> None:
    model = small()
    before = dict(finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS)
    for layer in model.model.layers:
        block = layer.mlp
        own, config = block.experts, block.experts.config
        block.experts = experts("gated", interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS)
        block.experts.config, block.experts.num_experts = config, own.num_experts
    with pytest.warns(UserWarning, match="its implementations are those of FP8ExpertsInterface") as caught:
        assert replace_routers(model, experts=True) == 2
    assert len(caught) == 1
    assert "left Experts (model.layers.0.mlp.experts and 1 more) as it is" in str(caught[0].message)
    assert model.config._experts_implementation == "grouped_mm"
    assert dict(finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS) == before


def test_experts_without_implementations() -> None:
    model = moe_configs.build(transformers.DbrxForCausalLM)
    with pytest.warns(UserWarning, match="DbrxExpert.* as it is: transformers has no experts impl") as caught:
        assert replace_routers(model, experts=True) == 2
    assert len(caught) == 1


def test_experts_of_a_router_that_stays() -> None:
    model = moe_configs.build(transformers.PhimoeForCausalLM)
    want = model(TOKENS).logits
    with pytest.warns(UserWarning, match="left Phimoe.* as it is: phimoe: no RoutingMethod expresses") as caught:
        assert replace_routers(model, experts=True) == 0
    assert len(caught) == 1
    assert model.config._experts_implementation == "cupy_router"
    assert_close({"": model(TOKENS).logits}, {"": want}, 1e-5)
    assert restore_routers(model) == 0
    assert model.config._experts_implementation == "grouped_mm"


def test_weights_in_an_order_of_their_own() -> None:
    model = small()
    model.config._experts_implementation_internal = "deepgemm_megamoe"
    with pytest.warns(UserWarning, match="transformers does not leave the implementation deepgemm_megamoe"):
        replace_routers(model, experts=True)
    assert model.config._experts_implementation == "deepgemm_megamoe"


def test_an_old_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", SimpleNamespace())
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.0.0")
    reason = "experts=True needs transformers 5.3 or later, this is 5.0.0"
    left = rf"^replace_routers left MixtralExperts \(model.layers.0.mlp.experts and 1 more\) as it is: {reason}$"
    with pytest.warns(UserWarning, match=left):
        assert replace_routers(model, experts=True) == 2
    assert model.config._experts_implementation == "grouped_mm"
