"""Keeps torch from fusing a normalization into a convolution where evaluation is no fixed scale and shift."""

from __future__ import annotations

import inspect
import sys

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

# Known by their code, not by their names: no alias escapes, and no other function of such a name is mistaken.
_FUSERS = {
    inspect.unwrap(function).__code__: function.__name__ for function in (fuse_conv_bn_eval, fuse_linear_bn_eval)
}


class Unfusible(nn.Module):
    """Base of the layers with the buffers of batch normalization that evaluate in another way than it does.

    torch's `fuse_conv_bn_eval` and `fuse_linear_bn_eval` read a layer's running statistics, γ, β and ε, whatever type
    it has, and nothing else: the fused layer would silently compute something else. (Other fusions, those of
    `torch.fx` and of `torch.ao.quantization`, go by the exact type, and leave these layers alone or refuse them.) Both
    read ε, so that is where they are refused.
    """

    @property
    def eps(self) -> float:
        """ε, added to the variance; refused to torch's functions that fuse batch normalizations."""
        value: float = self.__dict__["eps"]
        if not torch.compiler.is_compiling():
            fuser = _FUSERS.get(sys._getframe(1).f_code)
            if fuser is not None and not self.evaluates_as_batch_norm:
                raise TypeError(
                    f"{fuser} cannot fuse {type(self).__name__}, whose evaluation is not that of a batch "
                    "normalization: what it would give computes something else. Leave the layer as it is, or make it "
                    "one first: wellcond.nn.convert_norm(model, to='bn')"
                )
        return value

    @eps.setter
    def eps(self, value: float) -> None:
        self.__dict__["eps"] = value

    @property
    def evaluates_as_batch_norm(self) -> bool:
        """Whether, as it is made, the layer evaluates exactly as a batch normalization."""
        return False
