# SPDX-License-Identifier: Apache-2.0
"""Arrays of every framework on the GPU: results of the caller's type on the caller's device; DeepSeek-V4's routers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk, hash_router, topk_select
from tests import frameworks, inputs, oracle
from tests.gpu.support import METHOD, NAMES, call, empty_out, on_gpu, upload

FRAMEWORKS = tuple(frameworks.ON_GPU)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_results_are_right_and_of_the_callers_type(framework: str, name: str, dtype: str) -> None:
    gpu, case = on_gpu(framework), call(name, dtype=dtype)
    result = case(upload(gpu, case.arrays))
    assert all(isinstance(a, gpu.result_type) for a in result)
    assert all(a.__dlpack_device__()[0] == 2 for a in result)
    case.check(*map(gpu.numpy, result))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_out_is_filled_and_returned(framework: str, name: str) -> None:
    gpu, case = on_gpu(framework), call(name)
    arrays = upload(gpu, case.arrays)
    out = empty_out(gpu, case(arrays))
    result = case(arrays, out=out)
    assert result is out
    case.check(*map(gpu.numpy, out))


def test_jax_out_is_refused_and_unchanged() -> None:
    gpu, case = on_gpu("jax"), call("activation_topk")
    arrays = upload(gpu, case.arrays)
    out = empty_out(gpu, case(arrays))
    with pytest.raises(ValueError, match=r"out\.weights"):
        case(arrays, out=out)
    assert (gpu.numpy(out.weights) == 77).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_num_valid_in_an_array_of_the_framework(framework: str) -> None:
    gpu, logits = on_gpu(framework), inputs.normal((20, 256))
    for shape in ((), (1,)):
        count = gpu.array(np.full(shape, 7, np.int32))
        result = activation_topk(gpu.array(logits), METHOD, num_valid=count)
        want = oracle.pad(oracle.route(logits, METHOD), 7)
        np.testing.assert_array_equal(gpu.numpy(result.indices), want.indices)


def test_views_of_torch_tensors() -> None:
    torch = on_gpu("torch")
    scores = inputs.normal((9, 300), "bfloat16")
    tensor = torch.array(scores)
    cut = tensor.as_strided((8, 299), (300, 1), 1)  # one element after an aligned base
    for view in (tensor[::3], tensor[:, 7:200], tensor[:1].expand(5, 300), cut, tensor.clone().requires_grad_()):
        result = topk_select(view, 12)
        want = oracle.topk(torch.numpy(view.detach().clone()), 12)
        np.testing.assert_array_equal(torch.numpy(result.indices), want[1])
    with pytest.raises(ValueError, match=r"scores.*strides \[1, 300\]"):
        topk_select(tensor.T, 3)


def test_frameworks_may_be_mixed_on_one_device() -> None:
    logits, bias = inputs.normal((5, 256)), inputs.normal((256,), seed=1, scale=0.1)
    want = oracle.route(logits, METHOD, bias).indices
    for first in FRAMEWORKS:
        for second in FRAMEWORKS:
            one, other = on_gpu(first), on_gpu(second)
            result = activation_topk(one.array(logits), METHOD, bias=other.array(bias))
            assert isinstance(result.indices, one.result_type)
            np.testing.assert_array_equal(one.numpy(result.indices), want)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_arrays_of_two_devices_are_named(framework: str) -> None:
    gpu = on_gpu(framework)
    logits, bias = inputs.normal((5, 256)), np.zeros(256, np.float32)
    with pytest.raises(ValueError, match=r"logits.*cuda:0.*bias.*cpu"):
        activation_topk(gpu.array(logits), METHOD, bias=bias)
    with pytest.raises(ValueError, match=r"logits.*cpu.*bias.*cuda:0"):
        activation_topk(logits, METHOD, bias=gpu.array(bias))
    with pytest.raises(ValueError, match=r"num_valid.*cpu"):
        activation_topk(gpu.array(logits), METHOD, num_valid=np.array(3, np.int32))


def test_torch_tensors_without_strides_are_refused() -> None:
    torch = on_gpu("torch").torch
    with pytest.raises(ValueError, match="scores"):
        topk_select(torch.zeros(4, 16, device="cuda").to_sparse(), 2)
    with pytest.raises(ValueError, match="lengths"):
        topk_select(torch.zeros(4, 16, device="cuda"), 2, lengths=torch.zeros(4, device="meta", dtype=torch.int32))


def test_the_c_exchange_api_reports_the_current_stream() -> None:
    torch = on_gpu("torch").torch
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this PyTorch has no DLPack C exchange API")
    from cupy_router.arrays import _exchange

    exchange, tensor = _exchange.Exchange(torch.Tensor), torch.zeros(3, 4, device="cuda")
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            assert exchange.current_stream(tensor) == stream.cuda_stream
    assert exchange.view("x", tensor, 0).pointer == tensor.data_ptr()


class OnlyDLPack:
    """CUDA memory of an unknown framework."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **wanted: Any) -> object:
        return self.array.__dlpack__(**wanted)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self.array.__dlpack_device__()
        return int(kind), int(index)


