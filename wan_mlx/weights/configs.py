"""The sizes of a network, from the shapes of its weights.

config.json only adds values that shapes cannot show, and must not contradict them.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from ..models.animate_face import Face
from ..models.configs import (
    AUDIO_INJECT_LAYERS,
    AudioEncoderConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAE22Config,
    VAEConfig,
)
from ..models.image_encoder import last_block_shapes
from ..models.networks import new_network
from ..other_models import of_sizes
from ..presets import TASK_NAMES
from .component import ComponentWeights, check_keys, parameter_shapes

LARGEST_SIZE = 2**20  # of a dimension, exclusive; umT5's vocabulary has 256,384
# What config.json may say beside the kind that the weights show: PAI's Fun models are named by what they were made of.
ALSO_SAID = {"vace": ("t2v",), "i2v": ("ti2v",), "control": ("t2v", "i2v", "ti2v")}


def network_config(weights: ComponentWeights, config: Mapping[str, Any]) -> Any:
    """The sizes of the network that ``weights`` are of, such as a `TransformerConfig`, and ``config`` its config.json.

    Raises:
        WeightsError: the sizes make no sense, or the weights are not the whole of such a network and nothing else.
    """
    residual = weights.component == "vae" and "encoder.downsamples.0.downsamples.0.residual.2.weight" in weights.shapes
    config_class, sizes_in = (VAE22Config, _vae22_sizes) if residual else SIZES_IN[weights.component]
    said = _said(config_class, config, weights.path)
    sizes = sizes_in(weights, said)
    if said.get("model_type") in ALSO_SAID.get(sizes.get("model_type", ""), ()):
        del said["model_type"]
    found = _merge(config_class, sizes, said, weights.path)
    try:
        expected = shapes_of(found)
    except ValueError as error:  # the network cannot have these sizes
        raise WeightsError(f"{weights.path}: {error}") from None
    check_keys(weights, expected)
    return found


@lru_cache(maxsize=32)
def shapes_of(config: Any) -> Mapping[str, tuple[int, ...]]:
    """Name → shape of every tensor in a file of a network of these sizes: of CLIP also its last block's, which is not
    used, and of Animate's transformer the encoders of its face."""
    more: Mapping[str, tuple[int, ...]] = {}
    if isinstance(config, ImageEncoderConfig):
        more = last_block_shapes(config)
    elif isinstance(config, TransformerConfig) and config.face_layers:
        more = parameter_shapes(Face(config))
    return {**parameter_shapes(new_network(config)), **more}


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for match in (re.match(pattern, name) for name in shapes) if match})


