"""Converts any loadable checkpoint to one MLX folder: our names, our layout, a block never in two files.

The folder: config.json (sizes, dtypes, source, SHA-256 of every file), each network as one safetensors file or as
shards with an index, tokenizer.model, and README.md with commands to run it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from ..errors import WeightsError, some
from ..files.safetensors import save_arrays
from ..files.sentencepiece import read_tokenizer
from ..hub.names import MLX_FILES
from ..models.transformer import BLOCK
from ..presets import EXPERTS, NETWORKS, OPTIONAL, PRESETS
from ..storage import MARKER, fingerprint, free_space, gigabytes, new_folder, parse_json, sha256
from .checkpoint import open_checkpoint
from .component import MLX_LAYOUT, SAFETENSORS_NAMES, beside
from .config_files import MLX_FORMAT, MLX_VERSION
from .load import Progress, no_progress, open_network, parse_dtype, text_dtype
from .parameters import Parameters, dtype_of
from .parts import Checkpoint
from .quantize import QUANTIZED

# Key → shape and dtype of a tensor to be written.
Specs = dict[str, tuple[tuple[int, ...], mx.Dtype]]

SHARD_BYTES = 2 * 10**9  # a shard is in memory as it is written; umT5's embedding alone has 2.1 GB
# Files of a converted folder beside those that its config.json lists.
CONVERTED = ("config.json", "README.md", *(names[0] for names in MLX_FILES.values()), MARKER, ".DS_Store")


def convert(
    source: str | Path | Checkpoint,
    out: str | Path,
    dtype: str = "bfloat16",
    vae_dtype: str = "float32",
    model: str | None = None,
    progress: Progress = no_progress,
    quantize: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    parts: Mapping[str, str | Path] | None = None,
    name: str | None = None,
) -> Path:
    """Write ``source`` as an MLX folder, atomically: after Ctrl-C or a failure nothing is left.

    Args:
        source: a local folder or file, as for `open_checkpoint`, or an opened model.
        out: a folder that does not exist yet.
        dtype: of the transformer, whose time path, norms and head stay float32, and of the text encoder, which is in
            bfloat16 beside float16.
        vae_dtype: of the VAE. The image encoder keeps its dtype.
        model: preset whose sampling defaults the folder should use; recorded in its config.json.
        progress: wraps the iteration over tensors.
        quantize: mode for the blocks of transformer and text encoder, as for `load_transformer`.
        overwrite: replace ``out`` if it is an MLX folder that holds nothing else; anything else is never removed.
        shard_bytes: a larger network is split, never within a block.
        parts: name in `GIVEN_APART` → a file or folder used in place of the part in ``source``.
        name: of the source in config.json and README.md; None: the folder's or file's name.

    Raises:
        ValueError: ``out`` exists, or ``quantize`` is unknown or not possible for these weights.
        WeightsError: ``source`` cannot be loaded, or the disk has no space for the folder.
        WanError: the folder cannot be written.
    """
    out = Path(out).expanduser()
    check_target(out, overwrite, model)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, parts)
    name = name or checkpoint.path.resolve().name
    config: dict[str, Any] = {
        "format": MLX_FORMAT,
        "version": MLX_VERSION,
        "wan_mlx": __version__,
        "model": model or checkpoint.model,
        "source": {"name": name, "layouts": {}, "fingerprints": {}},
        "dtypes": {},
    }
    if checkpoint.boundary is not None:
        config["boundary"] = checkpoint.boundary
    networks = []
    for part in (part for kind in NETWORKS for part in checkpoint.of_kind(kind)):
        weights, sizes = open_network(part, part.kind)
        config[part.name] = asdict(sizes)
        own = {"vae": vae_dtype, "text_encoder": text_dtype(dtype), **dict.fromkeys(OPTIONAL, "float32")}
        kept = parse_dtype(own.get(part.kind, dtype))
        mode = (part.quantize or quantize) if part.kind in QUANTIZED else None
        parameters = Parameters(weights, kept, mode)
        if parameters.quantization.packings:
            config.setdefault("quantization", {})[part.name] = parameters.quantization.mode
        kept_as = {name: _kept(parameters, name) for name in weights.shapes}
        networks.append(Network(part.name, parameters, kept_as, shard_bytes))
        config["dtypes"][part.name] = networks[-1].dtypes()
        config["source"]["layouts"][part.name] = MLX_LAYOUT if weights.channels_last else weights.layout.name
        config["source"]["fingerprints"][part.name] = fingerprint(weights.path)["sha256"]
    tokenizer = read_tokenizer(checkpoint.part("tokenizer").file)
    needed, free = sum(network.nbytes() for network in networks) + len(tokenizer), free_space(out.parent)
    if needed > free:
        raise WeightsError(f"{out} needs {gigabytes(needed)}, and its disk has {gigabytes(free)} free")
    with new_folder(out, overwrite) as folder:
        steps = iter(progress([name for network in networks for name in network.kept]))
        config["files"] = {MLX_FILES["tokenizer"][0]: hashlib.sha256(tokenizer).hexdigest()}
        for network in networks:
            config["files"] |= network.write(folder, steps)
        mx.synchronize()  # only now a failed command buffer is sure to show
        next(steps, None)
        (folder / MLX_FILES["tokenizer"][0]).write_bytes(tokenizer)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(out.name, config, needed), encoding="utf-8")
    return out


def check_target(out: str | Path, overwrite: bool = False, model: str | None = None) -> None:
    """Raise ValueError if `convert` would refuse these arguments."""
    if model is not None and model not in PRESETS:
        raise ValueError(f"model is {model!r}, expected one of {', '.join(PRESETS)}")
    out = Path(out).expanduser()
    try:
        is_link = stat.S_ISLNK(os.lstat(out).st_mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({error.strerror}); give the name of a new folder") from None
    if not overwrite:
        raise ValueError(f"{out} exists already; give a new folder, or --overwrite (overwrite=True) to replace it")
    try:
        config = parse_json((out / "config.json").read_bytes())
        ours = {*config["files"], *CONVERTED} if config["format"] == MLX_FORMAT and not is_link else set()
    except (OSError, ValueError, LookupError, TypeError):
        ours = set()
    if not ours:
        raise ValueError(f"{out} is no MLX folder, so it is not replaced; give a new folder")
    if others := sorted(path.name for path in out.iterdir() if path.name not in ours):
        raise ValueError(f"{out} also holds {some(others)}, which would be lost; move that, or give a new folder")


@dataclass
class Network:
    """One network to be written.

    Attributes:
        name: the part's, and of its files.
        parameters: the parameters to write.
        kept: parameter → the tensors that store it.
        shard_bytes: most bytes of one file, unless a single block has more.
    """

    name: str
    parameters: Parameters
    kept: dict[str, Specs]
    shard_bytes: int = SHARD_BYTES

    def nbytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes of some of the parameters, or of all."""
        specs = (spec for name in names or self.kept for spec in self.kept[name].values())
        return sum(math.prod(shape) * dtype.size for shape, dtype in specs)

    def dtypes(self) -> dict[str, int]:
        """Dtype → number of its tensors."""
        names = (SAFETENSORS_NAMES[dtype] for specs in self.kept.values() for _, dtype in specs.values())
        return dict(sorted(Counter(names).items()))

    def shards(self) -> list[list[str]]:
        """The names of each file in storage order: blocks last, in order, never split."""
        # Tensors outside blocks come first, each its own group; VACE's blocks are computed before the others.
        found = {name: block for name in self.kept if (block := BLOCK.match(name))}
        blocks = {name: (block["list"] == "blocks", int(block["number"])) for name, block in found.items()}
        ordered = sorted(self.kept, key=lambda name: blocks.get(name, ()))
        shards: list[list[str]] = [[]]
        room = self.shard_bytes
        for _, group in groupby(ordered, key=lambda name: blocks.get(name, name)):
            names = list(group)
            size = self.nbytes(names)
            if size > room and shards[-1]:
                shards.append([])
                room = self.shard_bytes
            shards[-1] += names
            room -= size
        return shards

    def write(self, folder: Path, steps: Iterator[str]) -> dict[str, str]:
        """Write the network's files, advancing ``steps`` once per parameter; returns name → SHA-256."""
        shards = self.shards()
        index, single = MLX_FILES[self.name]
        if len(shards) == 1:
            return {single: self._write_shard(folder / single, shards[0], steps)}
        digests, owners = dict[str, str](), dict[str, str]()
        for number, names in enumerate(shards, 1):
            file = f"{self.name}-{number:05d}-of-{len(shards):05d}.safetensors"
            digests[file] = self._write_shard(folder / file, names, steps)
            owners |= {key: file for name in names for key in self.kept[name]}
        text = json.dumps({"metadata": {"total_size": self.nbytes()}, "weight_map": owners}, indent=1) + "\n"
        (folder / index).write_text(text, encoding="utf-8")
        return digests

    def _write_shard(self, path: Path, names: list[str], steps: Iterator[str]) -> str:
        """Write one file, whose tensors are all in memory meanwhile; returns its SHA-256."""
        metadata = {"layout": MLX_LAYOUT, "component": self.parameters.component}
        if self.parameters.quantization.packings:
            metadata |= self.parameters.quantization.to_metadata()
        save_arrays(path, dict(self._arrays(names, steps)), metadata)
        mx.clear_cache()
        return sha256(path)

    def _arrays(self, names: list[str], steps: Iterator[str]) -> Iterator[tuple[str, mx.array]]:
        """The tensors of ``names``, read, changed and cast one at a time."""
        for name in names:
            next(steps)
            with mx.stream(mx.cpu):
                started = self.parameters.start([name])
            arrays = dict(self.parameters.finish(started))
            for key, (_, dtype) in self.kept[name].items():
                with mx.stream(mx.cpu):
                    array = mx.contiguous(arrays.pop(key).astype(dtype))
                    mx.eval(array)  # so that what it was made of is freed
                yield key, array


