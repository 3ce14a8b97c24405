"""Convert the batch normalizations of a whole model from one kind to another, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils.parametrize import is_parametrized

from wellcond.nn.convert.frozen import frozen_norms, fused_norms, is_frozen, lookalikes, thawed
from wellcond.nn.convert.kinds import DIMENSIONS, KINDS, arguments_for, connect, constructor_options, disconnect
from wellcond.nn.convert.report import is_other_norm, keep_report
from wellcond.nn.convert.single_values import RefuseSingleValues
from wellcond.nn.convert.then_activation import NormClass, fused_type, parts_of
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.runtime.checks import Predicate, check_choice, check_positive_integer, checked
from wellcond.runtime.texts import quoted_names


class _Found(NamedTuple):
    layer: nn.Module
    names: list[str]
    selected: list[bool]
    fused: str | None  # The layer of torch's that it is a part of.


class _Change(NamedTuple):
    layer: nn.Module
    to: NormClass
    state: dict[str, Any]


class _NotConvertibleError(TypeError):
    """Why one layer cannot be converted."""


@checked
def convert_norm(model: nn.Module, to: str, where: Predicate | None = None, **options: Any) -> nn.Module:
    """Convert a model's batch normalizations to another kind, in place.

    From `nn.BatchNorm1d/2d/3d`, this library's layers that stand in for them, timm's `BatchNormAct2d` (whose dropout
    and activation stay), and the frozen ones of torchvision, timm, detectron2 and transformers (whose γ and β stay
    constant: parameters that do not require gradients until you say so), to the same number of dimensions of

    - ``"bn"``: `nn.BatchNorm*`, for deployment or to go back;
    - ``"ghost"``: `GhostBatchNorm*`; needs the option group_size;
    - ``"mbn"``: `MomentumBatchNorm*`; its history begins as the running statistics;
    - ``"mabn"``: `MovingAverageBatchNorm*`, and the linear layer or convolution right before computes with centralized
      weights (`weight_centralize`), so evaluation changes; going back makes these weights permanent. Layers with
      nothing of the kind before them stay as they are, and the report says why;
    - ``"cbn"``: `CrossIterationBatchNorm*`, connected by `connect_cross_iteration` with the linear layer or convolution
      right before; others stay as they are, and the report says why, but with ``compensate=False``;
    - ``"bsr"``, ``"evalnorm"``: `BSRBatchNorm*`, `EvalNorm*`; evaluate as before until they have seen training batches;
    - ``"brn"``: `BatchRenorm*`;
    - ``"pn"``: `PopulationNorm*`, with its own default of momentum;
    - ``"sn"``, ``"ssn"``: `SwitchableNorm*`, `SparseSwitchableNorm*`, from equal shares on;
    - ``"ibn"``: `InstanceBatchNorm2d`, of 2 dimensions only; `ibn_a` chooses the layers as IBN-Net does;
    - ``"dbn"``, ``"iternorm"``: `DecorrelatedBatchNorm2d`, `IterNorm2d`, of 2 dimensions only; evaluate as before until
      they have seen training batches;
    - ``"kn"``: `KalmanBatchNorm2d`, of 2 dimensions only; `connect_kalman` finds which layers come before which, and
      the parameters that it makes are new: make the optimizer afterwards;
    - ``"gn"``, ``"ln"``, ``"in"``: `nn.GroupNorm` (num_groups is 32 unless given), `nn.GroupNorm` of one group,
      `nn.InstanceNorm*` (1d for [N, C, L] only). These have no running statistics, which are dropped: only γ, β and ε
      stay, evaluation changes, and there is no way back. A forward pre-hook refuses, by the layer's name, inputs that
      offer one value to each set to be normalized, such as [N, C] to groups of one channel.

    A converted layer is the same object as before, with another class. So it keeps its γ and β (the very parameters,
    which an optimizer may hold), running statistics, device, mode, hooks and their handles, tied uses, references to it
    from elsewhere, and attributes, buffers and submodules that were added to it. A `wellcond.attach` made before stays
    right, too, but for ``"gn"``, ``"ln"`` and ``"in"``, whose normalized features correlate differently: attach after
    those. Wrap in `DistributedDataParallel`, which lists buffers once, after converting. If anything is refused,
    nothing has changed. `conversion_report(model)` says afterwards what was changed, what was left, and why.

    eps, momentum (but for ``"pn"``), affine and track_running_stats are the layer's unless given; so are group_size and
    synchronize where both kinds have them. Momentum Batch Norm keeps `momentum` for the way back only: its decay
    follows from the batch size. What the new kind has no place for is dropped: MBN's history, BSR's sums, EvalNorm's
    mixture, ghost groups, synchronization over ranks (in ``"bn"``; there is `nn.SyncBatchNorm.convert_sync_batchnorm`).
    A layer that is of the kind already is left alone without options, else made anew with them and with its buffers.

    Statistics of this library's layers are float32 or wider. Torch's evaluation needs those of a half-precision layer
    in the parameters' dtype, so ``"bn"`` rounds them to that.

    Args:
        model: Any model, or one such layer.
        to: The kind, as above.
        where: Which layers: a predicate of (qualified name, module). All of them by default.
        **options: Arguments of the new layers' constructor.

    Returns:
        `model`.

    Raises:
        TypeError: If an argument is of another type, an option is not one of the new layers' or is missing, or a
            selected layer cannot be kept as it is: a subclass with a forward that is not known, `nn.SyncBatchNorm`
            (whose number of dimensions is not known), a lazy layer without its parameters, a computed weight
            (parametrizations, pruning), no running statistics where the kind needs them, a part of one of torch's fused
            layers (`torch.ao.nn.intrinsic`), a layer that keeps running statistics but is of no known type (in-place
            activated batch normalization). All such layers are named. Or the model cannot be traced, for ``"kn"``.
        ValueError: If the kind is not known, no layer is selected, an option is out of its range, or a layer's channels
            cannot be divided into num_groups, or the order of layers is not clear, for ``"kn"``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> convert_norm(model, to="mbn", base_batch_size=64)[1]
        MomentumBatchNorm2d(8, eps=1e-05, affine=True, base_batch_size=64, base_inference_decay=0.85)
        >>> type(convert_norm(model, to="bn")[1]).__name__
        'BatchNorm2d'
        >>> convert_norm(model, to="gn", where=lambda name, module: name == "1", num_groups=4)[1].num_groups
        4
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("to", to, tuple(KINDS))
    if where is not None and not callable(where):
        raise ValueError(f"where must be a predicate of (name, module) or None, got {where!r}")
    _check_options(to, options)
    changes: dict[str, _Change] = {}
    left: dict[str, str] = {}
    refused: dict[str, list[str]] = {}
    errors: type[Exception] = ValueError
    every = _find(model, where)
    unsuited = _unsuited(model, every, to, options)
    for found in every:
        if not any(found.selected):
            left[found.names[0]] = f"{type(found.layer).__name__}: not selected by `where`"
            continue
        if found.names[0] in unsuited:
            left[found.names[0]] = f"{type(found.layer).__name__}: {unsuited[found.names[0]]}"
            continue
        try:
            change = _plan(found, to, options)
        except (TypeError, ValueError) as error:
            reason = f"{type(found.layer).__name__} {error}" if isinstance(error, _NotConvertibleError) else str(error)
            refused.setdefault(reason, []).append(repr(found.names[0]) if found.names[0] else "the model itself")
            errors = TypeError if isinstance(error, TypeError) else errors
        else:
            if change is None:
                left[found.names[0]] = f"{type(found.layer).__name__}: is of the kind already"
            else:
                changes[found.names[0]] = change
    if refused:
        lines = [f"\n  {', '.join(names)}: {reason}" for reason, names in refused.items()]
        raise errors(f"convert_norm(to={to!r}) cannot convert these layers, and changed none:{''.join(lines)}")
    said = {name: f"{type(each.layer).__name__} → {each.to.__name__}" for name, each in changes.items()}
    left |= {
        name: f"{type(module).__name__}: no batch normalization"
        for name, module in model.named_modules()
        if is_other_norm(module) and not isinstance(module, _BatchNorm) and name not in said and name not in left
    }
    before = [_Change(each.layer, type(each.layer), dict(vars(each.layer))) for each in changes.values()]
    _apply(changes.values())
    try:
        connect(model)
    except (TypeError, ValueError) as error:
        _apply(before)
        disconnect(model)
        raise type(error)(
            f"convert_norm(to={to!r}) changed nothing, since the order of layers is not clear: {error}"
        ) from error
    for name, change in changes.items():
        if not issubclass(change.to, _BatchNorm):
            change.layer.register_forward_pre_hook(RefuseSingleValues(name or "the model itself"))
    keep_report(model, f"convert_norm(to={to!r})", said, left)
    return model


