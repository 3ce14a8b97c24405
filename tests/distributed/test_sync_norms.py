"""Synchronized normalization: two processes (gloo, CPU) with unequal parts of a batch equal one with all of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import wellcond.nn as wnn

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORKER = Path(__file__).with_name("sync_norm_worker.py")


def _load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wellcond_sync_norm_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _load_worker()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    logs = [(folder / f"log{rank}").open("w+") for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), "2", str(folder)], stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(150) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = []
    for log in logs:
        log.seek(0)
        texts.append(log.read()[-3000:])
    assert codes == [0, 0], "\n".join(texts)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", worker.LAYERS)
def test_two_ranks_equal_one_process_with_the_joined_batch(name: str, ranks: list[dict[str, Any]]) -> None:
    alone = worker.train(name, 0, 1)
    for key, expected in alone.items():
        first, second = ranks[0][name][key], ranks[1][name][key]
        if key.startswith("state."):
            torch.testing.assert_close(first, second, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
            joined = first
        elif key.startswith(("weight_grad", "bias_grad")):
            joined = first + second  # as DDP reduces them, but for the division
        else:
            joined = torch.cat([first, second])
        torch.testing.assert_close(joined, expected, rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


def test_a_rank_without_samples_takes_part(ranks: list[dict[str, Any]]) -> None:
    layer = worker.momentum_layer().double()
    x = torch.randn(4, worker.CHANNELS, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x.requires_grad_()
    output = layer(x)
    output.square().sum().backward()
    torch.testing.assert_close(ranks[0]["empty"]["out"], output.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ranks[0]["empty"]["grad"], x.grad, rtol=1e-10, atol=1e-10)
    assert ranks[1]["empty"]["out"].shape == (0, worker.CHANNELS, 3, 3)
    torch.testing.assert_close(ranks[1]["empty"]["mean"], layer.running_mean, rtol=1e-10, atol=1e-10)


def test_a_second_derivative_over_ranks_is_refused() -> None:
    from wellcond.moments import batch_moments
    from wellcond.normalize import normalize

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    own = batch_moments(x)
    y = normalize(x, own.mean, own.var, None, None, 1e-5, own, all_reduce=lambda sums: 1 * sums)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_synchronized_alone_is_the_same_layer() -> None:
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(wnn.EvalNorm2d(3, synchronize=True)(x), nn.BatchNorm2d(3)(x))
