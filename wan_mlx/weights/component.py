"""One network's weights under the official names: strict about keys and shapes.

Sizes come from the weights' shapes; config.json only adds values that shapes cannot show, and must not contradict them.
`parameters` turns tensors into parameters of a network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import WeightsError, some
from ..files.base import BLOCKS, ByteRange, WeightsFile
from ..files.fp8 import FP8, fold
from ..files.open import open_weights
from ..models.configs import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from ..models.quantized_linear import Packing
from .gguf_blocks import EXACT, NEARLY_EXACT, PACKED_AGAIN, repack
from .layouts import canonical_keys, recognise
from .quantize import Quantization, quantizable

SAFETENSORS_NAMES = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint8: "U8", mx.uint32: "U32"
}  # fmt: skip
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
READABLE = {"F64", "F32", "F16", "BF16", *FP8, *BLOCKS}
MLX_LAYOUT = "mlx"
# Key in a file → its tensor.
Fetch = Callable[[str], mx.array]
LARGEST_SIZE = 2**20  # of a dimension, exclusive; umT5's vocabulary has 256,384


class ComponentWeights:
    """One network's weights under the official names, in this package's layout (channels last).

    Attributes:
        component: "transformer", "text_encoder", "vae" or "image_encoder".
        shapes: name → shape of every tensor, from headers only; for a quantised one, the matrix's shape.
        quantization: the matrices stored in MLX's quantised formats, with the formats; None if there are none.
        packable: packing of each matrix that `packed` can return as stored: those, and some of GGUF's blocks.
        nearest: nearest packing of the other matrices stored in GGUF's blocks.
    """

    def __init__(self, file: WeightsFile):
        file = fold(file)
        self.file = file
        self.quantization = Quantization.from_metadata(file.metadata, file.path)
        self.layout = recognise(self._without_scales())
        self.component = self.layout.component
        # From weights_convert.py; never guessed, since (96, 3, 3, 3, 3) is the same shape in both layouts.
        self.channels_last = file.metadata.get("layout") == MLX_LAYOUT
        self.sources = {
            name: (source,) if isinstance(source, str) else source
            for name, source in canonical_keys(self.layout, self._without_scales()).items()
        }
        self.shapes = {name: self._shape(name) for name in self.sources}
        self._check_packed()
        self.packable = dict(self.quantization.packings) if self.quantization else {}
        self.nearest: dict[str, Packing] = {}
        for name, kind in self._blocks().items():
            if kind in EXACT:
                self.packable[name] = Packing.parse(EXACT[kind][0])
            else:
                self.nearest[name] = Packing.parse(PACKED_AGAIN.get(kind) or NEARLY_EXACT[kind][0])
        if not self.channels_last:
            self._refuse_integers()

    @property
    def path(self) -> Path:
        return self.file.path

    def read(self, name: str, fetch: Fetch | None = None) -> mx.array:
        """The tensor in our layout and its stored dtype, float32 if it is quantised.

        ``fetch`` returns the file's tensors: by default `WeightsFile.read`, which is lazy if the file allows it.
        """
        if self.quantization is not None and name in self.quantization.packings:
            return self.quantization.packings[name].unpack(self.packed(name, fetch), mx.float32)
        parts = [(fetch or self.file.read)(source) for source in self.sources[name]]
        array = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        if not self.channels_last and array.ndim >= 4:
            array = mx.moveaxis(array.reshape(self._torch_shape(name)), 1, -1)
        return array.reshape(self.shapes[name])

    def packed(self, name: str, fetch: Fetch | None = None) -> dict[str, mx.array]:
        """Weight, scales and, in affine modes, biases of a matrix that is in `packable` or `repackable`.

        ``fetch``: as for `read`.

        Raises:
            WeightsError: blocks of a GGUF file have scales that are not finite.
        """
        blocks = self.raw(name)
        if blocks is not None:
            try:
                return repack(*blocks)
            except WeightsError as error:
                raise WeightsError(f"{self.path}: {name}: {error}") from None
        stem = name.removesuffix("weight")
        assert self.quantization is not None, "packed: see `repackable`"
        keys = self.quantization.packings[name].shapes(self.shapes[name])
        return {key: (fetch or self.file.read)(stem + key) for key in keys}

    def byte_ranges(self, names: Iterable[str]) -> dict[str, ByteRange] | None:
        """Places of all bytes that `read` and `packed` need for ``names``; None if some are stored differently."""
        keys: list[str] = []
        for name in names:
            if self.quantization is not None and name in self.quantization.packings:
                parts = self.quantization.packings[name].shapes(self.shapes[name])
                keys += [name.removesuffix("weight") + part for part in parts]
            else:
                keys += self.sources[name]
        found = {key: self.file.byte_range(key) for key in keys}
        ranges = {key: place for key, place in found.items() if place is not None}
        return ranges if len(ranges) == len(found) else None

    def repackable(self, name: str) -> bool:
        """Whether `packed` returns a matrix's integers as stored, even if not its scales."""
        return name in self.packable or self.stored_dtype(name) in NEARLY_EXACT

    def rows(self, name: str, indices: np.ndarray) -> mx.array:
        """Rows of a 2-D tensor; reads only them."""
        (source,) = self.sources[name]
        return self.file.rows(source, indices)

    def _without_scales(self) -> list[str]:
        """The file's keys without scales and biases of quantised weights."""
        packed = self.quantization.packings if self.quantization else ()
        belonging = {name.removesuffix("weight") + key for name in packed for key in ("scales", "biases")}
        return [key for key in self.file.tensors if key not in belonging]

    def _check_packed(self) -> None:
        """Every quantised tensor must have the shapes and dtypes of its packing."""
        for name, packing in (self.quantization.packings if self.quantization else {}).items():
            if name not in self.shapes:
                raise WeightsError(f"{self.path}: its quantization entry names {name}, which it does not hold")
            stem = name.removesuffix("weight")
            try:
                wanted = packing.shapes(self.shapes[name])
            except ValueError as error:
                raise WeightsError(f"{self.path}: {name} cannot be packed so: {error}") from None
            for key, (shape, dtype) in wanted.items():
                info = self.file.tensors.get(stem + key)
                expected = shape, SAFETENSORS_NAMES[dtype]
                if info is None or (info.shape, info.dtype) != expected:
                    found = "is missing" if info is None else f"is {info.dtype} {info.shape}"
                    raise WeightsError(
                        f"{self.path}: {stem + key} {found}; {packing.name} of {self.shapes[name]} needs "
                        f"{expected[1]} {expected[0]}"
                    )

    def _blocks(self) -> dict[str, str]:
        """The quantisable matrices stored in GGUF's blocks, and the type of each."""
        return {
            name: self.stored_dtype(name)
            for name in quantizable(self.component, self.sources)
            if self.file.has_rows_of_blocks(self.sources[name][0])
        }

    def raw(self, name: str) -> tuple[np.ndarray, str] | None:
        """A 2-D tensor's GGUF blocks as stored, uint8 (rows, bytes of a row), and their type; None without blocks."""
        source = self.sources[name][0]
        if len(self.shapes[name]) != 2 or len(self.sources[name]) > 1:
            return None
        return (self.file.raw(source), self.stored_dtype(name)) if self.file.has_rows_of_blocks(source) else None

    def stored_dtype(self, name: str) -> str:
        """The dtype in the file: F32, BF16, F8_E4M3 …, or a GGUF type such as Q4_K."""
        return self.file.tensors[self.sources[name][0]].dtype

    def stored_bytes(self, name: str) -> int:
        """Bytes of the tensor in the file; for a quantised one, without scales."""
        return sum(self.file.nbytes(source) for source in self.sources[name])

    def _refuse_integers(self) -> None:
        odd = [name for name in self.sources if self.stored_dtype(name) not in READABLE]
        if odd:
            raise WeightsError(
                f"{self.path}: {some(odd)} of dtype {self.stored_dtype(odd[0])}; expected floats, fp8 or GGUF blocks"
            )

    def _shape(self, name: str) -> tuple[int, ...]:
        packing = self.quantization and self.quantization.packings.get(name)
        if packing:
            return self._shape_of_packed(name, packing)
        shape = self._torch_shape(name)
        if self.channels_last:
            return shape
        if name.endswith(".gamma"):  # (C, 1, 1) or (C, 1, 1, 1), to broadcast over channels-first video
            return (math.prod(shape),)
        if len(shape) >= 4:
            shape = (shape[0], *shape[2:], shape[1])
        if name in ("cls_embedding", "pos_embedding"):  # Hugging Face drops the axes of size 1 before them
            return (1,) * (3 - len(shape)) + shape
        if name.endswith("patch_embedding.weight"):
            axes = 4 if self.component == "image_encoder" else 5
            if len(shape) != axes:
                raise WeightsError(f"{self.path}: {name} has shape {self._torch_shape(name)}, expected {axes} axes")
            return (shape[0], math.prod(shape[1:]))  # a convolution with stride equal to its kernel is a matmul
        return shape

    def _torch_shape(self, name: str) -> tuple[int, ...]:
        """The shape in PyTorch, after stacking several tensors if necessary."""
        shapes = [self.file.tensors[source].shape for source in self.sources[name]]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()
        if self.component == "transformer" and name.endswith("patch_embedding.weight"):
            # stable-diffusion.cpp's GGUF has at most four axes, and merges the first two.
            bias = self.sources.get(name.removesuffix("weight") + "bias")
            out = math.prod(self.file.tensors[bias[0]].shape) if bias else 0
            if shape[1:] == TransformerConfig.patch_size and out and shape[0] % out == 0:
                return (out, shape[0] // out, *shape[1:])
        return shape

    def _shape_of_packed(self, name: str, packing: Packing) -> tuple[int, int]:
        """Shape of the matrix; `_check_packed` reports wrong ones."""
        rows, columns = (*self.file.tensors[self.sources[name][0]].shape, 0, 0)[:2]
        return rows, columns * 32 // packing.bits


def check_keys(weights: ComponentWeights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError unless the file has exactly the ``expected`` names and shapes."""
    missing = sorted(expected.keys() - weights.shapes.keys())
    extra = sorted(weights.shapes.keys() - expected.keys())
    wrong = sorted(k for k in expected.keys() & weights.shapes.keys() if tuple(expected[k]) != weights.shapes[k])
    problems = []
    if missing:
        problems.append(f"lacks {some(missing)}")
    if extra:
        problems.append(f"holds unexpected {some(extra)}")
    if wrong:
        shapes = [f"{k} {weights.shapes[k]} instead of {tuple(expected[k])}" for k in wrong]
        problems.append(f"has other shapes: {some(shapes)}")
    if problems:
        raise WeightsError(f"{weights.path}: as a {weights.component} it {'; it '.join(problems)}")


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter; computes nothing."""
    return {name: tuple(array.shape) for name, array in dict(tree_flatten(module.parameters())).items()}


def open_component(path: str | Path, component: str) -> ComponentWeights:
    """Open a weight file and check that it is a ``component``.

    Raises:
        WeightsError: the file cannot be read, is not recognised, or is another network.
    """
    weights = ComponentWeights(open_weights(path))
    if weights.component != component:
        raise WeightsError(f"{path}: holds a {weights.component}, expected a {component}")
    return weights


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
            kinds = (int,) if field.name == "vace_layers" else (int, float)
            fits = isinstance(value, list | tuple) and all(isinstance(v, kinds) and math.isfinite(v) for v in value)
            wanted, value = "a list of numbers", tuple(value) if fits else value
        elif isinstance(field.default, str):
            fits, wanted = isinstance(value, str), "text"
        else:
            kind = (int, float) if isinstance(field.default, float) else (int,)
            fits = isinstance(value, kind) and not isinstance(value, bool) and 0 < value < LARGEST_SIZE
            wanted = (
                "a number above 0" if isinstance(field.default, float) else f"a size from 1 to {LARGEST_SIZE - 1:,}"
            )
        if not fits:
            raise WeightsError(f"{path}: config.json says {field.name} = {str(value)[:60]}, expected {wanted}")
        said[field.name] = value
    return said


def _merge(config_class, found: dict[str, Any], said: Mapping[str, Any], path: Path):
    """``found`` in the weights plus other values ``said`` by config.json; a contradiction is an error."""
    for key, value in found.items():
        if key in said and said[key] != value:
            raise WeightsError(f"{path}: config.json says {key} = {said[key]}, but the weights have {value}")
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


def transformer_config(weights: ComponentWeights, config: Mapping[str, Any]) -> TransformerConfig:
    """Sizes of a transformer. The number of heads is config.json's, else for heads of 128, as in every Wan model."""
    said = _said(TransformerConfig, config, weights.path)
    dim, text_dim = _shape_of(weights, "text_embedding.0.weight")
    patch = math.prod(said.get("patch_size", TransformerConfig.patch_size))
    if patch < 1 or len(said.get("patch_size", "123")) != 3:
        raise WeightsError(f"{weights.path}: config.json says patch_size = {said['patch_size']}, expected 3 sizes")
    shapes = weights.shapes
    kind = (
        "vace" if "vace_patch_embedding.weight" in shapes
        else "flf2v" if "img_emb.emb_pos" in shapes
        else "i2v" if "img_emb.proj.1.weight" in shapes
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
    )
    if kind in ("i2v", "flf2v"):
        found["image_dim"] = _shape_of(weights, "img_emb.proj.1.weight")[1]
    found["num_heads"] = _heads(weights, said, dim, 128)
    if kind == "vace":
        found["vace_in_dim"] = _shape_of(weights, "vace_patch_embedding.weight")[1] // patch
        found["vace_layers"] = _vace_layers(weights, said, found["num_layers"])
    return _merge(TransformerConfig, found, said, weights.path)


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


def text_encoder_config(weights: ComponentWeights, config: Mapping[str, Any]) -> TextEncoderConfig:
    """Sizes of a umT5 encoder, all from the weights' shapes."""
    said = _said(TextEncoderConfig, config, weights.path)
    vocab, dim = _shape_of(weights, "token_embedding.weight")
    buckets, heads = _shape_of(weights, "blocks.0.pos_embedding.embedding.weight")
    found = dict(
        vocab_size=vocab,
        dim=dim,
        num_buckets=buckets,
        num_heads=heads,
        dim_attn=_shape_of(weights, "blocks.0.attn.q.weight")[0],
        dim_ffn=_shape_of(weights, "blocks.0.ffn.fc1.weight")[0],
        num_layers=_count(weights.shapes, r"blocks\.(\d+)\."),
    )
    return _merge(TextEncoderConfig, found, said, weights.path)


def image_encoder_config(weights: ComponentWeights, config: Mapping[str, Any]) -> ImageEncoderConfig:
    """Sizes of CLIP's vision tower. The number of heads is config.json's, else for heads of 80, as in ViT-H/14."""
    said = _said(ImageEncoderConfig, config, weights.path)
    dim, pixels = _shape_of(weights, "patch_embedding.weight")
    patch = math.isqrt(pixels // 3)
    found = dict(
        image_size=patch * math.isqrt(_shape_of(weights, "pos_embedding", 3)[1] - 1),
        patch_size=patch,
        dim=dim,
        mlp_ratio=_shape_of(weights, "transformer.0.mlp.0.weight")[0] // dim,
        num_layers=_count(weights.shapes, r"transformer\.(\d+)\."),
    )
    found["num_heads"] = _heads(weights, said, dim, 80)
    return _merge(ImageEncoderConfig, found, said, weights.path)


def vae_config(weights: ComponentWeights, config: Mapping[str, Any]) -> VAEConfig:
    """Sizes of a VAE, from its encoder's layers: every stage ends at a ``resample``."""
    said = _said(VAEConfig, config, weights.path)
    shapes = weights.shapes
    dim = _shape_of(weights, "encoder.conv1.weight", 5)[0]
    mult, temporal, blocks = [], [], 0
    for index in range(_count(shapes, r"encoder\.downsamples\.(\d+)\.")):
        layer = f"encoder.downsamples.{index}"
        if f"{layer}.resample.1.weight" in shapes:
            temporal.append(f"{layer}.time_conv.weight" in shapes)
            mult.append(_shape_of(weights, f"{layer}.resample.1.weight", 4)[0] // dim)
        elif not mult:
            blocks += 1
    mult.append(_shape_of(weights, "encoder.middle.0.residual.2.weight", 5)[0] // dim)
    found = dict(
        dim=dim,
        dim_mult=tuple(mult),
        num_res_blocks=blocks,
        temporal_downsample=tuple(temporal),
        z_dim=_shape_of(weights, "conv2.weight", 5)[0],
    )
    if found["z_dim"] != len(VAEConfig.mean) and "mean" not in said:
        raise WeightsError(
            f"{weights.path}: a VAE with {found['z_dim']} latent channels, expected Wan2.1's 16 "
            "(Wan2.2-TI2V-5B has its own VAE, which is not supported)"
        )
    return _merge(VAEConfig, found, said, weights.path)


# Kind of network → (weights, its config.json) → its sizes; WeightsError if they make no sense.
CONFIG_OF: dict[str, Callable[[ComponentWeights, Mapping[str, Any]], Any]] = {
    "transformer": transformer_config,
    "text_encoder": text_encoder_config,
    "vae": vae_config,
    "image_encoder": image_encoder_config,
}
