"""The layers on a GPU: the numbers of the CPU, the same dtypes under autocast, and no waiting for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import wellcond.nn as wnn

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "mbn": lambda: wnn.MomentumBatchNorm2d(8),
    "mbn in groups": lambda: wnn.MomentumBatchNorm2d(8, group_size=2),
    "ghost": lambda: wnn.GhostBatchNorm2d(8, 2),
    "bsr": lambda: wnn.BSRBatchNorm2d(8),
    "bsr, one pass": lambda: wnn.BSRBatchNorm2d(8, exact=False),
    "bsr in groups": lambda: wnn.BSRBatchNorm2d(8, group_size=2),
    "brn": lambda: wnn.BatchRenorm2d(8),
    "evalnorm": lambda: wnn.EvalNorm2d(8),
    "evalnorm, fixed": lambda: wnn.EvalNorm2d(8, learn=False),
    "mabn": lambda: wnn.MovingAverageBatchNorm2d(8, window=2, warmup_steps=0, scale_after=1),
    "cbn": lambda: wnn.CrossIterationBatchNorm2d(8, compensate=False, group_size=2),
    "pn": lambda: wnn.PopulationNorm2d(8),
    "sn": lambda: wnn.SwitchableNorm2d(8),
    "sn in groups": lambda: wnn.SwitchableNorm2d(8, group_size=2),
    "ssn": lambda: wnn.SparseSwitchableNorm2d(8),
    "ibn": lambda: wnn.InstanceBatchNorm2d(8),
    "kn": lambda: wnn.KalmanBatchNorm2d(8, group_size=2),
    "iternorm": lambda: wnn.IterNorm2d(8),
    "dbn": lambda: wnn.DecorrelatedBatchNorm2d(8, channels_per_group=4),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    layer = LAYERS[name]()
    if isinstance(layer, wnn.SparseSwitchableNorm2d):
        layer.radius = 0.3
    if isinstance(layer, wnn.MomentumBatchNorm2d):
        layer.stat_momentum = 0.5
    return layer, copy.deepcopy(layer).cuda()


@each_layer
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_equals_the_cpu(name: str, memory_format: torch.memory_format) -> None:
    on_cpu, on_gpu = pair(name)
    for step in range(3):
        torch.manual_seed(step)
        x = (torch.randn(6, 8, 5, 4) + 3).to(memory_format=memory_format).requires_grad_()
        y = x.detach().cuda().requires_grad_()
        grad = torch.randn(6, 8, 5, 4)
        out, other = on_cpu(x), on_gpu(y)
        out.backward(grad)
        other.backward(grad.cuda())
        torch.testing.assert_close(other.cpu(), out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y.grad.cpu(), x.grad, rtol=1e-4, atol=1e-5)
        assert other.is_contiguous(memory_format=memory_format)
    for key, value in on_gpu.state_dict().items():
        torch.testing.assert_close(value.cpu(), on_cpu.state_dict()[key], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(on_gpu.eval()(y).cpu(), on_cpu.eval()(x), rtol=1e-4, atol=1e-4)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_its_input_dtype_and_float32_statistics(name: str, dtype: torch.dtype) -> None:
    on_cpu, layer = pair(name)
    x = torch.randn(6, 8, 5, 4)
    with torch.autocast("cuda", dtype):
        out = layer(x.cuda().to(dtype))
    assert out.dtype == dtype
    assert layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(out.float().cpu(), on_cpu(x.to(dtype).float()), rtol=0.02, atol=0.02)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


# torch.linalg.eigh waits for its error flag.
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "dbn"])
def test_a_step_does_not_wait_for_the_device(name: str, no_waiting: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    _, layer = pair(name)
    x = torch.randn(6, 8, 5, 4, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    layer(x).sum().backward()
