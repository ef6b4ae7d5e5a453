"""Sizes of each part of a model and bytes of its weights, known before they are read: input of a plan."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..geometry import Geometry
from ..models.animate_face import FACE
from ..models.configs import (
    AudioEncoderConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    geometry_of,
)
from ..models.quantized_linear import Packing
from ..models.rope import row_order
from ..models.transformer import BLOCK
from ..presets import EXPERTS, OPTIONAL, PARTS, Preset
from ..weights.configs import shapes_of
from ..weights.load import open_network, parse_dtype
from ..weights.lora import Loras, open_loras
from ..weights.parameters import Parameters, dtype_of
from ..weights.parts import Checkpoint, Part
from ..weights.prefetch import most_in_flight
from ..weights.quantize import EXPAND, NEAREST, QUANTIZED, check_mode, plan_quantization

# Kinds of networks of which all released models that have one have the same.
OF_ALL = {"image_encoder": ImageEncoderConfig(), "audio_encoder": AudioEncoderConfig()}


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a network's weights, resident and as stored in its file.

    ``outside`` counts weights outside the blocks, ``blocks`` all blocks, ``largest`` the largest block; ``unpacked`` is
    the largest quantised matrix after unpacking, 0 if none is quantised; ``in_flight`` is the extra memory of reading a
    block: copies that are quantised, cast or reordered on the way.
    """

    outside: int = 0
    blocks: int = 0
    largest: int = 0
    stored_outside: int = 0
    stored_blocks: int = 0
    unpacked: int = 0
    in_flight: int = 0

    @property
    def all(self) -> int:
        return self.outside + self.blocks


# Of each tensor: bytes kept and stored; whether it is made anew, and whether that is quantising.
Tensors = list[tuple[int, int, bool, bool]]


def weight_bytes(
    config: TransformerConfig,
    dtype: mx.Dtype,
    packings: Mapping[str, Packing],
    stored: Mapping[str, int],
    loras: Loras | None = None,
    merge: bool = True,
) -> WeightBytes:
    """Bytes of a transformer, and of what LoRAs keep beside its weights.

    Args:
        config: its sizes.
        dtype: of weights that are neither quantised nor kept in float32.
        packings: of its quantised weights, by name.
        stored: bytes of each tensor in its file, by name.
        loras, merge: LoRAs that apply to it; as `load_transformer` has them, they are merged but in blocks that are
            streamed, and in quantised matrices.
    """
    blocks: dict[str, Tensors] = defaultdict(list)
    beside: dict[str, int] = defaultdict(int)  # of LoRAs in a block
    stays: dict[str, int] = defaultdict(int)  # and of those what is beside the weights of a resident one, too
    unpacked = 0
    for name, shape in shapes_of(config).items():
        if name.startswith(FACE):  # at work before sampling
            continue
        if name in packings:
            size = sum(math.prod(s) * d.size for s, d in packings[name].shapes(shape).values())
            unpacked = max(unpacked, math.prod(shape) * dtype.size)
        else:
            size = math.prod(shape) * dtype_of("transformer", name, dtype).size
        resized = stored[name] != size
        anew = resized or row_order(name, config.dim, config.head_dim) is not None
        found = BLOCK.match(name)
        block = found[1] if found else "outside"
        blocks[block].append((size, stored[name], anew, resized and name in packings))
        values = sum(change.values_beside() for change in (loras or {}).get(name, ()))
        beside[block] += values * dtype.size
        stays[block] += values * dtype.size * (name in packings or not merge)

    def in_flight(block: Tensors) -> int:
        changed = [read for _, read, anew, packed in block if anew and not packed]
        quantised = sum(read for _, read, _, packed in block if packed)
        made = sum(size for size, _, anew, _ in block if anew)
        return most_in_flight(changed, quantised, read_of(block), kept_of(block), made)

    def kept_of(block: Tensors) -> int:
        return sum(size for size, *_ in block)

    def read_of(block: Tensors) -> int:
        return sum(read for _, read, *_ in block)

    outside = blocks.pop("outside")
    kept = {name: kept_of(block) for name, block in blocks.items()}
    return WeightBytes(
        outside=kept_of(outside) + beside["outside"],
        blocks=sum(kept[name] + stays[name] for name in blocks),
        largest=max(kept[name] + beside[name] for name in blocks),
        stored_outside=read_of(outside),
        stored_blocks=sum(map(read_of, blocks.values())),
        unpacked=unpacked,
        in_flight=max(map(in_flight, blocks.values())),
    )


def text_weight_bytes(
    config: TextEncoderConfig, dtype: mx.Dtype, packings: Mapping[str, Packing], stored: Mapping[str, int]
) -> WeightBytes:
    """Bytes of the text encoder's weights; embedding rows are read one by one. Arguments as for `weight_bytes`."""
    block = 0
    for name, shape in shapes_of(config).items():
        if name.startswith("blocks.0."):
            packed = packings[name].shapes(shape).values() if name in packings else [(shape, dtype)]
            block += sum(math.prod(s) * d.size for s, d in packed)
    in_file = sum(size for name, size in stored.items() if name.startswith("blocks."))
    return WeightBytes(0, config.num_layers * block, block, 0, in_file)


