"""Second moments over data: equal to explicit sums for random layers, kinds and splits; files, merging, errors."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wellcond
from wellcond import SecondMoments, WellcondWarning, second_moments
from wellcond.numerics.tap_blocks import cosine_basis
from wellcond.runtime.models import first_samples

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def conv_rows(x: Tensor, conv: nn.Module) -> Tensor:
    """Rows of a convolution over 2 axes by torch's own im2col, [groups, n, d]; of one over 1 axis likewise."""
    if isinstance(conv, nn.Conv1d):
        x, size, rest = x.unsqueeze(2), (1, *conv.kernel_size), [(1, *v) for v in (conv.dilation, conv.stride)]
        padding = (0, *conv.padding)
    else:
        size, rest, padding = conv.kernel_size, [conv.dilation, conv.stride], conv.padding
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), mode=mode)
    parts = [F.unfold(part, size, rest[0], 0, rest[1]) for part in x.chunk(conv.groups, dim=1)]
    return torch.stack([part.transpose(1, 2).flatten(0, 1) for part in parts])


def transposed_rows(x: Tensor, conv: nn.ConvTranspose2d) -> Tensor:
    """Rows of a transposed convolution from its Jacobian: what each weight element adds to each output position."""
    groups, (first, second) = conv.groups, conv.kernel_size
    inputs = x.shape[1] // groups
    parts = []
    for part in x.chunk(groups, dim=1):
        found = []
        for channel in range(inputs):
            for i in range(first):
                for j in range(second):
                    probe = torch.zeros(1, 1, first, second, dtype=x.dtype)
                    probe[0, 0, i, j] = 1
                    own = part[:, channel : channel + 1]
                    found.append(F.conv_transpose2d(own, probe, stride=conv.stride, padding=conv.padding).flatten())
        parts.append(torch.stack(found, 1))
    return torch.stack(parts)


def random_case(rng: random.Random) -> tuple[nn.Module, str, Tensor, Any]:
    """Return a layer, its weight's name, an input, and the function that lays out its rows."""
    kind = rng.choice(
        ("linear", "conv1", "conv2", "conv2", "conv2", "transposed", "bilinear", "embedding", "lstm", "gru cell")
    )
    n = rng.randint(1, 9)
    if kind == "linear":
        width = rng.randint(1, 9)
        shape = (n, rng.randint(1, 4), width) if rng.random() < 0.5 else (n, width)
        return (
            nn.Linear(width, 3, bias=rng.random() < 0.5),
            "weight",
            torch.randn(shape),
            lambda x, m: x.reshape(1, -1, width),
        )
    if kind in ("conv1", "conv2"):
        axes = int(kind[-1])
        groups = rng.choice((1, 1, 2, 3))
        options: dict[str, Any] = {"groups": groups, "stride": rng.randint(1, 3), "bias": rng.random() < 0.5}
        size = tuple(rng.randint(1, 3) for _ in range(axes))
        options["dilation"] = rng.randint(1, 2)
        options["padding"] = rng.randint(0, 2)
        options["padding_mode"] = rng.choice(("zeros", "zeros", "circular", "replicate"))
        channels = groups * rng.randint(1, 3)
        layer = (nn.Conv1d if axes == 1 else nn.Conv2d)(channels, 2 * groups, size, **options)
        space = [rng.randint(6, 8) for _ in range(axes)]
        return layer, "weight", torch.randn(n, channels, *space), conv_rows
    if kind == "transposed":
        groups, stride = rng.choice((1, 2)), rng.randint(1, 2)
        channels = groups * rng.randint(1, 2)
        layer = nn.ConvTranspose2d(channels, 2 * groups, rng.randint(1, 3), stride, rng.randint(0, 0), groups=groups)
        return layer, "weight", torch.randn(n, channels, 4, 5), transposed_rows
    if kind == "bilinear":
        layer = Pair(rng.randint(1, 4), rng.randint(1, 4))
        width = layer.bilinear.in1_features
        return (
            layer,
            "bilinear.weight",
            torch.randn(n, 8),
            lambda x, m: torch.stack(
                [torch.outer(row[:width], row[width : width + m.bilinear.in2_features]).flatten() for row in x]
            ).unsqueeze(0),
        )
    if kind == "embedding":
        layer = nn.Embedding(7, 3, padding_idx=rng.choice((None, 2)))

        def one_hot(x: Tensor, m: Any) -> Tensor:
            rows = F.one_hot(x, 7).double().reshape(1, -1, 7)
            if m.padding_idx is not None:
                rows[..., m.padding_idx] = 0
            return rows

        return layer, "weight", torch.randint(0, 7, (n, 5)), one_hot
    if kind == "lstm":
        layer = nn.LSTM(3, 4, batch_first=True)

        def hidden(x: Tensor, m: Any) -> Tensor:
            outputs = m(x)[0]
            return torch.cat([torch.zeros_like(outputs[:, :1]), outputs[:, :-1]], 1).reshape(1, -1, 4)

        return layer, "weight_hh_l0", torch.randn(n, 5, 3), hidden
    return nn.GRUCell(3, 4), "weight_ih", torch.randn(n, 3), lambda x, m: x.unsqueeze(0)


