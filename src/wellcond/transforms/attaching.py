"""Attach gradient transforms to an optimizer, and find what is attached to one."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from wellcond.transforms.attachment import Attachment
from wellcond.transforms.base import GradientTransform
from wellcond.transforms.by_name import named
from wellcond.transforms.stepping import followers_of
from wellcond.transforms.weight_decay import WeightDecayKind
from wellcond.transforms.wrappers import inner_optimizer


def attach(
    optimizer: Optimizer,
    model: nn.Module,
    *transforms: GradientTransform | str,
    weight_decay: WeightDecayKind = "auto",
    synchronize: bool | dist.ProcessGroup = True,
) -> Attachment:
    """Attach gradient transforms to an optimizer: from now on its steps see transformed gradients.

    Transforms are applied left to right. What they remember is saved and loaded with the optimizer's state dict. A
    parameter group with ``wellcond_<name>=False`` (``wellcond_whitening``, ``wellcond_descent``,
    ``wellcond_centralization``) is left out, as long as that stands there.

    Args:
        optimizer: Any ``torch.optim.Optimizer``, also in a wrapper (Lightning's, Fabric's, Accelerate's, Lookahead,
            SAM): the optimizer inside, which takes the steps, is attached to.
        model: The model whose parameters it trains, also wrapped (DDP, FSDP2, ``torch.compile``).
        *transforms: At least one; each kind once per optimizer. A name (``"centralization"``, ``"whitening"``,
            ``"descent"``) is the transform of that name with its default options.
        weight_decay: How the optimizer applies weight decay: ``"coupled"`` (adds λw to the gradient), ``"decoupled"``
            (shrinks the weight), or ``"auto"``: known for torch's own optimizers and for those whose parameter groups
            say it (``decoupled_weight_decay``, ``weight_decouple``).
        synchronize: Whether statistics are averaged over ranks when ``torch.distributed`` is initialised: over the
            default group (True), over the given group, or not at all.

    Returns:
        A handle with ``report()``, ``stats()`` and ``remove()``.

    Raises:
        TypeError: If an argument is of another type, or the optimizer one whose steps cannot be followed.
        ValueError: If no transform is given, one of its kind is attached already, the model shares no parameter
            with the optimizer, or a parameter group has a ``wellcond_…`` that is no transform's. After any error model
            and optimizer are as they were.

    Example:
        >>> import torch, wellcond
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> handle = wellcond.attach(optimizer, model, wellcond.GradientCentralization())
        >>> print(handle.report())
        centralization over AdamW
        0.weight  (8, 4)  gradient centred over 4 inputs of each of 8 output units  0 B
        0.bias    (8,)    unchanged: a bias
        2.weight  (2, 8)  gradient centred over 8 inputs of each of 2 output units  0 B
        2.bias    (2,)    unchanged: a bias
        in all: 2 of 4 parameters, 0 B kept
        >>> wellcond.attach(optimizer, model, "whitening").stats()["whitening"]["weights"]
        2
    """
    return Attachment(optimizer, model, named(transforms), weight_decay, synchronize)


def attachments(optimizer: object) -> list[Attachment]:
    """Return the handles of what is attached to an optimizer, for code that was only given the optimizer.

    Args:
        optimizer: A ``torch.optim.Optimizer``, also in a wrapper (Lightning's, Accelerate's, Lookahead).

    Returns:
        The handles, in the order of attaching; of those that were removed none.

    Raises:
        TypeError: If it is no optimizer.

    Example:
        >>> import torch, wellcond
        >>> from torch import nn
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = wellcond.attach(optimizer, model, wellcond.GradientCentralization())
        >>> attachments(optimizer) == [handle]
        True
    """
    return followers_of(inner_optimizer(optimizer))