@dataclass(frozen=True)
class PartSizes:
    """Sizes of a part, known before its weights are read.

    Attributes:
        name, kind: as of a `Part`.
        config: its sizes, such as a `TransformerConfig`.
        packings: of its quantised matrices, by name.
        weights: their bytes, for networks made of blocks; zeros for the others.
        timesteps: as of a `Part`.
    """

    name: str
    kind: str
    config: Any
    packings: Mapping[str, Packing] = field(default_factory=dict)
    weights: WeightBytes = WeightBytes()
    timesteps: tuple[float, float] = (0.0, math.inf)


@dataclass(frozen=True)
class Networks:
    """Sizes of a model, known before its weights are read: each part, and ``dtype``, in which it computes."""

    parts: tuple[PartSizes, ...]
    dtype: mx.Dtype

    def of_kind(self, kind: str) -> list[PartSizes]:
        return [part for part in self.parts if part.kind == kind]

    @property
    def experts(self) -> list[PartSizes]:
        """The transformers; one is active at a time."""
        return self.of_kind("transformer")

    @property
    def transformer(self) -> TransformerConfig:
        """Sizes of each transformer; all experts have the same."""
        return self.experts[0].config

    @property
    def weights(self) -> WeightBytes:
        """Bytes of a transformer; the largest if there are several."""
        return WeightBytes(*map(max, zip(*(astuple(expert.weights) for expert in self.experts), strict=True)))

    @property
    def text_encoder(self) -> PartSizes:
        return self.of_kind("text_encoder")[0]

    @property
    def vae(self) -> VAEConfig:
        return self.of_kind("vae")[0].config

    @property
    def image_encoder(self) -> ImageEncoderConfig:
        return self.of_kind("image_encoder")[0].config

    @property
    def audio_encoder(self) -> AudioEncoderConfig:
        return self.of_kind("audio_encoder")[0].config

    @property
    def geometry(self) -> Geometry:
        """The sizes of its latents and tokens."""
        return geometry_of(self.transformer, self.vae)


def sizes_of(
    model: Preset | Checkpoint,
    dtype: str | mx.Dtype,
    quantize: str | None = None,
    released: Preset | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    merge: bool = True,
) -> Networks:
    """Sizes of a released or local model; reads no weights.

    Args:
        model: for a released one, the bytes are those of the official files.
        dtype, quantize: as for `WanPipeline.from_pretrained`.
        released: the model whose sizes are those of parts that are not here (`not_here`).
        loras, merge: LoRAs of all transformers; as `load_transformer` takes them.

    Raises:
        ValueError: ``dtype`` or ``quantize`` is unknown, or does not suit the model.
        WeightsError: a LoRA does not suit it.
    """
    dtype = parse_dtype(dtype)
    check_mode(quantize)
    checkpoint, released = (not_here(model), model) if isinstance(model, Preset) else (model, released)
    kinds, found = ["transformer", "text_encoder", "vae"], list[PartSizes]()
    for kind in [*kinds, *OPTIONAL]:
        read = kind in kinds or (kind == "image_encoder" and found[0].config.has_image_branch)
        if read or (kind == "audio_encoder" and found[0].config.hears):
            parts = checkpoint.of_kind(kind) or [checkpoint.part(kind)]
            found += [_of_part(part, dtype, quantize, released, (*loras, *part.loras), merge) for part in parts]
    return Networks(tuple(found), dtype)


def not_here(preset: Preset) -> Checkpoint:
    """A released model without files: of its parts, whose path is its name, only the sizes are known (`sizes_of`)."""
    names, place = EXPERTS if preset.experts == 2 else ("transformer",), Path(preset.name)
    others = [Part(kind, kind, place) for kind in PARTS if kind != "transformer"]
    return Checkpoint(place, (*(Part(name, "transformer", place) for name in names), *others))


def _of_part(
    part: Part,
    dtype: mx.Dtype,
    quantize: str | None,
    released: Preset | None,
    loras: Sequence[tuple[Path, float]],
    merge: bool,
) -> PartSizes:
    kind, mode = part.kind, part.quantize or quantize
    packings: Mapping[str, Packing] = {}
    if released is not None and part.file == Path(released.name):
        config: Any = OF_ALL[kind] if kind in OF_ALL else getattr(released, kind)
        itemsize = released.itemsize if kind == "transformer" else 2  # as they are published
        stored = {name: itemsize * math.prod(shape) for name, shape in shapes_of(config).items()}
        if kind in QUANTIZED and mode not in (None, EXPAND, NEAREST):
            packings = plan_quantization(kind, mode, shapes_of(config)).packings
    else:
        opened, config = open_network(part, kind)
        stored = {name: opened.stored_bytes(name) for name in opened.sources}
        if kind in QUANTIZED:
            packings = Parameters(opened, dtype, mode).quantization.packings
    weights = WeightBytes()
    if kind == "transformer":
        changes = open_loras(loras, config) if loras else None
        weights = weight_bytes(config, dtype, packings, stored, changes, merge)
    elif kind == "text_encoder":
        weights = text_weight_bytes(config, dtype, packings, stored)
    return PartSizes(part.name, kind, config, packings, weights, part.timesteps)
