"""What a checkpoint is, from its headers alone: layout, networks, sizes, dtypes, quantisation, and what it lacks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from ..errors import WeightsError
from ..files.base import BLOCKS
from ..files.fp8 import FP8
from ..files.sentencepiece import read_tokenizer
from ..models.configs import TransformerConfig
from ..models.image_encoder import ImageEncoder, last_block_shapes
from ..models.text_encoder import text_encoder_shapes
from ..models.transformer import Transformer
from ..models.vace import VaceTransformer
from ..models.vae import VAE
from ..presets import NETWORKS, PRESETS
from ..storage import gigabytes
from .checkpoint import look_at
from .component import (
    ComponentWeights,
    check_keys,
    image_encoder_config,
    open_component,
    parameter_shapes,
    text_encoder_config,
    transformer_config,
    vae_config,
)

KINDS = {
    "t2v": "text to video",
    "i2v": "image to video",
    "flf2v": "first and last frame to video",
    "vace": "VACE: editing, control and references",
}


@dataclass(frozen=True)
class Network:
    """One network's file.

    Attributes:
        part: which of the networks.
        file: where it is; the index of shards.
        layout: whose names its tensors have.
        sizes: what it is, in a few words.
        tensors, parameters: how many.
        nbytes: dtype as stored → bytes, without scales and what is ignored.
        quantization: how its matrices are stored if not as floats, else "".
        fault: why it cannot be loaded; "" if it is whole.
    """

    part: str
    file: Path
    layout: str
    sizes: str
    tensors: int
    parameters: int
    nbytes: Mapping[str, int]
    quantization: str
    fault: str


@dataclass(frozen=True)
class Inspection:
    """What a source holds.

    Attributes:
        path: what was looked at.
        layout: "official", "diffusers", "mlx" or "single files".
        model: its kind, and the released models whose sizes it has; "" without a transformer.
        networks: in the order they are used.
        tokenizer: where it is and how many pieces it has; "" if there is none.
        missing: parts that must be given apart to make a video.
    """

    path: Path
    layout: str
    model: str
    networks: list[Network]
    tokenizer: str
    missing: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether everything that is there can be loaded."""
        return not any(network.fault for network in self.networks)

    def lines(self) -> list[str]:
        """As the command line prints it."""
        rows = [("source", f"{self.path} ({self.layout})")]
        if self.model:
            rows.append(("model", self.model))
        for network in self.networks:
            rows.append((network.part.replace("_", " "), f"{_relative(network.file, self.path)}: {network.sizes}"))
            total = gigabytes(sum(network.nbytes.values()))
            dtypes = ", ".join(f"{dtype} {gigabytes(size)}" for dtype, size in _largest_first(network.nbytes))
            parameters = f"{network.parameters / 1e9:.2f} billion parameters"
            rows.append(("", f"{network.layout} names, {network.tensors} tensors, {parameters}"))
            rows.append(("", f"{total}: {dtypes}"))
            if network.quantization:
                rows.append(("", f"quantised: {network.quantization}"))
            if network.fault:
                rows.append(("", f"cannot be loaded: {network.fault}"))
        if self.tokenizer:
            rows.append(("tokenizer", self.tokenizer))
        rows.append(("missing", ", ".join(self.missing).replace("_", " ") or "nothing: a whole model"))
        return [f"{name:<15}{text}" for name, text in rows]


def inspect_source(source: str | Path, parts: Mapping[str, str | Path] | None = None) -> Inspection:
    """Look at a folder or file, and at parts given apart, as `open_checkpoint` would; no weights are read.

    Raises:
        ValueError: no such file or folder.
        WeightsError: nothing in it was recognised; says what was seen.
    """
    found = look_at(source, {part: Path(place).expanduser() for part, place in (parts or {}).items()})
    networks, model = [], ""
    for part in (part for part in NETWORKS if part in found.files):
        weights = open_component(found.files[part], part)
        sizes, fault, config = _sizes_of(weights, found.configs.get(part, {}))
        if isinstance(config, TransformerConfig):
            model = _model_of(config, found.model)
        networks.append(_network(weights, sizes, fault))
    tokenizer = _tokenizer_at(found.files["tokenizer"], found.path) if "tokenizer" in found.files else ""
    return Inspection(found.path, found.layout, model, networks, tokenizer, found.missing())


