"""Files of RIFE's weights as they are published, with random numbers."""

import numpy as np
from safetensors.numpy import save_file

from wan_mlx.models.rife import RIFE, RIFEConfig
from wan_mlx.weights.component import parameter_shapes

TINY = RIFEConfig(widths=(8, 6, 4, 4, 4), head=4, depth=1)


def author_shapes(config: RIFEConfig = TINY) -> dict[str, tuple[int, ...]]:
    """Name → shape of what the network needs, in the author's ``flownet.pkl``, without ``module.``."""
    return {name: author_shape(name, shape) for name, shape in parameter_shapes(RIFE(config)).items()}


def author_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name.endswith(".beta"):
        return (1, *shape, 1, 1)
    if len(shape) != 4:
        return shape
    out, height, width, into = shape
    return (into, out, height, width) if is_transposed(name) else (out, into, height, width)


def is_transposed(name: str) -> bool:
    return "lastconv" in name or "cnn3" in name


def training_shapes() -> dict[str, tuple[int, ...]]:
    """What the author's files hold beside it, for training alone: a teacher's block, and a guess of the time."""
    found = {"teacher.conv0.0.0": (32, 31, 3, 3), "teacher.conv0.1.0": (64, 32, 3, 3)}
    found |= {f"teacher.convblock.{place}.conv": (64, 64, 3, 3) for place in range(8)}
    found |= {f"caltime.{place}": shape for place, shape in zip(
        range(0, 10, 2), [(32, 17, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (64, 64, 3, 3), (1, 64, 3, 3)], strict=True)}
    shapes = {}
    for name, shape in found.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"teacher.convblock.{place}.beta": (1, 64, 1, 1) for place in range(8)}
    return shapes | {"teacher.lastconv.0.weight": (64, 52, 4, 4), "teacher.lastconv.0.bias": (52,)}


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Of a size that flows reach a few pixels."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in shapes.items():
        fan = np.prod(shape[1:]) if len(shape) == 4 and not name.endswith("beta") else 16
        arrays[name] = (rng.normal(size=shape) * (1.6 if "lastconv" in name else 1) / np.sqrt(fan)).astype(np.float32)
    return arrays


def mlx_community(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same as mlx-community's file has them: channels last, and without the numbers of layers in a sequence."""
    found = {}
    for name, array in arrays.items():
        if array.ndim == 4:
            array = array.transpose(1, 2, 3, 0) if is_transposed(name) else array.transpose(0, 2, 3, 1)
        parts = name.split(".")
        if parts[1] == "conv0":
            parts[3] = "conv"
        if parts[1] == "lastconv":
            del parts[2]
        found[".".join(parts)] = np.ascontiguousarray(array)
    return found


def save_tiny(path, seed: int = 0):
    """A tiny network in mlx-community's layout."""
    save_file(mlx_community(random_weights(author_shapes(), seed)), path)
    return path
