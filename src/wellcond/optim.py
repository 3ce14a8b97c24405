"""Named optimizers: a torch optimizer plus one attached transform, nothing else.

By default they take the library's form of the second moment and of the first solves; ``as_published=True`` takes the
thesis's.

Their signatures show the options of both by name, so that what builds them from a config file (LightningCLI, Hydra) can
check these. A config that has only parameters and no model takes `from_parameters`, and the transform is attached by a
callback (`wellcond.integrations`).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NoReturn, TypeVar, get_type_hints

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from wellcond.deferred import attach_deferred, defer, parameters_of
from wellcond.grouping import Group, ParameterGroups, parameter_groups
from wellcond.runtime.checks import check_positive_integer, checked, checks_itself
from wellcond.transforms import Attachment, FeatureDescent, FeatureWhitening, GradientTransform, attach
from wellcond.transforms.preconditioner.norm_recovery import Norm

__all__ = [
    "DWSGDM",
    "FSGD",
    "WSGDM",
    "FAdam",
    "Group",
    "ParameterGroups",
    "WAdam",
    "attach_deferred",
    "create",
    "from_parameters",
    "intervals",
    "names",
    "parameter_groups",
]

# What algorithms 5, 6 and 8 of the thesis do where the transforms' defaults do otherwise, and the intervals that its
# experiments had; damping, statistics momentum and norm recovery are the transforms' defaults.
_PUBLISHED: dict[str, Any] = {"second_moment": "dense", "solve_warmup": False, "stats_every": 50, "solve_every": 500}


class _Attached:
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


Named = TypeVar("Named", bound=type[_Attached])


def _with_options_of(base: type[torch.optim.Optimizer]) -> Callable[[Named], Named]:
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


def _parameters(model: nn.Module, params: ParamsT | None) -> ParamsT:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: parameters or groups of them go to params= "
            "(where a config gives parameters alone: attach by a callback, see wellcond.integrations)"
        )
    return model.parameters() if params is None else params


def _split(base: type[torch.optim.Optimizer], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword options into those of torch's optimizer and those of the transform."""
    known = inspect.signature(base).parameters
    of_torch = {key: value for key, value in options.items() if key in known}
    return of_torch, {key: value for key, value in options.items() if key not in known}


class _FeatureSGD(_Attached, torch.optim.SGD):
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
        of_torch, options = _split(torch.optim.SGD, feature_options)
        super().__init__(_parameters(model, params), lr=lr, momentum=momentum, weight_decay=weight_decay, **of_torch)
        self._attach(model, options, as_published)


class _FeatureAdamW(_Attached, torch.optim.AdamW):
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
        of_torch, options = _split(torch.optim.AdamW, feature_options)
        super().__init__(_parameters(model, params), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **of_torch)
        self._attach(model, options, as_published)


class _DecoupledSGD(torch.optim.SGD):
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