class Pair(nn.Module):
    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(first, second, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.bilinear.in1_features
        return self.bilinear(x[:, :first], x[:, first : first + self.bilinear.in2_features])


def expected(rows: Tensor, kind: str, kernel: tuple[int, ...], centred: bool) -> Tensor:
    """The matrix that a form stands for, by explicit sums over rows, [groups, d, d]."""
    mean = rows.mean(1, keepdim=True) if centred else torch.zeros_like(rows[:, :1])
    full = torch.stack([sum(torch.outer(x, x) for x in part) / len(part) for part in rows - mean])
    taps = int(torch.Size(kernel).numel())
    groups, channels = len(rows), rows.shape[-1] // taps
    if taps == 1 or channels == 1 or kind not in ("kronecker", "blocks"):
        return full
    q = full.view(groups, channels, taps, channels, taps)
    if kind == "kronecker":
        by_channel, by_tap = torch.einsum("gckdk->gcd", q) / taps, torch.einsum("gckcl->gkl", q) / channels
        energy = torch.einsum("gkk->g", by_tap) / taps
        product = torch.einsum("gcd,gkl->gckdl", by_channel, by_tap) / energy.view(-1, 1, 1, 1, 1)
        return product.reshape(full.shape)
    basis = cosine_basis(kernel)
    blocks = torch.einsum("fk,fl,gckdl->gfcd", basis, basis, q)
    return torch.einsum("gfcd,fk,fl->gckdl", blocks, basis, basis).reshape(full.shape)


def test_equal_explicit_sums_for_300_random_configurations() -> None:
    for number in range(300):
        rng = random.Random(number)
        torch.manual_seed(number)
        model, name, x, rows_of = random_case(rng)
        model = model.double().eval()
        x = x.double() if x.is_floating_point() else x
        kind = rng.choice(("auto", "dense", "kronecker", "blocks", "sketch"))
        centred = rng.random() < 0.4
        loader = list(x.split(rng.randint(1, len(x))))
        if rng.random() < 0.3:
            loader = [(part, 0) if isinstance(model, Pair) else {"input": part} for part in loader]
        moments = second_moments(model, loader, kind=kind, centred=centred, rank=64)
        with torch.no_grad():
            rows = rows_of(x, model)
        kernel = tuple(getattr(model, "kernel_size", ()))
        found, wanted = moments[name].matrices(centred=centred), expected(rows, kind, kernel, centred)
        torch.testing.assert_close(
            found, wanted, **CLOSE, msg=lambda m, n=number, k=kind, of=model: f"{n} {k} {of}: {m}"
        )
        assert (moments[name].groups, moments[name].width) == (len(rows), rows.shape[-1])
        torch.testing.assert_close(moments[name].mean, rows.mean(1), **CLOSE)
        torch.testing.assert_close(moments[name].trace(centred=centred), torch.einsum("gdd->g", wanted), **CLOSE)
        values, vectors = moments[name].eigenpairs(centred=centred)
        again = (vectors * values.unsqueeze(-2)) @ vectors.mT
        torch.testing.assert_close(again, wanted, rtol=1e-8, atol=1e-8)


def test_sketches_of_wide_layers_find_the_leading_directions() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 5).double() @ torch.randn(5, 40).double()
    moments = second_moments(nn.Linear(40, 2).double(), x.split(32), max_dim=30, rank=8)
    assert moments[""].kind == "sketch"
    torch.testing.assert_close(moments.matrix(""), x.T @ x / 200, **CLOSE)
    assert moments.eigh("weight").eigenvalues.shape == (8,)
    assert second_moments(nn.Linear(40, 2).double(), [x], max_dim=40, rank=8)[""].kind == "dense"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)).eval()


