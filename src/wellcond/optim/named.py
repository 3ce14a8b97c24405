"""The named optimizers: each a torch optimizer plus one attached transform, nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from wellcond.optim.attached import (
    Attached,
    DecoupledSGD,
    FeatureAdamW,
    FeatureSGD,
    parameters_in,
    split_options,
    with_options_of,
)
from wellcond.runtime.checks import checked, checks_itself
from wellcond.transforms import FeatureDescent, FeatureWhitening
from wellcond.transforms.preconditioner.norm_recovery import NormRecovery


@with_options_of(torch.optim.SGD)
class DWSGDM(Attached, DecoupledSGD):
    """DW-SGDM, doubly whitened SGD with momentum: both sides of each layer's gradient whitened, in a fixed norm.

    Each layer's update is L^(−1/2) G M^(−1/2), M the second moment of its input, L that of the product's rows, scaled
    to the norm √min(out, inputs) of an orthogonal matrix; then momentum, and decoupled weight decay. It is no published
    algorithm: W-SGDM's transform with the norm rule and the second side that Muon's updates have (see "Why
    DW-SGDM" in the documentation for what was measured).

    Because the norm is fixed, one learning rate means the same for every layer and width, and it does not shrink as
    gradients do: it must be decayed to zero by a schedule (cosine or linear). Warm-up was not tried.

    Args:
        model: The model; its layers' inputs are observed.
        lr: Learning rate. From 0.004 to 0.025 were best in small runs; 0.02 is a first try.
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
        norm: NormRecovery = "fixed",
        outputs: bool = True,
        **feature_options: Any,
    ) -> None:
        of_torch, options = split_options(torch.optim.SGD, feature_options)
        super().__init__(parameters_in(model, params), lr=lr, momentum=momentum, weight_decay=weight_decay, **of_torch)
        self._attach(model, {"norm": norm, "outputs": outputs, **options}, as_published=False)


@with_options_of(torch.optim.SGD)
class FSGD(FeatureSGD):
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


@with_options_of(torch.optim.SGD)
class WSGDM(FeatureSGD):
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


@with_options_of(torch.optim.AdamW)
class FAdam(FeatureAdamW):
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


@with_options_of(torch.optim.AdamW)
class WAdam(FeatureAdamW):
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
