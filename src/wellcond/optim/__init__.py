"""Named optimizers: a torch optimizer plus one attached transform, nothing else.

By default they take the library's form of the second moment and of the first solves; ``as_published=True`` takes the
thesis's.

Their signatures show the options of both by name, so that what builds them from a config file (LightningCLI, Hydra) can
check these. A config that has only parameters and no model takes `from_parameters`, and the transform is attached by a
callback (`wellcond.integrations`).
"""

from wellcond.deferred import attach_deferred
from wellcond.grouping import Group, ParameterGroups, parameter_groups
from wellcond.optim.by_name import create, from_parameters, intervals, names
from wellcond.optim.named import DWSGDM, FSGD, WSGDM, FAdam, WAdam

__all__ = [
    "DWSGDM",
    "FSGD",
    "WSGDM",
    "FAdam",
    "Group",
    "ParameterGroups",
    "WAdam",
    "attach_deferred",
    "create",
    "from_parameters",
    "intervals",
    "names",
    "parameter_groups",
]
