"""Optimizers from parameters alone, by name, by the length of the run, and parameter groups that say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from wellcond.optim import Group, attach_deferred, create, from_parameters, intervals, names, parameter_groups


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    for seed in range(4):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", names())
def test_from_parameters_is_the_named_optimizer_once_it_knows_the_model(name: str) -> None:
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "damping": 0.2, "total_steps": 40}
    model, other = net(), net()
    optimizer = from_parameters(model.parameters(), name, **options)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"waits for its model: give the trainer .*attach_deferred"):
        optimizer.step()
    assert attach_deferred(optimizer, model) is not None
    assert attach_deferred(optimizer, model) is None
    expected = trained(other, create(name, other, **options))
    for mine, theirs in zip(trained(model, optimizer), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_options_are_checked_before_the_model_is_there() -> None:
    with pytest.raises(TypeError, match="WSGDM has no option 'dampng': did you mean 'damp"):
        from_parameters(net().parameters(), "wsgdm", lr=0.1, dampng=1)
    with pytest.raises(ValueError, match="damping must be a positive number, got -1"):
        from_parameters(net().parameters(), "wsgdm", lr=0.1, damping=-1)
    with pytest.raises(TypeError, match=r"params must be parameters or groups of them, got Sequential"):
        from_parameters(net(), "wsgdm", lr=0.1)
    with pytest.raises(ValueError, match="no optimizer is called 'wsgd': did you mean 'wsgdm'"):
        from_parameters(net().parameters(), "wsgd", lr=0.1)


def test_names_match_wildcards() -> None:
    assert {"fadam", "fsgd"} <= set(names("f*"))
    assert names("W?DAM") == ["wadam"]
    assert names("none*") == []


def test_the_length_of_the_run_gives_the_intervals() -> None:
    (transform,) = create("wsgdm", net(), lr=0.1, total_steps=186, solve_every=30).attachment.transforms  # type: ignore[attr-defined]
    assert (transform.stats_every, transform.solve_every) == (5, 30)
    assert [intervals(steps)["stats_every"] for steps in (1, 186, 1999, 2000, 10**6)] == [1, 5, 50, 50, 50]
    with pytest.raises(ValueError, match="total_steps must be a positive integer, got 0"):
        intervals(0)


class TestParameterGroups:
    def test_the_first_group_that_selects_a_parameter_has_it(self) -> None:
        model = net()
        groups = parameter_groups(model, Group("norms", weight_decay=0.0), Group("0.*", "biases", lr=0.5))
        assert [len(group["params"]) for group in groups] == [2, 3, 1]
        assert groups[2]["params"][0] is model[2].weight
        assert groups.reasons["0.bias"] == (1, "0.*")
        held = [parameter for group in groups for parameter in group["params"]]
        assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
        torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)

    @pytest.mark.parametrize(
        ("selector", "chosen"),
        [
            ("norms", {"1.weight", "1.bias"}),
            ("biases", {"0.bias", "1.bias", "2.bias"}),
            ("vectors", {"0.bias", "1.weight", "1.bias", "2.bias"}),
            ("linears", {"0.weight", "0.bias", "2.weight", "2.bias"}),
            ("head", {"2.weight", "2.bias"}),
            ("convolutions", set()),
            ("embeddings", set()),
            ("2", {"2.weight", "2.bias"}),
            ("*.weight", {"0.weight", "1.weight", "2.weight"}),
        ],
    )
    def test_selectors(self, selector: str, chosen: set[str]) -> None:
        groups = parameter_groups(net(), Group(selector, lr=0.5))
        assert {name for name, (_, why) in groups.reasons.items() if why == selector} == chosen

    def test_a_shared_parameter_is_taken_once(self) -> None:
        model = net()
        model.append(nn.Linear(3, 6))
        model.append(nn.Linear(6, 3))
        model[4].weight = model[2].weight
        groups = parameter_groups(model, Group("head", lr=0.5))
        held = [parameter for group in groups for parameter in group["params"]]
        assert len(held) == len(set(map(id, held))) == len(list(model.parameters()))

    def test_mistakes(self) -> None:
        with pytest.raises(ValueError, match="no parameter is selected by 'norm': did you mean 'norms'"):
            parameter_groups(net(), Group("norm", lr=0.5))
        with pytest.raises(ValueError, match="a group must have a selector and an option"):
            Group("norms")
        with pytest.raises(TypeError, match="groups must be wellcond.optim.Group"):
            parameter_groups(net(), {"lr": 0.5})  # type: ignore[arg-type]