def batches(count: int, size: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 4, 5, 5, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("kind", ["dense", "kronecker", "blocks", "sketch"])
def test_a_file_gives_all_of_it_back(kind: Any, tmp_path: Any) -> None:
    moments = second_moments(net(), batches(3), kind=kind, rank=5, centred=True)
    moments.save(tmp_path / "moments.safetensors")
    loaded = SecondMoments.load(tmp_path / "moments.safetensors")
    assert loaded.to_dict() == moments.to_dict()
    json.dumps(loaded.to_dict())
    assert repr(loaded) == repr(moments)
    assert loaded.weights == moments.weights
    for name in moments:
        assert torch.equal(loaded.matrix(name), moments.matrix(name))
        assert torch.equal(loaded.mean(name), moments.mean(name))
    tensors = pytest.importorskip("safetensors.torch").load_file(tmp_path / "moments.safetensors")
    assert all(tensor.dtype == torch.float64 for tensor in tensors.values())


def test_other_files_are_refused(tmp_path: Any) -> None:
    pytest.importorskip("safetensors.torch").save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors holds no second moments"):
        SecondMoments.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no")
    with pytest.raises(ValueError, match="no whole file of second moments"):
        SecondMoments.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        SecondMoments.load(tmp_path / "missing")


@pytest.mark.parametrize("kind", ["dense", "kronecker", "blocks", "sketch"])
def test_moments_of_parts_add_up_to_those_of_the_whole(kind: Any) -> None:
    model, data = net(), batches(5)
    together = second_moments(model, data, kind=kind, rank=64)
    added = second_moments(model, data[:2], kind=kind, rank=64) + second_moments(model, data[2:], kind=kind, rank=64)
    assert added.samples == together.samples == 20
    for name in together:
        torch.testing.assert_close(added.matrix(name), together.matrix(name), **CLOSE)
        torch.testing.assert_close(added.matrix(name, centred=True), together.matrix(name, centred=True), **CLOSE)
        assert added[name].rows == together[name].rows
    with pytest.raises(ValueError, match="'0': second moments of one form can be added up"):
        second_moments(model, data, kind="kronecker") + second_moments(model, data, kind="dense")


def test_max_samples_cuts_the_last_batch() -> None:
    data = batches(4)
    loader = [{"input": part, "label": torch.zeros(4), "scale": 2.0} for part in data]
    found = second_moments(net(), loader, max_samples=10, call=lambda m, b: m(b["input"]))
    wanted = second_moments(net(), [torch.cat(data)[:10]])
    torch.testing.assert_close(found.matrix("3"), wanted.matrix("3"), **CLOSE)
    assert found["3"].rows == (10.0,)
    assert second_moments(net(), data, max_samples=10).samples == 10
    assert second_moments(net(), data, max_batches=2).samples == 8
    assert first_samples([torch.zeros(3), torch.zeros(2)], 2, net())[1].shape == (2,)


def test_progress_is_told(capsys: Any) -> None:
    second_moments(net(), batches(3), progress=True)
    assert "batch 3/3, 12 samples\n" in capsys.readouterr().err
    second_moments(net(), batches(3))
    assert capsys.readouterr().err == ""


def test_nothing_is_left_of_the_pass() -> None:
    model = net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    second_moments(model, (torch.randn(4, 4, 5, 5) for _ in range(3)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_features_are_those_of_the_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    x = torch.randn(50, 3) * 7 + 2
    assert torch.allclose(second_moments(model.train(), [x]).matrix("1").diagonal(), torch.ones(3).double(), atol=1e-3)
    assert second_moments(model.eval(), [x]).matrix("1").diagonal().min() > 40


def test_names_of_layers_weights_and_wrappers() -> None:
    model = net()
    moments = second_moments(nn.DataParallel(model), batches(1))
    assert list(moments) == ["0", "3"]
    assert len(moments) == 2
    for name in ("0", "0.weight", "module.0", "module.0.weight", "module._orig_mod.0.weight"):
        assert name in moments
        assert moments.matrix(name).shape == (2, 18, 18)
    assert moments.eigh("3").eigenvectors.shape == (36, 36)
    assert moments.mean("0").shape == (2, 18)
    with pytest.raises(KeyError, match=r"no layer is called '3.weigh': did you mean '3.weight'\?"):
        moments["3.weigh"]
    attention = second_moments(nn.MultiheadAttention(4, 2), [torch.randn(3, 2, 4)], call=lambda m, x: m(x, x, x))
    assert attention.matrix("in_proj_weight").shape == (3, 4, 4)
    assert attention.matrix("out_proj").shape == (4, 4)


def test_condition_of_features_of_known_scales() -> None:
    x = torch.diag(torch.tensor([1.0, 2.0, 4.0])).double()
    moments = second_moments(nn.Linear(3, 1).double(), [x])
    assert moments.condition == {"": pytest.approx(16.0)}
    assert second_moments(nn.Linear(3, 1).double(), [x[1:]]).condition == {"": float("inf")}


def test_layers_without_rows_are_named_with_the_reason() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.fc, self.unused = nn.EmbeddingBag(5, 3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.bag(x))

    with pytest.warns(WellcondWarning, match="second_moments: nothing was seen of 'unused'"):
        moments = second_moments(Model(), [torch.randint(0, 5, (4, 3))])
    assert list(moments) == ["fc"]
    assert "a bag mixes its tokens" in moments.skipped["bag"]
    assert moments.skipped["unused"] == "no batch reached it"
    with pytest.raises(KeyError, match="a bag mixes its tokens"):
        moments.matrix("bag")


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="max_samples must be a positive integer, got 0"):
        second_moments(net(), batches(1), max_samples=0)
    with pytest.raises((TypeError, ValueError), match="kind must be one of"):
        second_moments(net(), batches(1), kind="whole")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the loader gave no batch"):
        second_moments(net(), [])
    with pytest.raises(ValueError, match="Sequential has no layer whose input rows are known"):
        second_moments(nn.Sequential(nn.ReLU()), batches(1))
    with pytest.raises(ValueError, match="no layer that `where` selects"):
        second_moments(net(), batches(1), where=lambda name, module: False)
    with pytest.raises(ValueError, match="features that are not finite reached '0'"):
        second_moments(net(), [torch.full((1, 4, 5, 5), float("nan"))])
    with pytest.raises(ValueError, match="max_samples: the batches do not say how many samples"):
        second_moments(net(), [3.0], max_samples=5, call=lambda m, b: m(batches(1)[0]))


def test_large_inputs_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = net(), batches(2)
    wanted = second_moments(model, data)
    module = sys.modules["wellcond.diagnostics.input_moments"]
    monkeypatch.setattr(module, "_PIECE", 50)
    found = second_moments(model, data)
    assert found.memory_bound < wanted.memory_bound
    for name in wanted:
        torch.testing.assert_close(found.matrix(name), wanted.matrix(name), **CLOSE)


def test_rows_behind_dropout_are_those_of_the_pass() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(6, 24, num_layers=2, dropout=0.5).double()
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output[0].detach()))
    moments = second_moments(model, [torch.randn(3, 2, 6).double()])
    hidden = torch.cat([torch.zeros(1, 2, 24).double(), seen[0][:-1]]).flatten(0, 1)
    torch.testing.assert_close(moments.matrix("weight_hh_l1"), hidden.T @ hidden / 6, **CLOSE)


