"""Takes the second moments of layers' inputs over data: one pass, in float64, over all ranks."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellcond.diagnostics.passes import (
    batches_on_device,
    calls_shown,
    check_where,
    layers_of,
    left_as_found,
)
from wellcond.layouts import Layer, Layout, UnknownInputError
from wellcond.moments.collection import SecondMoments
from wellcond.numerics.pieces import in_pieces
from wellcond.runtime.autocast import without_autocast
from wellcond.runtime.checks import Predicate, WellcondWarning, check_positive_integer, checked
from wellcond.runtime.models import Call, first_samples, run_on, samples_of, unwrapped
from wellcond.runtime.ranks import Ranks
from wellcond.runtime.texts import quoted_names
from wellcond.transforms.base import State
from wellcond.transforms.preconditioner.factors import DiagonalFactor
from wellcond.transforms.preconditioner.form import Form, tap_sums
from wellcond.transforms.preconditioner.forms import MomentForm, choose_form
from wellcond.transforms.preconditioner.records import layer_moment, sums_bytes

MomentChoice = Literal["auto", "dense", "kronecker", "blocks", "sketch"]

# How many numbers of a layer's rows are worked on at a time, and how many tensors of that size there are at most.
_PIECE = 1 << 21
_COPIES = 8
_FORMS: dict[str, MomentForm] = {
    "auto": "dense",
    "dense": "dense",
    "kronecker": "kronecker",
    "blocks": "blocks",
    "sketch": "low_rank",
}


@torch.no_grad()
@checked
def second_moments(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    kind: MomentChoice = "auto",
    call: Call | None = None,
    where: Predicate | None = None,
    centred: bool = False,
    max_dim: int = 2048,
    rank: int = 256,
    max_samples: int | None = None,
    max_batches: int | None = None,
    progress: bool = False,
    synchronize: bool | dist.ProcessGroup = True,
) -> SecondMoments:
    """Take E[x xᵀ] of each layer's input over data, in one pass, with sums in float64.

    x are the rows that a layer's weight multiplies, by the rules of `wellcond.layouts`, as for `FeatureWhitening`: a
    convolution's patches (per group), a recurrent layer's inputs and hidden states, attention's queries, keys and
    values. Batches are taken in one after another: the result is that of one large batch, up to rounding.

    Modules run in the modes that they are in: `model.eval()` for the features of evaluation. Nothing changes in the
    model, its gradients or torch's random state. With `torch.distributed` initialized every rank must call this, each
    with its part of the data, of any size; all of them get the moments of the whole. A model whose forward pass
    communicates (FSDP) needs as many batches on every rank.

    Memory beside the model's own passes is at most `SecondMoments.memory_bound`: three times what is kept of the widest
    layer, once of all others, and eight times 2²¹ numbers in float64 (16.8 MB each), or eight times the rows of one
    sample where these are more.

    Args:
        model: Any model; may be wrapped for DDP or compiled, or sharded by FSDP2.
        loader: Gives batches: a tensor; a tuple or list, whose first element is the input; or a mapping, for
            ``model(**batch)``. They are moved to the model's device.
        kind: What is kept of each matrix: ``"dense"``: the whole; ``"kronecker"``: of convolutions the margins over
            channels and over kernel taps; ``"blocks"``: of convolutions one matrix over channels for each frequency of
            the taps; ``"sketch"``: its products with ``rank`` directions, which give the leading eigenvectors;
            ``"auto"``: the whole up to ``max_dim``, a sketch beyond. What is no convolution is whole under all but
            ``"sketch"`` and ``"auto"``. Embedding tables, whose rows are one-hot, are diagonal.
        call: ``call(model, batch)``, for a model that is run otherwise.
        where: Which layers: a predicate of (module name, module); None is every linear map, convolution and embedding.
        centred: Whether matrices are those of deviations from the mean, unless asked otherwise. Means are always kept.
        max_dim: The widest matrix that ``"auto"`` keeps whole.
        rank: Directions of a sketch.
        max_samples: Stop after so many samples (of each rank); the last batch is cut.
        max_batches: Stop after so many of the loader's batches (of each rank).
        progress: Whether to write a line to standard error that counts batches and samples.
        synchronize: Over which ranks: all (True), a process group, or this process alone.

    Returns:
        The moments, by layer.

    Raises:
        TypeError: If ``where`` is not callable.
        ValueError: If an argument is out of its range, there is no such layer, the loader is empty, or a feature is not
            finite.
        RuntimeError: If the pass failed on another rank.

    Warns:
        WellcondWarning: About layers that no batch reached, by name; they are left out.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.LazyLinear(2))
        >>> _ = model(torch.randn(1, 4, 5, 5))
        >>> moments = second_moments(model, [torch.randn(8, 4, 5, 5) for _ in range(10)], max_samples=20)
        >>> moments.samples, moments.matrix("0").shape, moments.matrix("2").shape
        (20, torch.Size([4, 9, 9]), torch.Size([36, 36]))
    """
    for name, value in (
        ("max_dim", max_dim),
        ("rank", rank),
        ("max_samples", max_samples),
        ("max_batches", max_batches),
    ):
        if value is not None:
            check_positive_integer(name, value)
    inner, ranks = unwrapped(model), Ranks(synchronize)
    layers, skipped = _chosen(inner, where)
    limit, few = (max_dim if kind == "auto" else None), (rank if kind in ("auto", "sketch") else None)
    sums = {
        name: LayerSums(layer, choose_form([layer], False, _FORMS[kind], limit, few, -1.0))
        for name, layer in layers.items()
    }
    seen, error = 0, None
    try:
        with (
            left_as_found(inner),
            torch.no_grad(),
            calls_shown((own.layer.called, own.before, None) for own in sums.values()),
        ):
            for batch in _counted(batches_on_device(inner, loader, max_batches), inner, loader, max_samples, progress):
                seen += samples_of(batch, inner) or 0
                run_on(inner, batch, call)
    except Exception as raised:  # The other ranks, which would wait for this one, are told first.
        error = raised
    device = next(iter(layers.values())).weight.device
    said = ranks.gather(torch.tensor([error is not None, seen], dtype=torch.int64, device=device))
    if error is not None:
        raise error
    if said[:, 0].any():
        raise RuntimeError("second_moments failed on another rank")
    bound = memory_bound(sums.values())
    found = {}
    for name, own in sums.items():
        own.over_ranks(ranks)
        if own.unknown is None and own.reached:
            found[name] = own.result(name)
        else:
            skipped[name] = own.unknown or "no batch reached it"
    missed = [name for name in sums if name not in found]
    if not found:
        raise ValueError(f"no second moment was seen of {quoted_names(missed)}: {skipped[missed[0]]}")
    if missed:
        warnings.warn(
            f"second_moments: nothing was seen of {quoted_names(missed)} ({skipped[missed[0]]})",
            WellcondWarning,
            stacklevel=3,
        )
    weights = {own.layer.name: name for name, own in sums.items() if name in found}
    samples = None if call is not None else int(said[:, 1].sum())
    return SecondMoments(found, weights, centred=centred, skipped=skipped, samples=samples, memory_bound=bound)


class LayerSums:
    """The sums over one layer's rows: those of its form, the rows themselves, and how many there were.

    Args:
        layer: The layer.
        form: What is summed.
    """

    def __init__(self, layer: Layer, form: Form) -> None:
        self.layer, self.form = layer, form
        device = layer.weight.device
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        # Of a factor's tensors those that are sums, and the directions of sketches.
        self._state: State = {
            factor.key(name): factor.first(name, self._dtype, device)
            for factor in form.factors
            for name in factor.shapes()
            if name in factor.averaged or name.endswith("basis")
        }
        self._counts = torch.zeros(form.count_shape(), dtype=self._dtype, device=device)
        self._of_rows: Tensor | None = None
        if not isinstance(form.factors[0], DiagonalFactor):  # the mean of one-hot rows is their second moment
            self._of_rows = torch.zeros(form.groups, form.channels * form.taps, dtype=self._dtype, device=device)
        self.largest_sample = 0
        self.unknown: str | None = None

    @property
    def reached(self) -> bool:
        """Whether there was a row for each group."""
        return bool((self._counts > 0).all())

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take in the input of a call."""
        try:
            inputs = self.layer.inputs(args, kwargs)
        except UnknownInputError as error:
            self.unknown = str(error)
            return
        if inputs is None:
            return
        with without_autocast(self.layer.weight.device):
            for piece in self._pieces(inputs):
                self._add(piece)

    def _add(self, inputs: tuple[Any, ...]) -> None:
        *sums, counts = self.form.observe(self._state, self.layer, inputs, self._dtype)
        for key, total in zip(self.form.averaged_keys(), sums, strict=True):
            own = self._state[key]
            assert isinstance(own, Tensor)
            own.add_(total)
        self._counts.add_(counts)
        if self._of_rows is not None:
            self._of_rows.add_(self._row_sums(inputs))

    def _row_sums(self, inputs: tuple[Any, ...]) -> Tensor:
        """Return Σ x, shape [groups, d]."""
        inputs = tuple(v.to(self._dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs)
        window = self.layer.layout.window(self.layer.module)
        if window is not None:
            return tap_sums(self.layer.layout.padded(self.layer.module, *inputs), window)
        rows = self.layer.rows(*inputs)
        if isinstance(rows, Tensor):
            return rows.sum(dim=1)
        return torch.stack([part.sum(dim=0) for part in rows])

    def _pieces(self, inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        """Cut what a call shows along its samples, or its rows, so that float64 copies stay small."""
        first, *others = inputs
        layout, module, width = self.layer.layout, self.layer.module, self.form.channels * self.form.taps
        if layout.window(module) is not None:
            batch = first if first.dim() == self.layer.weight.dim() else first.unsqueeze(0)
            per_sample = max(1, batch[:1].numel()) * self.form.taps
            self.largest_sample = max(self.largest_sample, per_sample)
            yield from ((piece, *others) for piece in in_pieces(batch, per_sample, _PIECE) if len(piece))
        elif layout.trailing(module) == 1 and all(isinstance(value, Tensor) for value in inputs):
            flat = [value.reshape(-1, value.shape[-1]) for value in inputs]
            self.largest_sample = max(self.largest_sample, width)
            parts = [value.split(max(1, _PIECE // width)) for value in flat]
            yield from (piece for piece in zip(*parts, strict=True) if len(piece[0]))
        else:
            self.largest_sample = max(self.largest_sample, first.numel())
            yield inputs

    def over_ranks(self, ranks: Ranks) -> None:
        """Add what other ranks saw."""
        if ranks.size == 1:
            return
        unknown = ranks.gather_objects(self.unknown)
        self.unknown = next((why for why in unknown if why is not None), None)
        sums = [value for key in self.form.averaged_keys() if isinstance(value := self._state[key], Tensor)]
        ranks.add([*sums, self._counts, *([] if self._of_rows is None else [self._of_rows])])

    def result(self, name: str) -> Any:
        """Return the moment.

        Raises:
            ValueError: If a row was not finite.
        """
        averages = {key: value.to("cpu") for key, value in self._state.items() if isinstance(value, Tensor)}
        sums = [averages[key] for key in self.form.averaged_keys()]
        if not all(bool(torch.isfinite(total).all()) for total in sums):
            raise ValueError(f"features that are not finite reached {name!r}")
        self._state = {}
        counts = self._counts.to("cpu")
        means = self.form.means(sums, counts)
        averages |= dict(zip(self.form.averaged_keys(), means, strict=True))
        mean = None
        rows = tuple(counts.tolist())
        if self._of_rows is not None:
            per_group = counts.view(self.form.groups, -1)[:, :1]
            mean, rows = self._of_rows.to("cpu") / per_group, tuple(per_group.flatten().tolist())
        return layer_moment(self.form, self.layer, averages, mean, rows)


def memory_bound(sums: Iterable[LayerSums]) -> int:
    """Return the bytes that taking moments needs at most beside the model's own passes; see `second_moments`."""
    own = [(sums_bytes(each.form), each.largest_sample) for each in sums]
    workspace = _COPIES * 8 * max(_PIECE, *(sample for _, sample in own))
    # What one call adds is summed apart first; powers of two of it are made on the way.
    return sum(size for size, _ in own) + 2 * max(size for size, _ in own) + workspace


def _chosen(model: nn.Module, where: Predicate | None) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return the layers whose rows are defined, and why others are left out.

    By the module's name, or the weight's where a module has several.
    """
    check_where(where)
    layers = [layer for layer in layers_of(model) if layer.layout.kind != "norm"]
    chosen = [layer for layer in layers if where is None or where(layer.module_name, layer.module)]
    weights = Counter(layer.module_name for layer in layers)
    names = {layer: layer.module_name if weights[layer.module_name] == 1 else layer.name for layer in chosen}
    possible, skipped = {}, {}
    for layer, name in names.items():
        if layer.unfit is not None and layer.weight.dim() < 2:
            skipped[name] = layer.unfit
        elif type(layer.layout).rows is Layout.rows:
            skipped[name] = layer.layout.missing_rows
        else:
            possible[name] = layer
    if not possible:
        what = "that `where` selects and " if where is not None else ""
        why = "; ".join(f"{name!r}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(
            f"{type(model).__name__} has no layer {what}whose input rows are known{f' ({why})' if why else ''}"
        )
    return possible, skipped


def _counted(
    batches: Iterator[Any], model: nn.Module, loader: Iterable[Any], max_samples: int | None, progress: bool
) -> Iterator[Any]:
    """Yield batches until there were enough samples, of the last one as many as are left, and tell of it."""
    total = f"/{len(loader)}" if isinstance(loader, Sized) else ""
    seen = 0
    for number, batch in enumerate(batches, start=1):
        if max_samples is not None:
            if samples_of(batch, model) is None:
                raise ValueError("max_samples: the batches do not say how many samples they have; use max_batches")
            batch = first_samples(batch, max_samples - seen, model)
        seen += samples_of(batch, model) or 0
        if progress:
            print(f"\rsecond moments: batch {number}{total}, {seen} samples", end="", file=sys.stderr, flush=True)
        yield batch
        if max_samples is not None and seen >= max_samples:
            break
    if progress:
        print(file=sys.stderr)