def _said(config_class, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The values of config.json for fields of ``config_class``, with types checked; null counts as missing."""
    said = {}
    for field in fields(config_class):
        value = config.get(field.name)
        if value is None:
            continue
        if isinstance(field.default, tuple):
            counts = all(type(number) is int for number in field.default)
            kinds, least = ((int,), 0) if counts else ((int, float), -LARGEST_SIZE)
            fits = isinstance(value, list | tuple)
            fits = fits and all(isinstance(v, kinds) and least <= v < LARGEST_SIZE for v in value)
            wanted, value = f"a list of {'counts' if counts else 'numbers'}", tuple(value) if fits else value
        elif isinstance(field.default, str | bool):
            kind = type(field.default)
            fits, wanted = isinstance(value, kind), "text" if kind is str else "true or false"
        else:
            whole = isinstance(field.default, int | None)
            fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            fits = fits and 0 < value < LARGEST_SIZE
            wanted = f"a size from 1 to {LARGEST_SIZE - 1:,}" if whole else "a number above 0"
        if not fits:
            raise WeightsError(f"{path}: config.json says {field.name} = {reprlib.repr(value)}, expected {wanted}")
        said[field.name] = value
    return said


def _merge(config_class, found: dict[str, Any], said: Mapping[str, Any], path: Path):
    """``found`` in the weights plus other values ``said`` by config.json; a contradiction is an error."""
    for key, value in found.items():
        if key in said and said[key] != value:
            raise WeightsError(f"{path}: config.json says {key} = {said[key]!r}, but the weights have {value}")
        sizes = value if isinstance(value, tuple) else (value,)
        least = 0 if isinstance(value, tuple) else 1  # tuples may list layers, which count from 0
        if any(type(size) is int and not least <= size < LARGEST_SIZE for size in sizes):
            raise WeightsError(f"{path}: by its shapes {key} is {value}, which no such network has")
    merged = config_class(**{**said, **found})
    dim = getattr(merged, "dim_attn", merged.dim)
    heads = getattr(merged, "num_heads", 1)
    if dim % heads:
        raise WeightsError(f"{path}: {heads} heads do not divide {dim} channels")
    return merged


def _heads(weights: ComponentWeights, said: Mapping[str, Any], dim: int, width: int) -> int:
    """The number of heads in config.json, else for heads of ``width``, as in all released models."""
    if "num_heads" not in said and dim % width:
        raise WeightsError(f"{weights.path}: dim {dim} is no multiple of {width} and no config.json gives num_heads")
    return said.get("num_heads", dim // width)


def _shape_of(weights: ComponentWeights, name: str, ndim: int = 2) -> tuple[int, ...]:
    if name not in weights.shapes:
        raise WeightsError(f"{weights.path}: as a {weights.component} it lacks {name}")
    shape = weights.shapes[name]
    if len(shape) != ndim or 0 in shape:
        raise WeightsError(f"{weights.path}: {name} has shape {shape}, expected {ndim} axes, none of them empty")
    return shape


def _transformer_sizes(weights: ComponentWeights, said: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a transformer. The number of heads is config.json's, else for heads of 128, as in every Wan model."""
    dim, text_dim = _shape_of(weights, "text_embedding.0.weight")
    patch = math.prod(said.get("patch_size", TransformerConfig.patch_size))
    if patch < 1 or len(said.get("patch_size", "123")) != 3:
        raise WeightsError(f"{weights.path}: config.json says patch_size = {said['patch_size']}, expected 3 sizes")
    shapes = weights.shapes
    kind = (
        "vace" if "vace_patch_embedding.weight" in shapes
        else "s2v" if "casual_audio_encoder.weights" in shapes
        else "animate" if "face_adapter.fuser_blocks.0.k_norm.weight" in shapes
        else "flf2v" if "img_emb.emb_pos" in shapes
        else "i2v" if "img_emb.proj.1.weight" in shapes
        else "control" if "ref_conv.weight" in shapes
        else "i2v" if _reads_a_picture(weights, patch)  # Wan2.2's, without CLIP
        else "ti2v" if _shape_of(weights, "head.head.weight")[0] == len(VAE22Config.mean) * patch
        else "t2v"
    )  # fmt: skip
    found = dict(
        model_type=kind,
        dim=dim,
        text_dim=text_dim,
        ffn_dim=_shape_of(weights, "blocks.0.ffn.0.weight")[0],
        num_layers=_count(shapes, r"blocks\.(\d+)\."),
        freq_dim=_shape_of(weights, "time_embedding.0.weight")[1],
        in_dim=_shape_of(weights, "patch_embedding.weight")[1] // patch,
        out_dim=_shape_of(weights, "head.head.weight")[0] // patch,
        num_heads=_heads(weights, said, dim, 128),
    )
    _check_channels(weights.path, found)
    if kind in ("i2v", "flf2v", "animate"):
        has_clip = "img_emb.proj.1.weight" in shapes
        found["image_dim"] = _shape_of(weights, "img_emb.proj.1.weight")[1] if has_clip else None
    if kind == "control":
        found["ref_dim"] = _shape_of(weights, "ref_conv.weight")[1] // patch
    if kind == "animate":
        found |= _face_sizes(weights, said, found["num_layers"])
    if kind == "vace":
        found["vace_in_dim"] = _shape_of(weights, "vace_patch_embedding.weight")[1] // patch
        found["vace_layers"] = _vace_layers(weights, said, found["num_layers"])
    if kind == "s2v":
        found |= _audio_sizes(weights, said, found)
    return found


def _audio_sizes(weights: ComponentWeights, said: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What S2V's transformer has beside the others'; where its injectors are is config.json's, else as released."""
    shapes, first = weights.shapes, "casual_audio_encoder.encoder.conv1_local.conv.weight"
    count, num_layers = _count(shapes, r"audio_injectors\.(\d+)\."), sizes["num_layers"]
    layers = said.get("audio_inject_layers", AUDIO_INJECT_LAYERS if num_layers == 40 else ())
    if len(layers) != count or sorted(set(range(num_layers)).intersection(layers)) != [*layers]:
        raise WeightsError(
            f"{weights.path}: audio_inject_layers is {[*layers]}, but {count} injectors beside {num_layers} layers "
            f"need {count} increasing numbers from 0 to {num_layers - 1}; its config.json must say them"
        )
    return dict(
        audio_inject_layers=tuple(layers),
        audio_layers=_shape_of(weights, "casual_audio_encoder.weights", 4)[1],
        audio_dim=_shape_of(weights, first, 3)[2],
        audio_tokens=_shape_of(weights, first, 3)[0] // (sizes["dim"] // 4),
        audio_adain="audio_injectors.0.adain.weight" in shapes,
    )


def _audio_encoder_sizes(weights: ComponentWeights, said: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of wav2vec 2.0. The number of heads and the strides are config.json's, else heads of 64 and those of every
    released one."""
    shapes, convs = weights.shapes, "feature_extractor.conv_layers.{}.conv.weight"
    count = _count(shapes, r"feature_extractor\.conv_layers\.(\d+)\.")
    if "feature_extractor.conv_layers.1.layer_norm.weight" not in shapes:
        raise WeightsError(f"{weights.path}: a wav2vec 2.0 whose features are normed in groups, as in its base form; "
                           "expected its large form XLSR, which S2V reads")  # fmt: skip
    layers = [_shape_of(weights, convs.format(n), 3) for n in range(count)]
    _, kernel, inner = _shape_of(weights, "encoder.pos_conv_embed.conv.weight_v", 3)
    dim = _shape_of(weights, "feature_projection.projection.weight")[0]
    return dict(
        dim=dim,
        ffn_dim=_shape_of(weights, "encoder.layers.0.feed_forward.intermediate_dense.weight")[0],
        num_layers=_count(shapes, r"encoder\.layers\.(\d+)\."),
        num_heads=_heads(weights, said, dim, 64),
        conv_dim=tuple(width for width, _, _ in layers),
        conv_kernel=tuple(kernel for _, kernel, _ in layers),
        pos_kernel=kernel,
        pos_groups=dim // max(1, inner),
    )


def _reads_a_picture(weights: ComponentWeights, patch: int) -> bool:
    """Whether a transformer's input has the channels of a mask and of a video's latents beside its own latents."""
    channels, latents = _shape_of(weights, "patch_embedding.weight")[1], _shape_of(weights, "head.head.weight")[0]
    return channels == 2 * latents + 4 * patch


def _check_channels(path: Path, sizes: Mapping[str, Any]) -> None:
    """Raise WeightsError if no model here reads so many channels: the latents', or with an image twice and a mask, or
    with a control video besides."""
    kind, channels, latents = sizes["model_type"], sizes["in_dim"], sizes["out_dim"]
    of_picture = dict.fromkeys(("i2v", "flf2v", "animate"), 2 * latents + 4)
    expected = {**of_picture, "control": 3 * latents + 4}.get(kind, latents)
    if channels == expected:
        return
    if other := of_sizes("transformer", sizes):
        raise other.refusal(path)
    raise WeightsError(
        f"{path}: this is a transformer of another model than Wan2.1's and Wan2.2's: as {TASK_NAMES[kind]} of "
        f"{latents} latent channels it would read {expected}, and it reads {channels}"
    )


def _face_sizes(weights: ComponentWeights, said: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Sizes of what Animate adds to a transformer. Face blocks are evenly spaced, unless config.json says otherwise."""
    convs = "motion_encoder.enc.net_app.convs"
    blocks = _count(weights.shapes, convs + r"\.(\d+)\.conv1\.")
    widths = [_shape_of(weights, f"{convs}.0.0.weight", 4)[0]]
    widths += [_shape_of(weights, f"{convs}.{n + 1}.skip.1.weight", 4)[0] for n in range(blocks)]
    dim, count = _shape_of(weights, "motion_encoder.dec.direction.weight")
    features = _shape_of(weights, f"{convs}.{blocks + 1}.weight", 4)[0]
    width = _shape_of(weights, "face_encoder.conv2.conv.weight", 3)[0]
    tokens = _shape_of(weights, "face_encoder.conv1_local.conv.weight", 3)[0] // width
    layers = _count(weights.shapes, r"face_adapter\.fuser_blocks\.(\d+)\.")
    spaced = tuple(num_layers * n // layers for n in range(layers))
    return dict(
        face_layers=said.get("face_layers") or spaced,
        motion_widths=tuple(widths),
        motion_dims=(features, count, dim),
        face_dims=(width, tokens),
    )


def _vace_layers(weights: ComponentWeights, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The layers with hints: config.json's, else evenly spaced as in the released models."""
    _shape_of(weights, "vace_blocks.0.after_proj.weight")
    count = _count(weights.shapes, r"vace_blocks\.(\d+)\.")
    layers = tuple(config.get("vace_layers") or (num_layers * n // count for n in range(count)))
    if len(layers) != count or layers[:1] != (0,) or sorted(set(range(num_layers)).intersection(layers)) != [*layers]:
        raise WeightsError(
            f"{weights.path}: vace_layers is {list(layers)}, but {count} VACE blocks beside {num_layers} layers need "
            f"{count} increasing numbers from 0 to {num_layers - 1}, the first of them 0"
        )
    return layers


def _text_encoder_sizes(weights: ComponentWeights, said: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a umT5 encoder, all from the weights' shapes."""
    vocab, dim = _shape_of(weights, "token_embedding.weight")
    buckets, heads = _shape_of(weights, "blocks.0.pos_embedding.embedding.weight")
    return dict(
        vocab_size=vocab,
        dim=dim,
        num_buckets=buckets,
        num_heads=heads,
        dim_attn=_shape_of(weights, "blocks.0.attn.q.weight")[0],
        dim_ffn=_shape_of(weights, "blocks.0.ffn.fc1.weight")[0],
        num_layers=_count(weights.shapes, r"blocks\.(\d+)\."),
    )


def _image_encoder_sizes(weights: ComponentWeights, said: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of CLIP's vision tower. The number of heads is config.json's, else for heads of 80, as in ViT-H/14."""
    dim, pixels = _shape_of(weights, "patch_embedding.weight")
    if other := of_sizes("image_encoder", dict(dim=dim)):
        raise other.refusal(weights.path)
    patch = math.isqrt(pixels // 3)
    return dict(
        image_size=patch * math.isqrt(_shape_of(weights, "pos_embedding", 3)[1] - 1),
        patch_size=patch,
        dim=dim,
        mlp_ratio=_shape_of(weights, "transformer.0.mlp.0.weight")[0] // dim,
        num_layers=_count(weights.shapes, r"transformer\.(\d+)\."),
        num_heads=_heads(weights, said, dim, 80),
    )


def _vae_sizes(weights: ComponentWeights, said: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a VAE, from its encoder's layers: every stage ends at a ``resample``."""
    shapes = weights.shapes
    dim = _shape_of(weights, "encoder.conv1.weight", 5)[0]
    dim_mult, temporal, blocks = [], [], 0
    for index in range(_count(shapes, r"encoder\.downsamples\.(\d+)\.")):
        layer = f"encoder.downsamples.{index}"
        if f"{layer}.resample.1.weight" in shapes:
            temporal.append(f"{layer}.time_conv.weight" in shapes)
            dim_mult.append(_shape_of(weights, f"{layer}.resample.1.weight", 4)[0] // dim)
        elif not dim_mult:
            blocks += 1
    dim_mult.append(_shape_of(weights, "encoder.middle.0.residual.2.weight", 5)[0] // dim)
    stages = dict(dim_mult=tuple(dim_mult), temporal_downsample=tuple(temporal))
    return dict(dim=dim, num_res_blocks=blocks, z_dim=_latent_channels(weights, said, VAEConfig), **stages)


def _vae22_sizes(weights: ComponentWeights, said: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a VAE of Wan2.2, whose stages are modules with a list of layers."""
    shapes, stage = weights.shapes, "encoder.downsamples.{}.downsamples.{}"
    dim = _shape_of(weights, "encoder.conv1.weight", 5)[0]
    count = _count(shapes, r"encoder\.downsamples\.(\d+)\.")
    blocks = _count(shapes, r"encoder\.downsamples\.0\.downsamples\.(\d+)\.residual\.")
    widths = [_shape_of(weights, stage.format(n, 0) + ".residual.2.weight", 5)[0] for n in range(count)]
    return dict(
        dim=dim,
        num_res_blocks=blocks,
        z_dim=_latent_channels(weights, said, VAE22Config),
        dim_mult=tuple(width // dim for width in widths),
        temporal_downsample=tuple(stage.format(n, blocks) + ".time_conv.weight" in shapes for n in range(count - 1)),
        decoder_dim=_shape_of(weights, "decoder.head.0.gamma", 1)[0] * dim // widths[0],
    )


def _latent_channels(weights: ComponentWeights, said: Mapping[str, Any], released: type[VAEConfig]) -> int:
    """Channels of a VAE's latents; WeightsError if nothing tells their normalisation."""
    if any(value <= 0 for value in said.get("std", ())):
        raise WeightsError(f"{weights.path}: config.json says std = {[*said['std']]}, expected numbers above 0")
    channels, *_, width, last = _shape_of(weights, "conv2.weight", 5)
    if (width, last) == (channels, 1) != (1, 1):  # a convolution of one pixel, whose axes were turned
        raise WeightsError(
            f"{weights.path}: its convolutions are channels last under the official names, as tools for MLX write "
            "them, and nothing in the file says so; give the published VAE, or mlx-video's folder with its config.json"
        )
    if channels != len(released.mean) and "mean" not in said:
        known = "Wan2.2's 48" if released is VAE22Config else "Wan2.1's 16"
        raise WeightsError(f"{weights.path}: a VAE with {channels} latent channels, expected {known}")
    return channels


# Kind of network → its configuration, and the sizes that weights show beside its config.json.
SIZES_IN: dict[str, tuple[type, Callable[[ComponentWeights, Mapping[str, Any]], dict[str, Any]]]] = {
    "transformer": (TransformerConfig, _transformer_sizes),
    "text_encoder": (TextEncoderConfig, _text_encoder_sizes),
    "vae": (VAEConfig, _vae_sizes),
    "image_encoder": (ImageEncoderConfig, _image_encoder_sizes),
    "audio_encoder": (AudioEncoderConfig, _audio_encoder_sizes),
}
