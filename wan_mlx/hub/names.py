"""Names of models on hubs, and the files of a repository that a model needs; uses neither network nor disk.

A name is one of
    nano, nano-i2v                           bundled with the package
    ./Wan2.1-T2V-1.3B                        a path on this machine
    t2v-1.3B                                 a preset: the official repository
    Wan-AI/Wan2.1-T2V-1.3B-Diffusers         a repository: official, Diffusers' or an MLX folder
    city96/Wan2.1-T2V-14B-gguf:wan2.1-t2v-14b-Q4_K_M.gguf      one file of a repository
    https://huggingface.co/…/resolve/main/…  the same, as a browser's address
A repository may name another revision than main: owner/name@revision.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from ..errors import WeightsError, some
from ..other_models import of_name
from ..presets import EXPERTS, NETWORKS, OPTIONAL, PARTS, PRESETS, Preset

T = TypeVar("T")
_TRANSFORMER = ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors")


def _inside(folder: str, names: Collection[str] = _TRANSFORMER) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


WAV2VEC = "wav2vec2-large-xlsr-53-english"
# The official folder: component → the names it is published under, first one wins.
OFFICIAL_FILES = {
    "transformer": _TRANSFORMER,
    "high_noise": _inside("high_noise_model"),
    "low_noise": _inside("low_noise_model"),
    "text_encoder": ("models_t5_umt5-xxl-enc-bf16.pth",),
    "vae": ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth"),
    "image_encoder": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",),
    "audio_encoder": (f"{WAV2VEC}/model.safetensors",),
    "tokenizer": ("google/umt5-xxl/spiece.model",),
}
DIFFUSERS_FILES = {
    "transformer": _inside("transformer"),
    "high_noise": _inside("transformer"),  # where there is a second one
    "low_noise": _inside("transformer_2"),
    "text_encoder": ("text_encoder/model.safetensors.index.json", "text_encoder/model.safetensors"),
    "vae": ("vae/diffusion_pytorch_model.safetensors",),
    "image_encoder": ("image_encoder/model.safetensors",),
    "tokenizer": ("tokenizer/spiece.model", "tokenizer/tokenizer.json"),  # transformers 5 saves the second alone
}
MLX_FILES = {
    **{part: (f"{part}.safetensors.index.json", f"{part}.safetensors") for part in (*NETWORKS, *EXPERTS)},
    "tokenizer": ("tokenizer.model",),
}

ADAPTER_CONFIG = "adapter_config.json"  # beside PEFT's files
# huggingface_hub's bars, which are not shown, want ipywidgets in a notebook.
warnings.filterwarnings("ignore", "IProgress not found")
HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<file>[^:]+))?")
WEIGHT_ENDINGS = (".safetensors", ".gguf", ".pth", ".pt", ".ckpt")
# Small files of all layouts, besides the weights.
_FOLDERS = (*NETWORKS, "tokenizer", "transformer_2", "high_noise_model", "low_noise_model", WAV2VEC)
CONFIGS = ("config.json", "model_index.json", *(f"{folder}/config.json" for folder in _FOLDERS))
# What a file's name says of which expert it is; only for notes, since it may be wrong.
NAMED_EXPERT = re.compile(r"(?i:(?<![a-z])(?P<word>high|low)[-_ ]?noise)|(?<![A-Za-z])(?P<short>HIGH|LOW)(?![A-Za-z])")


@dataclass(frozen=True)
class Location:
    """A repository on a hub, or with ``file`` one file in it."""

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


def preset_at(location: Location) -> Preset | None:
    """The preset published at a location, in any layout; None if unknown."""
    plain = str(Location(location.repo, location.file))
    for preset in PRESETS.values():
        if location.repo in preset.repositories or plain == preset.comfyui_file:
            return preset
    return None


def parse_location(model: str | Path) -> Location | None:
    """The repository that ``model`` names; None if it does not name one.

    Raises:
        ValueError: an address of another site.
    """
    if isinstance(model, Path):
        return None
    if model in PRESETS and PRESETS[model].repo:
        return Location(PRESETS[model].repo)
    if re.match(r"https?://", model):
        return _parse_url(model)
    match = HUB_ID.fullmatch(model)
    if match is None or (match["file"] and _is_unsafe(match["file"])):
        return None
    return Location(match["repo"], match["file"], match["revision"])


def _parse_url(url: str) -> Location:
    from huggingface_hub import constants

    parts = urlsplit(url)
    known = {"huggingface.co", "hf.co", "www.huggingface.co", urlsplit(constants.ENDPOINT).netloc}
    match = re.fullmatch(
        r"/(?P<repo>[\w.-]+/[\w.-]+)(/(resolve|blob|tree)/(?P<revision>[^/]+)(/(?P<file>.+))?)?/?", unquote(parts.path)
    )
    if parts.netloc not in known or match is None or (match["file"] and _is_unsafe(match["file"])):
        raise ValueError(
            f"{url} is no model on {' or '.join(sorted(known))}; give owner/name or owner/name:path/to/file"
        )
    if "/tree/" in parts.path and match["file"]:
        raise ValueError(f"{url} is a folder in a repository; give one file as {match['repo']}:path/to/file")
    return Location(match["repo"], match["file"], match["revision"])


def _is_unsafe(file: str) -> bool:
    return file.startswith("/") or "\\" in file or any(part in ("", ".", "..") for part in file.split("/"))


def needed_files(names: Iterable[str], repo: str, parts: Collection[str] = PARTS) -> list[str]:
    """The needed files of a repository: each network's weights, the tokenizer, and the configurations.

    ``parts``: those of `PARTS` or `EXPERTS` to take from this repository; "transformer" is both experts of one that has
    two, and an expert the transformer of one that has one.

    Raises:
        WeightsError: a part is missing, or these are single files of which one must be chosen; lists them.
    """
    names = set(names)
    if _transformers(MLX_FILES, names):
        layout, files = "MLX", MLX_FILES
    elif "model_index.json" in names or "transformer/config.json" in names:
        layout, files = "Diffusers", DIFFUSERS_FILES
    elif _transformers(OFFICIAL_FILES, names):
        layout, files = "official", OFFICIAL_FILES
    else:
        raise WeightsError(f"{repo} is no whole Wan model{_known_as(repo)}; {weights_in(names, repo)}")
    needed, missing = [name for name in CONFIGS if name in names], []
    two = EXPERTS if set(EXPERTS).intersection(_transformers(files, names)) else ()
    for component in _each(parts, two):
        if component not in files and component not in OPTIONAL:
            raise WeightsError(f"{repo} has no {component} for a whole model; {weights_in(names, repo)}")
        candidates = files.get(component, ())
        present = [name for name in candidates if name in names]
        if present:
            needed += [present[0], *_shards(present[0], names)]
        elif component not in OPTIONAL:
            missing.append(f"{' or '.join(candidates)} ({component})")
    if missing:
        lacking = f"({layout} layout){_known_as(repo)}: it lacks {'; '.join(missing)}"
        raise WeightsError(f"{repo} is no whole Wan model {lacking}")
    return needed


def _transformers(files: Mapping[str, tuple[str, ...]], names: Collection[str]) -> list[str]:
    """The parts of a repository that are transformers."""
    there = {part: True for part in ("transformer", *EXPERTS) if not set(files[part]).isdisjoint(names)}
    return list(one_or_two(there))


def _each(parts: Iterable[str], two: tuple[str, ...]) -> Iterator[str]:
    """Each part, as a repository with or without ``two`` experts has it."""
    for part in parts:
        if part == "transformer" and two:
            yield from two
        else:
            yield part if two or part not in EXPERTS else "transformer"


def one_or_two(found: Mapping[str, T]) -> dict[str, T]:
    """Of files that were found, part → file, the transformer or else the experts, of which one may be missing."""
    two = "low_noise" in found or "transformer" not in found
    return {part: file for part, file in found.items() if part not in (("transformer",) if two else EXPERTS)}


def expert_named(path: str | Path) -> str | None:
    """The expert, of `EXPERTS`, that a file is by its name, or by its folder's."""
    for name in (Path(path).name, Path(path).parent.name):
        if match := NAMED_EXPERT.search(name):
            return f"{(match['word'] or match['short']).lower()}_noise"
    return None


def _known_as(repo: str) -> str:
    other = of_name(repo)
    return f", but by its name {other.name}, which is not supported" if other else ""


def _shards(index: str, names: set[str]) -> list[str]:
    """The shards of an index, by their names: x.safetensors.index.json → x-00001-of-00006.safetensors …"""
    if not index.endswith(".safetensors.index.json"):
        return []
    stem = re.escape(index.removesuffix(".safetensors.index.json"))
    return sorted(name for name in names if re.fullmatch(stem + r"-\d+-of-\d+\.safetensors", name))


def weights_in(names: Iterable[str], repo: str) -> str:
    """The weight files of a repository, to choose from, for an error message."""
    found = sorted(name for name in names if name.endswith(WEIGHT_ENDINGS))
    if not found:
        return "it holds no weight files"
    return f"give one of its files, as {repo}:{found[0]}; it holds {some(found, 6)}"
