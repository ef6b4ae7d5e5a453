"""The scale of LoRAs that hold no alpha: that of files which are known to lack one, and too large changes.

A file without an alpha is taken at scale 1. Raw files of Wan2.2-Lightning were trained with alpha 8 and rank 64, which
they do not say (Wan2GP, issue 677): at 1 they paint mosaics.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import mlx.core as mx

from ..errors import WeightsError
from ..files.base import WeightsFile
from .lora_changes import Change

log = logging.getLogger(__name__)

# The official names without what other tools put before them.
RAW_KEY = re.compile(r"blocks\.\d+\.(?:self_attn|cross_attn|ffn)\.\w+\.lora_(?:down|up)\.weight")
RAW_RANK, RAW_ALPHA, RAW_WIDTH = 64, 8, 5120
# Only files that change a whole model are looked at; that many matrices have ten blocks.
MANY = 100
MOST = 0.5  # of the norm of what is changed
SAMPLES = 3  # matrices


def is_raw_lightning(file: WeightsFile, changes: Mapping[str, Change]) -> bool:
    """Whether a file is one of Wan2.2-Lightning's own, by its keys and ranks: bare names, rank 64 throughout, as wide
    as the 14B models, and no alpha."""
    if len(changes) < MANY or not all(RAW_KEY.fullmatch(key) for key in file.tensors):
        return False
    attention = (change.shape[-1] == RAW_WIDTH for name, change in changes.items() if "self_attn" in name)
    return all(attention) and {change.rank for change in changes.values()} == {RAW_RANK}


@lru_cache
def tell_raw_lightning(path: Path) -> None:
    """Once for each file, which is opened to be checked and again to be loaded."""
    log.warning(
        "%s: by its keys and ranks a raw file of Wan2.2-Lightning, whose alpha of %d is not in it: scaled by %g",
        path, RAW_ALPHA, RAW_ALPHA / RAW_RANK,
    )  # fmt: skip


def check_sizes(loras: Mapping[str, Sequence[Change]], read: Callable[[str], mx.array]) -> None:
    """Raise WeightsError, which says what to write, if a LoRA without an alpha changes a model so much at strength 1
    that its scale must be missing.

    Args:
        loras: as `lora.open_loras` returns them; ``read``: name → the parameter that is changed.
    """
    factors: dict[int, dict[str, Change]] = {}  # by the opened file
    for name, changes in loras.items():
        for change in changes:
            if "down" in change.keys and change.strength == 1 and change.scale == 1 and "alpha" not in change.keys:
                factors.setdefault(id(change.file), {})[name] = change
    for of_file in factors.values():
        if len(of_file) < MANY:
            continue
        names = sorted(of_file)
        ratios = []
        for place in range(SAMPLES):
            name = names[place * (len(names) - 1) // (SAMPLES - 1)]
            size = mx.linalg.norm(read(name).astype(mx.float32).flatten())
            ratios.append(float(of_file[name].terms()[0].norm() / mx.maximum(size, 1e-12)))
        ratio, path = sum(ratios) / len(ratios), of_file[names[0]].file.path
        if ratio > MOST:
            raise WeightsError(
                f"{path}: it holds no alpha, and at strength 1 changes the weights by {ratio:.0%} of their norm, "
                f"expected at most {MOST:.0%}: its scale is missing; write its authors' strength after a colon, such "
                f"as {path.name}:{RAW_ALPHA / RAW_RANK:g}"
            )
