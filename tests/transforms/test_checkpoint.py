"""What survives a checkpoint: exact resume at every step, and state dicts that others wrote or will read."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import wellcond
from wellcond import FeatureDescent, FeatureWhitening

STEPS = 40
# Statistics at 0, 3, 6, …; factorizations at 0, 3, 6, 11, 22, 33: most steps lie between two refreshes.
SCHEDULE: dict[str, Any] = {"stats_decay": 0.8, "stats_every": 3, "solve_every": 11}


class Net(nn.Module):
    """An embedding, attention, a norm layer, a convolution, and linear layers wide enough for every form."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 68, 3, padding=1, groups=2)
        self.mix = nn.Conv1d(68, 52, 2)
        self.fc = nn.Linear(260, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.fc(self.mix(self.conv(x.mT).tanh()).flatten(1))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(12, (4, 6), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).float(), tokens.sum(dim=1) % 3).backward()
        optimizer.step()


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def saved(model: nn.Module, optimizer: Optimizer) -> io.BytesIO:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file


def load(file: io.BytesIO, model: nn.Module, optimizer: Optimizer) -> None:
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().clone()
        for key, value in optimizer.state[parameter].items():
            found[f"{name} {key}"] = value.clone() if isinstance(value, Tensor) else value
    return found


def assert_identical(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if isinstance(value, Tensor):
            assert value.dtype == theirs[key].dtype, key
            assert torch.equal(value, theirs[key]), f"{key} differs by {(value - theirs[key]).abs().max():.2e}"
        else:
            assert value == theirs[key], key


FORMS: dict[str, dict[str, Any]] = {
    "auto": {},
    "dense": {"second_moment": "dense"},
    "kronecker": {"second_moment": "kronecker"},
    "low rank": {"second_moment": "low_rank"},
    "sketched": {"second_moment": "kronecker", "max_dim": 64, "rank": 5},
    "blocks": {"second_moment": "blocks", "norm": "fixed"},
    "sketched blocks": {"second_moment": "blocks", "max_dim": 64, "rank": 5},
    "norm layers and gradient momentum": {"norm_layers": True, "gradient_momentum": 0.9},
    "bfloat16 products": {"second_moment": "low_rank", "precision": "bfloat16"},
}


# What each form keeps for the layers `mix` (68 channels, 2 taps) and `fc` (260 inputs).
KEPT = {
    "auto": {"mix": "tap_second_moment", "fc": "excess"},
    "dense": {"mix": "preconditioner", "fc": "preconditioner"},
    "kronecker": {"mix": "tap_second_moment", "fc": "preconditioner"},
    "low rank": {"mix": "sketch", "fc": "sketch"},
    "sketched": {"mix": "channel_sketch", "fc": "sketch"},
    "blocks": {"mix": "block_preconditioner", "fc": "preconditioner"},
    "sketched blocks": {"mix": "block_sketch", "fc": "sketch"},
    "norm layers and gradient momentum": {"norm": "second_moment", "fc": "gradient_momentum_of_bias"},
    "bfloat16 products": {"mix": "sketch", "fc": "sketch"},
}


def transform_of(form: str, transform_type: type = FeatureWhitening) -> Any:
    return transform_type(**SCHEDULE, **FORMS[form])


# exact resume -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_run_resumed_at_any_of_forty_steps_equals_the_run_that_was_not_stopped(form: str, dtype: torch.dtype) -> None:
    """Resumed at each step for one step, and from some for twelve, past the next refresh of both kinds."""
    transform_type = FeatureDescent if form == "kronecker" else FeatureWhitening
    make = sgd if form != "dense" else adamw
    model = net(dtype)
    optimizer = make(model)
    wellcond.attach(optimizer, model, transform_of(form, transform_type))
    files, states = [], []
    for step in range(STEPS):
        files.append(saved(model, optimizer))
        states.append(everything(model, optimizer))
        train(model, optimizer, range(step, step + 1))
    states.append(everything(model, optimizer))
    for layer, key in KEPT[form].items():
        name = f"{layer}.weight wellcond_{transform_type.name}_{key}"
        assert not torch.equal(states[1][name], states[-1][name])

    resumed = net(dtype)
    theirs = make(resumed)
    wellcond.attach(theirs, resumed, transform_of(form, transform_type))
    # One object takes them all: whatever it did before must not show. The first state dict is empty.
    for stopped_at in range(1, STEPS):
        load(files[stopped_at], resumed, theirs)
        until = min(STEPS, stopped_at + (12 if stopped_at in (7, 23) else 1))
        train(resumed, theirs, range(stopped_at, until))
        assert_identical(everything(resumed, theirs), states[until])


@pytest.mark.parametrize("form", ["dense", "sketched"])
def test_a_fresh_object_resumed_late_runs_to_the_same_end(form: str) -> None:
    model = net()
    optimizer = sgd(model)
    wellcond.attach(optimizer, model, transform_of(form))
    train(model, optimizer, range(17))
    file = saved(model, optimizer)
    train(model, optimizer, range(17, STEPS))
    resumed = net()
    theirs = sgd(resumed)
    wellcond.attach(theirs, resumed, transform_of(form))
    load(file, resumed, theirs)
    train(resumed, theirs, range(17, STEPS))
    assert_identical(everything(model, optimizer), everything(resumed, theirs))


def test_spread_factorizations_resume_exactly_while_some_layers_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """With next to no budget a step each layer waits for its turn; a checkpoint may fall in between."""
    monkeypatch.setattr("wellcond.transforms.preconditioner.solves.SOLVED_AT_ONCE", 1.0)
    transform = FeatureWhitening(stats_every=12, solve_every=12, stats_decay=0.8, second_moment="dense")
    model = net()
    optimizer = sgd(model)
    wellcond.attach(optimizer, model, transform)
    files, states = [], []
    for step in range(28):
        files.append(saved(model, optimizer))
        states.append(everything(model, optimizer))
        train(model, optimizer, range(step, step + 1))
    states.append(everything(model, optimizer))
    solved = [{v for k, v in state.items() if k.endswith("solved_at")} for state in states]
    assert any(len(steps) > 1 for steps in solved), "no step has layers that wait"
    for stopped_at in range(11, 28):
        resumed = net()
        theirs = sgd(resumed)
        wellcond.attach(theirs, resumed, transform)
        load(files[stopped_at], resumed, theirs)
        train(resumed, theirs, range(stopped_at, min(28, stopped_at + 3)))
        assert_identical(everything(resumed, theirs), states[min(28, stopped_at + 3)])


@pytest.mark.parametrize("form", FORMS)
def test_statistics_of_bfloat16_weights_stay_float32_through_a_checkpoint(form: str) -> None:
    """Trap 2: `load_state_dict` casts floating-point state to the parameter's dtype."""
    model, resumed = net(torch.bfloat16), net(torch.bfloat16)
    optimizer, theirs = sgd(model), sgd(resumed)
    wellcond.attach(optimizer, model, transform_of(form))
    wellcond.attach(theirs, resumed, transform_of(form))
    train(model, optimizer, range(4))
    load(saved(model, optimizer), resumed, theirs)
    found = everything(resumed, theirs)
    moments = {k: v for k, v in found.items() if k.endswith(("second_moment", "sketch", "trace", "mass"))}
    assert moments
    assert {value.dtype for value in moments.values()} == {torch.float32}
    assert_identical(everything(model, optimizer), found)


# state dicts of others ----------------------------------------------------------------------------------------------


def caught(action: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in record]


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("form", FORMS)
def test_a_plain_optimizers_state_is_taken_over_with_a_clear_warning(form: str, make: Any) -> None:
    plain, model = net(), net()
    plain_optimizer, optimizer = make(plain), make(model)
    train(plain, plain_optimizer, range(5))
    handle = wellcond.attach(optimizer, model, transform_of(form))
    train(model, optimizer, range(50, 57))  # its own statistics must go
    model.load_state_dict(plain.state_dict())
    (message,) = caught(lambda: optimizer.load_state_dict(copy.deepcopy(plain_optimizer.state_dict())))
    assert "no statistics of whitening" in message
    assert "start anew" in message
    assert "embed.weight" in message

    # From here on: as if attached to the plain optimizer now.
    wellcond.attach(plain_optimizer, plain, transform_of(form))
    train(plain, plain_optimizer, range(5, 12))
    train(model, optimizer, range(5, 12))
    assert_identical(everything(model, optimizer), everything(plain, plain_optimizer))
    assert handle.stats()["whitening"]["failed_solves"] == 0


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("form", FORMS)
def test_a_preconditioned_optimizers_state_loads_into_a_plain_one(form: str, make: Any) -> None:
    """It trains as one that never had the extra entries, keeps them when saved again, and says nothing."""
    model = net()
    optimizer = make(model)
    wellcond.attach(optimizer, model, transform_of(form))
    train(model, optimizer, range(5))
    state_dict = optimizer.state_dict()
    without = copy.deepcopy(state_dict)
    for entry in without["state"].values():
        for key in [key for key in entry if str(key).startswith("wellcond_")]:
            del entry[key]

    plain, reference = net(), net()
    plain_optimizer, theirs = make(plain), make(reference)
    plain.load_state_dict(model.state_dict())
    reference.load_state_dict(model.state_dict())
    assert caught(lambda: plain_optimizer.load_state_dict(copy.deepcopy(state_dict))) == []
    theirs.load_state_dict(without)
    train(plain, plain_optimizer, range(5, 10))
    train(reference, theirs, range(5, 10))
    for (name, a), b in zip(plain.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b), name

    # Once more through a file into another plain one.
    again = net()
    again_optimizer = make(again)
    load(saved(plain, plain_optimizer), again, again_optimizer)
    train(again, again_optimizer, range(10, 12))
    train(reference, theirs, range(10, 12))
    for (name, a), b in zip(again.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_statistics_that_went_through_a_plain_optimizer_are_taken_up_again() -> None:
    model = net()
    optimizer = sgd(model)
    wellcond.attach(optimizer, model, transform_of("dense"))
    train(model, optimizer, range(5))
    plain, resumed = net(), net()
    through, theirs = sgd(plain), sgd(resumed)
    load(saved(model, optimizer), plain, through)
    wellcond.attach(theirs, resumed, transform_of("dense"))
    load(saved(plain, through), resumed, theirs)
    train(model, optimizer, range(5, 20))
    train(resumed, theirs, range(5, 20))
    assert_identical(everything(model, optimizer), everything(resumed, theirs))


def load_or_refusal(theirs: Optimizer, ours: Optimizer) -> tuple[list[str], str]:
    """Load one optimizer's state into the other; return its warnings, or the error that it raised."""
    try:
        return caught(lambda: theirs.load_state_dict(copy.deepcopy(ours.state_dict()))), ""
    except ValueError as error:
        return [], str(error)


OTHERS = [
    ("dense", {"second_moment": "kronecker"}),
    ("kronecker", {"second_moment": "dense"}),
    ("dense", {"second_moment": "low_rank"}),
    ("blocks", {"second_moment": "kronecker"}),
    ("dense", {"second_moment": "blocks"}),
    ("low rank", {"second_moment": "dense"}),
    ("sketched", {"second_moment": "kronecker", "max_dim": 64, "rank": 7}),
]


@pytest.mark.parametrize(("form", "other"), OTHERS)
def test_state_of_another_form_starts_anew_or_is_refused_naming_the_layer(form: str, other: dict[str, Any]) -> None:
    """Never a silent mixture: a form's tensors must not be read as another's."""
    model, resumed = net(), net()
    optimizer, theirs = sgd(model), sgd(resumed)
    wellcond.attach(optimizer, model, transform_of(form))
    train(model, optimizer, range(5))
    wellcond.attach(theirs, resumed, FeatureWhitening(**SCHEDULE, **other))
    train(resumed, theirs, range(1))
    messages, refusal = load_or_refusal(theirs, optimizer)
    if refusal:
        assert any(f"'{name}'" in refusal for name in ("conv", "mix", "fc"))
        assert "shape" in refusal
        return
    assert len(messages) == 1
    assert "start anew" in messages[0]
    assert any(f"({name}.weight" in messages[0] for name in ("conv", "mix", "fc"))
    assert caught(lambda: train(resumed, theirs, range(5, 10))) == []
    assert all(bool(torch.isfinite(parameter).all()) for parameter in resumed.parameters())


def with_each_factor_damped(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Give Kronecker forms the tensors that they had when each factor was damped and raised by itself."""
    found = copy.deepcopy(state_dict)
    for entry in found["state"].values():
        kept = {k.removeprefix("wellcond_whitening_"): v for k, v in entry.items() if str(k).startswith("wellcond_")}
        if "tap_second_moment" not in kept:
            continue
        for key in ("tap_directions", "excess", "tail"):
            entry.pop(f"wellcond_whitening_{key}", None)
        powers = {"tap_preconditioner": torch.zeros_like(kept["tap_second_moment"])}
        if "tail" in kept:
            powers["channel_excess"] = torch.zeros(kept["channel_directions"].shape[::2])
            powers["channel_tail"] = torch.ones(len(kept["channel_directions"]))
        else:
            powers["channel_preconditioner"] = entry.pop("wellcond_whitening_channel_directions")
        entry |= {f"wellcond_whitening_{key}": value for key, value in powers.items()}
    return found


@pytest.mark.parametrize("attached_first", [True, False])
@pytest.mark.parametrize("form", ["auto", "kronecker", "sketched"])
def test_kronecker_state_from_when_each_factor_was_damped_starts_anew_naming_the_layer(
    form: str, attached_first: bool
) -> None:
    model, resumed = net(), net()
    optimizer, theirs = sgd(model), sgd(resumed)
    wellcond.attach(optimizer, model, transform_of(form))
    train(model, optimizer, range(5))
    before = everything(model, optimizer)
    old = with_each_factor_damped(optimizer.state_dict())
    layers = ["mix"] if form == "auto" else ["conv", "mix"]
    if attached_first:
        wellcond.attach(theirs, resumed, transform_of(form))
        (message,) = caught(lambda: theirs.load_state_dict(old))
        assert f"no statistics of whitening for {len(layers)} of the weights ({layers[0]}.weight" in message
    else:
        theirs.load_state_dict(old)
        messages = caught(lambda: wellcond.attach(theirs, resumed, transform_of(form)))
        told = [message.split(" in another form")[0] for message in messages if "start anew" in message]
        assert [words.split()[-1] for words in told] == [f"{layer}.weight" for layer in layers]
    found = everything(resumed, theirs)
    for name, value in found.items():
        if "wellcond" not in name:
            continue
        assert name in before, f"left over: {name}"
        if name.split(".")[0] in layers and name.endswith(("second_moment", "sketch", "mass")):
            assert not value.any(), name
    assert torch.equal(found["fc.weight wellcond_whitening_mass"], before["fc.weight wellcond_whitening_mass"])
    assert caught(lambda: train(resumed, theirs, range(5, 10))) == []


@pytest.mark.parametrize(("form", "other"), OTHERS)
def test_after_state_of_another_form_no_entry_of_it_is_left_behind(form: str, other: dict[str, Any]) -> None:
    model, resumed, fresh = net(), net(), net()
    optimizer, theirs, unused = sgd(model), sgd(resumed), sgd(fresh)
    wellcond.attach(optimizer, model, transform_of(form))
    train(model, optimizer, range(5))
    for other_model, other_optimizer in ((resumed, theirs), (fresh, unused)):
        wellcond.attach(other_optimizer, other_model, FeatureWhitening(**SCHEDULE, **other))
    train(fresh, unused, range(1))
    if load_or_refusal(theirs, optimizer)[1]:
        return
    train(resumed, theirs, range(5, 7))
    assert everything(resumed, theirs).keys() == everything(fresh, unused).keys()


def test_a_state_dict_of_another_shape_is_refused_naming_the_layer() -> None:
    model = net()
    optimizer = sgd(model)
    wellcond.attach(optimizer, model, transform_of("dense"))
    train(model, optimizer, range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    index = [name for name, _ in model.named_parameters()].index("fc.weight")
    state_dict["state"][index]["wellcond_whitening_second_moment"] = torch.zeros(1, 4, 4)
    with pytest.raises(
        ValueError, match=r"wellcond_whitening_second_moment of layer 'fc'.*\(1, 261, 261\).*\(1, 4, 4\)"
    ):
        optimizer.load_state_dict(state_dict)


def test_a_group_that_is_switched_off_has_no_state_and_resumes() -> None:
    def grouped(model: Net) -> Optimizer:
        rest = [p for name, p in model.named_parameters() if not name.startswith("fc")]
        groups = [{"params": rest}, {"params": model.fc.parameters(), "wellcond_whitening": False}]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    model, resumed = net(), net()
    optimizer, theirs = grouped(model), grouped(resumed)
    wellcond.attach(optimizer, model, transform_of("auto"))
    wellcond.attach(theirs, resumed, transform_of("auto"))
    train(model, optimizer, range(5))
    assert not any("wellcond" in key for key in optimizer.state[model.fc.weight])
    load(saved(model, optimizer), resumed, theirs)
    assert theirs.param_groups[1]["wellcond_whitening"] is False
    train(model, optimizer, range(5, 15))
    train(resumed, theirs, range(5, 15))
    assert_identical(everything(model, optimizer), everything(resumed, theirs))