# those of an optimizer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "kronecker", "blocks", "low_rank"])
@pytest.mark.parametrize("bias", [True, False])
def test_running_moments_of_one_batch_equal_those_over_data(kind: Any, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3, bias=bias)).double()
    x = torch.randn(2, 4, 5, 5).double()
    form = "sketch" if kind == "low_rank" else kind
    wanted = second_moments(model, [x], kind=form, rank=36)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"rank": 36} if kind == "low_rank" else {}
    handle = wellcond.attach(
        optimizer, model, wellcond.FeatureWhitening(stats_every=1, solve_every=2, second_moment=kind, **options)
    )
    assert len(handle.second_moments()) == 0
    assert handle.second_moments().skipped == {"0": "nothing was seen yet", "3": "nothing was seen yet"}
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()
    found = handle.second_moments()
    for name in wanted:
        torch.testing.assert_close(found.matrix(name), wanted.matrix(name), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(found[name].trace(), wanted[name].trace(), rtol=1e-7, atol=1e-7)
    assert found.matrix("0.weight").shape == (36, 36)
    with pytest.raises(ValueError, match="moving averages cannot be added up"):
        found + found


def test_running_moments_of_a_tied_table() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(x)))

    model, x = Model().double(), torch.tensor([[0, 1, 1, 4]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = wellcond.attach(optimizer, model, wellcond.FeatureWhitening(stats_every=1))
    wanted = second_moments(model, [x])
    model(x).sum().backward()
    optimizer.step()
    found = handle.second_moments()
    assert set(found) == set(wanted) == {"table", "head"}
    for name in wanted:
        torch.testing.assert_close(found.matrix(name), wanted.matrix(name), **CLOSE)


def test_no_transform_keeps_moments() -> None:
    model = net()
    handle = wellcond.attach(torch.optim.SGD(model.parameters()), model, wellcond.GradientCentralization())
    with pytest.raises(ValueError, match="no second moments are kept by GradientCentralization"):
        handle.second_moments()
