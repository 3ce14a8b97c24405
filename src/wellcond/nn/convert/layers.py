"""Convert the linear layers and convolutions of a whole model to layers that whiten what they multiply, and back."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from wellcond.nn.whitened.deconvolution import NetworkDeconvolution2d
from wellcond.nn.whitened.eigen import EigenConv2d, EigenLinear
from wellcond.nn.whitened.gwnn import GeneralizedWhitenedConv2d, GeneralizedWhitenedLinear
from wellcond.nn.whitened.linear_maps import AmortizedConv2d, AmortizedLinear
from wellcond.nn.whitened.wnn import WhitenedConv2d, WhitenedLinear
from wellcond.runtime.checks import Predicate, check_choice, checked
from wellcond.runtime.texts import quoted_names

# Of each kind, what stands for a linear layer and for a convolution.
_KINDS: dict[str, dict[type[nn.Module], Any]] = {
    "wnn": {nn.Linear: WhitenedLinear, nn.Conv2d: WhitenedConv2d},
    "eigen": {nn.Linear: EigenLinear, nn.Conv2d: EigenConv2d},
    "gwnn": {nn.Linear: GeneralizedWhitenedLinear, nn.Conv2d: GeneralizedWhitenedConv2d},
    "nd": {nn.Conv2d: NetworkDeconvolution2d},
    "plain": {},
}
_OURS = (AmortizedLinear, AmortizedConv2d, NetworkDeconvolution2d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@checked
def convert_layers(model: nn.Module, to: str, where: Predicate | None = None, **options: Any) -> nn.Module:
    """Replace a model's linear layers and convolutions by layers that whiten their features, in place.

    - ``"wnn"``: `WhitenedLinear`, `WhitenedConv2d`; the model's function stays;
    - ``"eigen"``: `EigenLinear`, `EigenConv2d`; the model's function stays;
    - ``"gwnn"``: `GeneralizedWhitenedLinear`, `GeneralizedWhitenedConv2d`; it stays until their first refresh;
    - ``"nd"``: `NetworkDeconvolution2d` for convolutions; changes what the model computes, and stands in for the batch
      normalizations beside them, too, which stay unless you take them out;
    - ``"plain"``: back to `nn.Linear` and `nn.Conv2d`, which compute what those layers do in evaluation.

    The new layers hold the very parameters of the old ones (but for ``"plain"``), so an optimizer goes on with them;
    make it anew after ``"plain"``. Layers of other types, subclasses of these two among them, stay as they are. If
    anything is refused, nothing has changed.

    Args:
        model: Any model, but not one such layer itself, which has no parent to be replaced in: use `from_layer`.
        to: The kind, as above.
        where: Which layers: a predicate of (qualified name, module). All of them by default.
        **options: Arguments of the new layers' constructor, such as ``refresh_every``; none for ``"plain"``.

    Returns:
        `model`.

    Raises:
        TypeError: If the model is a layer itself, an option is not one of the new layers', or a layer cannot be
            replaced without loss (hooks, a `forward` of its own, a weight that another module has, too, a place in an
            `nn.TransformerEncoderLayer`, whose evaluation uses its layers' weights directly).
        ValueError: If the kind is not known, or no layer is selected.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
        >>> model = convert_layers(model, to="wnn", refresh_every=100)
        >>> type(model[0]).__name__, type(model[3]).__name__
        ('WhitenedConv2d', 'LazyLinear')
        >>> type(convert_layers(model, to="plain")[0]).__name__
        'Conv2d'
    """
    check_choice("to", to, _KINDS)
    if to == "plain" and options:
        raise TypeError(f"to='plain' takes no options, got {quoted_names(options)}")
    kinds = _KINDS[to]
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        wanted = isinstance(module, _OURS) if to == "plain" else type(module) in kinds
        if wanted and (where is None or where(name, module)):
            names.setdefault(module, []).append(name)
    if not names:
        selected = "" if where is None else " that `where` selects"
        kind = "layer of this library" if to == "plain" else " or ".join(f"nn.{each.__name__}" for each in kinds)
        raise ValueError(f"{type(model).__name__} has no {kind} to convert{selected}")
    owners = _owners(model)
    new: dict[nn.Module, nn.Module] = {}
    for module, own in names.items():
        if module is model:
            raise TypeError(f"the model is a {type(module).__name__} itself: use from_layer or to_plain")
        if "forward" in vars(module) or any(vars(module)[hooks] for hooks in _HOOKS):
            raise TypeError(f"{own[0]!r} has hooks or a forward of its own, which would be lost: remove them first")
        parents = [model.get_submodule(name.rpartition(".")[0]) for name in own]
        if to != "plain" and any(isinstance(parent, nn.TransformerEncoderLayer) for parent in parents):
            raise TypeError(
                f"{own[0]!r} belongs to an nn.TransformerEncoderLayer, which evaluates with its weight as it is: leave "
                "it out with `where`"
            )
        shared = [name for name, owner in owners.get(id(module.weight), []) if owner is not module]
        if to in ("wnn", "eigen", "gwnn") and shared:
            raise TypeError(
                f"{own[0]!r} shares its weight with {shared[0]!r}, which a refresh would change: leave it out"
            )
        if to == "plain":
            new[module] = cast(Any, module).to_plain()
        else:
            new[module] = kinds[type(module)].from_layer(module, **options)
    for module, own in names.items():
        for name in own:
            model.set_submodule(name, new[module])
    return model


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Return, by parameter, the modules that hold it, with their names."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, module))
    return owners
