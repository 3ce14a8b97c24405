"""The second moments of a model's layers, by name: what `second_moments` returns."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from wellcond.moments.files import read_moments, write_moments
from wellcond.moments.layer_moment import Eigenpairs, LayerMoment

_WRAPPERS = ("module.", "_orig_mod.")


class SecondMoments(Mapping[str, LayerMoment]):
    """E[x xᵀ] of each layer's input x, by the layer's name; made by `second_moments` and `Attachment.second_moments`.

    A name is that of a layer (``"conv1"``), or of its weight (``"conv1.weight"``, ``"rnn.weight_ih_l0"``), which tells
    the weights of a layer with several apart. All tensors are on the CPU.

    Args:
        layers: The moment of each layer; by its weight's name where a layer has several.
        weights: The key of each weight in ``layers``, by the weight's name.
        centred: Whether matrices are, unless asked otherwise, those of deviations from the mean.
        skipped: Layers of which nothing is known, with the reason.
        samples: How many samples were seen; None where that was not counted.
        memory_bound: What taking them may have needed at most beside the model's own passes, in bytes.

    Example:
        >>> import torch, wellcond
        >>> model = torch.nn.Linear(2, 1)
        >>> moments = wellcond.second_moments(model, [torch.tensor([[2.0, 0.0], [0.0, 4.0]])])
        >>> moments.matrix("weight")
        tensor([[2., 0.],
                [0., 8.]], dtype=torch.float64)
        >>> moments.condition
        {'': 4.0}
    """

    def __init__(
        self,
        layers: Mapping[str, LayerMoment],
        weights: Mapping[str, str] | None = None,
        *,
        centred: bool = False,
        skipped: Mapping[str, str] | None = None,
        samples: int | None = None,
        memory_bound: int | None = None,
    ) -> None:
        self._layers = dict(layers)
        self.weights = dict(weights or {})
        self.centred = centred
        self.skipped = dict(skipped or {})
        self.samples = samples
        self.memory_bound = memory_bound

    # by name --------------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> LayerMoment:
        return self._layers[self._key(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def matrix(self, name: str, *, centred: bool | None = None) -> Tensor:
        """Return E[x xᵀ] of one layer's input.

        Args:
            name: Of the layer, or of its weight.
            centred: Whether to take out the mean, E[(x − μ)(x − μ)ᵀ]; by default as the moments were asked for.

        Returns:
            Shape [d, d]; [groups, d, d] where the weight is several matrices (grouped convolutions, attention's packed
            projection). A convolution's d counts (channel, *tap), as its weight does. Of Kronecker factors, tap blocks
            and sketches the matrix that they stand for.

        Raises:
            KeyError: If there is no such layer.
            ValueError: If the mean is asked for and not known.
        """
        return _single(self[name].matrices(centred=self._centred(centred)))

    def mean(self, name: str) -> Tensor:
        """Return E[x] of one layer's input.

        Args:
            name: Of the layer, or of its weight.

        Returns:
            Shape [d], or [groups, d].

        Raises:
            KeyError: If there is no such layer.
            ValueError: If the mean is not known.
        """
        mean = self[name].mean
        if mean is None:
            raise ValueError(f"the mean of the input of {name!r} is not known")
        return _single(mean)

    def eigh(self, name: str, *, centred: bool | None = None) -> Eigenpairs:
        """Return the eigenvalues and eigenvectors of one layer's second moment.

        Args:
            name: Of the layer, or of its weight.
            centred: As for `matrix`.

        Returns:
            Eigenvalues, ascending, and eigenvectors as columns; of a sketch the leading ones alone.

        Raises:
            KeyError: If there is no such layer.
            ValueError: If the mean is asked for and not known.
        """
        return Eigenpairs(*map(_single, self[name].eigenpairs(centred=self._centred(centred))))

    @property
    def condition(self) -> dict[str, float]:
        """λ₁/λ_d of each layer, of its worst group; infinite where M is singular, of a sketch a lower bound."""
        return {name: moment.condition(centred=self.centred) for name, moment in self._layers.items()}

    @property
    def bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(moment.bytes for moment in self._layers.values())

    # as a whole -----------------------------------------------------------------------------------------------------

    def __add__(self, other: SecondMoments) -> SecondMoments:
        """Return the moments of both sets of data together, each row counted once; layers of one alone are kept.

        Raises:
            ValueError: If a layer's moments are of different forms, or moving averages.
        """
        if not isinstance(other, SecondMoments):
            return NotImplemented
        layers = dict(self._layers)
        for name, moment in other._layers.items():
            try:
                layers[name] = layers[name].merged(moment) if name in layers else moment
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from None
        samples = None if self.samples is None or other.samples is None else self.samples + other.samples
        skipped = {name: why for name, why in {**self.skipped, **other.skipped}.items() if name not in layers}
        return SecondMoments(
            layers, {**self.weights, **other.weights}, centred=self.centred, skipped=skipped, samples=samples
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all to a safetensors file.

        Args:
            path: Of the file; an existing one is replaced.

        Raises:
            ImportError: If the package ``safetensors`` is missing (``pip install "wellcond[moments]"``).
            OSError: If it cannot be written.
        """
        about = {
            "weights": self.weights,
            "centred": self.centred,
            "skipped": self.skipped,
            "samples": self.samples,
            "memory_bound": self.memory_bound,
        }
        write_moments(path, self._layers, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SecondMoments:
        """Read what `save` wrote.

        Args:
            path: Of the file.

        Returns:
            The moments.

        Raises:
            ImportError: If the package ``safetensors`` is missing.
            OSError: If there is no such file.
            ValueError: If it is no file of second moments.
        """
        layers, about = read_moments(path)
        weights = about.pop("weights")
        return cls(layers, weights, **about)

    def to_dict(self) -> dict[str, Any]:
        """Return what is known of each layer as dictionaries, lists and numbers, for JSON: no matrices.

        Of each layer: its form, sizes, number of rows, traces, condition number and eigenvalues.
        """
        return {
            "centred": self.centred,
            "samples": self.samples,
            "bytes": self.bytes,
            "memory_bound": self.memory_bound,
            "skipped": dict(self.skipped),
            "layers": {name: moment.to_dict(centred=self.centred) for name, moment in self._layers.items()},
        }

    def __repr__(self) -> str:
        seen = "" if self.samples is None else f", {self.samples} samples"
        lines = [f"SecondMoments of {len(self)} layers{seen}, {self.bytes} bytes"]
        width = max((len(name) for name in self._layers), default=0)
        for name, moment in self._layers.items():
            rows = "" if moment.rows is None else f", {min(moment.rows):.0f} rows"
            lines.append(f"  {name.ljust(width)}  {moment.describe()}{rows}")
        lines += [f"  {name.ljust(width)}  nothing: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)

    def _centred(self, asked: bool | None) -> bool:
        return self.centred if asked is None else asked

    def _find(self, name: str) -> str | None:
        """Return the key of a layer's or a weight's name, also under the names that a wrapper gives."""
        stripped = name
        while True:
            for candidate in (stripped, self.weights.get(stripped)):
                if candidate is not None and candidate in self._layers:
                    return candidate
            prefix = next((prefix for prefix in _WRAPPERS if stripped.startswith(prefix)), None)
            if prefix is None:
                return None
            stripped = stripped.removeprefix(prefix)

    def _key(self, name: str) -> str:
        found = self._find(name)
        if found is not None:
            return found
        if name in self.skipped:
            raise KeyError(f"no second moment is known of {name!r}: {self.skipped[name]}")
        near = difflib.get_close_matches(name, [*self._layers, *self.weights], n=1)
        hint = f": did you mean {near[0]!r}?" if near else f"; known are {', '.join(map(repr, self._layers))}"
        raise KeyError(f"no layer is called {name!r}{hint}")


def _single(tensor: Tensor) -> Tensor:
    """Return a tensor of one group without the axis of groups."""
    return tensor.squeeze(0) if tensor.shape[0] == 1 else tensor