def _apply(changes: Iterable[_Change]) -> None:
    for change in changes:
        change.layer.__class__ = change.to
        change.layer.__dict__.clear()
        change.layer.__dict__.update(change.state)


# which layers -------------------------------------------------------------------------------------------------------


def _find(model: nn.Module, where: Predicate | None) -> list[_Found]:
    """Find all batch normalizations, and what looks like one, each once; raise if none of them is selected."""
    known = frozen_norms(model).keys() | lookalikes(model).keys()
    uses: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm) or module in known:
            uses.setdefault(module, []).append(name)
    fused = fused_norms(model)
    found = [
        _Found(layer, names, [where is None or bool(where(name, layer)) for name in names], fused.get(layer))
        for layer, names in uses.items()
    ]
    if any(any(each.selected) for each in found):
        return found
    if found:
        first = quoted_names(found[0].names[:1])
        raise ValueError(f"`where` selects none of the model's {len(found)} batch normalizations ({first}, …)")
    others = Counter(type(module).__name__ for module in model.modules() if is_other_norm(module))
    kinds = ", ".join(f"{count} {name}" for name, count in others.items()) or "none at all"
    raise ValueError(f"{type(model).__name__} has no batch normalization to convert; its normalizations are: {kinds}")


def _unsuited(model: nn.Module, every: Iterable[_Found], to: str, options: Mapping[str, Any]) -> Mapping[str, str]:
    """Return why some of the selected layers cannot be of the kind, by name; raise if that is so of all."""
    find = KINDS[to].unsuited
    if find is None:
        return {}
    selected = {found.names[0]: found.layer for found in every if any(found.selected)}
    try:
        reasons = find(model, selected, options)
    except TypeError as error:
        raise TypeError(f"convert_norm(to={to!r}) changed nothing: {error}") from error
    if len(reasons) == len(selected):
        lines = [f"\n  {name!r} {why}" if name else f"\n  the model itself {why}" for name, why in reasons.items()]
        raise ValueError(f"convert_norm(to={to!r}) can convert none of the selected layers:{''.join(lines)}")
    return reasons