@_with_options_of(torch.optim.SGD)
class DWSGDM(_Attached, _DecoupledSGD):
    """DW-SGDM, doubly whitened SGD with momentum: both sides of each layer's gradient whitened, in a fixed norm.

    Each layer's update is L^(−1/2) G M^(−1/2), M the second moment of its input, L that of the product's rows, scaled
    to the norm √min(out, inputs) of an orthogonal matrix; then momentum, and decoupled weight decay. It is no published
    algorithm: W-SGDM's transform with the norm rule and the second side that Muon's updates have (see "How it relates"
    in the documentation for what was measured).

    Because the norm is fixed, one learning rate means the same for every layer and width, and it does not shrink as
    gradients do: it must be decayed to zero by a schedule (cosine or linear). Warm-up was not tried.

    Args:
        model: The model; its layers' inputs are observed.
        lr: Learning rate. 0.024 and 0.05 were best in two small runs; 0.02 is a first try.
        momentum: Momentum, after the whitening.
        weight_decay: Decoupled, per unit of lr: each step multiplies the weights by 1 − lr · weight_decay.
        params: Parameters or parameter groups as any torch optimizer takes them; default ``model.parameters()``.
        norm: As of `wellcond.FeatureWhitening`.
        outputs: Whether the outputs' side is whitened too, likewise.
        **feature_options: Options of `wellcond.FeatureWhitening`, or of ``torch.optim.SGD`` (nesterov, foreach, …).

    Raises:
        TypeError: If ``model`` is no module or an option is unknown.
        ValueError: If an option is outside its range.

    Example:
        >>> optimizer = DWSGDM(nn.Linear(4, 2), stats_every=5, solve_every=25)
        >>> print(optimizer.attachment.report())
        whitening over DWSGDM
        weight  (2, 4)  preconditioned, dense 5 × 5, outputs 2 × 2  232 B
        bias    (2,)    together with weight
        in all: 2 of 2 parameters, 232 B kept
    """

    transform_type = FeatureWhitening

    @checked
    @checks_itself("model")
    def __init__(
        self,
        model: nn.Module,
        lr: float | torch.Tensor = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 0.1,
        params: ParamsT | None = None,
        norm: Norm = "fixed",
        outputs: bool = True,
        **feature_options: Any,
    ) -> None:
        of_torch, options = _split(torch.optim.SGD, feature_options)
        super().__init__(_parameters(model, params), lr=lr, momentum=momentum, weight_decay=weight_decay, **of_torch)
        self._attach(model, {"norm": norm, "outputs": outputs, **options}, as_published=False)


@_with_options_of(torch.optim.SGD)
class FSGD(_FeatureSGD):
    """Feature SGD: ``torch.optim.SGD`` over `wellcond.FeatureDescent`, after algorithm 5 of the thesis.

    By default it is not that algorithm to the letter: wide second moments are factored (``second_moment="auto"``), and
    the first matrices are solved early. ``as_published=True`` gives the algorithm. The same descent is known as FOOF
    (Benzing, 2022).

    Args:
        model: The model; its layers' inputs are observed.
        lr: Learning rate (classical momentum, as torch's).
        momentum: Momentum.
        weight_decay: Coupled weight decay, added after the preconditioner.
        params: Parameters or parameter groups as any torch optimizer takes them; default ``model.parameters()``.
        as_published: Take the algorithm as printed: whole second moments (``second_moment="dense"``) every 50 steps,
            factorized after the first batch and every 500 steps (``solve_warmup=False``). Options that are given go
            before these. Time and memory then grow with the cube and the square of a layer's width.
        **feature_options: Options of `wellcond.FeatureDescent`, or of ``torch.optim.SGD`` (nesterov, foreach, …).

    Raises:
        TypeError: If ``model`` is no module or an option is unknown.
        ValueError: If an option is outside its range.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = FSGD(model, lr=0.05, weight_decay=1e-3, stats_every=5, solve_every=25)
        >>> optimizer.attachment.transforms[0].solve_every
        25
    """

    transform_type = FeatureDescent


@_with_options_of(torch.optim.SGD)
class WSGDM(_FeatureSGD):
    """W-SGDM: ``torch.optim.SGD`` over `wellcond.FeatureWhitening`, after algorithm 8 of the thesis.

    By default it is not that algorithm to the letter: wide second moments are factored (``second_moment="auto"``), and
    the first matrices are solved early. ``as_published=True`` gives the algorithm.

    Args:
        model: The model; its layers' inputs are observed.
        lr: Learning rate (classical momentum, as torch's).
        momentum: Momentum.
        weight_decay: Coupled weight decay, added after the preconditioner.
        params: Parameters or parameter groups as any torch optimizer takes them; default ``model.parameters()``.
        as_published: Take the algorithm as printed: whole second moments (``second_moment="dense"``) every 50 steps,
            factorized after the first batch and every 500 steps (``solve_warmup=False``). Options that are given go
            before these. Time and memory then grow with the cube and the square of a layer's width.
        **feature_options: Options of `wellcond.FeatureWhitening`, or of ``torch.optim.SGD`` (nesterov, foreach, …).

    Raises:
        TypeError: If ``model`` is no module or an option is unknown.
        ValueError: If an option is outside its range.

    Example:
        >>> optimizer = WSGDM(nn.Linear(4, 2), lr=0.05)
        >>> isinstance(optimizer, torch.optim.SGD)
        True
    """

    transform_type = FeatureWhitening


