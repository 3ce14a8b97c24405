"""Reports of a conversion or calibration: the layers that changed, the layers that stayed, and the reasons."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from wellcond.runtime.checks import checked

_REPORTS: WeakKeyDictionary[nn.Module, ConversionReport] = WeakKeyDictionary()
_LOG = logging.getLogger("wellcond")


@dataclass(frozen=True)
class ConversionReport:
    """The changes of one call to a model's normalizations; `conversion_report` returns it, `str` is a table of it.

    Attributes:
        call: Such as ``"convert_norm(to='bsr')"``.
        changed: What became of each layer that was changed, by its name.
        left: Why each other normalization was left as it is, by its name.
        data: What a calibration has gone over, of this rank, such as ``"of 4 batches, 512 samples"``; "" of a
            conversion.
    """

    call: str
    changed: dict[str, str]
    left: dict[str, str]
    data: str = ""

    def __str__(self) -> str:
        of_data = f" {self.data}" if self.data else ""
        lines = [f"{self.call}{of_data}: {len(self.changed)} normalizations changed, {len(self.left)} left"]
        for title, entries in (("changed", self.changed), ("left", self.left)):
            for what, count in Counter(entries.values()).items():
                names = [name or "the model itself" for name, own in entries.items() if own == what]
                shown = ", ".join(names[:3]) + (", …" if count > 3 else "")
                lines.append(f"  {title} {count:>3}  {what}  ({shown})")
        return "\n".join(lines)


@checked
def conversion_report(model: nn.Module) -> ConversionReport:
    """Return what the last `convert_norm` or `wellcond.calibrate` of this very model did.

    The same is logged by the logger ``wellcond``, at the level INFO.

    Args:
        model: That was handed to the call (a copy of it has no report).

    Returns:
        Layer by layer, what was changed, what was left, and why.

    Raises:
        ValueError: If there was no such call.

    Example:
        >>> from wellcond.nn import convert_norm
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))
        >>> print(conversion_report(convert_norm(model, to="bsr")))
        convert_norm(to='bsr'): 1 normalizations changed, 1 left
          changed   1  BatchNorm2d → BSRBatchNorm2d  (1)
          left   1  GroupNorm: no batch normalization  (2)
    """
    if model not in _REPORTS:
        raise ValueError(f"model, a {type(model).__name__}, was not converted or calibrated: there is no report of it")
    return _REPORTS[model]


def keep_report(
    model: nn.Module, call: str, changed: Mapping[str, str], left: Mapping[str, str], data: str = ""
) -> None:
    """Keep and log a report."""
    report = ConversionReport(call, dict(changed), dict(left), data)
    _REPORTS[model] = report
    _LOG.info("%s", report)


def is_other_norm(module: nn.Module) -> bool:
    """Whether a module is, as far as its name says, a normalization; only for what is shown."""
    return type(module).__name__.rstrip("123d").endswith("Norm")
