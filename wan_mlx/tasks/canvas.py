"""The canvas: how a picture or video whose proportions are not those asked for comes to be of the video's size.

``fit`` is one of

    official  each task's own way. Image to video and VACE take the proportions of what they are given and the area that
              was asked for; a picture is then stretched to whole tokens, a video cropped. Video to video crops.
    crop      the size that was asked for; what is beyond it at two sides is left out.
    pad       the size that was asked for; black bars at two sides. A mask goes on over them as its edge is.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..media.read import Clip, contain, cover, placed
from ..types import Request

LITTLE = 0.03  # of a side, of which nothing is said
# Task → its sources that are stretched in the official way; the others are cropped.
_PICTURES = ("image", "last_image", "reference_image")
STRETCHED = {"i2v": ("image",), "flf2v": ("image",), "inp": _PICTURES, "control": _PICTURES}


def drawn(image: np.ndarray, request: Request, beyond: Literal["constant", "edge"] = "constant") -> np.ndarray:
    """An image uint8 (H, W, 3) of the request's size, cropped or padded; ``beyond``: as `contain` takes it."""
    if request.fit == "pad":
        return contain(image, request.height, request.width, beyond)
    return cover(image, request.height, request.width)


def notes(request: Request) -> list[str]:
    """Lines about sources that are stretched, cropped or padded by more than a little."""
    lines, size = [], f"{request.width}x{request.height}"
    for name, (width, height) in request.source_sizes.items():
        wider = request.width / request.height / (width / height)
        part = 1 - min(wider, 1 / wider)
        source = f"the {name.replace('_', ' ')} of {width}x{height}"
        if part <= LITTLE:
            continue
        if request.fit == "pad":
            lines.append(f"{source} is padded to {size}: bars are {part:.0%} of it")
        elif request.fit == "official" and name in STRETCHED.get(request.task, ()):
            how = f"{abs(wider - 1):.0%} {'wider' if wider > 1 else 'narrower'} than it is"
            lines.append(f"{source} is stretched to {size}: {how}; fit crop or pad keeps its proportions")
        else:
            lines.append(f"{source} is cropped to {size}: {part:.0%} of it is left out; fit pad shows all of it")
    return lines


def check_mask(mask: Clip, video: Clip) -> None:
    """Raise ValueError if a mask has another number of frames than its video, and more than one."""
    if mask.num_frames not in (1, video.num_frames):
        raise ValueError(
            f"mask {mask.name} has {mask.num_frames} frames, expected {video.num_frames} as its video, or one"
        )


def white_squares(mask: np.ndarray, request: Request) -> np.ndarray:
    """bool (h, w): the latents in whose square of pixels anything of a mask, bool (H, W), is True, once it lies on the
    canvas as its video does."""
    height, width = size = request.height, request.width
    rows, columns, top, left = placed(mask.shape, size, whole=request.fit == "pad")
    above, below = _spans(mask.shape[0], rows, top, height, request.geometry.spatial)
    before, after = _spans(mask.shape[1], columns, left, width, request.geometry.spatial)
    sums = np.pad(mask.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32), ((1, 0), (1, 0)))
    lower, upper = sums[below], sums[above]
    return lower[:, after] - lower[:, before] - upper[:, after] + upper[:, before] > 0


def _spans(old: int, new: int, corner: int, length: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """First and end along one axis of the mask's pixels that any part of each square of ``side`` shows, in whole
    numbers; beyond the mask it is the pixel at its edge."""
    edges = (np.arange(0, length + 1, side) - corner) * old
    return (edges[:-1] // new).clip(0, old - 1), (-(-edges[1:] // new)).clip(1, old)
