"""What an attachment says it does with each parameter, as rows: the report's lines, and the bytes in the state."""

from __future__ import annotations

import torch
from torch import nn

import wellcond
from wellcond import FeatureWhitening, GradientCentralization


def test_rows_are_the_reports_lines_and_count_what_is_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, GradientCentralization(), FeatureWhitening())
    model(torch.randn(6, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    found = handle.coverage()
    assert len(found) == 2
    centralized, whitened = found.values()
    names = [name for name, _ in model.named_parameters()]
    assert [row.name for row in centralized] == [row.name for row in whitened] == names
    blocks = handle.report().split("\n\n")
    for rows, block in zip(found.values(), blocks, strict=True):
        for row, line in zip(rows, block.splitlines()[1:-1], strict=True):
            name, rest = line.split(maxsplit=1)
            assert name == row.name
            assert rest.startswith(str(row.shape))
            assert row.how in line
    assert sum(row.state_bytes or 0 for row in centralized) == 0
    for row, (name, parameter) in zip(whitened, model.named_parameters(), strict=True):
        held = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        kept = sum(tensor.numel() * tensor.element_size() for tensor in held if tensor.numel() > 1)
        assert (row.state_bytes or 0) == kept, name
        assert (row.state_bytes is None) == (row.name not in ("0.weight", "3.weight"))


def test_of_an_optimizer_that_is_gone_it_says_what_was_done():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, GradientCentralization())
    optimizer.add_param_group({"params": [model[1].bias]})
    rows, lines = handle.coverage(), handle.report().splitlines()
    assert "not held" in lines[3]
    assert lines[4].split() == ["1.bias", "(2,)", "unchanged:", "a", "bias"]
    del optimizer
    assert handle.coverage() == rows
    assert handle.report().splitlines() == ["centralization over SGD (which no longer exists)", *lines[1:]]


def test_an_optimizer_that_nobody_asked_about_while_it_was_there_is_known_too():
    model = nn.Linear(3, 2)
    handle = wellcond.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, FeatureWhitening())
    rows = handle.coverage()["whitening"]
    assert [row.how for row in rows] == ["preconditioned, dense 4 × 4", "together with weight"]


def test_the_last_line_of_a_block_counts_a_parameter_of_two_names_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, "centralization", "whitening")
    totals = [block.splitlines()[-1] for block in handle.report().split("\n\n")]
    kept = sum(row.state_bytes or 0 for row in handle.coverage()["whitening"][:1])
    assert 0 < kept < 1000
    assert totals == ["in all: 1 of 5 parameters, 0 B kept", f"in all: 1 of 5 parameters, {kept} B kept"]
