"""Sizes of each part of a model and bytes of its weights, known before they are read: input of a plan."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..geometry import Geometry
from ..models.configs import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VAEConfig, geometry_of
from ..models.quantized_linear import Packing
from ..models.rope import row_order
from ..models.transformer import BLOCK_LISTS
from ..presets import EXPERTS, Preset
from ..weights.checkpoint import Checkpoint
from ..weights.configs import shapes_of
from ..weights.load import config_of, open_network, parse_dtype
from ..weights.parameters import Parameters, dtype_of
from ..weights.prefetch import most_in_flight
from ..weights.quantize import EXPAND, NEAREST, QUANTIZED, check_mode, plan_quantization


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
    config: TransformerConfig, dtype: mx.Dtype, packings: Mapping[str, Packing], stored: Mapping[str, int]
) -> WeightBytes:
    """Bytes of a transformer.

    Args:
        config: its sizes.
        dtype: of weights that are neither quantised nor kept in float32.
        packings: of its quantised weights, by name.
        stored: bytes of each tensor in its file, by name.
    """
    blocks: dict[str, Tensors] = defaultdict(list)
    unpacked = 0
    for name, shape in shapes_of(config).items():
        if name in packings:
            size = sum(math.prod(s) * d.size for s, d in packings[name].shapes(shape).values())
            unpacked = max(unpacked, math.prod(shape) * dtype.size)
        else:
            size = math.prod(shape) * dtype_of("transformer", name, dtype).size
        resized = stored[name] != size
        anew = resized or row_order(name, config.dim, config.head_dim) is not None
        block = ".".join(name.split(".")[:2]) if name.split(".")[0] in BLOCK_LISTS else "outside"
        blocks[block].append((size, stored[name], anew, resized and name in packings))

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
    kept = [kept_of(block) for block in blocks.values()]
    return WeightBytes(kept_of(outside), sum(kept), max(kept), read_of(outside), sum(map(read_of, blocks.values())),
                       unpacked, max(map(in_flight, blocks.values())))  # fmt: skip


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
    """

    name: str
    kind: str
    config: Any
    packings: Mapping[str, Packing] = field(default_factory=dict)
    weights: WeightBytes = WeightBytes()


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
    def geometry(self) -> Geometry:
        """The sizes of its latents and tokens."""
        return geometry_of(self.transformer, self.vae)


def sizes_of(
    model: Preset | Checkpoint, dtype: str | mx.Dtype, quantize: str | None = None, own: Sequence[str | None] = ()
) -> Networks:
    """Sizes of a released or local model; reads no weights.

    Args:
        model: for a released one, the bytes are those of the official files.
        dtype, quantize: as for `WanPipeline.from_pretrained`.
        own: the high-noise and the low-noise expert's quantisation, where that is another.

    Raises:
        ValueError: ``dtype`` or ``quantize`` is unknown, or does not suit the model; it has no experts.
    """
    dtype = parse_dtype(dtype)
    for mode in (quantize, *own):
        check_mode(mode)
    if any(own):
        if isinstance(model, Preset) and model.experts == 1:
            raise ValueError(f"{model.name} has one transformer, and the quantisation of one of two experts was given; "
                             "give it without high or low")  # fmt: skip
        model = model if isinstance(model, Preset) else model.with_experts(quantize=(own[0], own[1]))
    count: dict[str, Callable[..., WeightBytes]] = {"transformer": weight_bytes, "text_encoder": text_weight_bytes}
    parts = []
    found = _published(model, quantize, own) if isinstance(model, Preset) else _opened(model, dtype, quantize)
    for part, stored in found:
        if part.kind in count:
            part = replace(part, weights=count[part.kind](part.config, dtype, part.packings, stored))
        parts.append(part)
    return Networks(tuple(parts), dtype)


# A part, and the bytes of each tensor in its file.
Found = tuple[PartSizes, Mapping[str, int]]


def _published(preset: Preset, quantize: str | None, own: Sequence[str | None]) -> Iterator[Found]:
    """Transformers are published in float32, text encoders in bfloat16."""
    modes = dict(zip(EXPERTS, own, strict=False))
    for kind, config, itemsize in (("transformer", preset.transformer, 4), ("text_encoder", preset.text_encoder, 2)):
        shapes = shapes_of(config)
        stored = {name: itemsize * math.prod(shape) for name, shape in shapes.items()}
        names = EXPERTS if kind == "transformer" and preset.experts == 2 else (kind,)
        for name in names:
            mode = modes.get(name) or quantize
            mode = None if mode in (EXPAND, NEAREST) else mode
            packings = {} if mode is None else plan_quantization(kind, mode, shapes).packings
            yield PartSizes(name, kind, config, packings), stored
    yield PartSizes("vae", "vae", preset.vae), {}
    if preset.transformer.has_image_branch:
        yield PartSizes("image_encoder", "image_encoder", ImageEncoderConfig()), {}


def _opened(checkpoint: Checkpoint, dtype: mx.Dtype, quantize: str | None) -> Iterator[Found]:
    kinds = ["transformer", "text_encoder", "vae"]
    if config_of(checkpoint).has_image_branch:
        kinds.append("image_encoder")
    for part in (part for kind in kinds for part in checkpoint.of_kind(kind) or [checkpoint.part(kind)]):
        weights, config = open_network(part, part.kind)
        packings: Mapping[str, Packing] = {}
        if part.kind in QUANTIZED:
            packings = Parameters(weights, dtype, part.quantize or quantize).quantization.packings
        stored = {name: weights.stored_bytes(name) for name in weights.sources}
        yield PartSizes(part.name, part.kind, config, packings), stored
