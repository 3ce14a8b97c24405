"""Network Deconvolution, against loops over patches and against the authors' numbers."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from wellcond.layouts import layout_of
from wellcond.nn.standardize import weight_standardize
from wellcond.nn.whitened.deconvolution import NetworkDeconvolution2d
from wellcond.numerics.newton_schulz import newton_schulz_root

GOLDEN = Path(__file__).parents[2] / "golden"
FLOAT64 = torch.float64


def close(actual: object, expected: object, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT64) -> Tensor:
    """Correlated features with a mean, as behind a rectifier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=FLOAT64)
    return (x + 0.5 * x.roll(1, -1) + 0.3 * x.roll(1, -3)).relu().to(dtype)


# The reference: patches one by one, whitened, then multiplied by the kernel.


def patch(padded: Tensor, layer: nn.Conv2d, sample: int, group: int, row: int, column: int) -> Tensor:
    """What one output position reads, in the order (channel, tap)."""
    (height, width), (down, right) = layer.kernel_size, layer.dilation
    channels = layer.in_channels // layer.groups
    values = [
        padded[sample, group * channels + c, row + i * down, column + j * right]
        for c in range(channels)
        for i in range(height)
        for j in range(width)
    ]
    return torch.stack(values)


def inverse_root(matrix: Tensor, steps: int) -> Tensor:
    """Newton-Schulz as the paper has it."""
    norm = matrix.square().sum().sqrt()
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    y, z = matrix / norm, identity
    for _ in range(steps):
        t = 0.5 * (3 * identity - z @ y)
        y, z = y @ t, t @ z
    return z / norm.sqrt()


def members(layer: NetworkDeconvolution2d) -> list[list[int]]:
    """For each block, its places in a patch."""
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    size = layer.in_channels // layer.groups * taps
    blocks = size // (layer.block * taps)
    if layer.interleaved:
        return [list(range(block, size, blocks)) for block in range(blocks)]
    return [list(range(block * layer.block * taps, (block + 1) * layer.block * taps)) for block in range(blocks)]