@pytest.mark.parametrize("name", NAMES)
def test_arrays_with_only_dlpack(name: str) -> None:
    cupy, case = on_gpu("cupy"), call(name)
    arrays = {key: OnlyDLPack(a) for key, a in upload(cupy, case.arrays).items()}
    case.check(*map(cupy.numpy, case(arrays)))


def test_a_second_device_is_used_without_being_current(cupy: Any) -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two CUDA devices")
    for name in NAMES:
        case = call(name)
        with cupy.cuda.Device(1):
            arrays = upload(on_gpu("cupy"), case.arrays)
        result = case(arrays)
        assert cupy.cuda.runtime.getDevice() == 0
        assert all(a.device.id == 1 for a in result)
        with cupy.cuda.Device(1):
            case.check(*map(cupy.asnumpy, result))
    with cupy.cuda.Device(1):
        bias = cupy.zeros(256, np.float32)
    with pytest.raises(ValueError, match=r"logits.*cuda:0.*bias.*cuda:1"):
        activation_topk(cupy.zeros((3, 256), np.float32), METHOD, bias=bias)


# -- DeepSeek-V4 as the transformers package has it --------------------------------------------------------------------


def deepseek() -> Any:
    on_gpu("torch")
    transformers = pytest.importorskip("transformers")
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip(f"DeepSeek-V4 is as we know it from transformers 5.23 on, this is {transformers.__version__}")
    from transformers.models.deepseek_v4 import modeling_deepseek_v4

    config = transformers.DeepseekV4Config(
        hidden_size=64, num_local_experts=32, num_experts_per_tok=6, vocab_size=100, routed_scaling_factor=1.5
    )
    return modeling_deepseek_v4, config


def same_routing(result: Any, weights: Any, indices: Any) -> None:
    """Assert the same experts for every token, and weights within 1e-6."""
    import torch

    ours, theirs = result.indices.long(), indices.long()
    assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
    dense = [
        torch.zeros(len(ours), 32, device="cuda").scatter(1, i, w)
        for i, w in ((ours, result.weights), (theirs, weights))
    ]
    torch.testing.assert_close(dense[0], dense[1], rtol=1e-6, atol=0)


def test_topk_router_of_transformers() -> None:
    modeling, config = deepseek()
    import torch

    torch.manual_seed(0)
    router = modeling.DeepseekV4TopKRouter(config).cuda()
    torch.nn.init.normal_(router.weight, std=0.125)
    router.e_score_correction_bias.uniform_(8.0, 8.1)
    with torch.no_grad():
        logits, weights, indices = router(torch.randn(500, 64, device="cuda"))
        method = RoutingMethod(32, 6, "sqrtsoftplus", renormalize_eps=1e-20, scale=1.5)
        same_routing(activation_topk(logits, method, bias=router.e_score_correction_bias), weights, indices)


def test_hash_router_of_transformers() -> None:
    modeling, config = deepseek()
    import torch

    torch.manual_seed(0)
    router = modeling.DeepseekV4HashRouter(config).cuda()
    torch.nn.init.normal_(router.weight, std=0.125)
    router.tid2eid.copy_(torch.stack([torch.randperm(32)[:6] for _ in range(100)]))
    ids, x = torch.randint(0, 100, (500,), device="cuda"), torch.randn(500, 64, device="cuda")
    method = RoutingMethod(32, 6, "sqrtsoftplus", renormalize_eps=1e-20, scale=1.5)
    with torch.no_grad():
        logits, weights, indices = router(x, ids)
        given = hash_router(ids, router.tid2eid, method, logits=logits)
        same_routing(given, weights, indices)
        assert torch.equal(given.indices.long(), indices)
        products = hash_router(ids, router.tid2eid, method, x=x, weight=router.weight)
        torch.testing.assert_close(products.weights, weights, rtol=1e-5, atol=0)
