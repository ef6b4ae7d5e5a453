"""One network's weights under the official names, strict about keys and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import WeightsError, some
from ..files.base import AS_STORED, BLOCKS, FP8, MICROSCALED, ByteRange, JoinedFile, WeightsFile
from ..files.open import open_weights
from ..files.scaled import fold
from ..models.configs import TransformerConfig
from ..models.quantized_linear import Packing
from ..models.s2v import FRAME_PACK
from ..other_models import of_keys
from ..presets import MODULE
from .gguf_blocks import EXACT, NEARLY_EXACT, PACKINGS, repack
from .layouts import canonical_keys, networks_in, recognise
from .lora_config import are_of_adapter
from .quantize import Quantization, quantizable

SAFETENSORS_NAMES = {dtype: name for name, dtype in AS_STORED.items()}
FLOATS = ("F64", "F32", "F16", "BF16", *FP8)
MXFP8 = "mxfp8"  # stored as MLX has it
MLX_LAYOUT = "mlx"
# Weights of convolutions with a stride equal to the kernel, which are matrices over patches, and the kernels of a
# transformer's. CLIP's has no time.
_PATCH = TransformerConfig.patch_size
KERNELS = {
    "patch_embedding.weight": _PATCH,
    "ref_conv.weight": _PATCH[1:],
    "cond_encoder.weight": _PATCH,
    **{f"frame_packer.{name}.weight": patch for name, (patch, _) in FRAME_PACK.items()},
}
PATCHES = tuple(KERNELS)
# Of three axes and more, these are convolutions' weights where the file has the channels second: all of four or five
# axes, but these; of three, those of sound.
NO_CONVOLUTIONS = (".padding_tokens", "casual_audio_encoder.weights")
OF_SOUND = r".*\.conv\.weight(?:_[gv])?"
# Parts of a network → how to use them.
ALONE = {MODULE: ": VACE's part of a transformer; give a text-to-video model, and this with --vace-module"}
# Key in a file → its tensor.
Fetch = Callable[[str], mx.array]


class ComponentWeights:
    """One network's weights under the official names, in this package's layout (channels last).

    Attributes:
        component: "transformer", "text_encoder", "vae", "image_encoder" or "audio_encoder".
        shapes: name → shape of every tensor, from headers only; for a quantised one, the matrix's shape.
        quantization: the matrices stored in MLX's quantised formats, with the formats; None if there are none.
        nearest: the packing of each such matrix, or the one nearest to that of a matrix stored in GGUF's blocks.
    """

    def __init__(self, file: WeightsFile):
        if other := of_keys(file.tensors):
            raise other.refusal(file.path)
        self.file = file = fold(file)
        self.quantization = Quantization.from_metadata(file.metadata, file.path)
        self.packings = self.quantization.packings if self.quantization else {}
        ends = (".scales", ".biases") if self.packings else ()
        keys = [key for key in file.tensors if not key.endswith(ends)]
        try:
            self.layout = recognise(keys)
        except WeightsError as error:
            adapter = "a LoRA or another adapter, and no network: give it as --lora; wan-mlx info describes it"
            raise WeightsError(f"{self.path}: {adapter if are_of_adapter(keys) else error}") from None
        self.component = self.layout.component
        # From weights_convert.py; never guessed, since (96, 3, 3, 3, 3) is the same shape in both layouts.
        self.channels_last = file.metadata.get("layout") == MLX_LAYOUT
        self.sources = {
            name: (source,) if isinstance(source, str) else source
            for name, source in canonical_keys(self.layout, keys).items()
        }
        if lost := file.tensors.keys() - keys - {self._beside(name, key[1:]) for name in self.packings for key in ends}:
            raise WeightsError(f"{self.path}: holds unexpected {some(sorted(lost))}")
        self._torch_shapes = {name: self._torch_shape(name) for name in self.sources}
        self.shapes = {name: self._shape(name) for name in self.sources}
        self._check_packed()
        packing_of = {**PACKINGS, MXFP8: MXFP8}
        network = "transformer" if self.component == MODULE else self.component
        in_blocks = [name for name in quantizable(network, self.sources) if self._has_blocks(name)]
        self.nearest = self.packings or {name: Packing.parse(packing_of[self.stored_dtype(name)]) for name in in_blocks}
        odd = [name for name in self.sources if name not in self.packings and not self._is_number(name)]
        if odd and not self.channels_last:
            raise WeightsError(
                f"{self.path}: {some(odd)} of dtype {self.stored_dtype(odd[0])}, without scales; expected floats, fp8, "
                "GGUF blocks, or int8, mxfp8 or nvfp4 with scales"
            )

    def add(self, module: ComponentWeights) -> None:
        """Take in the tensors of a module in a file of its own, such as VACE's for this transformer."""
        if twice := sorted(self.shapes.keys() & module.shapes.keys()):
            raise WeightsError(f"{self.path}: holds {some(twice, 2)} already, which {module.path} would add")
        owners = {key: weights.file for weights in (self, module) for key in weights.file.tensors}
        self.file = JoinedFile(self.path, owners)
        self.channels_last = False  # a transformer in our layout has no convolutions, so nothing is left to turn
        self.sources |= module.sources
        self._torch_shapes |= module._torch_shapes
        self.shapes |= module.shapes
        self.nearest = {**self.nearest, **module.nearest}

    @property
    def path(self) -> Path:
        return self.file.path

    def read(self, name: str, fetch: Fetch | None = None) -> mx.array:
        """The tensor in our layout and its stored dtype, float32 if it is quantised.

        ``fetch`` returns the file's tensors: by default `WeightsFile.read`, which is lazy if the file allows it.
        """
        if name in self.packings:
            return self.packings[name].unpack(self.packed(name, fetch), mx.float32)
        parts = [(fetch or self.file.read)(source) for source in self.sources[name]]
        array = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        shape = self._torch_shapes[name]
        if not self.channels_last and is_convolution(name, shape):
            array = mx.moveaxis(array.reshape(shape), 1, -1)
        return array.reshape(self.shapes[name])

    def packed(self, name: str, fetch: Fetch | None = None) -> dict[str, mx.array]:
        """Weight, scales and, in affine modes, biases of a matrix that `stores` its packing, read as by `read`."""
        if name in self.packings:
            keys = self.packings[name].shapes(self.shapes[name])
            return {key: (fetch or self.file.read)(self._beside(name, key)) for key in keys}
        if self.stored_dtype(name) == MXFP8:
            return self.file.packed(self.sources[name][0], now=fetch is not None)
        try:
            return repack(self.file.raw(self.sources[name][0]), self.stored_dtype(name))
        except WeightsError as error:
            raise WeightsError(f"{self.path}: {name}: {error}") from None

    def stores(self, name: str, packing: Packing) -> bool:
        """Whether `packed` returns a matrix in this packing, with its integers as stored, even if not its scales."""
        as_stored = name in self.packings or self.stored_dtype(name) in (*EXACT, *NEARLY_EXACT, MXFP8)
        return as_stored and self.nearest.get(name) == packing

    @property
    def packable(self) -> dict[str, Packing]:
        """The packing of each matrix that `packed` returns unchanged."""
        exact = self.packings or [name for name in self.nearest if self.stored_dtype(name) in (*EXACT, MXFP8)]
        return {name: self.nearest[name] for name in exact}

    def byte_ranges(self, names: Iterable[str]) -> dict[str, ByteRange] | None:
        """Places of all bytes that `read` and `packed` need for ``names``; None if some are stored differently."""
        keys: list[str] = []
        for name in names:
            packing = self.packings.get(name)
            if packing is None:
                keys += self.sources[name]
            else:
                keys += [self._beside(name, key) for key in packing.shapes(self.shapes[name])]
        found = {key: self.file.byte_range(key) for key in keys}
        ranges = {key: place for key, place in found.items() if place is not None}
        return ranges if len(ranges) == len(found) else None

    def rows(self, name: str, indices: np.ndarray) -> mx.array:
        """Rows of a 2-D tensor; reads only them."""
        (source,) = self.sources[name]
        return self.file.rows(source, indices)

    def stored_dtype(self, name: str) -> str:
        """The dtype in the file: F32, BF16, F8_E4M3 …, or a GGUF type such as Q4_K."""
        return self.file.tensors[self.sources[name][0]].dtype

    def stored_bytes(self, name: str) -> int:
        """Bytes of the tensor in the file; for a quantised one, without scales."""
        return sum(self.file.nbytes(source) for source in self.sources[name])

    def _is_number(self, name: str) -> bool:
        """Whether each of a tensor's parts reads as floats."""
        known = (*FLOATS, *BLOCKS, *MICROSCALED)
        return all(self.file.tensors[key].dtype in known or key in self.file.scales for key in self.sources[name])

    def _has_blocks(self, name: str) -> bool:
        sources = self.sources[name]
        return len(self.shapes[name]) == 2 and len(sources) == 1 and self.file.has_rows_of_blocks(sources[0])

    def _check_packed(self) -> None:
        """Every quantised tensor must have the shapes and dtypes of its packing."""
        for name, packing in self.packings.items():
            if name not in self.shapes:
                raise WeightsError(f"{self.path}: its quantization entry names {name}, which it does not hold")
            try:
                wanted = packing.shapes(self.shapes[name])
            except ValueError as error:
                raise WeightsError(f"{self.path}: {name} cannot be packed so: {error}") from None
            for key, (shape, dtype) in wanted.items():
                info = self.file.tensors.get(self._beside(name, key))
                # mlx-video's scales have the dtype that the matrix had.
                also = ("BF16", "F32") if self.layout.name == "mlx-video" and key != "weight" else ()
                if info is None or info.shape != shape or info.dtype not in (SAFETENSORS_NAMES[dtype], *also):
                    found = "is missing" if info is None else f"is {info.dtype} {info.shape}"
                    raise WeightsError(
                        f"{self.path}: {beside(name, key)} {found}; {packing.name} of {self.shapes[name]} needs "
                        f"{SAFETENSORS_NAMES[dtype]} {shape}"
                    )

    def _beside(self, name: str, key: str) -> str:
        """The file's key of an array of a packed matrix."""
        return beside(self.sources[name][0], key) if name in self.sources else beside(name, key)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._torch_shapes[name]
        if name in self.packings:  # `_check_packed` reports wrong ones
            rows, columns = (*shape, 0, 0)[:2]
            return rows, columns * 32 // self.packings[name].bits
        if name.endswith((".gamma", ".bias")):  # (C, 1, 1) or such, to broadcast over channels-first video
            return (math.prod(shape),)
        if self.channels_last:
            return shape
        if is_convolution(name, shape):
            shape = (shape[0], *shape[2:], shape[1])
        if name in ("cls_embedding", "pos_embedding"):  # Hugging Face drops the axes of size 1 before them
            return (1,) * (3 - len(shape)) + shape
        if name.endswith(PATCHES):
            axes = 4 if self.component == "image_encoder" else 2 + len(_kernel_of(name))
            if len(shape) != axes:
                raise WeightsError(f"{self.path}: {name} has shape {shape}, expected {axes} axes")
            return (shape[0], math.prod(shape[1:]))  # a convolution with stride equal to its kernel is a matmul
        return shape

    def _torch_shape(self, name: str) -> tuple[int, ...]:
        """The shape in PyTorch, after stacking several tensors if necessary."""
        shapes = [self.file.tensors[source].shape for source in self.sources[name]]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()
        if self.component in ("transformer", MODULE) and name.endswith(PATCHES):
            # GGUF has at most four axes: stable-diffusion.cpp merges the first two, others flatten more of them.
            patch, count = _kernel_of(name), math.prod(shape)
            bias = self.sources.get(beside(name, "bias"))
            out = math.prod(self.file.tensors[bias[0]].shape) if bias else 0
            flat = (self.file.fields or self.layout.name == "mlx-video") and len(shape) < 2 + len(patch)
            merged = shape[1:] == patch or flat
            if merged and out and count % (out * math.prod(patch)) == 0:
                return (out, count // (out * math.prod(patch)), *patch)
        return shape


def is_convolution(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape in PyTorch has a convolution's channels along its second axis."""
    if len(shape) == 3:
        return re.fullmatch(OF_SOUND, name) is not None
    return len(shape) > 3 and not name.endswith(NO_CONVOLUTIONS)


def _kernel_of(name: str) -> tuple[int, ...]:
    """The kernel of one of `PATCHES`."""
    return next(kernel for ending, kernel in KERNELS.items() if name.endswith(ending))


def only_zeros(path: Path, name: str) -> WeightsError:
    """The error of a matrix that cannot be all zero, and is."""
    return WeightsError(f"{path}: {name} holds only zeros, as where a download ended early; download it again")


def beside(name: str, key: str) -> str:
    """The name of another parameter of the same layer, such as a weight's scales."""
    return name[: name.rfind(".") + 1] + key


def check_keys(weights: ComponentWeights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError unless the file has exactly the ``expected`` names and shapes."""
    check_shapes(f"{weights.path}: as a {weights.component} it", weights.shapes, expected)


def check_shapes(subject: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError, which begins with its ``subject``, unless the names and shapes are the ``expected`` ones."""
    wrong = sorted(name for name in expected.keys() & found.keys() if tuple(expected[name]) != found[name])
    faults = {
        "lacks": sorted(expected.keys() - found.keys()),
        "holds unexpected": sorted(found.keys() - expected.keys()),
        "has other shapes:": [f"{name} {found[name]} instead of {tuple(expected[name])}" for name in wrong],
    }
    if problems := [f"{fault} {some(names)}" for fault, names in faults.items() if names]:
        raise WeightsError(f"{subject} {'; it '.join(problems)}")


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter; computes nothing."""
    return {name: tuple(array.shape) for name, array in dict(tree_flatten(module.parameters())).items()}


def open_component(
    path: str | Path, component: str, module: Path | None = None, metadata: Mapping[str, str] | None = None
) -> ComponentWeights:
    """Open a network's weight file, or that network in a whole model's; WeightsError if it holds none such.

    ``module``: a file of tensors that belong to it, too; ``metadata``: more than the file has of its own.
    """
    file = open_weights(path)
    file.metadata |= metadata or {}
    networks = separate(file)
    if networks and component not in networks:
        raise WeightsError(f"{path}: holds {', '.join(networks)}, expected a {component}")
    weights = ComponentWeights(networks.get(component, file))
    if component != weights.component:
        hint = ALONE.get(weights.component, "")
        raise WeightsError(f"{path}: holds a {weights.component}, expected a {component}{hint}")
    if module is not None:
        weights.add(open_component(module, MODULE))
    return weights


def kinds_in(path: str | Path) -> list[str]:
    """The networks that a weight file holds; WeightsError if none is known."""
    kinds = networks_of(open_weights(path))
    if MODULE in kinds:
        raise WeightsError(f"{path}: holds a {MODULE}, expected a network{ALONE[MODULE]}")
    return kinds


def networks_of(file: WeightsFile) -> list[str]:
    """The networks that a weight file holds, of which VACE's module may be one; WeightsError if none is known."""
    return [*separate(file)] or [ComponentWeights(file).component]


def separate(file: WeightsFile) -> dict[str, WeightsFile]:
    """Each network in the file of a whole model, as a file of its own; empty for a file of a single network."""
    found: dict[str, WeightsFile] = {}
    for kind, keys in networks_in(file.tensors).items():
        found[kind] = JoinedFile(file.path, dict.fromkeys(keys, file))
    return found