def reference(layer: NetworkDeconvolution2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Return the output, and the batch's μ and D of each block."""
    spans = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    pads = {"valid": (0, 0), "same": tuple((span - 1) // 2 for span in spans)}
    down, right = pads[layer.padding] if isinstance(layer.padding, str) else layer.padding
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, (right, right, down, down), mode=mode)
    size = [(n - span) // s + 1 for n, span, s in zip(padded.shape[2:], spans, layer.stride, strict=True)]
    places = [(n, i, j) for n in range(len(x)) for i in range(size[0]) for j in range(size[1])]
    apart = layer.sampling_stride
    if layer.kernel_size == (1, 1):
        sampled = places[:: apart**2]
    else:
        sampled = [(n, i, j) for n, i, j in places if i % apart == 0 and j % apart == 0]
    output = x.new_zeros(len(x), layer.out_channels, *size)
    each = layer.out_channels // layer.groups
    means, roots = [], []
    for group in range(layer.groups):

        def read(n: int, i: int, j: int, group: int = group) -> Tensor:
            return patch(padded, layer, n, group, i * layer.stride[0], j * layer.stride[1])

        rows = [read(*place) for place in sampled]
        samples = [[row[block] for row in rows] for block in members(layer)]
        if layer.interleaved:
            samples = [[value for block in samples for value in block]] * len(samples)
        whitening = []
        for values in samples:
            mean = sum(values) / len(values)
            covariance = sum(torch.outer(v - mean, v - mean) for v in values) / len(values)
            root = inverse_root(covariance + layer.eps * torch.eye(len(mean), dtype=x.dtype), layer.steps)
            whitening.append((mean, root))
        for mean, root in whitening[:1] if layer.interleaved else whitening:
            means.append(mean)
            roots.append(root)
        for n, i, j in places:
            seen = read(n, i, j)
            whitened = torch.zeros_like(seen)
            for block, (mean, root) in zip(members(layer), whitening, strict=True):
                whitened[block] = root @ (seen[block] - mean)
            units = slice(group * each, (group + 1) * each)
            output[n, units, i, j] = weight[units].flatten(1) @ whitened
    if bias is not None:
        output = output + bias.view(-1, 1, 1)
    return output, torch.stack(means), torch.stack(roots)


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((2, 2, 5, 6), {"kernel_size": 3, "padding": 1}),
    "every patch": ((2, 2, 4, 5), {"kernel_size": 3, "sampling_stride": 1}),
    "stride and dilation": ((2, 2, 8, 9), {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": 2}),
    "without bias": ((2, 2, 5, 5), {"kernel_size": 2, "bias": False, "sampling_stride": 2}),
    "1x1": ((3, 3, 4, 5), {"kernel_size": 1}),
    "1x1, stride 2": ((3, 3, 6, 5), {"kernel_size": 1, "stride": 2, "sampling_stride": 2}),
    "same": ((2, 2, 5, 6), {"kernel_size": 3, "padding": "same"}),
    "valid": ((2, 2, 6, 6), {"kernel_size": 3, "padding": "valid", "sampling_stride": 2}),
    "reflected": ((2, 2, 5, 6), {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "sampling_stride": 2}),
    "groups": ((2, 4, 5, 6), {"kernel_size": 2, "groups": 2, "sampling_stride": 2}),
    "depthwise": ((2, 4, 5, 6), {"kernel_size": 2, "groups": 4, "sampling_stride": 2}),
    "blocks": ((2, 4, 5, 6), {"kernel_size": (2, 1), "block": 2, "sampling_stride": 2}),
    "blocks of one": ((2, 3, 5, 6), {"kernel_size": 2, "block": 1, "sampling_stride": 2}),
    "blocks in groups": ((2, 8, 4, 5), {"kernel_size": (1, 2), "block": 2, "groups": 2, "sampling_stride": 2}),
    "authors' blocks": ((2, 6, 5, 6), {"kernel_size": (2, 1), "block": 2, "interleaved": True, "sampling_stride": 2}),
    "authors' blocks, 1x1": ((3, 4, 4, 5), {"kernel_size": 1, "block": 2, "interleaved": True}),
    "authors' blocks in groups": ((2, 8, 4, 5), {"kernel_size": (1, 2), "block": 2, "groups": 2, "interleaved": True}),
}


def make(case: str, **options: Any) -> tuple[NetworkDeconvolution2d, Tensor]:
    shape, arguments = CASES[case]
    torch.manual_seed(1)
    options = {"eps": 1e-2, **arguments, **options}
    return NetworkDeconvolution2d(shape[1], 4, dtype=FLOAT64, **options), draw(*shape)


@pytest.mark.parametrize("case", CASES)
def test_a_convolution_of_whitened_patches(case: str) -> None:
    layer, x = make(case)
    x.requires_grad_()
    expected, mean, root = reference(layer, x, layer.weight, layer.bias)
    output = layer(x)
    close(output, expected)
    close(layer.running_mean, 0.1 * mean)
    close(layer.running_deconv, 0.9 * torch.eye(root.shape[-1], dtype=FLOAT64) + 0.1 * root)
    assert int(layer.num_batches_tracked) == 1
    upstream = torch.sin(torch.arange(output.numel(), dtype=FLOAT64)).view(output.shape)
    parameters = [x, *layer.parameters()]
    close(
        torch.autograd.grad(output, parameters, upstream),
        torch.autograd.grad(expected, parameters, upstream),
        1e-9,
    )


@pytest.mark.parametrize("case", ["3x3", "blocks in groups", "authors' blocks", "1x1"])
def test_gradients(case: str) -> None:
    layer, x = make(case)
    parameters = [parameter.detach().requires_grad_() for parameter in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *parameters), fast_mode=True)
    layer.eval()
    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def test_the_authors_numbers() -> None:
    golden = np.load(GOLDEN / "nd_conv3_s1.npz")
    hyper = json.loads(str(golden["hyper"]))
    layer = NetworkDeconvolution2d(
        hyper["in_channels"],
        hyper["out_channels"],
        hyper["kernel_size"],
        padding=hyper["padding"],
        eps=hyper["eps_used"],
        momentum=hyper["momentum_used"],
        steps=hyper["n_iter_used"],
        sampling_stride=hyper["sampling_stride_used"],
        interleaved=True,
        dtype=FLOAT64,
    )
    assert layer.block == hyper["block_used"]
    keys = ("weight", "bias", "running_mean", "running_deconv")
    layer.load_state_dict({key: torch.from_numpy(golden[f"state0_{key}"]) for key in keys})  # their own shapes

    def check(prefix: str, x: Tensor, y: Tensor) -> None:
        close(y, torch.from_numpy(golden[f"{prefix}_y"]))
        upstream = torch.from_numpy(golden["up"])[: len(y)]
        found = torch.autograd.grad(y, [x, layer.weight, layer.bias], upstream)
        expected = [torch.from_numpy(golden[f"{prefix}_{key}"]) for key in ("dx", "d_weight", "d_bias")]
        close(list(found), expected, 1e-10)

    for step, batch in enumerate(torch.from_numpy(golden["x_train"])):
        batch.requires_grad_()
        y = layer(batch)
        if step == 0:
            check("train0", batch, y)
        close(y, torch.from_numpy(golden["train_y"][step]))
        close(layer.running_mean[0], torch.from_numpy(golden["buf_running_mean"][step]))
        close(layer.running_deconv[0], torch.from_numpy(golden["buf_running_deconv"][step]))
    x = torch.from_numpy(golden["x_eval"]).requires_grad_()
    check("eval", x, layer.eval()(x))
    assert int(layer.num_batches_tracked) == len(golden["x_train"])


# How well it whitens.


def deviation(layer: NetworkDeconvolution2d, x: Tensor) -> float:
    """The largest distance of a whitened patch's variance, along any direction, from the 1 of a white one."""
    with torch.no_grad():
        mean, root = layer.whitening(x)
        rows = (layer.sampled_patches(x) - mean.unsqueeze(1)) @ root
        covariance = rows.mT @ rows / rows.shape[1]
    return float((torch.linalg.eigvalsh(covariance) - 1).abs().max())


def test_whitens_the_better_the_more_steps() -> None:
    """Each step multiplies small eigenvalues by up to 2.25; once near 1, the distance is squared."""
    x = F.avg_pool2d(draw(16, 3, 16, 16), 4, 1)  # smooth, as images are
    found = {
        steps: deviation(NetworkDeconvolution2d(3, 4, 3, padding=1, steps=steps, eps=1e-8, dtype=FLOAT64), x)
        for steps in (1, 3, 5, 8, 12)
    }
    assert all(later < earlier for earlier, later in itertools.pairwise(found.values())), found
    assert found[5] > 0.9  # the default five leave the smallest directions small
    assert found[12] < 1e-4  # what is left is ε beside the smallest eigenvalue


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_what_the_steps_leave_of_an_eigenvalue(steps: int) -> None:
    eigenvalues = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=FLOAT64)
    basis, _ = torch.linalg.qr(torch.randn(4, 4, dtype=FLOAT64))
    matrix = 7.0 * basis @ torch.diag(eigenvalues) @ basis.T
    root = newton_schulz_root(matrix, steps)
    variances = torch.diagonal(basis.T @ root @ matrix @ root @ basis)
    share = eigenvalues / eigenvalues.norm()
    for variance, a in zip(variances.tolist(), share.tolist(), strict=True):
        y, z = a, 1.0
        for _ in range(steps):
            y, z = y * (3 - z * y) / 2, z * (3 - z * y) / 2
        assert variance == pytest.approx(a * z * z, rel=1e-9)
        assert variance <= a * 2.25**steps * (1 + 1e-9)


def test_enough_steps_give_the_inverse_root() -> None:
    factor = torch.randn(2, 5, 40, dtype=FLOAT64)
    matrix = factor @ factor.mT / 40
    root = newton_schulz_root(matrix, 20)
    close(root @ matrix @ root, torch.eye(5).expand(2, 5, 5), 1e-9)
    close(newton_schulz_root(matrix.float(), 20), root, 1e-4)


def test_converged_whitening_forgets_the_inputs_scale_and_mixing() -> None:
    """Of channels mixed by an orthogonal matrix, the whitened patches are mixed by it and nothing else."""
    layer = NetworkDeconvolution2d(4, 4, 1, steps=25, eps=1e-12, sampling_stride=1, bias=False, dtype=FLOAT64)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=FLOAT64))
    x = draw(4, 4, 6, 6)
    mixed = 3.0 * torch.einsum("ij,njhw->nihw", rotation, x) + 2.0
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.copy_(torch.einsum("oihw,ji->ojhw", layer.weight, rotation))
    close(other(mixed), layer(x), 1e-8)


