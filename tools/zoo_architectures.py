"""The smallest model of every architecture family of torchvision, timm and transformers, with random weights."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 4
CLASSES = 5
LIBRARIES = ("torchvision", "timm", "transformers")
Call = Callable[[nn.Module], Any]
# From the smallest to the largest, as names of models say it; a name without such a word stands in the middle.
SIZES = (
    ("test", "atto", "femto", "pico", "zepto"),
    ("nano", "xxxs", "xxs", "xxt", "xxtiny", "ultrapico"),
    ("xs", "xt", "xtiny", "micro", "mini", "t0", "m0", "b0", "a0"),
    ("tiny", "t", "ti", "extra", "x05", "050", "m1", "b1", "400mf"),
    ("small", "s", "lite", "light", "035"),
    (),
    ("medium", "m", "base", "b"),
    ("large", "l", "xl", "xlarge", "huge", "h", "giant", "g", "gigantic", "enormous", "so150m", "so400m"),
)


class NotBuiltError(Exception):
    """The family's smallest model could not be built or called here; says nothing about wellcond."""


@dataclass(frozen=True)
class Architecture:
    """One architecture family.

    Attributes:
        library: One of `LIBRARIES`.
        family: The library's own name of the family.
        names: Its models, the smallest first as far as their names tell.
    """

    library: str
    family: str
    names: tuple[str, ...]

    @property
    def title(self) -> str:
        """Return the library and the family."""
        return f"{self.library}/{self.family}"

    def build(self) -> tuple[nn.Module, Call]:
        """Make the smallest model that can be made, and a call of it on inputs that are the same at each call.

        Raises:
            NotBuiltError: If that is none of them.
        """
        problems = []
        for name in self.names[:3]:
            for make in _BUILDERS[self.library](name):
                try:
                    torch.manual_seed(0)
                    model, calls = make()
                except Exception as error:
                    problems.append(f"{name}: {type(error).__name__}: {_line(error)}")
                    continue
                for call in calls:
                    try:
                        model.train()
                        loss = loss_of(call(model))
                        loss.backward()
                        model.zero_grad(set_to_none=True)
                        with torch.no_grad():
                            outputs_of(call(model.eval()))
                    except Exception as error:
                        problems.append(f"{name}: {type(error).__name__}: {_line(error)}")
                        continue
                    torch.manual_seed(0)
                    return make()[0], call
        raise NotBuiltError(problems[0] if problems else "no model")


def architectures(library: str) -> list[Architecture]:
    """Return a library's families, in the order of their names."""
    families: dict[str, list[str]] = {}
    if library == "torchvision":
        import torchvision

        for name in torchvision.models.list_models():
            families.setdefault(_torchvision_family(name), []).append(name)
    elif library == "timm":
        import timm

        for family in timm.list_modules():
            # timm's own names of its test models stand in the module of their family.
            families[family] = timm.list_models(module=family)
    else:
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

        families = {name: [name] for name in MODEL_MAPPING_NAMES}
    return [
        Architecture(library, family, tuple(sorted(names, key=_size)))
        for family, names in sorted(families.items())
        if names
    ]


# what comes out -----------------------------------------------------------------------------------------------------


