"""What the zoo does with one architecture: three training steps with a transform, or a conversion there and back."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_architectures import Call, loss_of, outputs_of

import wellcond

STEPS = 3
RATE = 1e-3
PACKAGE = str(Path(wellcond.__file__).parent)
# What may be said of a model: nothing is covered, or some weights are used in a way that no probe sees.
EXPECTED_WARNINGS = ("covers none of the weights", "inputs were not seen", "inputs have not been seen")

# What a converted layer may say of inputs that have no statistics of its kind.
TOLD = (
    "xpected more than 1 spatial element when training",
    "xpected more than 1 patch when training",
    "expected input's size at dim=",
)

_OFTEN = {"stats_every": 1, "solve_every": 1}
TRANSFORMS: dict[str, Callable[[], wellcond.GradientTransform]] = {
    "GradientCentralization": lambda: wellcond.GradientCentralization(),
    "FeatureWhitening": lambda: wellcond.FeatureWhitening(**_OFTEN, max_dim=256),
    "FeatureDescent": lambda: wellcond.FeatureDescent(**_OFTEN, max_dim=256),
}
NORMS: dict[str, dict[str, Any]] = {
    "bsr": {},
    "mbn": {},
    "gn": {"num_groups": 2},
    "iternorm": {},
    "dbn": {},
    "sn": {},
    "kn": {},
    "ibn": {},
    "evalnorm": {},
    "ghost": {"group_size": 2},
    "brn": {},
    "cbn": {},
    "mabn": {},
    "pn": {},
    "ssn": {},
    "ln": {},
    "in": {},
}
ONE_WAY = ("gn", "ln", "in", "mabn")  # or what changes what the model computes
LAYERS: dict[str, dict[str, Any]] = {"wnn": {}, "eigen": {}, "gwnn": {}, "nd": {}}
ACTIONS = [*TRANSFORMS, *(f"norm {name}" for name in NORMS), *(f"layers {name}" for name in LAYERS)]


@dataclass
class Outcome:
    """What came of one action on one architecture.

    Attributes:
        architecture: Library and family.
        action: One of `ACTIONS`, or "build".
        result: "ok", "refused" (by an error of this library that names what it is about), "FAIL", or "not built".
        detail: Of a refusal its message, of a failure what was expected and what came.
        coverage: Share of the parameters whose gradient is changed; None where nothing was attached.
    """

    architecture: str
    action: str
    result: str
    detail: str = ""
    coverage: float | None = None

    def line(self) -> str:
        """Return one line of text."""
        share = "" if self.coverage is None else f"{self.coverage:4.0%} of the parameters"
        words = f"{self.architecture:<40} {self.action:<22} {self.result:<9} {share} {self.detail}"
        return words.replace("\n", " ").rstrip()


class Wrong(Exception):  # noqa: N818 - it is a finding of the zoo, not an error of it
    """A check did not hold."""


class Trial:
    """One architecture, built once; each action works on a copy.

    Args:
        title: Library and family.
        model: Newly made.
        call: Calls it, or a copy, on its inputs.
    """

    def __init__(self, title: str, model: nn.Module, call: Call) -> None:
        self.title, self.model, self.call = title, model, call
        _fill_zeros(model)
        plain = copy.deepcopy(model)
        self.loss = self._backward(plain)
        self.gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        again = copy.deepcopy(model)
        # Some models draw numbers that no seed rules, or sum in an order of their own: there equality says nothing.
        self.repeatable = torch.equal(self._backward(again), self.loss) and all(
            torch.equal(p.grad, self.gradients[name]) for name, p in again.named_parameters() if p.grad is not None
        )

    def run(self, action: str) -> Outcome:
        """Do one action, and say what came of it."""
        kind, _, name = action.partition(" ")
        try:
            with _warnings_are_findings():
                if action in TRANSFORMS:
                    coverage = self._attach(action)
                    return Outcome(self.title, action, "ok", coverage=coverage)
                refusal = self._convert(kind, name)
            return Outcome(self.title, action, "refused" if refusal else "ok", refusal or "")
        except Wrong as finding:
            return Outcome(self.title, action, "FAIL", str(finding))
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)]
            place = f" [{Path(frames[-1].filename).name}:{frames[-1].name}]" if frames else ""
            text = (str(error).strip().splitlines() or [""])[0][:300]
            return Outcome(self.title, action, "FAIL", f"{type(error).__name__}: {text}{place}")

    # training -------------------------------------------------------------------------------------------------------

    def _backward(self, model: nn.Module, seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        model.train()
        loss = loss_of(self.call(model))
        loss.backward()
        return loss.detach()

    def _evaluate(self, model: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        model.eval()
        with torch.no_grad():
            return [tensor.clone() for tensor in outputs_of(self.call(model))]

    def _steps(self, model: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0, count: int = STEPS) -> None:
        for step in range(first, first + count):
            optimizer.zero_grad()
            loss = self._backward(model, step)
            _require(bool(torch.isfinite(loss)), f"the loss is {loss.item()} at step {step + 1}")
            optimizer.step()
        for name, parameter in model.named_parameters():
            _require(bool(torch.isfinite(parameter).all()), f"{name} is not finite after {first + count} steps")

    # transforms -----------------------------------------------------------------------------------------------------

    def _attach(self, name: str) -> float:
        """Train with a transform; return which share of the parameters it changes the gradient of."""
        model = copy.deepcopy(self.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        handle = wellcond.attach(optimizer, model, TRANSFORMS[name]())
        loss = self._backward(model)
        if self.repeatable:
            _require(torch.equal(loss, self.loss), f"the loss is {loss.item()}, without transforms {self.loss.item()}")
        optimizer.step()
        rows = {row.name: row for row in next(iter(handle.coverage().values()))}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        changed = {n: row.how for n, row in rows.items() if row.state_bytes is not None}
        together = {n: row.how.removeprefix("together with ") for n, row in rows.items() if "together with" in row.how}
        covered = {id(parameters[n]): parameters[n] for n in (*changed, *together)}
        if self.repeatable:
            self._check_gradients(name, model, changed, together, covered)
        self._steps(model, optimizer, 1, STEPS - 1)
        if name != "GradientCentralization":
            self._check_statistics(next(iter(handle.coverage())), handle, optimizer, parameters)
        self._check_resume(name, model, optimizer)
        total = sum(parameter.numel() for parameter in model.parameters())
        return sum(parameter.numel() for parameter in covered.values()) / total

    def _check_gradients(
        self,
        name: str,
        model: nn.Module,
        changed: dict[str, str],
        together: dict[str, str],
        covered: dict[int, Tensor],
    ) -> None:
        """Compare the transformed gradients with the plain ones of the same pass."""
        now = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        _require(now.keys() == self.gradients.keys(), "other parameters have gradients than without transforms")
        ids = {n: id(p) for n, p in model.named_parameters()}
        for n, gradient in now.items():
            if ids[n] not in covered and not torch.equal(gradient, self.gradients[n]):
                raise Wrong(f"{n} is not covered, but its gradient was changed")
        for n in changed:
            parts = [n, *(bias for bias, weight in together.items() if weight == n)]
            parts = [part for part in parts if part in now]
            if not parts:
                continue
            before = torch.cat([self.gradients[part].double().flatten() for part in parts])
            after = torch.cat([now[part].double().flatten() for part in parts])
            scale = before.norm()
            if scale < 1e-20:
                continue
            if name == "GradientCentralization":
                off = float((after @ (before - after)).abs() / scale**2)
                _require(off < 1e-4, f"the gradient of {n} was not projected: off by {off:.2g} of its square")
                off = float(after.sum().abs() / (scale * len(after) ** 0.5))
                _require(off < 1e-4, f"the gradient of {n} does not sum to 0: {off:.2g}")
            elif not _untransformed(changed[n]):
                off = float((after.norm() - scale).abs() / scale)
                _require(off < 1e-2, f"the gradient of {n} has {1 + off:.3g} times the norm that it had")

    def _check_statistics(
        self, name: str, handle: wellcond.Attachment, optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor]
    ) -> None:
        """Whatever the report calls preconditioned has received statistics, if it has a gradient."""
        for row in handle.coverage()[name]:
            parameter = parameters[row.name]
            if row.state_bytes is None or parameter.grad is None or _untransformed(row.how):
                continue
            state = optimizer.state[parameter]
            updated, mass = state.get(f"wellcond_{name}_updated_at", -1), state.get(f"wellcond_{name}_mass", 0)
            if updated < 0 or not mass > 0:
                raise Wrong(f"{row.name} is reported as '{row.how}', but never received statistics")

    def _check_resume(self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """A training that is stopped, loaded into new objects and continued equals the one that went on."""
        if not self.repeatable:
            return
        differing = self._resumed(name, model, optimizer)
        if differing is not None:
            plain = copy.deepcopy(self.model)
            plain_optimizer = torch.optim.SGD(plain.parameters(), lr=RATE, momentum=0.9)
            self._steps(plain, plain_optimizer)
            # Some models hold more than their state dict, and differ without transforms, too.
            _require(
                self._resumed(None, plain, plain_optimizer) is not None,
                f"{differing} differs after a step from a loaded state dict",
            )

    def _resumed(self, name: str | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
        """Continue in place and from the saved state; return which parameter differs, if one does."""
        other = copy.deepcopy(self.model)
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        other_optimizer = torch.optim.SGD(other.parameters(), lr=RATE, momentum=0.9)
        if name is not None:
            wellcond.attach(other_optimizer, other, TRANSFORMS[name]())
        other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        self._steps(model, optimizer, STEPS, 1)
        self._steps(other, other_optimizer, STEPS, 1)
        pairs = zip(model.named_parameters(), other.parameters(), strict=True)
        return next((n for (n, a), b in pairs if not torch.equal(a, b)), None)

    # conversions ----------------------------------------------------------------------------------------------------

    def _copy(self, state: dict[str, Any]) -> nn.Module:
        """Return a copy with a state: what a model keeps from its passes may not be copied."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(copy.deepcopy(state))
        return model

    def _convert(self, kind: str, name: str) -> str | None:
        """Convert there and back, and train what was converted; return why it was refused, if it was."""
        model = copy.deepcopy(self.model)
        self._steps(model, torch.optim.SGD(model.parameters(), lr=RATE), count=1)
        converted = self._copy(model.state_dict())
        types = [type(module) for module in converted.modules()]
        try:
            _converted(converted, kind, name)
        except (TypeError, ValueError) as error:
            # A refusal is the library's own; what torch or a model raises inside a conversion is a fault.
            if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE):
                raise
            same = [type(module) for module in converted.modules()] == types
            _require(same, "the conversion was refused, but the model has changed")
            return str(error).replace("\n", " ")
        # Network deconvolution changes what the model computes.
        if name not in (*ONE_WAY, "nd"):
            back = _converted(self._copy(model.state_dict()), kind, name)
            if kind == "norm":
                wellcond.nn.convert_norm(back, to="bn")
            else:
                wellcond.nn.convert_layers(back, to="plain")
            self._check_same_outputs(model, back, "converting there and back", 0.0 if kind == "norm" else 1e-3)
            if kind == "norm":
                shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (back, model)]
                _require(shapes[0] == shapes[1], "the state dict has other entries after converting there and back")
        try:
            self._steps(converted, torch.optim.SGD(converted.parameters(), lr=RATE))
        except ValueError as error:
            if not any(each in str(error) for each in TOLD):
                raise
            return f"in training: {error}"
        loaded = _converted(self._copy(model.state_dict()), kind, name)
        loaded.load_state_dict(copy.deepcopy(converted.state_dict()))
        self._check_same_outputs(converted, loaded, "loading the state dict", 1e-5)
        return None

    def _check_same_outputs(self, one: nn.Module, other: nn.Module, after: str, tolerance: float) -> None:
        expected = self._evaluate(one)
        if not all(torch.equal(a, b) for a, b in zip(expected, self._evaluate(one), strict=True)):
            return
        for a, b in zip(expected, self._evaluate(other), strict=True):
            _require(a.shape == b.shape, f"evaluation returns other shapes after {after}")
            off = float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
            _require(off <= tolerance, f"evaluation is off by {off:.2g} after {after}")


def _converted(model: nn.Module, kind: str, name: str) -> nn.Module:
    if kind == "norm":
        return wellcond.nn.convert_norm(model, to=name, **NORMS[name])
    return wellcond.nn.convert_layers(model, to=name, **LAYERS[name])


def _untransformed(how: str) -> bool:
    """Whether the report says that a weight keeps its plain gradient all the same."""
    return how.startswith(("plain gradient", "unchanged", "not ")) or "not seen" in how or "plain gradient" in how


def _fill_zeros(model: nn.Module) -> None:
    """Give weights that begin as zeros small numbers: behind a head or a gate of zeros no gradient arrives."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Wrong(otherwise)


@contextmanager
def _warnings_are_findings() -> Iterator[None]:
    """Turn the library's warnings into findings, but for those that a model may well give."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield
    for warning in record:
        text = str(warning.message)
        if issubclass(warning.category, wellcond.WellcondWarning) and not any(e in text for e in EXPECTED_WARNINGS):
            raise Wrong(f"warned: {text}")