def _network(weights: ComponentWeights, sizes: str, fault: str) -> Network:
    nbytes: Counter[str] = Counter()
    for sources in weights.sources.values():
        for source in sources:
            info = weights.file.tensors[source]
            nbytes[info.dtype] += info.nbytes
    return Network(
        weights.component, weights.path, weights.layout.name, sizes, len(weights.shapes),
        sum(math.prod(shape) for shape in weights.shapes.values()), nbytes, _quantization_of(weights), fault,
    )  # fmt: skip


def _sizes_of(weights: ComponentWeights, config: Mapping[str, Any]) -> tuple[str, str, Any]:
    """A network in a few words, why it cannot be loaded, and its configuration (None if that is why)."""
    try:
        if weights.component == "transformer":
            c = transformer_config(weights, config)
            shapes = parameter_shapes((VaceTransformer if c.model_type == "vace" else Transformer)(c))
            words = f"{c.num_layers} layers of {c.dim}, {c.num_heads} heads"
        elif weights.component == "text_encoder":
            c = text_encoder_config(weights, config)
            shapes = text_encoder_shapes(c)
            words = f"umT5 encoder, {c.num_layers} layers of {c.dim}, {c.vocab_size:,} words"
        elif weights.component == "vae":
            c = vae_config(weights, config)
            shapes = parameter_shapes(VAE(c))
            words = f"{c.z_dim} latent channels"
        else:
            c = image_encoder_config(weights, config)
            shapes = parameter_shapes(ImageEncoder(c)) | last_block_shapes(c)
            words = f"CLIP's vision tower, {c.num_layers} layers of {c.dim}, images of {c.image_size} pixels"
        check_keys(weights, shapes)
    except (WeightsError, ValueError) as error:
        return "of unknown size", str(error), None
    return words, "", c


def _model_of(config: TransformerConfig, recorded: str | None) -> str:
    kind = KINDS[config.model_type]
    if recorded:
        return f"{kind}, {recorded}"
    same = [preset.name for preset in PRESETS.values() if preset.transformer == config]
    if same:
        return f"{kind}, {' or '.join(same)}" + (" (their weights have the same shapes)" if len(same) > 1 else "")
    return f"{kind}, of no released size"


def _quantization_of(weights: ComponentWeights) -> str:
    if weights.quantization is not None:
        return f"{weights.quantization.mode}, {len(weights.quantization.packings)} matrices"
    dtypes = Counter(weights.stored_dtype(name) for name in weights.shapes)
    kinds = [f"{kind} {count}" for kind, count in dtypes.most_common() if kind in BLOCKS or kind in FP8]
    if not kinds:
        return ""
    if set(FP8).isdisjoint(dtypes):
        return f"{', '.join(kinds)} tensors"
    scales = weights.file.scales.values()
    rows = "one scale per row" if any(scale.size > 1 for scale in scales) else "one scale per tensor"
    return f"{', '.join(kinds)} tensors, {rows if scales else 'without scales'}"


def _tokenizer_at(file: Path, base: Path) -> str:
    try:
        pieces = SentencePieceProcessor(model_proto=read_tokenizer(file)).get_piece_size()
    except (WeightsError, RuntimeError) as error:
        return f"{_relative(file, base)}: cannot be read ({str(error).splitlines()[0]})"
    return f"{_relative(file, base)}, {pieces:,} pieces"


def _relative(file: Path, base: Path) -> str:
    return str(file.relative_to(base)) if base in file.parents else str(file)


def _largest_first(nbytes: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(nbytes.items(), key=lambda item: -item[1])
