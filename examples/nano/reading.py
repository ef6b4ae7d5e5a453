"""Does a video show what its prompt asked for? Read from pixels, with numpy alone.

``measure(frames)`` finds the one thing in a clip and says its colour, background, motion and shape; ``score`` compares
that with what was asked. ``measure_two`` does so for each half of a clip that shows two things. A shape is named only
where its outline holds in nearly every frame; how near it comes to the shape as it is painted is said beside it.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import world
from world import Scene

THRESHOLD = 40.0  # RGB distance from the backdrop from which a pixel belongs to a thing
SPIN = 0.25  # variation in time over variation in space, from which a thing at rest counts as turning
PATCH = 40  # side of the patches in which outlines are compared
TURNS = 48  # orientations tried for each shape
HOLDS = 0.8  # of the frames at least, in which the outline must be the same shape's
SHARP = 0.9  # correlation with the shape's own outline, on average over the clip, from which it counts as sharp


class Reading(NamedTuple):
    """What a clip shows; ``kind`` is one of world.SHAPES or "none", ``motion`` one of world.MOTIONS.

    ``outline``: correlation with the outline of ``kind`` as it is painted, 0 to 1. Painted clips have 0.94 to 0.99.
    """

    colour: str
    background: str
    motion: str
    kind: str
    outline: float


EMPTY = Reading("none", "none", "none", "none", 0.0)


def measure(frames: np.ndarray) -> Reading:
    """Read a clip of one shape, uint8 (T, H, W, 3). Without a visible thing only ``background`` is named."""
    video = np.asarray(frames, np.float32)
    ground = _backdrop(video)
    border = np.concatenate([video[:, :3].reshape(-1, 3), video[:, -3:].reshape(-1, 3), video[:, :, :3].reshape(-1, 3)])
    background = _nearest(np.median(border, 0), world.BACKGROUNDS)
    # A shadow is the backdrop, only darker: no part of the thing.
    gain = ((video * ground).sum(-1) / (ground**2).sum(-1).clip(1)).clip(0.7, 1.0)
    difference = np.linalg.norm(video - gain[..., None] * ground, axis=-1)
    cover = _largest(difference > THRESHOLD)
    area = cover.sum((1, 2))
    if (area < 20).any():
        return EMPTY._replace(background=background)
    y, x = np.mgrid[: cover.shape[1], : cover.shape[2]] + 0.5
    centre = np.stack([(cover * x).sum((1, 2)), (cover * y).sum((1, 2))], 1) / area[:, None]
    patches = np.stack([_patch(cover[i].astype(np.float32), centre[i], area[i]) for i in range(len(cover))])
    motion = _motion(video, centre, area)
    return Reading(_colour(video, cover, difference), background, motion, *_kind(patches, area))


def score(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Which of the details of a one-thing scene a reading got right; "all three" are all but the shape,
    "sharp" means that all four are right and the outline is sharp."""
    thing = scene.things[0]
    right = {
        "colour": reading.colour == thing.colour,
        "background": reading.background == scene.background,
        "motion": reading.motion == thing.motion,
    }
    three, shape = all(right.values()), reading.kind == thing.kind
    four = three and shape
    return {**right, "all three": three, "shape": shape, "all four": four, "sharp": four and reading.outline >= SHARP}


