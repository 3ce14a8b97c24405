"""Calibrates a trained model: one pass over data gives its norms statistics at the training batch size."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wellcond.calibration.estimates import Average, Kind, Mixture, RegressionSums, RunningStatistics
from wellcond.calibration.replay import Passed, Seen, named_batch_norms, training_pass
from wellcond.nn.convert.frozen import frozen_norms, lookalikes, thawed
from wellcond.nn.convert.norms import convert_norm
from wellcond.nn.convert.report import is_other_norm, keep_report
from wellcond.runtime.checks import Predicate, check_positive_integer, checked
from wellcond.runtime.models import Call, device_of, unwrapped
from wellcond.runtime.ranks import Ranks
from wellcond.transforms.base import WellcondWarning


@checked
def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    batch_size: int,
    what: str = "bsr",
    *,
    call: Call | None = None,
    momentum: float | None = None,
    where: Predicate | None = None,
    max_batches: int | None = None,
    **options: Any,
) -> nn.Module:
    """Take a trained model's normalization statistics anew, in one pass over data with training batches of m samples.

    - ``"bsr"``: the sums of Batch Statistics Regression (3.12). Batch normalizations that are not `BSRBatchNorm*` yet
      become such (`nn.convert_norm`), and from then on evaluate each instance with statistics that are predicted for
      it. Running statistics stay: the regression's feature (μ_s − μ)² refers to them. To take both anew, calibrate
      ``"bn"`` first.
    - ``"evalnorm"``: likewise α and β of `EvalNorm*`, here not learned step by step but the exact minimum, over [0, 1],
      of the squared differences to the batches' statistics that its training descends. With ``learn=False``: 1/m.
    - ``"bn"``: the running mean and (unbiased) variance of the batch normalizations of all kinds, each of which
      normalizes as it does in training; frozen ones (`nn.convert_norm`) stay frozen. `num_batches_tracked` becomes
      the number of batches of m samples, of all ranks; with a momentum it goes up by that.

    In the pass the selected normalizations normalize groups of m consecutive samples; all other modules, also the
    normalizations that are not selected, are in evaluation mode. Nothing else changes: parameters, gradients, other
    buffers, modes, hooks, torch's random state. If the pass raises, nothing has changed at all.

    A batch of the loader may have any number of samples: it is divided into batches of m, and what is left over is not
    counted. So larger ones only make the pass faster. Where a layer's input has k rows per sample (frames of a video),
    a batch has k·m rows.

    With `torch.distributed` initialized every rank must call this, each with its part of the data, of any size; all of
    them get the statistics of the whole. A `DistributedDataParallel` model is run without its wrapper. What was
    synchronized over ranks in training is here taken from each rank's groups of m samples, so m is then the number of
    samples on all ranks together. A model whose forward pass communicates (FSDP) needs as many batches on every rank.

    Args:
        model: Any model with batch normalizations, or one of them; may be wrapped for DDP or compiled.
        loader: Gives batches: a tensor; a tuple or list, whose first element is the input; or a mapping, for
            ``model(**batch)``. They are moved to the model's device.
        batch_size: m, the samples behind one set of statistics in training: of one device, or of a ghost group.
        what: ``"bsr"``, ``"evalnorm"`` or ``"bn"``.
        call: ``call(model, batch)``, for a model that is run otherwise; it gets the model without its wrapper. Each row
            of a layer's input is then taken for a sample.
        momentum: None: all batches weigh equally. A number: the moving average of training, from the present
            statistics on, in which a batch of m samples has this weight; of ranks, the average.
        where: Which normalizations: a predicate of (qualified name, module). All of them by default.
        max_batches: Stop after so many of the loader's batches (of each rank).
        **options: For `nn.convert_norm`, such as ``nonneg="nnls"``; none for ``"bn"``.

    Returns:
        `model`. `nn.conversion_report(model)` says what was changed, what was left, and why.

    Raises:
        TypeError: If an option is not one of the layers', or a layer cannot be converted, or keeps running statistics
            but is of no known type.
        ValueError: If an argument is out of its range, there is no such layer, the loader is empty, no batch has m
            samples, a layer has one value per channel in a batch, or features are not finite.
        RuntimeError: If the pass failed on another rank.

    Warns:
        WellcondWarning: About layers that the pass did not reach, by name; their statistics stay.

    Source: thesis ch. 3, 3.5–3.13.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
        >>> loader = [(torch.randn(8, 1, 6, 6), None) for _ in range(10)]
        >>> _ = calibrate(calibrate(model, loader, batch_size=2, what="bn"), loader, batch_size=2, nonneg="nnls")
        >>> model[1]
        BSRBatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, nonneg=nnls)
        >>> int(model[1].num_batches_tracked)
        40
    """
    check_positive_integer("batch_size", batch_size)
    if what not in _KINDS:
        raise ValueError(f"what must be one of {', '.join(map(repr, _KINDS))}, got {what!r}")
    if momentum is not None and not 0 < momentum <= 1:
        raise ValueError(f"momentum must lie in (0, 1] or be None, got {momentum!r}")
    if max_batches is not None:
        check_positive_integer("max_batches", max_batches)
    if what == "bn" and options:
        raise TypeError(f"what='bn' converts nothing and takes no options, got {', '.join(map(repr, options))}")
    inner = unwrapped(model)
    layers, frozen = _selected(inner, where)
    were = {name: type(layer).__name__ for name, layer in layers.items()}
    kind = _KINDS[what]
    with _undone_on_error(layers.values()), _thawed(frozen, again=what == "bn"):
        if what != "bn":
            chosen = set(layers.values())
            convert_norm(inner, what, lambda name, module: module in chosen, **options)
        norms = {name: cast(_BatchNorm, layer) for name, layer in layers.items()}
        averages = {name: Average(kind.present(layer), momentum) for name, layer in norms.items()}

        def observe(name: str, seen: Seen) -> None:
            averages[name].add(kind.values(norms[name], seen))

        passed, error = Passed(0, 0, batch_size), None
        try:
            passed = training_pass(inner, loader, batch_size, norms, observe, call=call, max_batches=max_batches)
        except Exception as raised:  # The other ranks, which would wait for this one, are told first.
            error = raised
        _join_ranks(averages, passed, error, device_of(inner))
        missed = [name for name, average in averages.items() if average.batches == 0]
        with torch.no_grad():
            for name in layers.keys() - missed:
                kind.replace(norms[name], averages[name])
    _report(model, inner, what, were, layers, missed)
    if missed:
        warnings.warn(
            f"calibrate: no batch of {batch_size} samples reached {_listed(missed)}, which keep their statistics",
            WellcondWarning,
            stacklevel=3,
        )
    return model


@checked
@contextmanager
def calibrated(
    model: nn.Module, loader: Iterable[Any], batch_size: int, what: str = "bsr", **options: Any
) -> Iterator[nn.Module]:
    """Have a model calibrated for as long as a ``with`` block lasts, such as a validation in the midst of training.

    Afterwards its batch normalizations are what they were, of their own kind and with the statistics that they had, so
    training goes on, and checkpoints are written, as if there had been no calibration.

    Args:
        model: As in `calibrate`.
        loader: As in `calibrate`; not the one that trains, whose workers and shuffling a further pass would disturb.
        batch_size: As in `calibrate`.
        what: As in `calibrate`.
        **options: All further ones of `calibrate`.

    Yields:
        `model`, calibrated.

    Raises:
        Exception: Whatever `calibrate` raises.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
        >>> loader = [torch.randn(8, 1, 6, 6) for _ in range(10)]
        >>> with calibrated(model, loader, batch_size=2):
        ...     print(type(model[1]).__name__)
        BSRBatchNorm2d
        >>> print(type(model[1]).__name__, int(model[1].num_batches_tracked))
        BatchNorm2d 0
    """
    inner = unwrapped(model)
    layers = [*named_batch_norms(inner)[0].values(), *frozen_norms(inner)]
    before = _recorded(layers)
    values = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    try:
        yield calibrate(model, loader, batch_size, what, **options)
    finally:
        for layer, _, state in before:
            state["training"] = layer.training  # The mode is not the calibration's.
        _put_back(before)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def _selected(model: nn.Module, where: Predicate | None) -> tuple[dict[str, nn.Module], list[nn.Module]]:
    """Return the normalizations that are to be calibrated, by name, and which of them are frozen."""

    def chosen(found: dict[nn.Module, list[str]]) -> dict[str, nn.Module]:
        return {
            names[0]: layer
            for layer, names in found.items()
            if where is None or any(where(name, layer) for name in names)
        }

    unknown = chosen(lookalikes(model))
    if unknown:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in unknown.values()}))
        raise TypeError(
            f"calibrate cannot calibrate {_listed(unknown)} ({kinds}): they keep running statistics, but are no batch "
            "normalizations that are known. Leave them out with `where`"
        )
    layers, of_any_kind = named_batch_norms(model, where)
    of_frozen = frozen_norms(model)
    frozen = chosen(of_frozen)
    if layers or frozen:
        return {**layers, **frozen}, list(frozen.values())
    if of_any_kind + len(of_frozen) == 0:
        raise ValueError(f"{type(model).__name__} has no batch normalization to calibrate")
    selected = "" if where is None else " that `where` selects"
    raise ValueError(f"{type(model).__name__} has no batch normalization with running statistics{selected}")


@contextmanager
def _thawed(frozen: Iterable[nn.Module], again: bool) -> Iterator[None]:
    """Make frozen layers plain ones, for statistics to be taken of them; and frozen again, with new statistics."""
    before = _recorded(frozen)
    for layer, _, _ in before:
        plain = thawed(layer)
        layer.__class__ = type(plain)
        layer.__dict__.clear()
        layer.__dict__.update(vars(plain))
    yield
    if again:
        _put_back(before)


def _report(
    model: nn.Module,
    inner: nn.Module,
    what: str,
    were: dict[str, str],
    layers: dict[str, nn.Module],
    missed: list[str],
) -> None:
    """Keep what was done to which layer."""
    new = {"bn": "new running statistics", "bsr": "new regression sums", "evalnorm": "a new mixture"}[what]
    changed, left = {}, {name: f"{kind}: no whole batch reached it" for name, kind in were.items() if name in missed}
    for name, kind in were.items():
        now = type(layers[name]).__name__
        if name not in missed:
            changed[name] = f"{kind}: {new}" if kind == now else f"{kind} → {now}: {new}"
    chosen = set(layers.values())
    for name, module in inner.named_modules():
        if module in chosen:
            continue
        if isinstance(module, _BatchNorm):
            kept = module.running_mean is not None
            left[name] = f"{type(module).__name__}: {'not selected by `where`' if kept else 'no running statistics'}"
        elif is_other_norm(module):
            left[name] = f"{type(module).__name__}: no batch normalization"
    for reported in {inner, model}:
        keep_report(reported, f"calibrate(what={what!r})", changed, left)


@contextmanager
def _undone_on_error(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Make layers, which may have been converted, what they were if anything raises."""
    before = _recorded(layers)
    try:
        yield
    except BaseException:
        _put_back(before)
        raise


