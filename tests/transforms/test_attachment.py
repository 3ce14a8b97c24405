"""Attaching: what is refused and in which words, groups, wrappers, closures, and what a handle tells."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.checkpoint import checkpoint

import wellcond
from wellcond import FeatureDescent, FeatureWhitening, GradientCentralization
from wellcond.transforms import WellcondWarning


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def second_moment(optimizer: torch.optim.Optimizer, weight: Tensor) -> Tensor:
    return optimizer.state[weight]["wellcond_whitening_second_moment"]


class TestRefusals:
    def test_no_transform(self) -> None:
        model = linear()
        with pytest.raises(ValueError, match="at least one transform"):
            wellcond.attach(sgd(model), model)

    @pytest.mark.parametrize(
        ("transform", "hint"),
        [
            (GradientCentralization, r"did you mean GradientCentralization\(\)\?"),
            ([GradientCentralization()], "give them one by one, not as a sequence"),
            (("whitening",), "give them one by one, not as a sequence"),
        ],
    )
    def test_what_is_no_transform(self, transform: Any, hint: str) -> None:
        model = linear()
        with pytest.raises(TypeError, match=f"transforms must be GradientTransforms, got .*{hint}"):
            wellcond.attach(sgd(model), model, transform)

    def test_a_kind_twice_in_one_call_or_in_two(self) -> None:
        model = linear()
        optimizer = sgd(model)
        with pytest.raises(ValueError, match="GradientCentralization is attached to this SGD already"):
            wellcond.attach(optimizer, model, GradientCentralization(), GradientCentralization("conv"))
        handle = wellcond.attach(optimizer, model, GradientCentralization())
        with pytest.raises(ValueError, match="GradientCentralization is attached to this SGD already"):
            wellcond.attach(optimizer, model, GradientCentralization())
        handle.remove()
        wellcond.attach(optimizer, model, GradientCentralization())

    def test_a_refused_attachment_leaves_the_optimizer_as_it_was(self) -> None:
        model, reference = linear(), linear()
        optimizer = sgd(model, weight_decay=0.1)
        with pytest.raises(ValueError, match="needs decoupled weight decay"):
            wellcond.attach(optimizer, model, GradientCentralization(where="update", decay="outside"))
        for net, opt in ((model, optimizer), (reference, sgd(reference, weight_decay=0.1))):
            net(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
            opt.step()
        assert torch.equal(model.weight, reference.weight)

    def test_a_model_that_shares_no_parameter(self) -> None:
        with pytest.raises(ValueError, match=r"model \(Linear\) shares no parameter with the optimizer \(SGD\)"):
            wellcond.attach(sgd(linear()), linear(), GradientCentralization())

    def test_things_of_another_type(self) -> None:
        model = linear()
        with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got Linear"):
            wellcond.attach(model, sgd(model), GradientCentralization())
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
            wellcond.attach(sgd(model), [model], GradientCentralization())
        with pytest.raises(TypeError, match=r"did you mean GradientCentralization\(\)\?"):
            wellcond.attach(sgd(model), model, GradientCentralization)
        with pytest.raises(ValueError, match="weight_decay must be one of 'auto', 'coupled', 'decoupled', got 'L2'"):
            wellcond.attach(sgd(model), model, GradientCentralization(), weight_decay="L2")

    def test_a_sparse_gradient(self) -> None:
        model = nn.Embedding(5, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wellcond.attach(optimizer, model, GradientCentralization(layers=lambda name, module: True))
        model.sparse = True  # or: whoever calls F.embedding(…, sparse=True) on its weight
        model(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(ValueError, match="'weight' has a sparse gradient"):
            optimizer.step()

    def test_a_layer_that_will_make_sparse_gradients_is_left_out_with_the_reason(self) -> None:
        model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = wellcond.attach(optimizer, model, GradientCentralization(layers=lambda name, module: True))
        assert "sparse gradients (sparse=True)" in handle.report()
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()


def test_a_transform_that_covers_nothing_is_told_of() -> None:
    model = linear()
    optimizer = sgd(model)
    with pytest.warns(
        WellcondWarning, match=r"GradientCentralization covers none .* \(not centred: not a convolution\)"
    ):
        wellcond.attach(optimizer, model, GradientCentralization("conv"))


class TestWrappers:
    def test_the_optimizer_inside_a_wrapper_is_found(self) -> None:
        class Wrapper:
            def __init__(self, optimizer: torch.optim.Optimizer) -> None:
                self.optimizer = optimizer

        model = linear()
        optimizer = sgd(model)
        wellcond.attach(Wrapper(optimizer), model, GradientCentralization())
        model(torch.randn(2, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        assert model.weight.grad is not None
        assert model.weight.grad.sum(dim=1).abs().max() < 1e-12

    def test_lr_schedulers_and_clipping_work_as_before(self) -> None:
        model = linear()
        optimizer = sgd(model)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        wellcond.attach(optimizer, model, GradientCentralization())
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(2, 4, dtype=torch.float64)).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)

    def test_an_optimizer_that_is_let_go_is_freed_with_its_attachment(self) -> None:
        model = linear()
        optimizer = sgd(model)
        alive = weakref.ref(wellcond.attach(optimizer, model, FeatureWhitening()))
        del optimizer
        gc.collect()
        assert alive() is None
        model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()  # its forward hook finds nobody, and is silent


class TestClosures:
    def test_a_closure_evaluated_many_times_is_observed_once(self) -> None:
        """L-BFGS calls its closure several times a step: each gradient is transformed, one forward is counted."""
        model = linear()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        wellcond.attach(optimizer, model, FeatureWhitening(stats_every=1, solve_every=1, stats_decay=0.0))
        inputs = torch.randn(6, 4, dtype=torch.float64)
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        first = optimizer.step(closure)
        assert calls > 1
        x = torch.cat([inputs, torch.ones(6, 1, dtype=torch.float64)], dim=1)
        torch.testing.assert_close(second_moment(optimizer, model.weight)[0], x.T @ x / 6)
        for _ in range(10):
            last = optimizer.step(closure)
        assert last < first

    def test_two_attachments_apply_in_the_order_they_were_made(self) -> None:
        models = [linear(), linear()]
        inputs = torch.randn(6, 4, dtype=torch.float64)
        for model, together in zip(models, (True, False), strict=True):
            optimizer = sgd(model)
            transforms = (GradientCentralization(), FeatureWhitening())
            if together:
                wellcond.attach(optimizer, model, *transforms)
            else:
                for transform in transforms:
                    wellcond.attach(optimizer, model, transform)
            for closure in (None, lambda m=model: m(inputs).square().mean().backward()):
                optimizer.zero_grad()
                if closure is None:
                    model(inputs).square().mean().backward()
                optimizer.step(closure)
        assert torch.equal(models[0].weight, models[1].weight)


class TestExactlyOnce:
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_checkpointed_forward_counts_once(self, reentrant: bool) -> None:
        """Trap 4: recomputation runs each forward twice; with reentrance the first has gradients off."""
        moments = []
        for checkpointed in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
            optimizer = sgd(model)
            wellcond.attach(optimizer, model, FeatureWhitening(stats_every=1))
            for step in range(3):
                optimizer.zero_grad()
                for part in range(2):  # accumulation: two passes a step
                    torch.manual_seed(10 * step + part)
                    x = torch.randn(6 + part, 4, dtype=torch.float64, requires_grad=True)
                    y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
                    y.square().mean().backward()
                optimizer.step()
            moments.append([second_moment(optimizer, model[i].weight) for i in (0, 2)])
        for plain, ours in zip(*moments, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)

    def test_the_samples_of_a_step_that_a_scaler_skips_do_not_count(self) -> None:
        """Their gradient is never used."""
        model = linear()
        optimizer = sgd(model)
        wellcond.attach(optimizer, model, FeatureWhitening(stats_every=1, stats_decay=0.0))
        batches = [torch.randn(size, 4, dtype=torch.float64) for size in (3, 5)]
        for x in batches:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if x is batches[1]:
                optimizer.step()  # GradScaler calls no step() at all when it finds infinities
        rows = torch.cat([batches[1], torch.ones(5, 1, dtype=torch.float64)], dim=1)
        torch.testing.assert_close(second_moment(optimizer, model.weight)[0], rows.T @ rows / 5)

    def test_a_model_whose_inputs_are_never_seen_is_told_of(self) -> None:
        model = linear()
        optimizer = sgd(model)
        wellcond.attach(optimizer, model, FeatureDescent())
        x = torch.randn(6, 4, dtype=torch.float64)

        def step() -> None:
            nn.functional.linear(x, model.weight, model.bias).square().mean().backward()
            optimizer.step()

        step()
        with pytest.warns(WellcondWarning, match="inputs were not seen"):
            step()
        step()  # told once


def test_a_first_batch_that_is_not_finite_does_not_use_up_the_first_solve() -> None:
    model = linear()
    optimizer = sgd(model, momentum=0.9)
    handle = wellcond.attach(optimizer, model, FeatureWhitening(stats_every=2, solve_every=100, solve_warmup=False))
    preconditioners = []
    for step in range(4):
        x = torch.randn(6, 4, dtype=torch.float64)
        optimizer.zero_grad()
        model(x * torch.inf if step == 0 else x).square().mean().backward()
        if step == 0:
            model.weight.grad, model.bias.grad = torch.zeros_like(model.weight), torch.zeros_like(model.bias)
        optimizer.step()
        preconditioners.append(optimizer.state[model.weight]["wellcond_whitening_preconditioner"].clone())
    identity = torch.eye(5, dtype=torch.float64)[None]
    assert [torch.equal(preconditioner, identity) for preconditioner in preconditioners] == [True, True, False, False]
    assert handle.stats()["whitening"]["skipped_updates"] == 1


class TestCheckpoints:
    def test_statistics_of_bfloat16_weights_stay_float32_and_resume_exactly(self) -> None:
        """Trap 2: torch casts loaded floating-point state to the parameter's dtype."""

        def make() -> tuple[nn.Module, torch.optim.Optimizer]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).bfloat16()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            wellcond.attach(optimizer, model, FeatureWhitening(stats_every=2, solve_every=3))
            return model, optimizer

        def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
            for step in steps:
                generator = torch.Generator().manual_seed(step)
                x = torch.randn(6, 4, generator=generator).bfloat16()
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()

        model, optimizer = make()
        train(model, optimizer, range(5))
        saved = {key: value.clone() for key, value in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
        resumed, theirs = make()
        resumed.load_state_dict(saved[0])
        theirs.load_state_dict(saved[1])
        moment = second_moment(theirs, resumed[0].weight)
        assert moment.dtype == torch.float32
        assert torch.equal(moment, second_moment(optimizer, model[0].weight))
        train(model, optimizer, range(5, 12))
        train(resumed, theirs, range(5, 12))
        for ours, other in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(ours, other)

    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
    def test_resumes_exactly_through_a_distributed_checkpoint(self, tmp_path: Path) -> None:
        def make() -> tuple[nn.Module, torch.optim.Optimizer]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            wellcond.attach(optimizer, model, FeatureWhitening(stats_every=2, solve_every=3))
            return model, optimizer

        def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
            for step in steps:
                optimizer.zero_grad()
                model(torch.randn(6, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
                optimizer.step()

        model, optimizer = make()
        train(model, optimizer, range(5))
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
        resumed, theirs = make()
        weights, state = get_state_dict(resumed, theirs)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
        set_state_dict(resumed, theirs, model_state_dict=weights, optim_state_dict=state)
        train(model, optimizer, range(5, 12))
        train(resumed, theirs, range(5, 12))
        for ours, other in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(ours, other)

    def test_a_state_rounded_by_loading_before_attaching_is_told_of(self) -> None:
        model = linear().bfloat16()
        optimizer = sgd(model, momentum=0.9)
        handle = wellcond.attach(optimizer, model, FeatureWhitening())
        model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        state = optimizer.state_dict()
        state["state"][0] = dict(state["state"][0])
        handle.remove()
        other = sgd(model, momentum=0.9)
        other.load_state_dict(state)
        with pytest.warns(WellcondWarning, match="attach first, then load"):
            wellcond.attach(other, model, FeatureWhitening())

    def test_a_state_of_float32_that_was_loaded_before_attaching_was_not_rounded(self) -> None:
        model = linear().float()
        optimizer = sgd(model, momentum=0.9)
        handle = wellcond.attach(optimizer, model, FeatureWhitening())
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        moment = second_moment(optimizer, model.weight).clone()
        handle.remove()
        optimizer.load_state_dict(state)
        wellcond.attach(optimizer, model, FeatureWhitening())
        assert torch.equal(second_moment(optimizer, model.weight), moment)
        assert optimizer.state[model.weight]["wellcond_whitening_skipped"].dtype == torch.int64

    def test_a_plain_optimizers_state_is_taken_and_told_of(self) -> None:
        model = linear()
        plain = sgd(model, momentum=0.9)
        model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
        plain.step()
        optimizer = sgd(model, momentum=0.9)
        wellcond.attach(optimizer, model, FeatureWhitening())
        with pytest.warns(WellcondWarning, match=r"no statistics of whitening for 1 of the weights \(weight\)"):
            optimizer.load_state_dict(plain.state_dict())
        assert torch.equal(
            optimizer.state[model.weight]["momentum_buffer"], plain.state[model.weight]["momentum_buffer"]
        )

    def test_a_preconditioned_optimizers_state_loads_into_a_plain_one(self) -> None:
        model = linear()
        optimizer = sgd(model, momentum=0.9)
        wellcond.attach(optimizer, model, FeatureWhitening())
        model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
        optimizer.step()
        plain = sgd(model, momentum=0.9)
        plain.load_state_dict(optimizer.state_dict())
        plain.step()

    def test_a_state_of_another_shape_names_the_layer(self) -> None:
        model = linear()
        optimizer = sgd(model, momentum=0.9)
        wellcond.attach(optimizer, model, FeatureWhitening())
        model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
        optimizer.step()
        state = optimizer.state_dict()
        state["state"][0]["wellcond_whitening_second_moment"] = torch.ones(2, 2)
        with pytest.raises(
            ValueError, match=r"second_moment of layer '.*' must have the shape \(1, 5, 5\), got \(2, 2\)"
        ):
            optimizer.load_state_dict(state)


def test_the_report_says_what_is_done_and_why_not() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Gate(), nn.ConvTranspose2d(8, 4, 2), nn.Embedding(5, 2), nn.Linear(4, 2)
    )
    optimizer = torch.optim.SGD([p for i, m in enumerate(model) for p in m.parameters() if i != 5], lr=0.1)
    handle = wellcond.attach(optimizer, model, GradientCentralization(), FeatureWhitening())
    centralization, whitening = (block.splitlines() for block in handle.report().split("\n\n"))
    assert centralization[0] == "centralization over SGD"
    assert whitening[0] == "whitening over SGD"
    assert "gradient centred over 27 inputs of each of 8 output units" in centralization[1]
    assert "not centred: a norm layer's scale" in centralization[3]
    assert "no rule for the layer type Gate" in centralization[5]
    assert "gradient centred over 32 inputs of each of 4 output units" in centralization[6]
    assert "an embedding table" in centralization[8]
    assert "not held by this optimizer" in centralization[9]
    assert "preconditioned, dense 28 × 28" in whitening[1]
    assert whitening[1].endswith("6.3 kB")
    assert "together with 0.weight" in whitening[2]
    assert "plain gradient: a norm layer" in whitening[3]
    assert "no rule for the layer type Gate" in whitening[5]
    assert "preconditioned, dense 33 × 33" in whitening[6]
    assert whitening[6].endswith("8.7 kB")
    assert "preconditioned, diagonal of 5" in whitening[8]
    assert whitening[8].endswith("40 B")
    assert "not held by this optimizer" in whitening[9]
