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
    *("mnasnet0_5", "efficientnet_b0", "regnet_x_400mf", "convnext_tiny", "shufflenet_v2_x0_5"),
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
