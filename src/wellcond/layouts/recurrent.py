"""Recurrent layers and cells: their rows are the inputs, and the hidden states of the step before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from wellcond.layouts.layout import Layout, Rows
from wellcond.runtime.autocast import without_autocast
from wellcond.runtime.random_state import random_numbers_kept


class RecurrentLayout(Layout):
    """``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and their cells: each weight (gates · hidden, in), all gates one matrix."""

    has_rows = True

    def weights(self, module: nn.Module) -> list[tuple[str, str | None]]:
        """Pair each ``weight_…`` with its ``bias_…``."""
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if isinstance(getattr(module, "parametrizations", None), nn.ModuleDict):
            names += list(cast(nn.ModuleDict, module.parametrizations))
        biases = {name.replace("weight", "bias"): name for name in names if name.startswith("weight")}
        return [(weight, bias if bias in names else None) for bias, weight in biases.items()]

    def of_weight(self, name: str) -> Layout:
        """Return the rule of one weight."""
        if not self.has_rows:
            return self
        _, which, *place = name.split("_", 3)
        if which == "hr":
            return _Projection()
        if not place:
            return _CellWeight(hidden=which == "hh")
        return _SequenceWeight(int(place[0][1:]), "reverse" in place, hidden=which == "hh")


class _Weight(Layout):
    """A rule whose `inputs` are the rows themselves."""

    has_rows = True

    def trailing(self, module: nn.Module) -> int | None:
        """Return one."""
        return 1

    def rows(self, module: nn.Module, inputs: Tensor) -> Rows:
        """Flatten all axes but the last into rows."""
        return inputs.reshape(1, -1, inputs.shape[-1])


class _Projection(Layout):
    """``weight_hr``, by which an LSTM with ``proj_size`` projects its hidden states."""

    missing_rows = "the hidden states before an LSTM's projection are not seen"


class _CellWeight(_Weight):
    """A cell's ``weight_ih`` or ``weight_hh``, whose rows the call shows."""

    def __init__(self, hidden: bool) -> None:
        self.hidden = hidden

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Pick the input, or the hidden state: zeros where none is given."""
        given = dict(zip(("input", "hx"), args, strict=False)) | dict(kwargs)
        inputs, state = given.get("input"), given.get("hx")
        if not isinstance(inputs, Tensor):
            return None
        if not self.hidden:
            return (inputs,)
        if state is None:
            return (inputs.new_zeros(*inputs.shape[:-1], cast(int, module.hidden_size)),)
        state = state[0] if isinstance(state, (tuple, list)) else state
        return (state,) if isinstance(state, Tensor) else None


class _SequenceWeight(_Weight):
    """A weight of ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``: of one of its layers, in one direction.

    Hidden states inside the layer, and the inputs of all its layers but the first, are found by running its layers up
    to this one once more, which costs as much on the steps that take statistics.
    """

    def __init__(self, layer: int, reverse: bool, hidden: bool) -> None:
        self.layer, self.reverse, self.hidden = layer, reverse, hidden
        self.reruns = layer > 0  # with the dropout between layers

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Return the rows of this weight; of packed sequences those that are there."""
        given = dict(zip(("input", "hx"), args, strict=False)) | dict(kwargs)
        sequence, state = given.get("input"), given.get("hx")
        if not isinstance(sequence, (Tensor, PackedSequence)):
            return None
        recurrent = cast(nn.LSTM, module)
        weight = cast(Tensor, recurrent.weight_ih_l0)
        with torch.no_grad(), without_autocast(weight.device), random_numbers_kept(weight.device):
            run = _Run(recurrent, sequence, state, weight.dtype)
            rows = run.data
            for layer in range(self.layer):
                rows = F.dropout(run.outputs(layer, rows), recurrent.dropout, recurrent.training)
            if self.hidden:
                rows = run.before(self.layer, run.outputs(self.layer, rows), self.reverse)
        return (rows,)


class _Run:
    """A call of a recurrent layer, to be followed layer by layer.

    Args:
        module: The layer.
        sequence: Its input, as it was given.
        state: The state that it starts from, as it was given.
        dtype: That its weights have.
    """

    def __init__(self, module: nn.LSTM, sequence: Tensor | PackedSequence, state: Any, dtype: torch.dtype) -> None:
        self.module = module
        self.directions = 2 if module.bidirectional else 1
        self.sizes: Tensor | None = None
        self.size = module.proj_size or module.hidden_size
        order = None
        if isinstance(sequence, PackedSequence):
            self.data, self.sizes, order = sequence.data.to(dtype), sequence.batch_sizes, sequence.sorted_indices
            batch = int(self.sizes[0])
        else:
            data = sequence.to(dtype)
            if data.dim() == 2:
                data = data.unsqueeze(1)
            elif module.batch_first:
                data = data.transpose(0, 1)
            self.data, batch = data, data.shape[1]
        given = state if isinstance(state, (tuple, list)) else (state,)
        widths = (self.size, module.hidden_size)[: 2 if isinstance(module, nn.LSTM) else 1]
        count = module.num_layers * self.directions
        self.states: list[Tensor] = []
        for width, value in zip(widths, given if state is not None else (None,) * len(widths), strict=True):
            if value is None:
                value = self.data.new_zeros(count, batch, width)
            value = value.to(dtype)
            value = value.unsqueeze(1) if value.dim() == 2 else value
            self.states.append(value if order is None else value.index_select(1, order))

    def outputs(self, layer: int, rows: Tensor) -> Tensor:
        """Run one layer, in both directions where it has two.

        Args:
            layer: Its number.
            rows: What it is given: [time, batch, features], or packed.

        Returns:
            Its outputs, laid out likewise.
        """
        module = self.module
        kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
        kinds += ["weight_hr"] if module.proj_size else []
        ways = ("", "_reverse")[: self.directions]
        # As parametrizations compute them, and whole where they are sharded.
        weights = [getattr(module, f"{kind}_l{layer}{way}") for way in ways for kind in kinds]
        own = slice(layer * self.directions, (layer + 1) * self.directions)
        states = [value[own].contiguous() for value in self.states]
        state: Any = tuple(states) if isinstance(module, nn.LSTM) else states[0]
        kind: Any = torch.lstm if isinstance(module, nn.LSTM) else torch.gru
        if isinstance(module, nn.RNN):
            kind = torch.rnn_relu if module.nonlinearity == "relu" else torch.rnn_tanh
        options = (weights, module.bias, 1, 0.0, False, module.bidirectional)
        if self.sizes is not None:
            return cast(Tensor, kind(rows, self.sizes, state, *options)[0])
        return cast(Tensor, kind(rows, state, *options, False)[0])

    def before(self, layer: int, outputs: Tensor, reverse: bool) -> Tensor:
        """Return the hidden state from which each step of one direction came.

        Args:
            layer: Its number.
            outputs: What `outputs` returned.
            reverse: Whether the direction is that from the end.

        Returns:
            The states, laid out as the outputs.
        """
        outputs = outputs[..., self.size :] if reverse else outputs[..., : self.size]
        first = self.states[0][layer * self.directions + reverse]
        if self.sizes is None:
            parts = [outputs[1:], first.unsqueeze(0)] if reverse else [first.unsqueeze(0), outputs[:-1]]
            return torch.cat(parts)
        steps = outputs.split(self.sizes.tolist())
        if not reverse:
            return torch.cat([state[: len(step)] for state, step in zip([first, *steps], steps, strict=False)])
        later = [*steps[1:], outputs[:0]]
        return torch.cat(
            [torch.cat([after, first[len(after) : len(step)]]) for after, step in zip(later, steps, strict=True)]
        )
