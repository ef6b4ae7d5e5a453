"""Describes a LoRA: its kinds, ranks and blocks, the models it fits, how much it changes, what its metadata tells."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from ..errors import WanError, WeightsError
from ..events import Listener, counted, unheard
from ..files.base import WeightsFile
from ..files.open import open_weights
from ..files.scaled import fold
from ..models.configs import TransformerConfig
from ..presets import PRESETS
from ..storage import gigabytes, parse_json
from .component import ComponentWeights
from .inspect import Inspection
from .lora import Loras, file_of, open_loras
from .lora_changes import MAGNITUDES, Change, Changed, kind_of, merged
from .lora_config import are_of_adapter

# Metadata that training tools write: row → keys, of which the first is taken.
FACTS = {
    "title": ("modelspec.title", "ss_output_name", "name"),
    "base model": ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "base_model"),
    "trigger words": ("trigger_word", "trigger_words", "modelspec.trigger_phrase", "instance_prompt"),
    "usage": ("modelspec.usage_hint",),
    "description": ("modelspec.description", "ss_training_comment", "modelspec.tags"),
    "network": ("ss_network_module",),
    "dim, alpha": ("ss_network_dim",),
    "steps": ("ss_steps", "ss_max_train_steps"),
    "learning rate": ("ss_learning_rate",),
    "resolution": ("modelspec.resolution", "ss_resolution"),
    "author": ("modelspec.author",),
    "license": ("modelspec.license",),
    "date": ("modelspec.date", "ss_training_finished_at"),
}  # fmt: skip
LONGEST_FACT, MOST_TAGS = 200, 12
BLOCK = re.compile(r"((?:vace_)?blocks)\.(\d+)\.(.+)\.\w+")


def is_lora(path: Path) -> bool:
    """Whether a file, or the file in a folder, is an adapter, by its keys."""
    try:
        return are_of_adapter(open_weights(file_of(path)).tensors)
    except WanError:
        return False


def trigger_words(path: Path) -> str:
    """The words that a LoRA was trained to be called by, as its metadata has them; "" if it has none."""
    metadata = open_weights(file_of(path)).metadata
    return next((metadata[key] for key in FACTS["trigger words"] if metadata.get(key)), "")


def inspect_lora(
    path: Path, base: tuple[ComponentWeights, TransformerConfig] | None = None, listener: Listener = unheard
) -> Inspection:
    """Describe a LoRA; with a transformer as ``base`` the change is told as a ratio to its weights' norms.

    Reads the file's values, one parameter at a time, and the same ones of ``base``.

    Raises:
        WeightsError: it cannot be read, or does not suit ``base``.
    """
    file = fold(open_weights(file_of(path)))
    rows = [("LoRA", f"{file.path}, {gigabytes(sum(info.nbytes for info in file.tensors.values()))}")]
    fits, errors = _fitting(path)
    if base is not None:
        loras = open_loras([(path, 1.0)], base[1])
    elif fits:
        loras = open_loras([(path, 1.0)], PRESETS[fits[0]].transformer)
    else:
        rows += [*_facts(file.metadata), ("fits", f"no released model: {min(errors, key=len)}")]
        return Inspection(rows, False)
    rows += _contents(file, loras)
    rows.append(("fits", ", ".join(fits) or "no released model, but the given one"))
    rows += _facts(file.metadata)
    rows += _change(loras, base and base[0], listener)
    return Inspection(rows, True)


def _fitting(path: Path) -> tuple[list[str], list[str]]:
    """The presets whose transformers the file suits, and what is wrong with it for the others."""
    verdicts: dict[TransformerConfig, str] = {}
    for preset in PRESETS.values():
        if preset.transformer not in verdicts:
            try:
                open_loras([(path, 1.0)], preset.transformer)
                verdicts[preset.transformer] = ""
            except WeightsError as error:
                verdicts[preset.transformer] = str(error)
    fits = [preset.name for preset in PRESETS.values() if not verdicts[preset.transformer]]
    return fits, [error for error in verdicts.values() if error]


def _contents(file: WeightsFile, loras: Loras) -> Iterator[tuple[str, str]]:
    changes = [change for changes in loras.values() for change in changes]
    kinds = Counter(name for change in changes for name in _kinds(change))
    yield "kind", ", ".join(f"{name} of {_tensors(count)}" for name, count in kinds.most_common())
    if ranks := Counter(change.rank for change in changes if change.rank):
        yield "rank", _numbers(ranks)
    if alphas := Counter(round(c.scale * c.rank, 4) for c in changes if c.rank and "alpha" in c.keys):
        yield "alpha", _numbers(alphas)
    if scales := Counter(round(change.scale, 4) for change in changes if kind_of(change.keys)):
        yield "scale", f"{_numbers(scales)} (alpha / rank)"
    dtypes = Counter(info.dtype for info in file.tensors.values())
    yield "keys", f"{len(file.tensors)} ({', '.join(f'{dtype} {count}' for dtype, count in dtypes.most_common())})"
    blocks, modules = defaultdict[str, set[int]](set), Counter[str]()
    for name in loras:
        match = BLOCK.fullmatch(name)
        modules[match[3] if match else name.rpartition(".")[0] or name] += 1
        if match:
            blocks[match[1]].add(int(match[2]))
    ranges = (f"{len(found)} {of}, {min(found)} to {max(found)}" for of, found in blocks.items())
    yield "blocks", "; ".join(ranges) or "none"
    yield "layers", ", ".join(modules)


def _kinds(change: Change) -> Iterator[str]:
    if kind := kind_of(change.keys):
        yield ("DoRA, " if {*MAGNITUDES} & change.keys.keys() else "") + kind
    if {"diff", "up_bias"} & change.keys.keys():
        yield "difference"
    if "whole" in change.keys:
        yield "whole weights"


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _numbers(counts: Counter) -> str:
    """The only number, or the least and the largest, and the most frequent."""
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    return f"{min(counts):g} to {max(counts):g}, most often {counts.most_common(1)[0][0]:g}"


def _facts(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What training tools wrote (``ss_…`` of kohya and musubi, ``modelspec.…``), each as one line."""
    for name, keys in FACTS.items():
        found = next((metadata[key] for key in keys if metadata.get(key, "None") not in ("None", "")), None)
        if found is not None:
            alpha = metadata.get("ss_network_alpha") if name == "dim, alpha" else None
            yield name, _line(found if alpha is None else f"{found}, {alpha}")
    tags = Counter[str]()
    try:
        for of_folder in parse_json(metadata.get("ss_tag_frequency", "{}")).values():
            tags.update({str(tag).strip(): int(count) for tag, count in of_folder.items()})
    except (ValueError, TypeError, AttributeError):
        return
    if tags:
        yield "tags", _line(", ".join(f"{tag} ({count})" for tag, count in tags.most_common(MOST_TAGS)))