def measure_two(frames: np.ndarray) -> tuple[Reading, Reading]:
    """Read a clip of two things, each in its own half: left and right, or upper and lower."""
    _, height, width, _ = frames.shape
    halves = [(frames[:, :, : width // 2], frames[:, :, width // 2 :]),
              (frames[:, : height // 2], frames[:, height // 2 :])]  # fmt: skip
    # The cut runs where the picture changes least along it.
    seams = [frames[:, :, width // 2 - 1 : width // 2 + 1], frames[:, height // 2 - 1 : height // 2 + 1]]
    changes = [np.abs(np.diff(seams[axis].astype(np.float32), axis=1 + axis)).mean() for axis in (0, 1)]
    first, second = halves[int(np.argmin(changes))]
    return measure(first), measure(second)


def score_two(readings: tuple[Reading, Reading], scene: Scene) -> dict[str, bool]:
    """As `score`: a detail is right if it is of both things, whichever of the two stands where."""
    orders = [
        [score(r, replace(scene, things=(thing,))) for r, thing in zip(readings, things, strict=True)]
        for things in (scene.things, scene.things[::-1])
    ]
    both = [{name: a[name] and b[name] for name in a} for a, b in orders]
    return max(both, key=lambda right: sum(right.values()))


def summarise(scores: list[dict[str, bool]]) -> dict[str, float]:
    """Percent right, per detail."""
    return {name: round(100 * float(np.mean([s[name] for s in scores])), 1) for name in scores[0]}


# --- reading pixels --------------------------------------------------------------------------------------------


def _backdrop(video: np.ndarray) -> np.ndarray:
    """The backdrop (H, W, 3): a quadratic surface through the frame's rim, refitted without the outliers."""
    _, height, width, _ = video.shape
    y, x = np.mgrid[:height, :width]
    x, y = x / (width - 1) * 2 - 1, y / (height - 1) * 2 - 1
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], -1)
    rim = (np.minimum(1 - abs(x), 1 - abs(y)) < 0.1) & True
    values = np.median(video, axis=0)
    keep = rim
    for _ in range(3):
        weights = np.linalg.lstsq(terms[keep], values[keep], rcond=None)[0]
        error = np.linalg.norm(values - terms @ weights, axis=-1)
        keep = rim & (error < max(12.0, 2 * np.median(error[rim])))
    return (terms @ weights).astype(np.float32)


def _largest(mask: np.ndarray) -> np.ndarray:
    """Only the largest connected region of each frame of ``mask`` (T, H, W)."""
    labels = np.where(mask, np.arange(1, mask[0].size + 1).reshape(mask.shape[1:]), 0)
    while True:  # every pixel takes the largest label around it, then that label's label, until nothing changes
        spread = labels.copy()
        for axis in (1, 2):
            for first, second in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
                a = tuple(first if i == axis else slice(None) for i in range(3))
                b = tuple(second if i == axis else slice(None) for i in range(3))
                spread[a] = np.maximum(spread[a], spread[b] * mask[a])
        flat = spread.reshape(len(spread), -1)
        flat = np.where(flat > 0, np.take_along_axis(flat, np.maximum(flat - 1, 0), 1), 0)
        spread = np.maximum(spread, flat.reshape(spread.shape))
        if (spread == labels).all():
            break
        labels = spread
    best = [np.bincount(frame.ravel())[1:].argmax() + 1 if frame.any() else -1 for frame in labels]
    return labels == np.array(best)[:, None, None]


def _nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(((rgb - np.array(palette[name])) ** 2).sum()))


def _colour(video: np.ndarray, cover: np.ndarray, difference: np.ndarray) -> str:
    """The palette's colour that some brightness brings nearest to the thing's typical pixel.

    Pixels that differ most from the backdrop are the thing's own; along its rim the two are mixed.
    """
    typical = np.median(video[cover & (difference >= np.quantile(difference[cover], 0.5))], 0)

    def distance(name: str) -> float:
        target = np.array(world.COLOURS[name], float)
        gain = np.clip((typical @ target) / (target @ target), 0.7, 1.15)
        return float(((typical - gain * target) ** 2).sum() + 2000 * (1 - gain) ** 2)

    return min(world.COLOURS, key=distance)


def _motion(video: np.ndarray, centre: np.ndarray, area: np.ndarray) -> str:
    side = min(video.shape[1:3])
    shift = centre[-2:].mean(0) - centre[:2].mean(0)
    if np.hypot(*shift) > 0.12 * side:
        angle = np.arctan2(shift[1], shift[0])
        return min(world.DIRECTIONS, key=lambda name: 1 - np.cos(angle - np.arctan2(*world.DIRECTIONS[name][::-1])))
    if np.ptp(centre[:, 1]) > 0.12 * side:
        return "bounce"
    ratio = area[-2:].mean() / area[:2].mean()
    if not 0.6 < ratio < 1.7:
        return "grow" if ratio > 1 else "shrink"
    radius = int(np.sqrt(area.mean()) * 0.6) + 2
    boxes = np.stack([_crop(_smooth(video[i]), centre[i], radius) for i in range(len(video))])
    turning = np.sqrt(boxes.var(0).sum(-1).mean() / boxes[0].reshape(-1, 3).var(0).sum())
    return "spin" if turning > SPIN else "still"


def _smooth(image: np.ndarray) -> np.ndarray:
    """Mean of 3x3 pixels of (H, W, 3)."""
    p = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = p[:-2] + p[1:-1] + p[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def _crop(image: np.ndarray, centre: np.ndarray, radius: int) -> np.ndarray:
    x, y = np.floor(centre).astype(int) + radius
    return np.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="edge")[
        y - radius : y + radius + 1, x - radius : x + radius + 1
    ]


# --- shapes ----------------------------------------------------------------------------------------------------


def _patch(cover: np.ndarray, centre: np.ndarray, area: float) -> np.ndarray:
    """``cover`` (H, W) resampled so that its centre of mass and its area become the same in every patch."""
    step = np.sqrt(area) / PATCH * 1.7
    line = (np.arange(PATCH) - (PATCH - 1) / 2) * step - 0.5
    return _bilinear(cover, centre[0] + line[None, :], centre[1] + line[:, None])


def _bilinear(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.broadcast_arrays(x, y)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    padded = np.pad(image, 1)
    total = np.zeros(x.shape, np.float32)
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - abs(x - x0 - dx)) * (1 - abs(y - y0 - dy))
            rows, columns = np.clip(y0 + dy + 1, 0, image.shape[0] + 1), np.clip(x0 + dx + 1, 0, image.shape[1] + 1)
            total += weight * padded[rows, columns]
    return total


@functools.cache
def _templates() -> np.ndarray:
    """(shapes, TURNS, PATCH * PATCH) unit vectors: each shape in every orientation, cut out as ``_patch`` does."""
    levels = world.shape_levels()
    line = (np.arange(96) + 0.5) / 96 * 2 * world.GLYPH_REACH - world.GLYPH_REACH
    x, y = np.meshgrid(line, line)
    rows = []
    for level in levels:
        for turn in np.arange(TURNS) * 2 * np.pi / TURNS:
            u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
            scale = world.GLYPH_SIZE / (2 * world.GLYPH_REACH)
            inside = _bilinear(level + 2, *((c + world.GLYPH_REACH) * scale - 0.5 for c in (u, v))) > 2
            cover = inside.astype(np.float32)
            rows.append(
                _patch(
                    cover,
                    np.array([(cover * (i + 0.5)).sum() / cover.sum() for i in np.mgrid[:96, :96][::-1]]),
                    cover.sum(),
                )
            )
    flat = np.stack(rows).reshape(len(levels), TURNS, -1) - 0.5
    return flat / np.linalg.norm(flat, axis=-1, keepdims=True)


def _kind(patches: np.ndarray, area: np.ndarray) -> tuple[str, float]:
    """The shape whose outline, turned as fits best in each frame, correlates best over the clip, and how well; large
    frames lead. "none" if the outline does not hold.
    """
    match, best = _matches(patches)
    kind = int((area @ match).argmax())
    outline = float(area @ match[:, kind] / area.sum())
    return world.SHAPES[kind] if (best == kind).mean() >= HOLDS else "none", round(outline, 3)


def _matches(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each frame the correlation with each shape (T, shapes), and the shape that fits best (T,)."""
    flat = patches.reshape(len(patches), -1) - 0.5
    flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
    match = np.einsum("tp,sap->tsa", flat, _templates()).max(-1)
    return match, match.argmax(1)
