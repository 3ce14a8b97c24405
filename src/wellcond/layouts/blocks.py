"""Blocks of other libraries that multiply with a child's weight and never call the child."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from wellcond.layouts.layout import Layout
from wellcond.layouts.linear import LinearLayout
from wellcond.layouts.own_forward import watched


class BlockLayout(Layout):
    """A block without weights of its own whose forward uses some linear children's weights: they are found in it.

    Args:
        children: Their attributes.
        without_bias: Of these, the ones whose bias the block changes before it adds it.
        when: Whether a block does so; where it does not, it calls its children.
    """

    def __init__(
        self,
        children: tuple[str, ...],
        without_bias: tuple[str, ...] = (),
        when: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        self.children = children
        self.without_bias = without_bias
        self.when = when

    def weights(self, module: nn.Module) -> list[tuple[str, str | None]]:
        """Name none."""
        return []

    def adopted(self, module: nn.Module) -> Mapping[str, Layout]:
        """Adopt the children that are linear layers."""
        if self.when is not None and not self.when(module):
            return {}
        return {
            name: watched(_WEIGHT_ALONE if name in self.without_bias else _LINEAR, child=name)
            for name in self.children
            if isinstance(getattr(module, name, None), nn.Linear)
        }


class _WeightAlone(LinearLayout):
    """A linear map whose bias is none of its own parameters as they stand."""

    family = LinearLayout

    def weights(self, module: nn.Module) -> list[tuple[str, str | None]]:
        """Name the weight."""
        return [("weight", None)]


_LINEAR, _WEIGHT_ALONE = LinearLayout(), _WeightAlone()


def _has_biases_apart(module: nn.Module) -> bool:
    """Whether timm's attention keeps query's, key's and value's biases apart, and joins them in its forward."""
    return getattr(module, "q_bias", None) is not None and not getattr(module, "qkv_bias_separate", False)


_JOINING = BlockLayout(("qkv",), without_bias=("qkv",), when=_has_biases_apart)

BLOCKS: dict[tuple[str, str], Layout] = {
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): BlockLayout(("qkv", "proj")),
    ("torchvision.models.swin_transformer", "ShiftedWindowAttentionV2"): BlockLayout(("qkv", "proj"), ("qkv",)),
    ("torchvision.models.video.swin_transformer", "ShiftedWindowAttention3d"): BlockLayout(("qkv", "proj")),
    ("timm.models.beit", "Attention"): _JOINING,
    ("timm.models.eva", "EvaAttention"): _JOINING,
    ("timm.models.swin_transformer_v2", "WindowAttention"): _JOINING,
    ("transformers.models.longcat_flash.modeling_longcat_flash", "LongcatFlashTopkRouter"): BlockLayout(
        ("classifier",)
    ),
}
"""By module and class."""
