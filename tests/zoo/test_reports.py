"""Reports of twelve transformers and twelve convolutional networks: no parameter without a how or a why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wellcond

torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

CONVOLUTIONAL = (
    *("alexnet", "vgg11", "resnet18", "squeezenet1_1", "googlenet", "mobilenet_v2", "mobilenet_v3_small"),
    *("mnasnet0_5", "efficientnet_b0", "resnext50_32x4d", "convnext_tiny", "shufflenet_v2_x0_5"),
)
TRANSFORMERS = {
    "bert": {},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 3},
    "gpt_neox": {},
    "t5": {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 4, "d_kv": 8},
    "vit": {"image_size": 32},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
DONE = ("preconditioned", "together with ", "gradient centred", "projected", "held ")
WHY = ("plain gradient: ", "unchanged: ", "not centred: ", "not projected: ")


def convolutional(name: str) -> nn.Module:
    more = {"init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **more)


def transformer(name: str) -> nn.Module:
    kind = transformers.CONFIG_MAPPING[name]
    known = kind().to_dict()
    settings = {
        key: value for key, value in (SMALL | TRANSFORMERS[name]).items() if key in known or key == "vocab_size"
    }
    return transformers.AutoModel.from_config(kind(**settings))


@pytest.mark.parametrize("name", [*CONVOLUTIONAL, *TRANSFORMERS])
def test_every_parameter_has_a_how_or_a_why(name: str) -> None:
    with torch.device("meta"):
        model = convolutional(name) if name in CONVOLUTIONAL else transformer(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(
        optimizer,
        model,
        wellcond.GradientCentralization(),
        wellcond.FeatureWhitening(),
        wellcond.GradientProjection(),
    )
    names = [parameter for parameter, _ in model.named_parameters(remove_duplicate=False)]
    covered = 0
    for rows in handle.coverage().values():
        assert [row.name for row in rows] == names
        for row in rows:
            assert row.how.startswith(DONE) or any(
                row.how.startswith(why) and len(row.how) > len(why) for why in WHY
            ), row
            covered += row.how.startswith(DONE)
    assert covered > len(names) / 2


class LowRank(nn.Module):
    """A linear layer in the manner of peft's: the frozen one, and two of low rank in dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 3).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Bank(nn.Module):
    """Experts in one parameter, [experts, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 3, 4))


class Quantized(nn.Linear):
    """A linear layer whose weight is of whole numbers."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (LowRank, "lora_A.default.weight", "preconditioned, dense 4 × 4"),
        (LowRank, "lora_B.default.weight", "preconditioned, dense 2 × 2"),
        (LowRank, "base_layer.weight", "unchanged: frozen (requires_grad=False)"),
        (Bank, "experts", "unchanged: no rule for the layer type Bank (see register_layout)"),
        (Quantized, "weight", "plain gradient: its weight has the dtype torch.int8"),
        (
            lambda: nn.EmbeddingBag(5, 3),
            "weight",
            "plain gradient: a bag mixes its tokens, so their second moment is a",
        ),
        (lambda: nn.Bilinear(3, 2, 4), "weight", "preconditioned, dense 7 × 7"),
        (lambda: nn.LSTM(3, 4, proj_size=2), "weight_hr_l0", "plain gradient: the hidden states before an LSTM's"),
        (lambda: nn.LSTM(3, 4), "weight_hh_l0", "preconditioned, dense 5 × 5"),
    ],
)
@pytest.mark.filterwarnings("ignore:FeatureWhitening covers none")
def test_wrapped_packed_and_quantized_layers_are_covered_or_named_with_the_reason(make, name, said) -> None:
    model = make()
    handle = wellcond.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, wellcond.FeatureWhitening())
    (row,) = (row for row in handle.coverage()["whitening"] if row.name == name)
    assert row.how.startswith(said)