# what becomes of one layer ------------------------------------------------------------------------------------------


def _plan(found: _Found, to: str, options: Mapping[str, Any]) -> _Change | None:
    """Make a layer's new state without touching the layer; None if it stays as it is."""
    if is_frozen(found.layer):
        free = thawed(found.layer)
        change = _plan(found._replace(layer=free), to, options)
        return change._replace(layer=found.layer) if change else _Change(found.layer, type(free), dict(vars(free)))
    layer = found.layer
    if not isinstance(layer, _BatchNorm):
        raise _NotConvertibleError(
            "keeps running statistics as a batch normalization does, but is none that is known, so what else it does "
            "would be lost: replace it by hand, or leave it out with `where`"
        )
    plain, fused = _plain_type(layer)
    if not all(found.selected):
        raise _NotConvertibleError(
            f"is one layer under the names {quoted_names(found.names)}, of which `where` selects only some"
        )
    target = KINDS[to].layers[DIMENSIONS[plain]]
    if target is None:
        raise _NotConvertibleError(f"has no counterpart: {to!r} is for inputs [N, C, H, W] only")
    if target is plain and not options:
        return None
    if found.fused is not None:
        raise _NotConvertibleError(
            f"is a part of {found.fused}, which computes with its tensors by itself: convert before fusing"
        )
    _check_state(layer, target)
    new = _build(layer, plain, target, to, options)
    if isinstance(new, _BatchNorm):
        _take_statistics(new, layer, options)
    return _Change(layer, target if fused is None else fused_type(target, fused), _merge(layer, plain, new))


def _plain_type(layer: _BatchNorm) -> tuple[NormClass, NormClass | None]:
    """Return the type that normalizes, and timm's type that adds an activation to it, if there is one."""
    kind = type(layer)
    if kind in DIMENSIONS:
        return kind, None
    if (parts := parts_of(layer)) is not None:
        return parts
    if is_parametrized(layer):
        raise _NotConvertibleError("is parametrized: remove the parametrization first")
    if isinstance(layer, _LazyNormBase):
        raise _NotConvertibleError("has no parameters yet: run the model once first")
    if isinstance(layer, nn.SyncBatchNorm):
        raise _NotConvertibleError(
            "takes inputs of any number of dimensions, so it cannot be told what it should become: convert before "
            "nn.SyncBatchNorm.convert_sync_batchnorm, or with synchronize=True instead of that"
        )
    raise _NotConvertibleError(
        f"is a subclass of {kind.__mro__[1].__name__} that is not known, so what it does beside batch normalization "
        "would be lost: replace it by hand, or leave it out with `where`"
    )


