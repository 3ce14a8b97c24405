"""Gradient projection: keep what a layer answers to given features as it is (continual learning)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from wellcond.layouts import Layer
from wellcond.layouts.layout import Layout
from wellcond.layouts.unusual import is_sharded
from wellcond.moments.collection import SecondMoments
from wellcond.moments.layer_moment import LayerMoment
from wellcond.numerics.moments import statistics_dtype
from wellcond.runtime.checks import Predicate, check_choice, check_fields
from wellcond.transforms.base import Coverage, GradientTransform, Slot, State
from wellcond.transforms.sharding import is_sharded_by_first_axis, local, rows_are_whole, whole, write_whole

ProjectionPlace = Literal["gradient", "update"]


@dataclass(frozen=True)
class GradientProjection(GradientTransform):
    """Keep gradients, and updates, out of the span of given features: Φ(G) = G (I − U Uᵀ), U from E[x xᵀ] = U Λ Uᵀ.

    A layer then answers to all x in the span as before, W x + b, whatever it learns of other features: gradient
    projection memory, null-space and orthogonal-gradient training for continual learning. No sample is stored. With all
    layers covered and ``energy=1`` the outputs of a whole network for the old data stay exactly as they were.

    What is held once something is protected: of linear maps and convolutions W U, and their biases; of embeddings the
    vectors of the tokens that occurred; scales and shifts of norm layers whole. Not held are running statistics of
    batch normalization, which no gradient moves (`convert_norm(model, "frozen")` holds them), and the layers that
    `Attachment.report` names.

    Args:
        moments: Of the features to protect from the start; None for none. `Attachment.protect` adds more, task by
            task.
        energy: What share of each layer's E[‖x‖²] the protected directions hold, in (0, 1]. At 1 all directions that
            are not rounding.
        where: ``"update"``: the optimizer's update is projected as well as the gradient, so that neither momentum of
            the time before, nor weight decay, nor the scaling of Adam leads into the span; ``"gradient"``: the gradient
            alone, which costs a product less, and leaves all that in.
        layers: Which layers: a predicate of (module name, module); None is every layer with rows, and norm layers.

    Raises:
        ValueError: If an argument is outside its range.

    Source: Saha, Garg & Roy 2021 (GPM); Wang et al. 2021 (null space); Zeng et al. 2019 (OWM); Farajtabar et al. 2020.

    Example:
        >>> import wellcond
        >>> model = torch.nn.Linear(4, 2)
        >>> old = torch.randn(50, 2) @ torch.randn(2, 4)  # features on a plane
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> moments = wellcond.second_moments(model, [old])
        >>> handle = wellcond.attach(optimizer, model, wellcond.GradientProjection(moments, energy=1.0))
        >>> before = model(old)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 4)).square().sum().backward()
        ...     optimizer.step()
        >>> bool((model(old) - before).abs().max() < 1e-5), handle.stats()
        (True, {'projection': {'weights': 1, 'protected': 1, 'directions': 2}})
    """

    name: ClassVar[str] = "projection"

    moments: SecondMoments | None = field(default=None, compare=False, repr=False)
    energy: float = 0.99
    where: ProjectionPlace = "update"
    layers: Predicate | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.moments is not None and not isinstance(self.moments, SecondMoments):
            raise TypeError(f"moments must be SecondMoments or None, got {type(self.moments).__name__}")
        check_fields(self)
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy!r}")
        check_choice("where", self.where, ("gradient", "update"))

    # what is covered ------------------------------------------------------------------------------------------------

    def cover(self, layer: Layer) -> Coverage:
        """Decide whether a weight's gradient is projected."""
        reason = layer.unfit
        if reason is None and layer.weight.is_complex():
            reason = f"its weight is complex ({layer.weight.dtype})"
        norm = layer.layout.kind == "norm"
        if reason is None and not norm and type(layer.layout).rows is Layout.rows:
            reason = layer.layout.missing_rows
        if reason is None and self.layers is not None and not self.layers(layer.module_name, layer.module):
            reason = "not chosen by `layers`"
        if reason is None and not is_sharded_by_first_axis(layer.weight):
            reason = "its weight is sharded otherwise than along its first axis"
        if reason is not None:
            return Coverage(False, f"not projected: {reason}")
        bias = layer.bias is not None and layer.bias.requires_grad
        if norm:
            return Coverage(True, "held as soon as something is protected", bias, 1)
        groups, _, *inputs = layer.matrix_shape
        width = torch.Size(inputs).numel()
        numbers = groups * width * (1 if layer.layout.one_hot else width)
        what = f"diagonal of {width}" if layer.layout.one_hot else f"{groups} × {width} × {width}".removeprefix("1 × ")
        size = numbers * statistics_dtype(layer.weight.dtype).itemsize + 8
        return Coverage(True, f"projected, {self.where}, {what}", bias, size)

    def init(self, slot: Slot) -> State:
        """Start from what the moments given say, or with nothing that is protected."""
        weight, layer = slot.layer.weight, slot.layer
        state: State = {"rank": torch.zeros((), dtype=torch.int64, device=weight.device)}
        if layer.layout.kind != "norm":
            groups, _, *inputs = layer.matrix_shape
            width = torch.Size(inputs).numel()
            shape = (groups, width) if layer.layout.one_hot else (groups, width, width)
            state["directions"] = torch.zeros(shape, dtype=statistics_dtype(weight.dtype), device=weight.device)
        if self.moments is not None and not weight.is_meta:
            known = slot.shared.setdefault("first", {})
            if layer.name not in known:
                self._extend(slot, state, self.moments)
                known[layer.name] = {key: _of(state, key).cpu() for key in state}
            for key, value in known[layer.name].items():
                _of(state, key).copy_(value)
        return state

    def protect(self, slots: Sequence[Slot], moments: SecondMoments) -> bool:
        """Protect further features: the directions in which these, without what is protected already, have energy."""
        for slot in slots:
            if slot.state:
                self._extend(slot, slot.state, moments)
        return True

    def _extend(self, slot: Slot, state: State, moments: SecondMoments) -> None:
        """Add to a state's directions those of further moments, in place."""
        rank = _of(state, "rank")
        if slot.layer.layout.kind == "norm":
            rank.fill_(1)
            return
        directions = _of(state, "directions")
        for use in slot.uses:
            if use.name not in moments:
                continue
            moment = moments[use.name]
            groups, _, *inputs = slot.layer.matrix_shape
            if (moment.groups, moment.width) != (groups, torch.Size(inputs).numel()):
                raise ValueError(
                    f"moments of '{use.name}' are of {moment.groups} × {moment.width} features, the layer has "
                    f"{groups} × {torch.Size(inputs).numel()}"
                )
            if slot.layer.layout.one_hot:
                extended = _more_tokens(directions.cpu().double(), moment, self.energy)
                count = int(extended.sum(-1).max())
            else:
                extended = _more_directions(directions.cpu().double()[..., : int(rank)], moment, self.energy)
                count = extended.shape[-1]
            directions.zero_()[..., : extended.shape[-1]].copy_(extended)
            rank.fill_(count)

    # steps ----------------------------------------------------------------------------------------------------------

    def _rank(self, slot: Slot) -> int:
        """Return how many directions are protected; the device is asked once."""
        known: dict[str, tuple[Tensor, int, int]] = slot.shared.setdefault("ranks", {})
        rank = _of(slot.state, "rank")
        found = known.get(slot.layer.name)
        if found is None or found[0] is not rank or found[1] != rank._version:
            found = known[slot.layer.name] = (rank, rank._version, int(rank))
        return found[2]

    def update(self, slots: Sequence[Slot]) -> None:
        """Project each gradient, and note where the weights stand in the span."""
        for slot in slots:
            slot.scratch = None
            if not (rank := self._rank(slot)):
                continue
            weight, bias = slot.layer.weight, slot.bias
            assert weight.grad is not None
            if slot.layer.layout.kind == "norm":
                weight.grad.zero_()
            else:
                directions = self._directions(slot, rank)
                _remove(slot.layer, weight.grad, directions, 0.0)
            if bias is not None and bias.grad is not None:
                bias.grad.zero_()
            if self.where == "update":
                slot.scratch = [self._place(slot, tensor, rank) for tensor in (weight, *slot.companions())]
                slot.scratch += [None if bias is None else local(bias).detach().clone()]

    def _directions(self, slot: Slot, rank: int) -> Tensor:
        directions = _of(slot.state, "directions")
        return directions if slot.layer.layout.one_hot else directions[..., :rank]

    def _place(self, slot: Slot, tensor: Tensor, rank: int) -> Tensor:
        """Return what a weight answers to each protected direction, W U; of norm layers the weight."""
        if slot.layer.layout.kind == "norm":
            return local(tensor).detach().clone()
        return _components(slot.layer, tensor, self._directions(slot, rank))

    def finish(self, slots: Sequence[Slot]) -> None:
        """Take back what the optimizer's update has changed in the span, by whatever way."""
        for slot in slots:
            before, slot.scratch = slot.scratch, None
            if before is None:
                continue
            *places, bias = before
            tensors = (slot.layer.weight, *slot.companions())
            for tensor, place in zip(tensors, [*places, *places[:1] * (len(tensors) - len(places))], strict=True):
                if slot.layer.layout.kind == "norm":
                    local(tensor).copy_(place)
                else:
                    _remove(slot.layer, tensor, self._directions(slot, self._rank(slot)), place)
            if bias is not None and slot.bias is not None:
                local(slot.bias).copy_(bias)

    def stats(self, slots: Sequence[Slot]) -> dict[str, int]:
        """Count the weights, those of which something is protected, and the directions of all of these."""
        ranks = [self._rank(slot) for slot in slots if slot.state]
        return {"weights": len(slots), "protected": sum(rank > 0 for rank in ranks), "directions": sum(ranks)}


