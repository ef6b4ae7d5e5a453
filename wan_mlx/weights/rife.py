"""RIFE's published weight files: the author's ``flownet.pkl`` of 4.25 and 4.26, and mlx-community's safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ..errors import WeightsError
from ..events import Listener, unheard
from ..files.base import WeightsFile
from ..files.open import open_weights
from ..hub.resolve import resolve
from ..models.rife import RIFE, RIFEConfig
from .component import check_shapes, only_zeros, parameter_shapes

# MIT, as the author's own files: the 4.25 that he recommends, converted without a change of a number.
DEFAULT = "mlx-community/RIFE-4.25:model.safetensors"
NAME = "rife"  # stands for `DEFAULT`
TRAINING = ("teacher.", "caltime.")  # only training needed them: a teacher's block, and one that guesses the time
WRAPPER = "module."  # of PyTorch's data parallel training
# mlx-community's names of layers, in which nothing but the activation is left out → the author's.
MLX_NAMES = ((r"\.conv0\.(\d)\.conv\.", r".conv0.\1.0."), (r"\.lastconv\.(?=weight|bias)", ".lastconv.0."))
DOUBLING = re.compile(r"(encode\.cnn3|block\d\.lastconv\.0)\.weight")
OTHERS = "4.25 or 4.26 of github.com/hzwer/Practical-RIFE"


def find_rife(name: str | Path = NAME, source: str = "huggingface", listener: Listener = unheard) -> Path:
    """The file of RIFE's weights that ``name`` says: "rife" for the default, a file, or one on a hub, downloaded if it
    is not here.

    Raises:
        WeightsError: the download failed.
    """
    return resolve(DEFAULT if name == NAME else name, source, listener)


def load_rife(path: str | Path = NAME) -> RIFE:
    """Load RIFE, in float32, from its file: ``flownet.pkl``, or safetensors of either layout.

    Args:
        path: as `find_rife` takes it.

    Raises:
        WeightsError: the file is no whole RIFE 4.25 or 4.26, or the download failed.
    """
    file = open_weights(find_rife(path))
    names = names_in(file)
    model = RIFE(_config(file, names))
    expected = parameter_shapes(model)
    channels_last = _is_channels_last(file, names)
    found = {name: _shape(name, file.tensors[key].shape, channels_last) for name, key in names.items()}
    check_shapes(f"{file.path}: is no RIFE {OTHERS}: it", found, expected)
    arrays = [(name, _read(file, name, key, channels_last).reshape(expected[name])) for name, key in names.items()]
    mx.eval([array for _, array in arrays])
    for name, array in arrays:
        if array.ndim > 1 and not array.any().item():
            raise only_zeros(file.path, name)
        if not mx.isfinite(array).all().item():
            raise WeightsError(f"{file.path}: {name} holds NaN or infinite numbers; download it again")
    model.load_weights(arrays)
    model.eval()
    return model


def names_in(file: WeightsFile) -> dict[str, str]:
    """The author's name of each tensor that the network has → its key in the file."""
    names: dict[str, str] = {}
    for key in file.tensors:
        name = key.removeprefix(WRAPPER)
        if name.startswith(TRAINING):
            continue
        for theirs, ours in MLX_NAMES:
            name = re.sub(theirs, ours, name)
        if name in names:
            raise WeightsError(f"{file.path}: {names[name]} and {key} are the same tensor")
        names[name] = key
    return names


def _config(file: WeightsFile, names: Mapping[str, str]) -> RIFEConfig:
    """The network's sizes. Other versions have other widths, too, but their blocks are joined in another way: so only
    4.25's number of blocks is taken."""
    config = RIFEConfig()
    first = [f"block{place}.conv0.1.0.bias" for place in range(len(config.widths))]
    missing = [name for name in (*first, "encode.cnn0.bias") if name not in names]
    if missing:
        raise WeightsError(f"{file.path}: is no RIFE {OTHERS}: it has no {missing[0]}")
    width = {name: file.tensors[names[name]].shape[0] for name in (*first, "encode.cnn0.bias")}
    depth = sum(name.startswith("block0.convblock.") and name.endswith(".beta") for name in names)
    return RIFEConfig(tuple(width[name] for name in first), width["encode.cnn0.bias"], depth)


def _is_channels_last(file: WeightsFile, names: Mapping[str, str]) -> bool:
    """Whether convolutions are stored (O, 3, 3, I), as MLX has them; of the first block, whose input has 15 channels,
    the shape tells."""
    return file.tensors[names["block0.conv0.0.0.weight"]].shape[-1] == RIFEConfig().inputs(0)


def _shape(name: str, shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """As the network has it: convolutions (O, height, width, I), factors (C,)."""
    if name.endswith(".beta"):
        return (max(shape, default=0),) if len(shape) == 4 and sorted(shape)[:3] == [1, 1, 1] else shape
    if len(shape) != 4 or channels_last:
        return shape
    given, made = (0, 1) if DOUBLING.fullmatch(name) else (1, 0)
    return (shape[made], shape[2], shape[3], shape[given])


def _read(file: WeightsFile, name: str, key: str, channels_last: bool) -> mx.array:
    array = file.read(key).astype(mx.float32)
    if array.ndim != 4 or channels_last or name.endswith(".beta"):
        return array
    return array.transpose(1, 2, 3, 0) if DOUBLING.fullmatch(name) else array.transpose(0, 2, 3, 1)