def _check_state(layer: _BatchNorm, target: NormClass) -> None:
    """Refuse what a constructor would not have made, and what the target has no place for."""
    overridden = [name for name in vars(layer) if callable(getattr(type(layer), name, None))]
    if overridden:
        raise _NotConvertibleError(f"has its own {quoted_names(overridden)}, set on this one object")
    computed = [name for name in ("weight", "bias") if name not in layer._parameters]
    if computed:
        raise _NotConvertibleError(
            f"computes its {quoted_names(computed)} (as pruning does): make that permanent first"
        )
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(layer, name)
        if tensor is not None and tensor.shape != (layer.num_features,):
            raise _NotConvertibleError(
                f"says that it has {layer.num_features} features, but its {name} has shape {list(tensor.shape)}"
            )
    if not issubclass(target, _BatchNorm):
        return
    if len({layer.track_running_stats, layer.running_mean is not None, layer.running_var is not None}) > 1:
        raise _NotConvertibleError(
            f"has track_running_stats={layer.track_running_stats}, which contradicts its buffers: "
            "set running_mean and running_var to None, or track_running_stats back to True, first"
        )
    if layer.running_mean is None and "track_running_stats" not in constructor_options(target):
        raise _NotConvertibleError(
            f"has no running statistics (track_running_stats=False), which {target.__name__} needs: "
            "convert to 'bn' with track_running_stats=True and let it see data first"
        )


def _build(layer: _BatchNorm, plain: NormClass, target: NormClass, to: str, options: Mapping[str, Any]) -> nn.Module:
    """Make a layer of the target type with the arguments that the given layer was made with, and the options."""
    ours = isinstance(layer, StatisticsNorm)
    arguments = arguments_for(layer, target is plain, to, target, options)
    # Torch's kernels want statistics in the parameters' dtype, so that decides, except between torch's own layers.
    tensors = [tensor for tensor in (layer.weight, layer.bias, layer.running_mean) if tensor is not None]
    if tensors:
        arguments |= {"device": tensors[0].device, "dtype": tensors[0 if ours else -1].dtype}
    if issubclass(target, nn.GroupNorm):
        check_positive_integer("num_groups", arguments["num_groups"])
        if layer.num_features % arguments["num_groups"]:
            raise ValueError(f"num_groups={arguments['num_groups']} does not divide {layer.num_features} channels")
        return target(num_channels=layer.num_features, **arguments)
    new = target(layer.num_features, **arguments)
    if isinstance(new, StatisticsNorm) and "momentum" not in constructor_options(target):
        new.momentum = layer.momentum
    return new


def _take_statistics(new: _BatchNorm, layer: _BatchNorm, options: Mapping[str, Any]) -> None:
    """Give a new layer the statistics of the old one, as if from a checkpoint, and the same mode."""
    taken = {
        name: old
        for name, old in layer._buffers.items()
        if old is not None and name not in new._non_persistent_buffers_set
        if (buffer := new._buffers.get(name)) is not None and buffer.shape == old.shape
    }
    new.load_state_dict(taken, strict=False)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if name in taken and taken[name].dtype == new.get_buffer(name).dtype:
            new._buffers[name] = taken[name]
    for name, value in options.items():
        if isinstance(getattr(type(new), name, None), property):
            # Kept in a buffer, over which the old one has just been loaded.
            setattr(new, name, value)
    new.train(layer.training)


def _merge(layer: _BatchNorm, plain: NormClass, new: nn.Module) -> dict[str, Any]:
    """Return the state of `layer` with what makes it a `plain` layer replaced by what makes `new` one of its kind."""
    of_plain = _blank(plain)
    of_module = vars(nn.Module())
    state = {name: value for name, value in vars(layer).items() if name in of_module or name not in vars(of_plain)}
    state |= {name: value for name, value in vars(new).items() if name not in of_module}
    for registry in ("_parameters", "_buffers", "_modules"):
        added = {name: value for name, value in vars(layer)[registry].items() if name not in vars(of_plain)[registry]}
        state[registry] = vars(new)[registry] | added
    if new.affine and (layer.weight is not None or layer.bias is not None):
        state["_parameters"] |= {"weight": layer.weight, "bias": layer.bias}
    for name, parameter in layer._parameters.items():
        # Such as the logits of switchable normalization.
        made = new._parameters.get(name)
        if name not in ("weight", "bias") and made is not None and parameter is not None:
            state["_parameters"][name] = parameter if parameter.shape == made.shape else made
    state["_non_persistent_buffers_set"] = new._non_persistent_buffers_set | {
        name for name in layer._non_persistent_buffers_set if name in state["_buffers"]
    }
    return state


def _blank(plain: NormClass) -> nn.Module:
    """Make a layer of a type, to see what belongs to it."""
    required = [name for name, argument in constructor_options(plain).items() if argument.default is argument.empty]
    return plain(2, **dict.fromkeys(required, 1))  # Half of them is still one.


# options ------------------------------------------------------------------------------------------------------------


def _check_options(to: str, options: Mapping[str, Any]) -> None:
    taken = [name for name in constructor_options(KINDS[to].layers[1]) if name not in KINDS[to].fixed]
    unknown = [name for name in options if name not in taken]
    if unknown:
        raise TypeError(f"convert_norm(to={to!r}) takes the options {quoted_names(taken)}, got {quoted_names(unknown)}")