@_with_options_of(torch.optim.AdamW)
class FAdam(_FeatureAdamW):
    """Feature Adam: ``torch.optim.AdamW`` over `wellcond.FeatureDescent`, after algorithm 6 of the thesis.

    By default it is not that algorithm to the letter: wide second moments are factored (``second_moment="auto"``), and
    the first matrices are solved early. ``as_published=True`` gives the algorithm, with AdamW's weight decay: the
    printed one takes a λ and never uses it. This is not the FAdam of Hwang (2024), a natural-gradient variant of Adam.

    Args:
        model: The model; its layers' inputs are observed.
        lr: Learning rate.
        betas: Adam's moving-average coefficients.
        eps: Adam's ε.
        weight_decay: Decoupled weight decay.
        params: Parameters or parameter groups as any torch optimizer takes them; default ``model.parameters()``.
        as_published: Take the algorithm as printed: whole second moments (``second_moment="dense"``) every 50 steps,
            factorized after the first batch and every 500 steps (``solve_warmup=False``). Options that are given go
            before these. Time and memory then grow with the cube and the square of a layer's width.
        **feature_options: Options of `wellcond.FeatureDescent`, or of ``torch.optim.AdamW`` (amsgrad, fused, …).

    Raises:
        TypeError: If ``model`` is no module or an option is unknown.
        ValueError: If an option is outside its range.

    Example:
        >>> optimizer = FAdam(nn.Linear(4, 2), lr=1e-3, damping=0.1)
        >>> isinstance(optimizer, torch.optim.AdamW)
        True
    """

    transform_type = FeatureDescent


@_with_options_of(torch.optim.AdamW)
class WAdam(_FeatureAdamW):
    """W-Adam: ``torch.optim.AdamW`` over `wellcond.FeatureWhitening`, after algorithm 8 of the thesis.

    By default it is not that algorithm to the letter: wide second moments are factored (``second_moment="auto"``), and
    the first matrices are solved early. ``as_published=True`` gives the algorithm.

    Args:
        model: The model; its layers' inputs are observed.
        lr: Learning rate.
        betas: Adam's moving-average coefficients.
        eps: Adam's ε.
        weight_decay: Decoupled weight decay.
        params: Parameters or parameter groups as any torch optimizer takes them; default ``model.parameters()``.
        as_published: Take the algorithm as printed: whole second moments (``second_moment="dense"``) every 50 steps,
            factorized after the first batch and every 500 steps (``solve_warmup=False``). Options that are given go
            before these. Time and memory then grow with the cube and the square of a layer's width.
        **feature_options: Options of `wellcond.FeatureWhitening`, or of ``torch.optim.AdamW`` (amsgrad, fused, …).

    Raises:
        TypeError: If ``model`` is no module or an option is unknown.
        ValueError: If an option is outside its range.

    Example:
        >>> optimizer = WAdam(nn.Linear(4, 2), lr=1e-3)
        >>> optimizer.attachment.stats()["whitening"]["weights"]
        1
    """

    transform_type = FeatureWhitening


# What the named optimizers' signatures show beside options of torch's optimizer and of the transform.
_OURS = ("model", "lr", "params", "as_published")

_NAMED: dict[str, type[FSGD | WSGDM | FAdam | WAdam | DWSGDM]] = {
    kind.__name__.casefold(): kind for kind in (FSGD, WSGDM, FAdam, WAdam, DWSGDM)
}


def names(pattern: str = "*") -> list[str]:
    """Return the names of the named optimizers.

    Args:
        pattern: What they must match; ``*`` stands for any signs, and case does not matter.

    Example:
        >>> names("w*")
        ['wadam', 'wsgdm']
    """
    return sorted(name for name in _NAMED if fnmatchcase(name, pattern.casefold()))