def test_authors_blocks_whiten_only_what_they_share() -> None:
    """Two channels of unlike scale, a block each: one D for both leaves their variances unlike."""
    x = draw(8, 2, 8, 8) * torch.tensor([1.0, 10.0], dtype=FLOAT64).view(2, 1, 1)
    spread = {}
    for interleaved in (False, True):
        layer = NetworkDeconvolution2d(
            2, 2, 1, block=1, steps=20, sampling_stride=1, interleaved=interleaved, bias=False, dtype=FLOAT64
        )
        with torch.no_grad():
            layer.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        spread[interleaved] = layer(x).var((0, 2, 3), correction=0)
    close(spread[False], torch.ones(2), 1e-3)
    close(spread[True][1] / spread[True][0], x[:, 1].var(correction=0) / x[:, 0].var(correction=0), 1e-9)


# Running statistics.


def test_evaluation_is_a_plain_convolution() -> None:
    for case in CASES:
        layer, x = make(case)
        layer(x)
        layer.eval()
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        conv = layer.to_plain()
        assert type(conv) is nn.Conv2d
        assert not conv.training
        close(layer(x), conv(x))
        close(dict(layer.named_buffers()), before)


def test_a_new_layer_evaluates_as_the_convolution_it_was_made_from() -> None:
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, dtype=FLOAT64)
    x = draw(2, 3, 7, 7)
    close(NetworkDeconvolution2d.from_layer(conv).eval()(x), conv(x))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, None])
