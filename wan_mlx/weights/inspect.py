"""Describes a checkpoint from its headers: layout, networks, sizes, dtypes, quantisation, missing parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from ..errors import WeightsError
from ..events import Listener, unheard
from ..files.base import BLOCKS, FP8, MICROSCALED
from ..files.sentencepiece import read_tokenizer
from ..hub.names import expert_named
from ..models.configs import TransformerConfig
from ..other_models import of_name
from ..presets import EXPERTS, NETWORKS, PRESETS, TASK_NAMES
from ..storage import gigabytes
from .check_sums import faults_of
from .checkpoint import look_at
from .component import ComponentWeights
from .configs import network_config

# Kind of network → summary of its sizes.
WORDS = {
    "transformer": "{c.num_layers} layers of {c.dim}, {c.num_heads} heads",
    "text_encoder": "umT5 encoder, {c.num_layers} layers of {c.dim}, {c.vocab_size:,} words",
    "vae": "{c.z_dim} latent channels",
    "image_encoder": "CLIP's vision tower, {c.num_layers} layers of {c.dim}, images of {c.image_size} pixels",
    "audio_encoder": "wav2vec 2.0, {c.num_layers} layers of {c.dim}",
}


@dataclass(frozen=True)
class Inspection:
    """A description as ``rows`` of (name, text), and whether every network in it can be loaded."""

    rows: list[tuple[str, str]]
    is_sound: bool

    def lines(self) -> list[str]:
        """The command line's output."""
        return [f"{name:<15}{text}" for name, text in self.rows]


def inspect_source(
    source: str | Path, parts: Mapping[str, str | Path] | None = None, listener: Listener = unheard
) -> Inspection:
    """Inspect a folder or file, and separate parts, like `open_checkpoint`.

    Reads headers, and whole files only to compare check sums, of which ``listener`` hears the `Progress`.

    Raises:
        ValueError: no such file or folder.
        WeightsError: nothing was recognised; lists the contents.
    """
    found = look_at(source, parts)
    rows, networks, sound = [("source", f"{found.path} ({found.layout})")], [], True
    for part in (part for kind in NETWORKS for part in found.of_kind(kind)):
        weights = part.open()
        sizes, faults = "of unknown size", []
        try:
            config = network_config(weights, part.config)
            sizes = WORDS[part.kind].format(c=config)
            if isinstance(config, TransformerConfig):
                model = "model", _model_of(config, found.model, len(found.of_kind("transformer")))
                rows += [model] * (model not in rows)
        except WeightsError as error:
            faults, sound = [f"cannot be loaded: {error}"], False
        networks.append((part.label, f"{_relative(weights.path, found.path)}: {sizes}"))
        networks += [("", text) for text in (*_contents(weights), *faults)]
    rows += networks
    for name in dict.fromkeys(path.name for path in (found.path, *found.files.values())):
        if sound and (other := of_name(name, known=True)):
            rows.append(("note", f"by its name {name} is {other.name}, which has the shapes of a model of Wan"))
    for part in found.of_kind("transformer"):
        if part.name not in EXPERTS and (expert := expert_named(part.file)):
            expert = expert.replace("_", " ")
            rows.append(("note", f"by its name {part.file.name} is the {expert} expert of a model of two"))
    rows += [("not used", other) for other in found.others]
    damaged = faults_of(dict.fromkeys(found.files.values()), listener)
    rows += [("damaged", fault) for fault in damaged]
    for part in found.of_kind("tokenizer"):
        rows.append(("tokenizer", _tokenizer_at(part.file, found.path)))
    rows.append(("missing", ", ".join(found.missing()).replace("_", " ") or "nothing: a whole model"))
    return Inspection(rows, sound and not damaged)


def _contents(weights: ComponentWeights) -> Iterator[str]:
    """Names and number of the tensors, stored bytes of each dtype, quantisation."""
    nbytes: Counter[str] = Counter()
    for source in (source for sources in weights.sources.values() for source in sources):
        info = weights.file.tensors[source]
        nbytes[info.dtype] += info.nbytes
    parameters = sum(math.prod(shape) for shape in weights.shapes.values())
    yield f"{weights.layout.name} names, {len(weights.shapes)} tensors, {parameters / 1e9:.2f} billion parameters"
    dtypes = ", ".join(f"{dtype} {gigabytes(size)}" for dtype, size in nbytes.most_common())
    yield f"{gigabytes(sum(nbytes.values()))}: {dtypes}"
    if quantization := _quantization_of(weights):
        yield f"quantised: {quantization}"


def _model_of(config: TransformerConfig, recorded: str | None, experts: int) -> str:
    kind = TASK_NAMES[config.model_type]
    if recorded:
        return f"{kind}, {recorded}"
    same = [preset.name for preset in PRESETS.values() if (preset.transformer, preset.experts) == (config, experts)]
    if not same and experts == 1:
        same = [f"one expert of {preset.name}" for preset in PRESETS.values() if preset.transformer == config]
    if same:
        return f"{kind}, {' or '.join(same)}" + (" (their weights have the same shapes)" if len(same) > 1 else "")
    return f"{kind}, of no released size"


def _quantization_of(weights: ComponentWeights) -> str:
    if weights.quantization is not None:
        return f"{weights.quantization.mode}, {len(weights.quantization.packings)} matrices"
    dtypes = Counter(weights.stored_dtype(name) for name in weights.shapes)
    few_bits = (*FP8, "I8", *MICROSCALED, *BLOCKS)
    kinds = [f"{kind} {count}" for kind, count in dtypes.most_common() if kind in few_bits]
    if not kinds:
        return ""
    if dtypes.keys().isdisjoint((*FP8, "I8")):
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
