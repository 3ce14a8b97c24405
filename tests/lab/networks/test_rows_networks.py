"""Networks on text and on tables: what they compute, and that the preconditioners reach all that they should."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wellcond
from wellcond.lab.errors import LabError
from wellcond.lab.networks.gpt import Gpt, select_gpt
from wellcond.lab.networks.gpt_specs import GPTS
from wellcond.lab.networks.mlp import Mlp, select_mlp
from wellcond.lab.networks.mlp_specs import MLPS


def test_a_gpt_sees_what_came_before_alone() -> None:
    torch.manual_seed(0)
    network = Gpt(select_gpt("gpt-tiny"), 11).eval()
    tokens = torch.randint(11, (2, 64))
    logits = network(tokens)
    assert logits.shape == (2, 64, 11)
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 11
    torch.testing.assert_close(network(changed)[:, :40], logits[:, :40])
    assert not torch.allclose(network(changed)[:, 40], logits[:, 40])
    torch.testing.assert_close(network(tokens[:, :10]), logits[:, :10])
    # Untrained it guesses.
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert float(loss.detach()) == pytest.approx(2.4, abs=0.05)


@pytest.mark.parametrize("name", GPTS)
def test_the_attention_of_every_gpt_fits(name: str) -> None:
    spec = select_gpt(name)
    assert spec.features % spec.heads == 0
    assert str(spec.block) in spec.description


def test_every_matrix_of_a_gpt_is_preconditioned() -> None:
    network = Gpt(select_gpt("gpt-tiny"), 11)
    optimizer = torch.optim.AdamW(network.parameters())
    handle = wellcond.attach(optimizer, network, wellcond.FeatureWhitening())
    (rows,) = handle.coverage().values()
    assert {row.name for row in rows if len(row.shape) > 1 and not row.state_bytes} == set(), rows


def test_an_mlp_embeds_categories_behind_its_numbers() -> None:
    torch.manual_seed(0)
    network = Mlp(select_mlp("mlp"), 2, (20, 30), 3)
    rows = torch.tensor([[0.5, 1.0, 19.0, 29.0], [0.5, 1.0, 19.0, 0.0]])
    embedded = torch.cat([rows[:, :2], network.embeddings[0](torch.tensor([19, 19]))], dim=1)
    embedded = torch.cat([embedded, network.embeddings[1](torch.tensor([29, 0]))], dim=1)
    torch.testing.assert_close(network(rows), network.layers(embedded))
    assert Mlp(select_mlp("linear"), 4, (), 1)(torch.zeros(3, 4)).shape == (3, 1)


@pytest.mark.parametrize("name", MLPS)
def test_hidden_layers_are_as_named(name: str) -> None:
    network = Mlp(MLPS[name], 4, (), 2)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == 2 * MLPS[name].batch_norm
    assert network(torch.randn(5, 4)).shape == (5, 2)


def test_unknown_networks() -> None:
    for select in (select_gpt, select_mlp):
        with pytest.raises(LabError, match="model"):
            select("resnet8")
