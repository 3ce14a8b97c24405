"""Optimizers by name: torch's, those of `pytorch_optimizer`, one's own, and those that need more than parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from wellcond.lab.errors import LabError
from wellcond.lab.importing import import_path, is_import_path

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from wellcond.lab.methods.clipping import Clipping

# What building adds itself, or what would change the meaning of a run.
_OURS = ("self", "params", "model", "lr", "optimizer", "base_optimizer", "args", "kwargs", "maximize")
# Torch has another of the first name, and these need more than parameters and an lr.
_PEERS_FIRST = ("Muon", "Lookahead", "SAM")
_PEERS = "pytorch_optimizer"
SECOND_ORDER = ("AdaHessian", "SophiaH")
"""Those that differentiate the gradient once more, so that backward has to keep its graph."""


def build_optimizer(
    name: str, model: nn.Module, lr: float, options: Mapping[str, Any], groups: list[dict[str, Any]] | None = None
) -> Optimizer:
    """Return an optimizer of all of a network's parameters.

    Args:
        name: See `find_optimizer`.
        model: The network.
        lr: The lr.
        options: Further keyword arguments.
        groups: The network's parameters in groups; None: all in one.

    Raises:
        LabError: If there is no such optimizer.
        ValueError: If the optimizer makes groups of its own and has been given some.
    """
    kind = find_optimizer(name)
    called = _special(kind)
    if called and groups is not None:
        raise ValueError(f"{called} takes no group(...): it makes parameter groups of its own")
    optimizer: Optimizer
    if called == "Muon":
        return _muon(kind, model, lr, **options)
    if called in ("Lookahead", "SAM"):
        return _over_sgd(kind, model, lr, **options)
    if kind.__name__ in ("Kron", "ScalableShampoo") and kind.__module__.startswith(_PEERS):
        from wellcond.lab.methods.own_steps import kron, shampoo

        kind = kron(kind) if kind.__name__ == "Kron" else shampoo(kind)
    if next(iter(inspect.signature(kind).parameters), None) == "model":
        # As wellcond's own named optimizers.
        optimizer = kind(model, lr=lr, **({} if groups is None else {"params": groups}), **options)
        return optimizer
    optimizer = kind(model.parameters() if groups is None else groups, lr=lr, **options)
    return optimizer


def attached_to(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that transforms belong on: of one that wraps another, the wrapped.

    Its step takes the closure, and its state dict is what the wrapper saves.
    """
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def find_optimizer(name: str) -> Callable[..., Any]:
    """Return an optimizer's class.

    Args:
        name: A class of `torch.optim`, or else of `pytorch_optimizer` (``"Muon"``, ``"Lookahead"`` and ``"SAM"`` are
            the latter's), or an import path such as ``my_project.optim:Lion``.

    Raises:
        LabError: If there is none, or `pytorch_optimizer` would be needed and is not installed.

    >>> find_optimizer("SGD").__module__
    'torch.optim.sgd'
    """
    import torch

    if name not in _PEERS_FIRST and hasattr(torch.optim, name):
        kind = getattr(torch.optim, name)
    elif is_import_path(name):
        kind = import_path(name)
    else:
        # Only now: it takes seconds to import.
        kind = getattr(_peers(name), name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
        raise LabError(f"{name} is no optimizer (a subclass of torch.optim.Optimizer)")
    return kind


def optimizer_names() -> list[str]:
    """Return the names of all optimizers that need no import path."""
    import torch

    found = [torch.optim] if not has_peers() else [torch.optim, _peers("")]
    names = (
        name
        for module in found
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    )
    return sorted(set(names) - {"BaseOptimizer"})


def has_peers() -> bool:
    """Return whether `pytorch_optimizer` is installed."""
    from importlib.util import find_spec

    return find_spec(_PEERS) is not None


def known_options(name: str) -> list[str]:
    """Return what options an optimizer of this name takes; see also `takes_any_option`.

    >>> known_options("SGD")[:3]
    ['momentum', 'dampening', 'weight_decay']
    """
    kind = find_optimizer(name)
    if _special(kind) in ("Lookahead", "SAM"):
        return [*_arguments(kind), *_arguments(find_optimizer("SGD"))]
    if _is_torchs_muon(kind):
        from wellcond.lab.methods.hidden_matrices import options_of_rest

        return [*_arguments(kind), *options_of_rest()]
    return _arguments(kind)


def takes_any_option(name: str) -> bool:
    """Return whether an optimizer takes options that its signature does not name."""
    kind = find_optimizer(name)
    known = inspect.signature(kind).parameters.values()
    # Those of pytorch_optimizer would put anything into their groups, where nobody reads it.
    return any(each.kind is each.VAR_KEYWORD for each in known) and not kind.__module__.startswith(_PEERS)


def default_lr(name: str) -> float | None:
    """Return the lr that an optimizer has by default; None if it has none."""
    known = inspect.signature(find_optimizer(name)).parameters
    default = known["lr"].default if "lr" in known else None
    return float(default) if isinstance(default, (int, float)) and default > 0 else None


def needs_closure(optimizer: Optimizer) -> bool:
    """Return whether an optimizer computes the loss itself, as LBFGS and SAM do, some more than once a step."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def take_step(
    optimizer: Optimizer, loss: Callable[[], Tensor], create_graph: bool = False, clipping: Clipping | None = None
) -> None:
    """Make a training step as the optimizer takes it.

    Args:
        optimizer: The optimizer; one that has training and evaluation weights must have the former.
        loss: Returns the batch's loss, with its graph.
        create_graph: Whether backward keeps its graph.
        clipping: What gradients are limited to; None for no limit.
    """

    def backward() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward(create_graph=create_graph)
        if clipping is not None:
            clipping.apply(optimizer)
        return value

    if needs_closure(optimizer):
        optimizer.step(backward)  # type: ignore[arg-type]  # torch says float, and takes a tensor
    else:
        backward()
        optimizer.step()


def use_weights(optimizer: Optimizer, training: bool) -> None:
    """Let an optimizer with other weights for evaluation than for training (Schedule-Free) put the right ones in.

    Args:
        optimizer: Any optimizer; others are left alone.
        training: Whether training goes on; else an evaluation begins.
    """
    switch = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()


def _peers(name: str) -> Any:
    try:
        import pytorch_optimizer
    except ModuleNotFoundError as error:
        if error.name != _PEERS:
            raise
        raise LabError(
            f"{name} is not one of torch.optim, and pytorch_optimizer, which has others, is not installed: "
            "pip install 'wellcond[peers]'"
        ) from None
    return pytorch_optimizer


def _arguments(kind: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(kind).parameters if name not in _OURS]


def _special(kind: Any) -> str:
    """Return the name of one that needs more than parameters and an lr; "" for others, a user's of that name too."""
    of_theirs = kind.__module__.partition(".")[0] in ("torch", _PEERS)
    return kind.__name__ if of_theirs and kind.__name__ in _PEERS_FIRST else ""


def _is_torchs_muon(kind: Callable[..., Any]) -> bool:
    """Whether it is torch's, which takes matrices alone."""
    return kind.__name__ == "Muon" and kind.__module__.startswith("torch.")


def _muon(kind: Callable[..., Any], model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """Return Muon for the weights inside the network, and AdamW (``adamw_lr``) for everything else.

    As its authors advise: embeddings, the classifier, biases and norm layers have no use for orthogonal updates. Which
    weights are inside is for `wellcond.Orthogonalize.split` to say.

    Raises:
        LabError: If there are none: AdamW would train all of it.
    """
    import wellcond

    try:
        hidden = {id(weight) for weight in wellcond.Orthogonalize().split(model).hidden}
    except ValueError as error:
        raise LabError(
            "Muon updates the weights inside a network, between its inputs or embeddings and its last layer, and this "
            f"one has none: take AdamW for it ({str(error).partition(chr(10))[0].rstrip(':')})"
        ) from error

    def group(inside: bool) -> list[nn.Parameter]:
        return [parameter for parameter in model.parameters() if (id(parameter) in hidden) == inside]

    if _is_torchs_muon(kind):
        from wellcond.lab.methods.hidden_matrices import HiddenMatrices

        return HiddenMatrices(kind, group(True), group(False), lr, **options)
    groups = [{"params": group(True), "use_muon": True}, {"params": group(False), "use_muon": False}]
    optimizer: Optimizer = kind([each for each in groups if each["params"]], lr=lr, **options)
    return optimizer


def _over_sgd(kind: Callable[..., Any], model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """Return Lookahead or SAM over SGD."""
    import torch

    own = {name: options.pop(name) for name in _arguments(kind) if name in options}
    optimizer: Optimizer
    if "base_optimizer" in inspect.signature(kind).parameters:
        from wellcond.lab.methods.own_steps import sam

        optimizer = sam(kind)(model.parameters(), torch.optim.SGD, lr=lr, **own, **options)
    else:
        optimizer = kind(torch.optim.SGD(model.parameters(), lr=lr, **options), **own)
    return optimizer