def intervals(total_steps: int) -> dict[str, int]:
    """Return a preconditioner's intervals that suit a run of this many steps.

    The defaults (50 and 500) are for long runs; one of 200 steps would hardly refresh with them.

    Args:
        total_steps: Optimizer steps of the run.

    Returns:
        ``stats_every`` and ``solve_every``, for a transform or a named optimizer.

    Raises:
        ValueError: If it is no positive integer.

    Example:
        >>> intervals(186)
        {'stats_every': 5, 'solve_every': 25}
        >>> intervals(40_000)
        {'stats_every': 50, 'solve_every': 500}
    """
    check_positive_integer("total_steps", total_steps)
    if total_steps >= 2000:
        return {"stats_every": 50, "solve_every": 500}
    stats_every = max(1, round(total_steps / 40))
    return {"stats_every": stats_every, "solve_every": 5 * stats_every}


def from_parameters(
    params: ParamsT, name: str, lr: float | torch.Tensor, total_steps: int | None = None, **options: Any
) -> torch.optim.Optimizer:
    """Return a named optimizer from parameters alone, for LightningCLI, Hydra and others that know no model yet.

    It is the torch optimizer, and refuses to step until the transform is attached: by wellcond's callback
    (`wellcond.integrations`) when training begins, or by `attach_deferred`.

    Args:
        params: Parameters, or groups of them.
        name: As `create` takes it.
        lr: Learning rate.
        total_steps: Optimizer steps of the run, in place of intervals by hand.
        **options: Further options of the torch optimizer and of the transform.

    Raises:
        TypeError: If an option is unknown, or the parameters are none.
        ValueError: If no optimizer has the name, or an option is outside its range.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> type(from_parameters(model.parameters(), "wadam", lr=1e-3, total_steps=200)).__name__
        'AdamW'
    """
    kind = _named(name)
    base = next(
        each for each in kind.__mro__ if issubclass(each, torch.optim.Optimizer) and not issubclass(each, _Attached)
    )
    shown = {key: each.default for key, each in inspect.signature(kind).parameters.items() if each.name not in _OURS}
    for option in options.keys() - shown.keys():
        near = difflib.get_close_matches(option, shown, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{kind.__name__} has no option {option!r}{hint}")
    given = shown | ({} if total_steps is None else intervals(total_steps)) | options
    of_transform = {key: given.pop(key) for key in inspect.signature(kind.transform_type).parameters}
    optimizer: torch.optim.Optimizer = base(parameters_of(params), lr=lr, **given)
    defer(optimizer, kind.transform_type(**of_transform))
    return optimizer


def create(name: str, model: nn.Module, total_steps: int | None = None, **options: Any) -> torch.optim.Optimizer:
    """Return a named optimizer, for code and for config files that name it.

    Args:
        name: ``"fsgd"``, ``"wsgdm"``, ``"fadam"``, ``"wadam"``, ``"dwsgdm"``; case, hyphens, underscores do not matter
            (``"W-SGDM"``).
        model: The model; its layers' inputs are observed.
        total_steps: Optimizer steps of the run: takes the intervals that suit it (see `intervals`).
        **options: As the class of that name takes them: ``lr``, ``params``, ``damping``, …

    Raises:
        TypeError: If ``model`` is no module, or an option is unknown or missing.
        ValueError: If no optimizer has the name, or an option is outside its range.

    Example:
        >>> type(create("w-sgdm", nn.Linear(4, 2), lr=0.1, stats_every=10)).__name__
        'WSGDM'
    """
    if total_steps is not None:
        options = intervals(total_steps) | options
    optimizer: torch.optim.Optimizer = _named(name)(model, **options)
    return optimizer


def _named(name: str) -> Any:
    if not isinstance(name, str):
        raise TypeError(f"name must be a text such as 'wsgdm', got {type(name).__name__}")
    plain = name.casefold().replace("-", "").replace("_", "")
    if plain not in _NAMED:
        near = difflib.get_close_matches(plain, _NAMED, n=1)
        guess = f": did you mean {near[0]!r}?" if near else ":"
        raise ValueError(f"no optimizer is called {name!r}{guess} Known: {', '.join(_NAMED)}")
    return _NAMED[plain]
