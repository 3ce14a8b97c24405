"""Every kind of layer: its gradient after a step against the formula over rows that are written out here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import wellcond
from wellcond import FeatureDescent, FeatureWhitening
from wellcond.layouts import Layout, register_layout, registry

BOTH = pytest.mark.parametrize("transform_type", [FeatureWhitening, FeatureDescent])
NAMES = {FeatureWhitening: "whitening", FeatureDescent: "descent"}
DAMPING = {FeatureWhitening: 1e-2, FeatureDescent: 0.1}

# the formula --------------------------------------------------------------------------------------------------------


def inverse_power(moment: Tensor, transform_type: type) -> Tensor:
    """(M + εI)⁻¹, or (M + ελ_max I)^(−1/2)."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0)
    if transform_type is FeatureDescent:
        return vectors @ torch.diag(1 / (values + DAMPING[transform_type])) @ vectors.mT
    return vectors @ torch.diag((values + DAMPING[transform_type] * values[-1]).rsqrt()) @ vectors.mT


def expected(transform_type: type, rows: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """G̃ = G T ‖G‖/‖G T‖: a matrix of G and its own rows [n, d] per group, the norm over all groups together."""
    changed = torch.stack(
        [g @ inverse_power(x.mT @ x / len(x), transform_type) for g, x in zip(gradient, rows, strict=True)]
    )
    return changed * gradient.norm() / changed.norm()


def with_one(rows: Tensor) -> Tensor:
    """Append the constant 1, for the bias."""
    return torch.cat([rows, torch.ones(*rows.shape[:-1], 1, dtype=rows.dtype)], dim=-1)


def attached(
    model: nn.Module, transform_type: type, **options: Any
) -> tuple[torch.optim.Optimizer, wellcond.Attachment]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {"damping": DAMPING[transform_type], "stats_decay": 0.9, "stats_every": 1, "solve_every": 1} | options
    return optimizer, wellcond.attach(optimizer, model, transform_type(**settings))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, output: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return all gradients before and after a step."""
    optimizer.zero_grad()
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    (output.sin() * weights).sum().backward()
    before = gradients(model)
    optimizer.step()
    return before, gradients(model)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def changed_much(before: Tensor, after: Tensor) -> bool:
    return float((before - after).norm()) > 0.02 * float(before.norm())


# transposed convolutions --------------------------------------------------------------------------------------------

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def transposed_rows(layer: Any, x: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Of each group: for every sample and output position what each (channel, tap) adds to it, found tap by tap."""
    x = x if x.dim() == 2 + len(layer.kernel_size) else x.unsqueeze(0)
    per_group = x.shape[1] // layer.groups
    taps = list(itertools.product(*map(range, layer.kernel_size)))
    groups: list[list[Tensor]] = [[] for _ in range(layer.groups)]
    for sample, group in itertools.product(x, range(layer.groups)):
        part = sample[group * per_group : (group + 1) * per_group]
        for position in itertools.product(*map(range, shape)):
            row = torch.zeros(per_group, len(taps), dtype=x.dtype)
            for index, tap in enumerate(taps):
                starts = [
                    p + pad - d * k for p, pad, d, k in zip(position, layer.padding, layer.dilation, tap, strict=True)
                ]
                if any(start % s for start, s in zip(starts, layer.stride, strict=True)):
                    continue
                places = [start // s for start, s in zip(starts, layer.stride, strict=True)]
                if all(0 <= place < size for place, size in zip(places, part.shape[1:], strict=True)):
                    row[:, index] = part[(slice(None), *places)]
            groups[group].append(row.flatten())
    return [torch.stack(rows) for rows in groups]


TRANSPOSED_CASES: list[tuple[int, dict[str, Any], list[int], dict[str, Any]]] = [
    (1, {"kernel_size": 3}, [2, 4, 5], {}),
    (1, {"kernel_size": 4, "stride": 3, "padding": 2, "output_padding": 1, "dilation": 2}, [3, 4, 4], {}),
    (1, {"kernel_size": 2, "stride": 3, "groups": 2, "bias": False}, [2, 4, 4], {}),
    (1, {"kernel_size": 3, "stride": 2, "padding": 1}, [2, 4, 5], {"output_size": [10]}),
    (1, {"kernel_size": 3, "padding": 3}, [2, 4, 8], {}),
    (1, {"kernel_size": 3, "stride": 2}, [4, 5], {}),
    (
        2,
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2), "groups": 2},
        [2, 4, 3, 4],
        {},
    ),
    (2, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": (1, 0), "groups": 4}, [2, 4, 3, 3], {}),
    (2, {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}, [2, 4, 3, 3], {"output_size": (6, 5)}),
    (2, {"kernel_size": 1, "stride": 2}, [2, 4, 3, 3], {}),
    (3, {"kernel_size": 2, "stride": (2, 1, 2), "padding": (1, 0, 0), "groups": 2}, [2, 4, 2, 3, 2], {}),
    (
        3,
        {"kernel_size": (1, 2, 2), "dilation": (1, 1, 2), "stride": (2, 2, 1), "output_padding": (0, 1, 0)},
        [1, 4, 2, 2, 3],
        {},
    ),
]


@BOTH
@pytest.mark.parametrize(("axes", "options", "shape", "call"), TRANSPOSED_CASES)
def test_transposed_convolution(
    transform_type: type, axes: int, options: dict[str, Any], shape: list[int], call: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    layer = TRANSPOSED[axes](4, 8, dtype=torch.float64, **options)
    optimizer, _ = attached(layer, transform_type)
    x = torch.randn(*shape, dtype=torch.float64) + 0.5
    output = layer(x, **call)
    before, after = train_step(layer, optimizer, output)
    rows = transposed_rows(layer, x, output.shape[-axes:])
    groups = layer.groups

    def pack(grads: dict[str, Tensor]) -> Tensor:
        matrix = grads["weight"].reshape(groups, 4 // groups, 8 // groups, -1).transpose(1, 2).flatten(2)
        return torch.cat([matrix, grads["bias"].view(groups, -1, 1)], 2) if "bias" in grads else matrix

    rows = [with_one(part) for part in rows] if layer.bias is not None else rows
    assert changed_much(before["weight"], after["weight"])
    close(pack(after), expected(transform_type, rows, pack(before)))


def test_transposed_convolutions_output_size_may_be_positional() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2, dtype=torch.float64)
    optimizer, _ = attached(layer, FeatureWhitening)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    output = layer(x, [8, 7])
    before, after = train_step(layer, optimizer, output)
    rows = [with_one(part) for part in transposed_rows(layer, x, (8, 7))]

    def pack(grads: dict[str, Tensor]) -> Tensor:
        return torch.cat([grads["weight"].transpose(0, 1).reshape(1, 3, -1), grads["bias"].view(1, 3, 1)], 2)

    close(pack(after), expected(FeatureWhitening, rows, pack(before)))


# embeddings ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("padding_idx", [None, 0, 3])
def test_embedding(transform_type: type, padding_idx: int | None) -> None:
    """M is the diagonal of the tokens' frequencies; padding is an input of zero, which still counts as a row."""
    torch.manual_seed(0)
    layer = nn.Embedding(6, 4, padding_idx=padding_idx, dtype=torch.float64)
    optimizer, handle = attached(layer, transform_type)
    # Padding, where there is one, would be the most frequent token: it must not set λ_max.
    most = 1 if padding_idx is None else padding_idx
    tokens = torch.tensor([[0, 1, most, most, 3], [most, 3, 5, most, 1]])
    before, after = train_step(layer, optimizer, layer(tokens))
    rows = torch.zeros(10, 6, dtype=torch.float64)
    for place, token in enumerate(tokens.flatten().tolist()):
        if token != padding_idx:
            rows[place, token] = 1.0
    frequencies = optimizer.state[layer.weight][f"wellcond_{NAMES[transform_type]}_second_moment"]
    close(frequencies[0], 0.1 * rows.mean(0))
    assert changed_much(before["weight"], after["weight"])
    close(after["weight"].mT[None], expected(transform_type, [rows], before["weight"].mT[None]))
    for unseen in (2, 4):
        assert not bool(after["weight"][unseen].any())
    assert "diagonal of 6" in handle.report()


@BOTH
def test_rare_tokens_learn_faster_under_either_form(transform_type: type) -> None:
    """By the formula: a token's gain is (f + damping)^(−p), whatever form is asked for."""
    for form in ("auto", "dense", "low_rank", "kronecker"):
        torch.manual_seed(0)
        layer = nn.Embedding(3, 2, dtype=torch.float64)
        optimizer, _ = attached(layer, transform_type, second_moment=form, restore_norm=False)
        before, after = train_step(layer, optimizer, layer(torch.tensor([0, 0, 0, 1])))
        gain = (after["weight"] / before["weight"])[:2, 0]
        frequencies = torch.tensor([0.75, 0.25], dtype=torch.float64)
        power = (frequencies + 0.1) ** -1 if transform_type is FeatureDescent else (frequencies + 0.0075) ** -0.5
        close(gain, power)


@pytest.mark.filterwarnings("ignore:FeatureWhitening covers none")
def test_sparse_embeddings_are_refused_in_the_report_and_keep_their_gradient() -> None:
    layer = nn.Embedding(5, 3, sparse=True)
    optimizer, handle = attached(layer, FeatureWhitening)
    layer(torch.tensor([1, 2, 2])).sum().backward()
    assert layer.weight.grad.is_sparse
    before = layer.weight.grad.to_dense().clone()
    optimizer.step()
    assert torch.equal(layer.weight.grad.to_dense(), before)
    assert "plain gradient: sparse gradients (sparse=True)" in handle.report()


@BOTH
def test_a_sparse_gradient_that_comes_all_the_same_is_a_clear_error(transform_type: type) -> None:
    layer = nn.Embedding(5, 3)
    optimizer, _ = attached(layer, transform_type)
    layer.sparse = True
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=f"'weight' has a sparse gradient, which {transform_type.__name__} cannot"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:FeatureDescent covers none")
def test_embedding_bags_keep_their_plain_gradient() -> None:
    bag = nn.EmbeddingBag(5, 3, dtype=torch.float64)
    optimizer, handle = attached(bag, FeatureDescent)
    before, after = train_step(bag, optimizer, bag(torch.tensor([[1, 2], [2, 4]])))
    assert torch.equal(before["weight"], after["weight"])
    assert "plain gradient: a bag mixes its tokens" in handle.report()


# attention ----------------------------------------------------------------------------------------------------------


def context(attention: nn.MultiheadAttention, output: Tensor) -> Tensor:
    """Recover the output projection's input from its output: its matrix is square."""
    bias = 0.0 if attention.out_proj.bias is None else attention.out_proj.bias
    return torch.linalg.solve(attention.out_proj.weight, (output - bias).reshape(-1, output.shape[-1]).mT).mT.detach()


def check_attention(
    transform_type: type, attention: nn.MultiheadAttention, inputs: tuple[Tensor, Tensor, Tensor], **call: Any
) -> None:
    optimizer, handle = attached(attention, transform_type)
    output, _ = attention(*inputs, **call)
    ctx = context(attention, output)
    before, after = train_step(attention, optimizer, output)
    flat = [value.detach().reshape(-1, value.shape[-1]) for value in inputs]
    width = attention.embed_dim
    has_bias = attention.in_proj_bias is not None
    rows = [with_one(part) for part in [*flat, ctx]] if has_bias else [*flat, ctx]

    def third(grads: dict[str, Tensor], weight: Tensor, index: int) -> Tensor:
        bias = grads["in_proj_bias"].view(3, width)[index].unsqueeze(1) if has_bias else weight[:, :0]
        return torch.cat([weight, bias], 1)

    def packed(grads: dict[str, Tensor]) -> Tensor:
        return torch.stack([third(grads, w, i) for i, w in enumerate(grads["in_proj_weight"].chunk(3))])

    if attention.in_proj_weight is not None:
        assert changed_much(packed(before), packed(after))
        close(packed(after), expected(transform_type, rows[:3], packed(before)))
    else:
        for index, name in enumerate(("q_proj_weight", "k_proj_weight", "v_proj_weight")):
            old, new = (third(grads, grads[name], index)[None] for grads in (before, after))
            assert changed_much(old, new)
            close(new, expected(transform_type, [rows[index]], old))

    def out(grads: dict[str, Tensor]) -> Tensor:
        parts = [grads["out_proj.weight"]] + ([grads["out_proj.bias"].unsqueeze(1)] if has_bias else [])
        return torch.cat(parts, 1)[None]

    assert changed_much(out(before), out(after))
    close(out(after), expected(transform_type, [rows[3]], out(before)), 1e-7)
    assert handle.stats()[NAMES[transform_type]]["weights"] == (2 if attention.in_proj_weight is not None else 4)


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention(transform_type: type, bias: bool, batch_first: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, bias=bias, batch_first=batch_first, dtype=torch.float64)
    if bias:
        nn.init.normal_(attention.in_proj_bias)
        nn.init.normal_(attention.out_proj.bias)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    check_attention(transform_type, attention, (x, x, x), need_weights=need_weights)


@BOTH
@pytest.mark.parametrize("kind", ["causal", "boolean", "float", "padding", "both", "per head"])
def test_masked_attention(transform_type: type, kind: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    call: dict[str, Any] = {
        "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5).double(), "is_causal": True},
        "boolean": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(5, 5, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "per head": {"attn_mask": torch.randn(6, 5, 5, dtype=torch.float64), "average_attn_weights": False},
    }[kind]
    check_attention(
        transform_type, attention, (x, x, x), **call, **({"need_weights": False} if kind == "causal" else {})
    )


@BOTH
@pytest.mark.parametrize("batched", [True, False])
def test_cross_attention_with_different_lengths(transform_type: type, batched: bool) -> None:
    """Each projection's moment is an average over its own number of rows."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 3, dtype=torch.float64)
    nn.init.normal_(attention.in_proj_bias)
    batch = (2,) if batched else ()
    query = torch.randn(3, *batch, 6, dtype=torch.float64)
    memory = torch.randn(7, *batch, 6, dtype=torch.float64) * 2 + 1
    check_attention(transform_type, attention, (query, memory, 0.5 * memory), need_weights=False)


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(4, 3), (6, 5)])
def test_attention_with_separate_projections(transform_type: type, bias: bool, sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(
        6, 2, kdim=sizes[0], vdim=sizes[1], bias=bias, batch_first=True, dtype=torch.float64
    )
    if bias:
        nn.init.normal_(attention.in_proj_bias)
    inputs = [
        torch.randn(2, length, width, dtype=torch.float64) for length, width in ((3, 6), (5, sizes[0]), (5, sizes[1]))
    ]
    check_attention(transform_type, attention, (inputs[0], inputs[1], inputs[2]))


@BOTH
def test_attention_with_further_keys(transform_type: type) -> None:
    """Learned and zero keys enter behind the projections: they are no rows of theirs."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    check_attention(transform_type, attention, (x, x, x))


@BOTH
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_with_dropout(transform_type: type, need_weights: bool) -> None:
    """The rows are those of this very forward, whose random numbers are the same with and without us."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True, dtype=torch.float64)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    torch.manual_seed(7)
    plain = attention(x, x, x, need_weights=need_weights)[0].detach()
    following = torch.rand(4)
    optimizer, handle = attached(attention, transform_type)
    torch.manual_seed(7)
    watched = attention(x, x, x, need_weights=need_weights)[0]
    assert torch.equal(watched, plain)
    assert torch.equal(torch.rand(4), following)
    handle.remove()
    optimizer.zero_grad()
    torch.manual_seed(7)
    check_attention(transform_type, attention, (x, x, x), need_weights=need_weights)


@pytest.mark.parametrize("needed", ["float32", "bfloat16"])
def test_attention_under_autocast(needed: str) -> None:
    """Rows are taken in full precision; the forward itself is as it is without us."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    x = torch.randn(3, 5, 6, dtype=getattr(torch, needed))
    outputs = []
    for watched in (False, True):
        optimizer, handle = attached(attention, FeatureWhitening)
        if not watched:
            handle.remove()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = attention(x, x, x, need_weights=False)[0]
        outputs.append(output.detach())
        _, after = train_step(attention, optimizer, output.float())
        assert all(bool(torch.isfinite(g).all()) for g in after.values())
    assert torch.equal(*outputs)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_transformer_encoder_layer_in_training(norm_first: bool, dropout: float) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        6, 2, 8, dropout=dropout, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    torch.manual_seed(3)
    plain = layer(x, src_mask=causal, is_causal=True).detach()
    optimizer, handle = attached(layer, FeatureWhitening)
    seen: dict[str, Tensor] = {}
    for name in ("linear1", "linear2"):
        module = getattr(layer, name)
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
    layer.self_attn.register_forward_hook(lambda _, args, out: seen.update(attention=out[0].detach()))
    torch.manual_seed(3)
    output = layer(x, src_mask=causal, is_causal=True)
    assert torch.equal(output, plain)
    before, after = train_step(layer, optimizer, output)
    fed = layer.norm1(x).detach() if norm_first else x
    rows = {
        "self_attn.in_proj": [fed.reshape(-1, 6)] * 3,
        "self_attn.out_proj": [context(layer.self_attn, seen["attention"])],
        "linear1": [seen["linear1"].reshape(-1, 6)],
        "linear2": [seen["linear2"].reshape(-1, 8)],
    }
    for name, parts in rows.items():
        joint = "_" if name.endswith("in_proj") else "."

        def pack(grads: dict[str, Tensor], name: str = name, joint: str = joint, groups: int = len(parts)) -> Tensor:
            weight, bias = grads[f"{name}{joint}weight"], grads[f"{name}{joint}bias"]
            return torch.cat([weight, bias.unsqueeze(1)], 1).unflatten(0, (groups, -1))

        assert changed_much(pack(before), pack(after))
        close(pack(after), expected(FeatureWhitening, [with_one(part) for part in parts], pack(before)), 1e-7)
    for name in ("norm1.weight", "norm2.bias"):
        assert torch.equal(before[name], after[name])
    assert handle.stats()["whitening"]["weights"] == 4


def test_transformer_encoder_in_eval_mode_is_untouched_and_counts_where_its_gradient_comes() -> None:
    """With and without gradients: under no_grad torch takes a fused path that calls no module inside."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(3, 5, 6)
    encoder.eval()
    with torch.no_grad():
        plain = encoder(x)
    optimizer, handle = attached(encoder, FeatureWhitening, stats_every=1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(100 * x / 100), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder(x), plain, rtol=1e-5, atol=1e-5)
    encoder.train()
    weight = encoder.layers[0].self_attn.in_proj_weight
    train_step(encoder, optimizer, encoder(x))
    moment = optimizer.state[weight]["wellcond_whitening_second_moment"].clone()
    rows = with_one(x.reshape(-1, 6))
    torch.testing.assert_close(moment[0], 0.1 * rows.mT @ rows / len(rows))
    mass = optimizer.state[weight]["wellcond_whitening_mass"].clone()
    encoder.eval()
    encoder(50 * x)
    with torch.no_grad():
        encoder(50 * x)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["wellcond_whitening_second_moment"], moment)
    assert torch.equal(optimizer.state[weight]["wellcond_whitening_mass"], mass)
    train_step(encoder, optimizer, encoder(2 * x))
    rows = with_one(2 * x.reshape(-1, 6))
    now = optimizer.state[weight]["wellcond_whitening_second_moment"][0]
    torch.testing.assert_close(now, 0.9 * moment[0] + 0.1 * rows.mT @ rows / len(rows))
    with torch.no_grad():
        handle.remove()
        calls: list[int] = []
        encoder.layers[0].linear1.forward = calls.append
        encoder(x)
    assert not calls, "the fused path calls no module inside"
    assert handle.stats()["whitening"] == {"weights": 8, "failed_solves": 0, "skipped_updates": 0}


# norm layers --------------------------------------------------------------------------------------------------------


def normalized(layer: nn.Module, x: Tensor) -> Tensor:
    """Return x̂ as [n, elements], from mean and variance written out."""
    if isinstance(layer, nn.GroupNorm):
        parts = x.reshape(len(x), layer.num_groups, -1)
        parts = (parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
        return parts.reshape(x.shape).movedim(1, -1).reshape(-1, layer.num_channels)
    size = math.prod(layer.normalized_shape)
    flat = x.reshape(-1, size)
    if isinstance(layer, nn.RMSNorm):
        eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
        return flat / (flat.square().mean(-1, keepdim=True) + eps).sqrt()
    return (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()


NORMS: list[tuple[Callable[[], nn.Module], list[int]]] = [
    (lambda: nn.LayerNorm(4), [3, 5, 4]),
    (lambda: nn.LayerNorm([3, 4], eps=0.1), [6, 3, 4]),
    (lambda: nn.LayerNorm(4, bias=False), [7, 4]),
    (lambda: nn.GroupNorm(2, 6), [3, 6, 4, 2]),
    (lambda: nn.GroupNorm(3, 6, eps=0.1), [5, 6, 3]),
    (lambda: nn.RMSNorm(4), [3, 5, 4]),
    (lambda: nn.RMSNorm([2, 3], eps=0.1), [5, 2, 3]),
]


@BOTH
@pytest.mark.parametrize(("make", "shape"), NORMS)
def test_norm_layers(transform_type: type, make: Callable[[], nn.Module], shape: list[int]) -> None:
    """Each element's (scale, shift) by the 2 × 2 second moment of its (x̂, 1); the layer's norm is recovered as one."""
    torch.manual_seed(0)
    layer = make().double()
    optimizer, _ = attached(layer, transform_type, norm_layers=True)
    # Features of different scale and mean, so that x̂ has neither mean 0 nor variance 1 along the batch.
    x = (
        torch.randn(*shape, dtype=torch.float64) * torch.linspace(0.3, 3, math.prod(shape[1:])).double().view(shape[1:])
        + 1
    )
    before, after = train_step(layer, optimizer, layer(x))
    rows = normalized(layer, x).mT.unsqueeze(-1)
    has_bias = getattr(layer, "bias", None) is not None
    parts = list(with_one(rows) if has_bias else rows)

    def pack(grads: dict[str, Tensor]) -> Tensor:
        columns = [grads["weight"].flatten()] + ([grads["bias"].flatten()] if has_bias else [])
        return torch.stack(columns, 1).unsqueeze(1)

    if has_bias:
        assert changed_much(pack(before), pack(after))
    close(pack(after), expected(transform_type, parts, pack(before)))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None), nn.InstanceNorm1d(4, affine=True)]
)
def test_batch_and_instance_norm_are_the_identity(norm: nn.Module) -> None:
    norm = norm.double()
    model = nn.Sequential(nn.Conv1d(4, 4, 1, dtype=torch.float64), norm)
    optimizer, handle = attached(model, FeatureDescent, norm_layers=True)
    before, after = train_step(model, optimizer, model(torch.randn(3, 4, 5, dtype=torch.float64)))
    for name in ("1.weight", "1.bias"):
        assert torch.equal(before[name], after[name])
    assert "its second moment is the identity" in handle.report()
    assert handle.stats()["descent"]["weights"] == 1


# other layers -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (6,), (3, 4)])
def test_bilinear(transform_type: type, bias: bool, leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Bilinear(2, 3, 4, bias=bias, dtype=torch.float64)
    optimizer, _ = attached(layer, transform_type)
    one, two = torch.randn(*leading, 2, dtype=torch.float64), torch.randn(*leading, 3, dtype=torch.float64) + 1
    before, after = train_step(layer, optimizer, layer(one, input2=two))
    pairs = zip(one.reshape(-1, 2).tolist(), two.reshape(-1, 3).tolist(), strict=True)
    rows = torch.tensor([[a * b for a in first for b in second] for first, second in pairs], dtype=torch.float64)

    def pack(grads: dict[str, Tensor]) -> Tensor:
        columns = [grads["weight"].reshape(4, 6)] + ([grads["bias"].unsqueeze(1)] if bias else [])
        return torch.cat(columns, 1)[None]

    close(pack(after), expected(transform_type, [with_one(rows) if bias else rows], pack(before)))


def joint_power(transform_type: type, frequencies: Tensor, moment: Tensor, gradient: Tensor) -> Tensor:
    """(D ⊗ I + I ⊗ M + damping)^(−p) vec(G), with that matrix written out in full."""
    tokens, features = gradient.shape
    eye = torch.eye
    total = torch.kron(torch.diag(frequencies), eye(features).double()) + torch.kron(eye(tokens).double(), moment)
    changed = (inverse_power(total, transform_type) @ gradient.flatten()).view(tokens, features)
    return changed * gradient.norm() / changed.norm()


class Tied(nn.Module):
    def __init__(self, tokens: int, features: int, order: str, padding_idx: int | None = None) -> None:
        super().__init__()
        embedding = nn.Embedding(tokens, features, padding_idx=padding_idx, dtype=torch.float64)
        head = nn.Linear(features, tokens, dtype=torch.float64)
        head.weight = embedding.weight
        for name in order.split():
            setattr(self, name, {"embedding": embedding, "head": head}[name])

    def forward(self, tokens: Tensor) -> Tensor:
        self.hidden = self.embedding(tokens).cumsum(0).tanh()
        return self.head(self.hidden)


@BOTH
@pytest.mark.parametrize("order", ["embedding head", "head embedding"])
@pytest.mark.parametrize(("tokens", "features", "padding_idx"), [(7, 3, None), (3, 5, None), (4, 4, None), (6, 4, 0)])
def test_a_table_tied_between_an_embedding_and_a_linear_layer(
    transform_type: type, order: str, tokens: int, features: int, padding_idx: int | None
) -> None:
    torch.manual_seed(0)
    model = Tied(tokens, features, order, padding_idx)
    optimizer, handle = attached(model, transform_type)
    given = torch.tensor([0, 1, 1, 2, 1, 0, 2, 1])
    before, after = train_step(model, optimizer, model(given))
    frequencies = torch.zeros(tokens, dtype=torch.float64)
    for token in given.tolist():
        frequencies[token] += (token != padding_idx) / 8
    hidden = model.hidden.detach()
    (name,) = [name for name in before if name.endswith("weight")]
    assert changed_much(before[name], after[name])
    close(after[name], joint_power(transform_type, frequencies, hidden.mT @ hidden / 8, before[name]))
    assert torch.equal(before["head.bias"], after["head.bias"])
    assert handle.stats()[NAMES[transform_type]]["weights"] == 1


@BOTH
def test_a_weight_tied_between_linear_layers_and_called_several_times(transform_type: type) -> None:
    torch.manual_seed(0)
    first, second = (nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(2))
    second.weight = first.weight
    model = nn.ModuleList([first, second])
    optimizer, _ = attached(model, transform_type)
    x = torch.randn(6, 4, dtype=torch.float64)
    one = first(x).tanh()
    two = second(one).tanh()
    three = second(two[:2])
    before, after = train_step(model, optimizer, three)
    rows = torch.cat([x, one, two[:2]]).detach()
    close(after["0.weight"][None], expected(transform_type, [rows], before["0.weight"][None]))


@BOTH
def test_convolutions_tied_with_different_strides(transform_type: type) -> None:
    """One weight at two scales: each use brings the patches of its own stride and dilation."""
    torch.manual_seed(0)
    fine = nn.Conv1d(2, 3, 3, bias=False, dtype=torch.float64)
    coarse = nn.Conv1d(2, 3, 3, stride=2, dilation=2, bias=False, dtype=torch.float64)
    coarse.weight = fine.weight
    model = nn.ModuleList([fine, coarse])
    optimizer, _ = attached(model, transform_type)
    x = torch.randn(2, 2, 9, dtype=torch.float64)
    before, after = train_step(model, optimizer, torch.cat([fine(x), coarse(x)], 2))
    starts = [(start, 1) for start in range(7)] + [(start, 2) for start in (0, 2, 4)]
    rows = [x[n, :, s : s + 2 * d + 1 : d].flatten() for n in range(2) for s, d in starts]
    close(
        after["0.weight"].flatten(1)[None],
        expected(transform_type, [torch.stack(rows)], before["0.weight"].flatten(1)[None]),
    )


# lazy modules -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dry_run", [False, True])
def test_lazy_layers_count_from_their_first_training_forward(transform_type: type, dry_run: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyConv1d(3, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()
    optimizer, handle = attached(model, transform_type)
    assert handle.report().count("known after its first forward pass") == 4
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    if dry_run:
        with torch.no_grad():
            model(100 * x)
    before, after = train_step(model, optimizer, model(x))
    hidden = model[:3](x).detach()
    patches = torch.stack([x[n, :, s : s + 2].flatten() for n in range(5) for s in range(3)])
    for name, rows in (("0", patches), ("3", hidden)):

        def pack(grads: dict[str, Tensor], name: str = name) -> Tensor:
            return torch.cat([grads[f"{name}.weight"].flatten(1), grads[f"{name}.bias"].unsqueeze(1)], 1)[None]

        assert changed_much(pack(before), pack(after))
        close(pack(after), expected(transform_type, [with_one(rows)], pack(before)))
    assert "known after" not in handle.report()
    assert handle.stats()[NAMES[transform_type]]["weights"] == 2


# parametrized layers ------------------------------------------------------------------------------------------------


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.softplus(weight)


@BOTH
@pytest.mark.parametrize("kind", ["spectral", "weight norm", "own", "chain"])
def test_parametrized_layers(transform_type: type, kind: str) -> None:
    """The gradient that is changed is that of the parameter which the parametrization starts from."""
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(5, 3, dtype=torch.float64)
    if kind == "spectral":
        parametrizations.spectral_norm(layer)
    elif kind == "weight norm":
        parametrizations.weight_norm(layer)
    else:
        parametrize.register_parametrization(layer, "weight", Positive())
        if kind == "chain":
            parametrize.register_parametrization(layer, "weight", nn.Softmax(dim=1))
    optimizer, handle = attached(layer, transform_type)
    start = f"parametrizations.weight.original{1 if kind == 'weight norm' else ''}"
    x = torch.randn(8, 5, dtype=torch.float64) + 1
    before, after = train_step(layer, optimizer, layer(x))

    def pack(grads: dict[str, Tensor]) -> Tensor:
        return torch.cat([grads[start], grads["bias"].unsqueeze(1)], 1)[None]

    assert changed_much(pack(before), pack(after))
    close(pack(after), expected(transform_type, [with_one(x)], pack(before)))
    if kind == "weight norm":
        magnitude = "parametrizations.weight.original0"
        assert torch.equal(before[magnitude], after[magnitude])
        assert "no rule for the layer type _WeightNorm" in handle.report()
    assert "before its parametrization" in handle.report()


def test_a_parametrization_of_another_shape_keeps_its_plain_gradient() -> None:
    class Diagonal(nn.Module):
        def forward(self, vector: Tensor) -> Tensor:
            return torch.diag(vector)

        def right_inverse(self, weight: Tensor) -> Tensor:
            return weight.diagonal()

    torch.manual_seed(0)
    layer = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    parametrize.register_parametrization(layer, "weight", Diagonal(), unsafe=True)
    model = nn.Sequential(layer, nn.Linear(3, 2, dtype=torch.float64))
    optimizer, _ = attached(model, FeatureWhitening)
    before, after = train_step(model, optimizer, model(torch.randn(6, 3, dtype=torch.float64)))
    name = "0.parametrizations.weight.original"
    assert torch.equal(before[name], after[name])
    assert changed_much(before["1.weight"], after["1.weight"])


# own layers ---------------------------------------------------------------------------------------------------------


class Squares(nn.Module):
    """y = (x², x) Wᵀ + c, with names and an axis order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
        self.shift = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.square(), x], -1) @ self.table + self.shift


class SquaresLayout(Layout):
    has_rows = True
    output_axis = 1

    def weights(self, module: nn.Module) -> list[tuple[str, str | None]]:
        return [("table", "shift")]

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.mT.unsqueeze(0)

    def rows(self, module: nn.Module, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(1, -1, 3)
        return torch.cat([flat.square(), flat], -1)


@BOTH
def test_a_users_own_layer(transform_type: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_LAYOUTS", dict(registry._LAYOUTS))
    register_layout(Squares, SquaresLayout())
    torch.manual_seed(0)
    model = Squares()
    optimizer, handle = attached(model, transform_type)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    before, after = train_step(model, optimizer, model(x))
    flat = x.reshape(10, 3)
    rows = with_one(torch.cat([flat**2, flat], 1))

    def pack(grads: dict[str, Tensor]) -> Tensor:
        return torch.cat([grads["table"].mT, grads["shift"].unsqueeze(1)], 1)[None]

    assert changed_much(pack(before), pack(after))
    close(pack(after), expected(transform_type, [rows], pack(before)))
    assert "together with table" in handle.report()


def test_a_tied_table_wider_than_max_dim_keeps_its_plain_gradient_and_says_so() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = wellcond.attach(optimizer, model, wellcond.FeatureWhitening(max_dim=5)).report()
    assert "plain gradient: a tied table of 6 features (max_dim=5)" in report