def _recorded(layers: Iterable[nn.Module]) -> list[tuple[nn.Module, type[nn.Module], dict[str, Any]]]:
    """Note what layers are; not the values of their tensors."""
    before = []
    for layer in layers:
        state = dict(vars(layer))
        state |= {name: dict(state[name]) for name in ("_parameters", "_buffers", "_modules")}
        before.append((layer, type(layer), state))
    return before


def _put_back(before: Iterable[tuple[nn.Module, type[nn.Module], dict[str, Any]]]) -> None:
    for layer, kind, state in before:
        layer.__class__ = kind
        layer.__dict__.clear()
        layer.__dict__.update(state)


def _join_ranks(
    averages: dict[str, Average], passed: Passed, error: Exception | None, device: torch.device | None
) -> None:
    """Finish the averages over the batches of all ranks; raise on all of them if there is nothing to average."""
    ranks = Ranks(True)
    said = torch.tensor([error is not None, passed.batches, passed.largest], dtype=torch.int64, device=device)
    failed, batches, largest = ranks.gather(said).unbind(1)
    if error is not None:
        raise error
    if failed.any():
        raise RuntimeError("calibrate failed on another rank; nothing has changed")
    if not batches.any():
        raise ValueError("the loader gave no batch")
    ranks.add([tensor for average in averages.values() for tensor in average.summed()])
    reached = {name: average for name, average in averages.items() if average.batches}
    if not reached and 0 < largest.max() < passed.batch_size:
        raise ValueError(f"no batch has batch_size={passed.batch_size} samples: the largest has {int(largest.max())}")
    if not reached:
        raise ValueError(f"no batch reached any of the batch normalizations {_listed(averages)}")
    for average in reached.values():
        average.finish()
    spoilt = [name for name, average in reached.items() if not average.is_finite]
    if spoilt:
        raise ValueError(f"features that are not finite reached {_listed(spoilt)}; nothing has changed")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


_KINDS: dict[str, Kind] = {"bsr": RegressionSums(), "evalnorm": Mixture(), "bn": RunningStatistics()}