def test_running_statistics(momentum: float | None) -> None:
    layer, _ = make("blocks", momentum=momentum)
    mean, root = layer.running_mean.clone(), layer.running_deconv.clone()
    for step in range(1, 4):
        x = draw(2, 4, 5, 6, seed=step)
        own_mean, own_root = layer.whitening(x)
        factor = 1 / step if momentum is None else momentum
        mean, root = (1 - factor) * mean + factor * own_mean, (1 - factor) * root + factor * own_root
        layer(x)
        close(layer.running_mean, mean)
        close(layer.running_deconv, root)
    assert not layer.running_deconv.requires_grad


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    layer, x = make("blocks")
    other, again = copy.deepcopy(layer), x.clone().requires_grad_()
    x.requires_grad_()
    y, expected = checkpoint(other, again, use_reentrant=use_reentrant), layer(x)
    close(y, expected)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    close(again.grad, x.grad)
    close(other.weight.grad, layer.weight.grad)
    close(dict(other.named_buffers()), dict(layer.named_buffers()))
    assert int(other.num_batches_tracked) == 1


def test_without_gradients_a_training_batch_counts() -> None:
    layer, x = make("3x3")
    with torch.no_grad():
        layer(x)
    assert int(layer.num_batches_tracked) == 1


def test_reset() -> None:
    layer, x = make("blocks")
    fresh = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    weight = layer.weight.detach().clone()
    layer(x)
    layer.reset_running_stats()
    close(dict(layer.named_buffers()), fresh)
    close(layer.weight, weight)
    layer(x)
    layer.reset_parameters()
    close(dict(layer.named_buffers()), fresh)
    assert not torch.equal(layer.weight, weight)


# Dtypes, shapes, memory.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_float32(dtype: torch.dtype) -> None:
    layer = NetworkDeconvolution2d(4, 4, 3, padding=1, block=2)
    x = draw(4, 4, 8, 8, dtype=torch.float32)
    for _ in range(3):
        layer(x)
    deconv = layer.running_deconv.clone()
    half = copy.deepcopy(layer).to(dtype)
    assert half.running_mean.dtype == half.running_deconv.dtype == torch.float32
    assert torch.equal(half.running_deconv, deconv)  # not rounded on the way
    assert half.weight.dtype == dtype
    output = half(x.to(dtype))
    assert output.dtype == dtype
    close(output.float(), layer(x), 0.1)
    close(half.running_deconv, layer.running_deconv, 0.02)
    assert half.double().running_deconv.dtype == FLOAT64
    made = NetworkDeconvolution2d(4, 4, 3, dtype=dtype)
    assert made.running_deconv.dtype == torch.float32
    assert made.eval()(x.to(dtype)).dtype == dtype


