"""Optimizers of others, each stepping in its own way: trained, kept and continued, and named where they are missing."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import Refresh, method
from wellcond.lab.methods.optimizers import needs_closure, take_step, use_weights
from wellcond.lab.networks.gpt import Gpt, select_gpt

PEERS = ["Lion", "ScheduleFree", "SOAP", "Shampoo", "PSGD", "SAM", "LBFGS", "Muon", "torch.optim:Muon(momentum=0.9)"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 8), nn.ReLU(), nn.Linear(8, 3))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    for step in steps:
        torch.manual_seed(step)
        images = torch.randn(8, 1, 8, 8)
        take_step(optimizer, lambda images=images: model(images).square().mean())
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("text", PEERS)
def test_a_run_goes_on_as_if_it_had_not_been_stopped(text):
    found = method(text)
    model, again = net(), net()
    (optimizer, _), (other, _) = (found.build(each, found.lrs[0], Refresh(1, 2)) for each in (model, again))
    trained(model, optimizer, range(3))
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for mine, theirs in zip(trained(model, optimizer, range(3, 6)), trained(again, other, range(3, 6)), strict=True):
        assert torch.equal(mine, theirs)


def test_closures_are_asked_of_the_optimizer():
    def needs(text: str) -> bool:
        return needs_closure(method(text).build(net(), 0.1, Refresh(1, 2))[0])

    assert {text for text in PEERS if needs(text)} == {"SAM", "LBFGS"}


def test_evaluation_weights_are_put_in_and_taken_out():
    model = net()
    optimizer, _ = method("ScheduleFree").build(model, 0.01, Refresh(1, 2))
    training = trained(model, optimizer, range(3))
    use_weights(optimizer, training=False)
    evaluated = [parameter.detach().clone() for parameter in model.parameters()]
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(training, evaluated, strict=True))
    use_weights(optimizer, training=True)
    for mine, theirs in zip(training, model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_torchs_muon_updates_kernels_as_matrices():
    """Against torch's own on the flattened kernel, and AdamW on the rest."""
    model, other = net(), net()
    optimizer, _ = method("torch.optim:Muon(weight_decay=0.1, adamw_lr=0.003)").build(model, 0.02, Refresh(1, 2))
    kernel = nn.Parameter(other[0].weight.detach().view(4, -1))
    matrices = torch.optim.Muon([kernel, other[3].weight], lr=0.02, weight_decay=0.1)
    others = [p for p in other.parameters() if p is not other[0].weight and p is not other[3].weight]
    rest = torch.optim.AdamW(others, lr=0.003)
    for step in range(3):
        images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        take_step(optimizer, lambda images=images: model(images).square().mean())
        other.zero_grad()
        other(images).square().mean().backward()
        kernel.grad = other[0].weight.grad.view(4, -1)
        matrices.step()
        rest.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.003]


@pytest.mark.parametrize("kind", ["Muon", "torch.optim:Muon"])
def test_muon_leaves_embeddings_and_the_head_to_adamw_and_so_do_its_transforms(kind):
    """A table of embeddings is two-dimensional, too, and the first of a GPT's weights."""
    model = Gpt(select_gpt("gpt-tiny"), tokens=11)
    text = f"{kind}(weight_decay=0.0) + GradientCentralization + FeatureDescent"
    optimizer, handle = method(text).build(model, 0.02, Refresh(1, 2))
    hidden, rest = optimizer.param_groups
    inside = [weight for name, weight in model.blocks.named_parameters() if weight.ndim == 2]
    assert {id(weight) for weight in hidden["params"]} == {id(weight) for weight in inside}
    assert {model.token.weight, model.position.weight, model.head.weight} <= set(rest["params"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for rows in handle.coverage().values():
        assert {row.name for row in rows if row.state_bytes is not None} == {names[id(weight)] for weight in inside}


def test_muon_refuses_a_network_without_hidden_weights():
    with pytest.raises(LabError, match=r"Muon updates the weights inside a network.*take AdamW"):
        method("Muon").build(nn.Linear(3, 2), 0.02, Refresh(1, 2))


def test_psgd_begins_its_products_at_the_gradient():
    """Against pytorch_optimizer's own, which makes the product of all preconditioners first."""
    import pytorch_optimizer

    model, other = net(), net()
    optimizer, _ = method("PSGD").build(model, 0.001, Refresh(1, 2))
    plain = pytorch_optimizer.Kron(other.parameters(), lr=0.001, weight_decay=0.05, balance_prob=0.0)
    for mine, theirs in zip(trained(model, optimizer, range(3)), trained(other, plain, range(3)), strict=True):
        torch.testing.assert_close(mine, theirs)
    wide = nn.Linear(256, 256)  # the product of its preconditioners would have 4 billion numbers
    optimizer, _ = method("PSGD").build(wide, 0.001, Refresh(1, 2))
    take_step(optimizer, lambda: wide(torch.ones(2, 256)).square().mean())


def test_without_the_extra_one_line_says_what_to_install():
    code = (
        "import sys; sys.modules['pytorch_optimizer'] = None\n"
        "from wellcond.lab.errors import LabError\n"
        "from wellcond.lab.methods.method import select_methods\n"
        "from wellcond.lab.methods.optimizers import find_optimizer\n"
        "for act in (lambda: find_optimizer('SOAP'), lambda: select_methods(['pytorch_optimizer:SOAP'])):\n"
        "    try: act()\n"
        "    except LabError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("pip install 'wellcond[peers]'" in line for line in lines)