def _line(text: str) -> str:
    """Text of a stranger's as one short printable line."""
    text = "".join(letter if letter.isprintable() else " " for letter in " ".join(str(text).split()))
    return text if len(text) <= LONGEST_FACT else text[: LONGEST_FACT - 1] + "…"


def _change(loras: Loras, base: ComponentWeights | None, listener: Listener) -> Iterator[tuple[str, str]]:
    """Norms of the change: of all, and of each block; with ``base`` as a ratio to its norm."""
    squares, of_base = defaultdict[str, float](float), defaultdict[str, float](float)
    unknown = 0
    for name, changes in counted(listener, "norms")(loras.items()):
        match = BLOCK.fullmatch(name)
        place = f"{match[1]}.{match[2]}" if match else "others"
        if base is not None:
            array = base.read(name).astype(mx.float32)
            squares[place] += _square(merged(changes, array) - array)
            of_base[place] += _square(array)
        elif any({"whole", *MAGNITUDES} & change.keys.keys() for change in changes):
            unknown += 1
        else:
            squares[place] += _square_of_terms([term for change in changes for term in change.terms()])
    total = sum(squares.values()) ** 0.5
    if base is None:
        rest = f", without {_tensors(unknown)}, whose change only --model tells" if unknown else ""
        yield "change", f"norm {total:.4g}{rest}"
    else:
        yield "change", f"{total / sum(of_base.values()) ** 0.5:.2%} of the norm of what it changes"
    for place, square in squares.items():
        yield f"  {place}", f"{(square / of_base[place]) ** 0.5:.2%}" if base is not None else f"{square**0.5:.4g}"


def _square(array: mx.array) -> float:
    return float((array * array).sum(-1).sum())  # row by row, which rounds less


def _square_of_terms(terms: list) -> float:
    """|sum|²; of a single term without making its matrix, if it has factors."""
    if len(terms) == 1:
        return float(terms[0].norm()) ** 2
    return _square(Changed(terms=terms).of(mx.array(0.0)))