def test_autocast_computes_statistics_in_float32() -> None:
    layer = NetworkDeconvolution2d(4, 4, 3, padding=1)
    plain = copy.deepcopy(layer)
    x = draw(4, 4, 8, 8, dtype=torch.float32)
    plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(layer.running_deconv, plain.running_deconv)
    output.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_meta_and_moves() -> None:
    layer = NetworkDeconvolution2d(4, 4, 3, block=2, device="meta", dtype=torch.bfloat16)
    assert layer.running_deconv.is_meta
    assert layer.running_deconv.dtype == torch.float32
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    close(real.running_deconv, torch.eye(18).repeat(2, 1, 1))
    assert real.running_deconv.dtype == torch.float32


def test_channels_last() -> None:
    layer, x = make("3x3")
    other = copy.deepcopy(layer)
    y = other(x.contiguous(memory_format=torch.channels_last))
    close(y, layer(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_without_a_batch_axis() -> None:
    layer, x = make("3x3")
    other = copy.deepcopy(layer)
    close(other(x[0]), layer(x[:1])[0])
    close(other.running_mean, layer.running_mean)
    layer.eval()
    close(layer(x[0]), layer(x)[0])


def test_empty_batches() -> None:
    layer, x = make("blocks")
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    output = layer(x[:0])
    assert output.shape == (0, *layer(x).shape[1:])
    layer, _ = make("blocks")
    layer(x[:0]).sum().backward()
    close(layer.weight.grad, torch.zeros_like(layer.weight))
    close(dict(layer.named_buffers()), before)


def test_constant_input() -> None:
    """Nothing to whiten: D is ε^(−1/2) up to what the steps reach, and the output is the bias."""
    layer = NetworkDeconvolution2d(2, 3, 3)
    x = torch.full((2, 2, 8, 8), 5.0, requires_grad=True)
    output = layer(x)
    close(output, layer.bias.view(-1, 1, 1).expand_as(output), 1e-3)
    output.sum().backward()
    assert x.grad.isfinite().all()


# As a module.


def test_from_layer() -> None:
    for bias in (True, False):
        conv = nn.Conv2d(4, 6, (3, 2), (1, 2), (1, 0), (1, 2), 2, bias, "reflect", dtype=FLOAT64).eval()
        state = torch.get_rng_state()
        layer = NetworkDeconvolution2d.from_layer(conv, eps=1e-3, block=1, sampling_stride=2)
        assert torch.equal(torch.get_rng_state(), state)  # no random numbers are drawn
        assert layer.weight is conv.weight
        assert layer.bias is conv.bias
        assert not layer.training
        assert not layer.running_deconv.is_meta
        assert layer.running_deconv.dtype == FLOAT64
        assert (layer.eps, layer.block, layer.sampling_stride) == (1e-3, 1, 2)
        assert f"{conv.extra_repr()}, eps=0.001, momentum=0.1, steps=5, block=1, sampling_stride=2" in repr(layer)
        x = draw(2, 4, 6, 7)
        close(layer(x), conv(x))
        close(layer.train()(x), reference(layer, x, conv.weight, conv.bias)[0], 1e-9)

    class Other(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    for wrong in (nn.Conv1d(2, 2, 1), Other(2, 2, 1), layer, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"layer must be an nn.Conv2d, got {type(wrong).__name__}"):
            NetworkDeconvolution2d.from_layer(wrong)
    with pytest.raises(ValueError, match="layer must not be parametrized"):
        NetworkDeconvolution2d.from_layer(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 2)))


def test_copies_and_state() -> None:
    layer, x = make("authors' blocks")
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        close(other(x), copy.deepcopy(layer)(x))
        close(other.eval()(x), copy.deepcopy(other)(x))
    fresh, _ = make("authors' blocks")
    fresh.load_state_dict(layer.state_dict())
    close(fresh.eval()(x), copy.deepcopy(layer).eval()(x))
    assert set(layer.state_dict()) == {"weight", "bias", "running_mean", "running_deconv", "num_batches_tracked"}
    with pytest.raises(RuntimeError, match="size mismatch for running_deconv"):
        make("3x3")[0].load_state_dict({**make("3x3")[0].state_dict(), "running_deconv": torch.eye(3)})
    with pytest.raises(RuntimeError, match="Missing key.*running_mean"):
        make("3x3")[0].load_state_dict(nn.Conv2d(2, 4, 3).state_dict())


@pytest.mark.parametrize("case", ["3x3", "blocks in groups", "authors' blocks", "1x1", "reflected"])
def test_compiles(case: str) -> None:
    torch._dynamo.reset()
    layer, x = make(case)
    other = copy.deepcopy(layer)
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for step in range(3):
        batch = draw(*x.shape, seed=step).requires_grad_()
        again = batch.detach().clone().requires_grad_()
        y, expected = compiled(batch), other(again)
        close(y, expected)
        y.sin().sum().backward()
        expected.sin().sum().backward()
        close(batch.grad, again.grad)
    close(dict(layer.named_buffers()), dict(other.named_buffers()))
    assert counter.frame_count == 1
    compiled = torch.compile(layer.eval(), backend="eager", fullgraph=True)
    close(compiled(x), other.eval()(x))


def test_compiles_with_a_partitioned_backward() -> None:
    """What the compiler recomputes in the backward is not what the forward has updated since."""
    torch._dynamo.reset()
    layer, x = make("blocks")
    other, again = copy.deepcopy(layer), x.clone().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    y, expected = compiled(x.requires_grad_()), other(again)
    close(y, expected)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    close(x.grad, again.grad, 1e-9)
    close(layer.running_deconv, other.running_deconv)


def test_exports() -> None:
    layer = NetworkDeconvolution2d(4, 6, 3, padding=1, groups=2)
    x = draw(3, 4, 6, 6, dtype=torch.float32)
    layer(x)
    layer.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    close(program.module()(x[:2]), layer(x[:2]), 1e-6)


def test_symbolic_traces_keep_it_whole() -> None:
    net = nn.Sequential(NetworkDeconvolution2d(3, 4, 3), nn.ReLU())
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    x = draw(2, 3, 6, 6, dtype=torch.float32)
    net.eval()
    close(traced.eval()(x), net(x))


def test_trains_with_a_standardized_weight() -> None:
    layer, x = make("groups")
    weight_standardize(layer)
    close(layer(x), reference(layer, x, layer.weight, layer.bias)[0], 1e-9)


def test_the_library_knows_it_as_a_convolution() -> None:
    layer, _ = make("groups")
    assert layout_of(layer).matrix(layer, layer.weight).shape == (2, 2, 2, 2, 2)


@pytest.mark.parametrize(
    ("channels", "groups", "block", "used"),
    [(6, 1, 64, 6), (128, 1, 64, 64), (96, 1, 64, 32), (8, 1, 3, 1), (8, 4, 64, 2), (24, 2, 8, 4), (4, 4, 2, 1)],
)
def test_block_divides_the_channels_of_a_group(channels: int, groups: int, block: int, used: int) -> None:
    layer = NetworkDeconvolution2d(channels, channels, 1, groups=groups, block=block)
    assert layer.block == used
    assert layer.running_deconv.shape == (channels // used, used, used)
    authors = NetworkDeconvolution2d(channels, channels, 1, groups=groups, block=block, interleaved=True)
    assert authors.running_deconv.shape == (groups, used, used)
    assert f"block={used}" in repr(layer)
    assert repr(authors).endswith(", interleaved=True)")


@pytest.mark.parametrize("argument", ["in_channels", "out_channels", "steps", "block", "sampling_stride"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_counts_are_checked(argument: str, value: object) -> None:
    arguments = {"in_channels": 2, "out_channels": 2, "kernel_size": 1, argument: value}
    with pytest.raises(ValueError, match=f"{argument} must be a positive integer, got {value}"):
        NetworkDeconvolution2d(**arguments)


def test_mistakes_are_named() -> None:
    for eps in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"eps must be positive, got {eps}"):
            NetworkDeconvolution2d(2, 2, 1, eps=eps)
    for momentum in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"momentum must lie in \[0, 1\] or be None, got {momentum}"):
            NetworkDeconvolution2d(2, 2, 1, momentum=momentum)
    layer = NetworkDeconvolution2d(2, 2, 3)
    for shape in ((2, 3, 8, 8), (2, 8), (2, 2, 2, 8, 8)):
        expected = rf"expected input of size \[N, 2, H, W\] or \[2, H, W\], got \[{', '.join(map(str, shape))}\]"
        with pytest.raises(ValueError, match=expected):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"expected more than 1 patch when training, got input size \[1, 2, 5, 5\]"):
        layer(torch.zeros(1, 2, 5, 5))
    assert int(layer.num_batches_tracked) == 0
    assert layer.eval()(torch.zeros(1, 2, 5, 5)).shape == (1, 2, 3, 3)
