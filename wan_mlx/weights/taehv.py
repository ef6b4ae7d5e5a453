"""TAEHV's published weight files: ``taew2_1``, ``taew2_2`` (.pth, .safetensors) and others with the same layers."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from ..errors import WeightsError
from ..files.base import WeightsFile
from ..files.open import open_weights
from ..models.taehv import TAEHV, TAEHVConfig
from .component import check_shapes, only_zeros, parameter_shapes
from .load import parse_dtype

WIDTHS = ("decoder.1.weight", "decoder.8.weight", "decoder.14.weight", "decoder.20.weight")
PATCHES = {(16, 3): 1, (48, 12): 2}  # latent channels and values that the decoder makes → side of a patch
LATENTS, OUTPUT = "decoder.1.weight", "decoder.22.weight"


def load_taehv(path: str | Path, dtype: str | mx.Dtype = "float32") -> TAEHV:
    """Load TAEHV from its file, safetensors or .pth; widths come from the weights' shapes.

    The file for HunyuanVideo's latents (``taehv``) has the same keys and shapes, and cannot be told from ``taew2_1``:
    all its colours are wrong.

    Raises:
        ValueError: unknown ``dtype``.
        WeightsError: the file is not a whole TAEHV for Wan's latents; says which one it is, if known.
    """
    dtype, file = parse_dtype(dtype), open_weights(path)
    model = TAEHV(_config(file))
    expected = {name: _torch_shape(shape) for name, shape in parameter_shapes(model).items()}
    found = {name: _last_frames(name, info.shape, expected) for name, info in file.tensors.items()}
    check_shapes(f"{file.path}: is no TAEHV of Wan: it", found, expected)
    arrays = [(name, _channels_last(file.read(name))[-shape[0] :].astype(dtype)) for name, shape in expected.items()]
    mx.eval([array for _, array in arrays])
    if zeros := [name for name, array in arrays if array.ndim > 1 and not array.any().item()]:
        raise only_zeros(file.path, zeros[0])
    model.load_weights(arrays)
    model.eval()
    return model


def _config(file: WeightsFile) -> TAEHVConfig:
    for name in (*WIDTHS, OUTPUT, "encoder.0.weight"):
        if name not in file.tensors or len(file.tensors[name].shape) != 4:
            raise WeightsError(f"{file.path}: is no TAEHV: it has no 4-D {name}; expected taew2_1 or taew2_2 "
                               "of github.com/madebyollin/taehv")  # fmt: skip
    shapes = {name: file.tensors[name].shape for name in file.tensors}
    channels = shapes[LATENTS][1], shapes[OUTPUT][0]
    if channels not in PATCHES:
        raise WeightsError(
            f"{file.path}: is a TAEHV of {channels[0]} latent channels and {channels[1]} values per pixel, expected 16 "
            "and 3 (taew2_1), or 48 and 12 (taew2_2)"
        )
    first, second, third, fourth = (shapes[name][0] for name in WIDTHS)
    width, widths = shapes["encoder.0.weight"][0], (first, second, third, fourth)
    return TAEHVConfig(channels[0], width, widths, patch=PATCHES[channels])


def _last_frames(name: str, shape: tuple[int, ...], expected: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """A layer stored with more output frames than the model's has the last of them, as in the reference."""
    wanted = expected.get(name)
    if wanted is None or not name.startswith("decoder.") or len(shape) != 4 or shape[2:] != (1, 1):
        return shape
    return wanted if shape[1] == wanted[1] and shape[0] in (2 * wanted[0], 4 * wanted[0]) else shape


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[-1], *shape[1:-1]) if len(shape) == 4 else shape


def _channels_last(array: mx.array) -> mx.array:
    return mx.moveaxis(array, 1, -1) if array.ndim == 4 else array
