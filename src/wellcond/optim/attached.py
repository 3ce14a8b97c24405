"""The bases of the named optimizers: a torch optimizer and a transform in one class, with the options of both."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, get_type_hints

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from wellcond.runtime.checks import checked, checks_itself
from wellcond.transforms import Attachment, GradientTransform, attach

# What algorithms 5, 6 and 8 of the thesis do where the transforms' defaults do otherwise, and the intervals that its
# experiments had; damping, statistics momentum and norm recovery are the transforms' defaults.
_PUBLISHED: dict[str, Any] = {"second_moment": "dense", "solve_warmup": False, "stats_every": 50, "solve_every": 500}


class Attached:
    """Mixin of the named optimizers: options split between torch's optimizer and the transform."""

    transform_type: type[GradientTransform]
    attachment: Attachment

    def _attach(self, model: nn.Module, options: dict[str, Any], as_published: bool) -> None:
        assert isinstance(self, torch.optim.Optimizer)
        if as_published:
            options = _PUBLISHED | options
        known = list(inspect.signature(self.transform_type).parameters)
        for option in options.keys() - known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{type(self).__name__} has no option {option!r}{hint}")
        self.attachment = attach(self, model, self.transform_type(**options))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} is tied to its model and cannot be copied or pickled: save and load state_dict()"
        )


Named = TypeVar("Named", bound=type[Attached])


def with_options_of(base: type[torch.optim.Optimizer]) -> Callable[[Named], Named]:
    """Return a class decorator that shows the options of the torch optimizer and of the transform in the signature."""

    def show(kind: Named) -> Named:
        inherited: Callable[..., None] = kind.__init__
        own = inspect.signature(inherited)
        shown = {name: each for name, each in own.parameters.items() if each.kind is not each.VAR_KEYWORD}
        for source in (kind.transform_type, base):
            hints = get_type_hints(source.__init__)
            for name, each in inspect.signature(source).parameters.items():
                if name not in shown and name != "params":
                    shown[name] = each.replace(kind=each.KEYWORD_ONLY, annotation=hints.get(name, Any))
        hints = get_type_hints(inherited)
        parameters = [each.replace(annotation=hints.get(name, each.annotation)) for name, each in shown.items()]

        def begin(self: Any, *args: Any, **options: Any) -> None:
            inherited(self, *args, **options)

        # Where inspect looks, and what it is asked by.
        begin.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        kind.__init__ = checked(checks_itself("model")(begin))  # type: ignore[method-assign]
        return kind

    return show


def parameters_in(model: nn.Module, params: ParamsT | None) -> ParamsT:
    """Return the parameters that were given, or else all of the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: parameters or groups of them go to params= "
            "(where a config gives parameters alone: attach by a callback, see wellcond.integrations)"
        )
    return model.parameters() if params is None else params


def split_options(base: type[torch.optim.Optimizer], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword options into those of torch's optimizer and those of the transform."""
    known = inspect.signature(base).parameters
    of_torch = {key: value for key, value in options.items() if key in known}
    return of_torch, {key: value for key, value in options.items() if key not in known}


class FeatureSGD(Attached, torch.optim.SGD):
    """SGD with momentum over a feature preconditioner."""

    @checked
    @checks_itself("model")
    def __init__(
        self,
        model: nn.Module,
        lr: float | torch.Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        params: ParamsT | None = None,
        as_published: bool = False,
        **feature_options: Any,
    ) -> None:
        of_torch, options = split_options(torch.optim.SGD, feature_options)
        super().__init__(parameters_in(model, params), lr=lr, momentum=momentum, weight_decay=weight_decay, **of_torch)
        self._attach(model, options, as_published)


class FeatureAdamW(Attached, torch.optim.AdamW):
    """AdamW over a feature preconditioner."""

    @checked
    @checks_itself("model")
    def __init__(
        self,
        model: nn.Module,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        params: ParamsT | None = None,
        as_published: bool = False,
        **feature_options: Any,
    ) -> None:
        of_torch, options = split_options(torch.optim.AdamW, feature_options)
        super().__init__(
            parameters_in(model, params), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **of_torch
        )
        self._attach(model, options, as_published)


class DecoupledSGD(torch.optim.SGD):
    """SGD whose weight decay is decoupled: w ← (1 − lr·λ) w beside the update, not through the momentum."""

    def __init__(self, params: ParamsT, **options: Any) -> None:
        super().__init__(params, **options)
        # By this word attachments, too, know the kind of decay.
        self.defaults["decoupled_weight_decay"] = True
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Shrink the weights that have a gradient, then step as SGD without weight decay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group["weight_decay"] for group in self.param_groups]
        found_inf = getattr(self, "found_inf", None)
        try:
            for group, decay in zip(self.param_groups, decays, strict=True):
                shrink = group["lr"] * decay
                keep = 1 - (shrink if found_inf is None else shrink * (1 - found_inf))
                with torch.no_grad():
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.mul_(keep)
                group["weight_decay"] = 0.0
            super().step()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        return loss