def _of(state: State, key: str) -> Tensor:
    value = state[key]
    assert isinstance(value, Tensor)
    return value


def _matrix(layer: Layer, tensor: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return a weight-shaped tensor as [groups, out, d], what that is a view of, and whether that is the whole."""
    gathered = is_sharded(tensor) and not rows_are_whole(layer)
    part = whole(tensor) if gathered else local(tensor)
    return layer.matrix(part).flatten(2), part, gathered


def _components(layer: Layer, tensor: Tensor, directions: Tensor) -> Tensor:
    """Return W U; of one-hot rows the protected columns, zeros elsewhere."""
    matrix, _, _ = _matrix(layer, tensor.detach())
    wide = matrix.to(directions.dtype)
    return wide * directions.unsqueeze(1) if directions.dim() == 2 else wide @ directions


def _remove(layer: Layer, tensor: Tensor, directions: Tensor, place: Tensor | float) -> None:
    """W ← W − (W U − place) Uᵀ, in place."""
    matrix, part, gathered = _matrix(layer, tensor.detach())
    wide = matrix.to(directions.dtype)
    if directions.dim() == 2:
        off = wide * directions.unsqueeze(1) - place
    else:
        off = (wide @ directions - place) @ directions.mT
    view = layer.matrix(part)
    view.copy_((wide - off).unflatten(2, view.shape[2:]))
    if gathered:
        write_whole(tensor, part)


def _more_directions(known: Tensor, moment: LayerMoment, energy: float) -> Tensor:
    """Return orthonormal directions, those known first, that hold a share of a moment's energy.

    Args:
        known: Shape [groups, d, r], zeros where a group has fewer.
        moment: Of further features.
        energy: The share.

    Returns:
        Shape [groups, d, s], s ≥ r.
    """
    found = []
    for basis, matrix in zip(known, moment.matrices(), strict=True):
        basis = basis[:, basis.square().sum(0) > 0.5]
        total = matrix.diagonal().sum()
        rest = matrix - basis @ (basis.T @ matrix)
        rest = rest - (rest @ basis) @ basis.T
        values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        # Rounding, of the moment and of what was taken out of it, is no direction.
        values = torch.where(values > 8 * len(values) * torch.finfo(values.dtype).eps * total, values, 0.0)
        held = (total - values.sum()) + values.cumsum(0) - values  # before each
        count = int(((values > 0) & ((held < energy * total * (1 - 1e-12)) | (energy == 1))).sum())
        joined = torch.cat([basis, vectors[:, :count]], 1)
        # Once more orthogonal, as far as float64 goes.
        found.append(torch.linalg.qr(joined)[0] if joined.shape[1] else joined)
    most = max(basis.shape[1] for basis in found)
    return torch.stack([torch.nn.functional.pad(basis, (0, most - basis.shape[1])) for basis in found])


def _more_tokens(known: Tensor, moment: LayerMoment, energy: float) -> Tensor:
    """Return 1 for each token that is known or among the most frequent ones that hold a share of all; 0 for others."""
    frequencies = moment.tensors["diagonal"].double()
    values, order = frequencies.sort(dim=-1, descending=True)
    held = values.cumsum(-1) - values
    kept = (values > 0) & ((held < energy * values.sum(-1, keepdim=True) * (1 - 1e-12)) | (energy == 1))
    return torch.maximum(known, torch.zeros_like(known).scatter_(-1, order, kept.to(known.dtype)))