def outputs_of(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in what a model returned, in order.

    Raises:
        ValueError: If there are none.
    """
    found = [tensor for tensor in _tensors(output) if tensor.is_floating_point() and tensor.numel()]
    if not found:
        raise ValueError(f"the model returned no numbers: {type(output).__name__}")
    return found


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def loss_of(output: Any) -> Tensor:
    """Return a random linear function of the outputs: no normalization at the end makes its gradient vanish."""
    generator = torch.Generator().manual_seed(1)
    terms = []
    for tensor in outputs_of(output):
        factors = torch.randn(tensor.shape, generator=generator)
        if tensor.requires_grad:
            terms.append((tensor * factors).sum() / tensor.numel() ** 0.5)
    if not terms:
        raise ValueError("no output depends on a parameter")
    return torch.stack([term.float() for term in terms]).sum()


def noise(*shape: int) -> Tensor:
    """Return normal numbers that depend on the shape alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


# torchvision --------------------------------------------------------------------------------------------------------


def _torchvision_family(name: str) -> str:
    """Return the family of a model: its name up to its size."""
    family = re.sub(r"(_?v?\d+_bn|_\d+x\d+d|_[tslbh](_\d+)?|_v2_[tsl]|_\d+_?\d*gf|_\d+mf)$", "", name)
    family = re.sub(r"_(base|large|small|tiny|b\d|\d+_2)$", "", family)
    return re.sub(r"(\d_\d|_x\d_\d|\d\d+)$", "", family).rstrip("_") or name


def _torchvision(name: str) -> Iterator[Callable[[], tuple[nn.Module, list[Call]]]]:
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    group = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    options: list[dict[str, Any]] = [{"num_classes": CLASSES}]
    if group == "detection":
        options = [{"num_classes": CLASSES, "weights_backbone": None, "min_size": 64, "max_size": 96}]
        options += [{"num_classes": CLASSES, "weights_backbone": None}]
    elif group == "segmentation":
        options = [{"num_classes": CLASSES, "weights_backbone": None}]
    elif group == "optical_flow":
        options = [{}]
    elif name.startswith("vit"):
        small = {"patch_size": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
        builder = torchvision.models.VisionTransformer
        options = [{"num_classes": CLASSES, "image_size": 64, **small}]
    elif "maxvit" in name:
        options = [{"num_classes": CLASSES}]
    elif name.startswith("mvit"):
        options = [{"num_classes": CLASSES, "spatial_size": (64, 64), "temporal_size": 4}]
    if name in ("googlenet", "inception_v3"):
        options[0] |= {"init_weights": False}
    for each in options:

        def make(each: dict[str, Any] = each) -> tuple[nn.Module, list[Call]]:
            return builder(**each), list(_torchvision_calls(group))

        yield make


def _torchvision_calls(group: str) -> Iterator[Call]:
    if group == "detection":
        images = [noise(3, 64, 64).sigmoid(), noise(3, 64, 64).sigmoid()]
        targets = {
            "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
            "keypoints": torch.tensor([[[8.0, 8.0, 1.0]] * 17]),
        }
        # In evaluation it returns boxes, of which there may be none: a number stands beside them.
        yield (
            lambda model: (
                model(images, [targets, targets]) if model.training else [torch.zeros(1), *_tensors(model(images))]
            )
        )
    elif group == "optical_flow":
        first, second = noise(1, 3, 128, 128).tanh(), noise(1, 3, 128, 128).flip(3).tanh()
        yield lambda model: model(first, second, num_flow_updates=2)
    elif group == "video":
        for frames, size in ((4, 64), (14, 64), (16, 112)):
            clip = noise(2, 3, frames, size, size)
            yield lambda model, clip=clip: model(clip)
    else:
        yield from _image_calls((64, 96, 128, 224))


def _image_calls(sizes: tuple[int, ...]) -> Iterator[Call]:
    for size in sizes:
        images = noise(BATCH, 3, size, size)
        yield lambda model, images=images: model(images)


# timm ---------------------------------------------------------------------------------------------------------------


def _timm(name: str) -> Iterator[Callable[[], tuple[nn.Module, list[Call]]]]:
    import timm

    size = (timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).input_size[-1]
    # What a model does not take it refuses at once.
    tried: list[tuple[dict[str, Any], tuple[int, ...]]] = [
        ({"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4}, (64,)),
        ({"img_size": 64, "depths": (1, 1, 1, 1)}, (64,)),
        ({"depths": (1, 1, 1, 1)}, (64, 96, 128)),
        ({"img_size": 64}, (64,)),
        ({}, (64, 96, 128)),
        ({"img_size": 128}, (128,)),
        ({}, (size,)),
    ]
    for options, sizes in tried:

        def make(options: dict[str, Any] = options, sizes: tuple[int, ...] = sizes) -> tuple[nn.Module, list[Call]]:
            return timm.create_model(name, num_classes=CLASSES, **options), list(_image_calls(sizes))

        yield make


# transformers -------------------------------------------------------------------------------------------------------

VOCABULARY = 128
# The first pattern that matches a setting's whole name says to what it shrinks; what is smaller already stays.
_SETTINGS: tuple[tuple[str, int], ...] = (
    (r"num_feat_extract_layers", 99),  # as many as there are entries in lists
    (r"vocab_size|.*_vocab_size|codebook_size|num_codebook.*|n_vocab|type_vocab_size", VOCABULARY),
    (r".*(num_key_value_heads|num_kv_heads|kv_heads|n_head_kv|num_query_groups)", 2),
    (r".*(attention_heads|n_heads?|num_heads|num_head|heads)", 4),
    (r".*(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_blocks|depth|.*_layers)", 2),
    (r"mask_(time|feature)_length", 2),
    (r".*(head_dim|rotary_dim|d_kv|qk_.*_dim|v_head_dim|head_size)", 8),
    (r".*(lora_rank|.*_rank)", 16),
    (r".*(intermediate_size|d_ff|ffn_dim|ffn_hidden_size|n_inner|mlp_dim|ffn_size|.*intermediate.*|inner_dim)", 64),
    (r".*(num_experts_per_tok|num_experts_per_token|top_?k|moe_top_k|num_selected_experts)", 2),
    (r".*(num_.*experts|n_routed_experts|num_experts)", 4),
    (r"n_group|topk_group|n_shared_experts|first_k_dense_replace", 1),
    (r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|.*projection_dim|.*proj_dim|dim|width)", 32),
    (r".*(embedding_dim|hidden_features|.*_hidden_dim|.*_hidden_size|conv_dim|.*_channels|.*_dim|.*_width)", 32),
    (r".*(max_position_embeddings|n_positions|max_.*_positions|max_seq_len|seq_length|n_ctx)", 64),
    (r".*(image_size|img_size|input_size)", 64),
    (r".*patch_size", 8),
    (r"num_mel_bins|.*mel_bins|feature_size", 16),
    (r"window_size", 4),
    (r"num_queries|num_latents|num_query_tokens|num_feature_levels", 8),
)
_LISTS: tuple[tuple[str, Callable[[int], int]], ...] = (
    (r"depths|.*_depths|num_layers.*|layer_depths|.*num_blocks.*|encoder_num_layers", lambda index: 1),
    (r".*heads.*", lambda index: 2),
    (
        r".*(hidden_sizes|embed_dims?|embedding_dims|dims|.*channels|neck_hidden_sizes|.*_dims)",
        lambda index: 16 << index,
    ),
    (r"conv_dim|tdnn_dim", lambda index: 32),
    (r"image_size|img_size", lambda index: 64),
)
_TRANSFORMERS_MAPPINGS = ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_MAPPING")


def _transformers(name: str) -> Iterator[Callable[[], tuple[nn.Module, list[Call]]]]:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    kind = CONFIG_MAPPING[name]
    classes = []
    for mapping in _TRANSFORMERS_MAPPINGS:
        with contextlib.suppress(KeyError, AttributeError, ImportError):
            found = getattr(modeling_auto, mapping)[kind]
            classes.append(found[0] if isinstance(found, (tuple, list)) else found)
    for model_type in classes:
        for sparing, pairs in ((False, 2), (False, 4), (True, 2)):

            def make(
                model_type: Any = model_type, sparing: bool = sparing, pairs: int = pairs
            ) -> tuple[nn.Module, list[Call]]:
                settings = shrink(kind().to_dict(), sparing, pairs)
                config = kind.from_dict(settings)
                config._attn_implementation = "eager"
                model = model_type(config)
                count = sum(parameter.numel() for parameter in model.parameters())
                if count > 30_000_000:
                    raise NotBuiltError(f"the smallest that was made has {count:,} parameters")
                return model.float(), list(_transformers_calls(model, config))

            yield make


def shrink(settings: dict[str, Any], sparing: bool = False, pairs: int = 2) -> dict[str, Any]:
    """Make a configuration small, whatever its model type calls width, depth and heads.

    Args:
        settings: A configuration as a dictionary; sub-configurations are dictionaries in it.
        sparing: Leave lists as they are.
        pairs: Heads of keys and values, of 4 heads; some kinds need as many.

    Returns:
        A new dictionary.
    """
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and "rope" in key:
            # Of a head of 8 the sections hold one half; what is not for such models is ignored.
            small[key] = {**value, "mrope_section": [1, 1, 2]}
        elif isinstance(value, dict):
            small[key] = shrink(value, sparing, pairs)
        elif key in ("out_features", "out_indices", "stage_names", "_out_features", "_out_indices"):
            continue  # follow from the number of stages
        elif isinstance(value, bool) or value is None:
            small[key] = False if key == "use_cache" else value
        elif isinstance(value, int):
            small[key] = pairs if re.fullmatch(_SETTINGS[2][0], key) else _shrunk(key, value)
        elif isinstance(value, (list, tuple)) and value and all(type(each) is int for each in value) and not sparing:
            rule = next((rule for pattern, rule in _LISTS if re.fullmatch(pattern, key)), None)
            small[key] = value if rule is None else [min(each, rule(i)) for i, each in enumerate(value)]
        else:
            small[key] = value
    layers = small.get("num_hidden_layers")
    if isinstance(layers, int):
        for key, value in small.items():
            if isinstance(value, list) and key.endswith(("layer_types", "layers_block_type", "mlp_layer_types")):
                kinds = list(dict.fromkeys(value))
                small[key] = (kinds * layers)[:layers]
    return small


def _shrunk(key: str, value: int) -> int:
    if key.endswith(("_token_id", "_token_index", "_idx")):
        return value if value < VOCABULARY else VOCABULARY - 1 - value % 7
    for pattern, small in _SETTINGS:
        if re.fullmatch(pattern, key):
            return min(value, small)
    return value


def _transformers_calls(model: nn.Module, config: Any) -> Iterator[Call]:
    """Try what the forward's arguments are called for, the model's main input first."""
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(10, VOCABULARY - 10, (BATCH, 16), generator=generator)
    decoder = {"decoder_input_ids": tokens[:, :8]} if "decoder_input_ids" in accepted else {}
    main = getattr(model, "main_input_name", "input_ids")
    parts = [config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config", "audio_config"))]
    channels = next((c for part in parts if (c := getattr(part, "num_channels", None))), 3)
    sizes = [s for part in parts if isinstance(s := getattr(part, "image_size", None), int)]
    frames = next((f for part in parts if (f := getattr(part, "num_frames", None))), 4)
    images = [noise(BATCH, channels, size, size) for size in dict.fromkeys((*sizes, 64, 128, 224))]
    clips = [noise(2, frames, channels, size, size) for size in dict.fromkeys((*sizes, 64))]
    bins = next((b for part in parts if (b := getattr(part, "num_mel_bins", None))), 16)
    sounds = [
        noise(BATCH, bins, 64),
        noise(BATCH, 64, bins),
        noise(BATCH, 64, 32),
        noise(BATCH, bins, 3000),
        noise(BATCH, 3000, bins),
    ]
    waves = [noise(BATCH, 4000), noise(BATCH, 1, 4000), noise(BATCH, 16, 16)]
    candidates: dict[str, list[Tensor]] = {
        "pixel_values": images + clips,
        "pixel_values_videos": clips,
        "input_features": sounds,
        "input_values": waves + sounds,
        "input_ids": [tokens],
    }
    tried = [{main: value} for value in candidates.get(main, [])]
    if main != "input_ids" and "input_ids" in accepted:
        tried += [{"input_ids": tokens}, *({"input_ids": tokens, **each} for each in list(tried))]
    elif "pixel_values" in accepted:
        tried += [{"input_ids": tokens, "pixel_values": image} for image in images]
    for inputs in tried:
        for extra in (decoder, {}) if decoder else ({},):
            arguments = {**inputs, **extra}
            yield lambda model, arguments=arguments: model(**arguments)


# names --------------------------------------------------------------------------------------------------------------

_BUILDERS: dict[str, Callable[[str], Iterator[Callable[[], tuple[nn.Module, list[Call]]]]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}


def _size(name: str) -> tuple[int, list[int], str]:
    """Order names of models from small to large, by their words and then by their numbers."""
    words = re.split(r"[_\-.]", name)
    ranks = [rank for rank, group in enumerate(SIZES) for word in words if word in group]
    return (min(ranks) if ranks else SIZES.index(()), [int(n) for n in re.findall(r"\d+", name)], name)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