def _kept(parameters: Parameters, name: str) -> Specs:
    """Key → shape and dtype of the tensors that store one parameter.

    As loaded, but no wider than the source, which would only add bytes.
    """
    weights, packing = parameters.weights, parameters.quantization.packings.get(name)
    if packing is not None:
        return {beside(name, key): value for key, value in packing.shapes(weights.shapes[name]).items()}
    wanted = dtype_of(weights.component, name, parameters.dtype)
    narrow = {"F16": mx.float16, "BF16": mx.bfloat16}.get(weights.stored_dtype(name), wanted)
    return {name: (weights.shapes[name], narrow if wanted == mx.float32 else wanted)}


def _card(name: str, config: Mapping[str, Any], nbytes: int) -> str:
    """The folder's README.md, with the hub's front matter."""
    model = PRESETS.get(config["model"] or "")
    transformer = next(config[name] for name in ("transformer", *EXPERTS) if name in config)
    kind = model.task if model else transformer["model_type"]
    sources = {"i2v": " --image first.png", "flf2v": " --image first.png --last-image last.png",
               "vace": " --src_video in.mp4", "control": " --src_video poses.mp4",
               "animate": " --src_root_path DIR"}  # fmt: skip
    packed = config.get("quantization", {})
    precision = ", ".join(
        f"{component} {packed.get(component) or '/'.join(dtypes)}" for component, dtypes in config["dtypes"].items()
    )
    tags = {"t2v": "text-to-video", "ti2v": "text-to-video", "i2v": "image-to-video", "flf2v": "image-to-video",
            "inp": "image-to-video"}  # fmt: skip
    tag = tags.get(kind, "video-to-video")
    family = "Wan2.2" if kind in ("ti2v", "inp", "control", "animate") or EXPERTS[0] in config else "Wan2.1"
    base = f"base_model: {model.repo}\n" if model and model.repo else ""
    return f"""---
library_name: mlx
pipeline_tag: {tag}
{base}tags: [mlx, wan_mlx, {family.lower()}]
---
# {name}

{model.name if model else kind}, a {family} model, in the form that wan_mlx reads: {gigabytes(nbytes)}, {precision}.
Converted from `{config["source"]["name"]}` by wan_mlx {__version__}. With wan_mlx installed, beside this folder:

```sh
wan-mlx --model ./{name}{sources.get(kind, "")} --prompt "what it should show" --output out.mp4
```

`--help` tells of size, length, steps and memory. In Python, `wan_mlx.WanPipeline.from_pretrained("./{name}")` opens it.

`config.json` has the sizes, and the SHA-256 of every file. The weights are under the licence of what they were
converted from.
"""
