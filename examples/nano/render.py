"""Paints scenes of the nano world, a batch at a time, on whatever device torch has.

``pack`` draws trajectories and looks on the CPU; ``paint`` turns packed scenes of one size into video.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
import world
from world import Scene

EDGE = 1.5  # pixels over which an outline fades
SHADOW = 0.24
OF_THINGS = ("centre", "radius", "angle", "glyph", "colour", "stripe", "mark")
BLUE = np.array((30, 50, 250)) / 255  # of marks, where that is seen better than a dark or a light one
BAND = 0.18  # half the width of the band across what is round and spins, in radii


def pack(scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Everything ``paint`` needs about scenes of one size, the scene first; missing things have radius 0."""
    things, frames = 2, scenes[0].frames
    count = len(scenes)
    arrays = {
        "centre": np.zeros((count, things, frames, 2)),
        "radius": np.zeros((count, things, frames)),
        "angle": np.zeros((count, things, frames)),
        "glyph": np.zeros((count, things), int),
        "colour": np.zeros((count, things, 3)),
        "stripe": np.zeros((count, things)),
        "mark": np.zeros((count, things, 3)),
        "background": np.zeros((count, 3)),
        "slope": np.zeros((count, 2)),
        "light": np.zeros((count, 2)),
        "cloth": np.zeros((count, 1, 5, 5)),
    }
    for i, scene in enumerate(scenes):
        centre, radius, angle = world.trajectory(scene)
        rng = np.random.default_rng(scene.seed + 1)
        lamp = rng.uniform(-2.6, -0.5)  # the light comes from above
        arrays["light"][i] = np.cos(lamp), np.sin(lamp)
        arrays["slope"][i] = rng.normal(0, 0.5, 2)
        arrays["cloth"][i] = rng.normal(0, 1, (1, 5, 5))
        arrays["background"][i] = np.array(world.BACKGROUNDS[scene.background]) / 255 + rng.normal(0, 0.008, 3)
        for j, thing in enumerate(scene.things):
            arrays["centre"][i, j], arrays["radius"][i, j], arrays["angle"][i, j] = centre[j], radius[j], angle[j]
            arrays["colour"][i, j] = np.array(world.COLOURS[thing.colour]) / 255 + rng.normal(0, 0.012, 3)
            if thing.kind in world.SHAPES:
                arrays["glyph"][i, j] = world.SHAPES.index(thing.kind)
                if thing.motion == "spin" and thing.kind in ("circle", "ring"):  # whose turning is invisible
                    arrays["stripe"][i, j], arrays["mark"][i, j] = 1, _mark(thing.colour, scene.background)
            else:
                pool = np.flatnonzero(world.handwriting()[1] == int(thing.kind[6:]))
                arrays["glyph"][i, j] = len(world.SHAPES) + pool[thing.sample % len(pool)]
    return {name: a if name == "glyph" else a.astype(np.float32) for name, a in arrays.items()}


def _mark(colour: str, background: str) -> np.ndarray:
    """The colour of a band that is seen on the thing, and not taken for the backdrop in shadow.

    Blue only where it does not stand out so much more than the thing that its colour would be taken for the thing's.
    """
    own, ground = np.array(world.COLOURS[colour]) / 255, np.array(world.BACKGROUNDS[background]) / 255

    def least(mark: np.ndarray) -> float:
        shadow = np.clip(mark @ ground / (ground @ ground), 0.7, 1) * ground
        return min(float(np.linalg.norm(mark - other)) for other in (own, shadow))

    loud = np.linalg.norm(BLUE - ground) > 1.5 * np.linalg.norm(own - ground)
    return max((0.15 * own, 0.2 * own + 0.78, *(() if loud else (BLUE,))), key=least)


def upload(packs: list[dict[str, np.ndarray]], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Several packs as one, on ``device``."""
    return {name: torch.as_tensor(np.concatenate([p[name] for p in packs])).to(device) for name in packs[0]}


def atlas(device: torch.device | str, digits: bool = True) -> torch.Tensor:
    """(6 + 1797, 2, size, size): distance to the outline in radii (positive inside), and ink in [0, 1].

    Without ``digits`` the six shapes alone, for which scikit-learn is not needed.
    """
    levels = torch.as_tensor(world.shape_levels())[:, None]
    shapes = torch.cat([levels, torch.ones_like(levels)], 1)
    if not digits:
        return shapes.to(device)
    ink, _ = world.handwriting()
    ink = F.pad(torch.as_tensor(ink)[:, None], (1, 1, 1, 1))
    ink = F.interpolate(ink, size=(world.GLYPH_SIZE,) * 2, mode="bicubic", align_corners=False).clamp(0, 1)
    # A digit's pixel is a quarter of a radius wide: ink falls from 1 to 0 over about that distance.
    return torch.cat([shapes, torch.cat([(ink - 0.36) * 0.26, ink], 1)]).to(device)


def paint(packed: dict[str, torch.Tensor], glyphs: torch.Tensor, width: int, height: int, corner=None, side: int = 0):
    """Video (B, 3, T, H, W) in [-1, 1], and (B, 1, T, H, W) that is 1 within the things' bounding boxes.

    With ``corner`` (B, 2), x and y in whole pixels, only the window of ``side`` x ``side`` from there is painted.
    """
    device = glyphs.device
    x = torch.arange(side or width, device=device) + 0.5
    y = torch.arange(side or height, device=device) + 0.5
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)
    if corner is None:
        corner = torch.zeros(len(packed["slope"]), 2, device=device)
    grid = grid + corner[:, None, None, None]  # (B, 1, H, W, 2)
    video = _ground(packed, grid, width, height)  # (B, T, H, W, 3)
    boxes = torch.zeros(video.shape[:-1], device=device)
    for index in range(packed["radius"].shape[1]):
        thing = {name: packed[name][:, index] for name in OF_THINGS}
        video, alpha = _stamp(video, thing, packed["light"], glyphs, grid)
        rows, columns = alpha.amax(-1) > 0.05, alpha.amax(-2) > 0.05
        boxes = torch.maximum(boxes, (rows[..., :, None] & columns[..., None, :]).float())
    return video.clamp(0, 1).permute(0, 4, 1, 2, 3) * 2 - 1, boxes[:, None]


def _ground(packed, grid, width: int, height: int) -> torch.Tensor:
    """A softly lit backdrop with a faint weave, the same in every frame."""
    frames = packed["radius"].shape[-1]
    p = torch.stack([grid[:, 0, ..., 0] / width, grid[:, 0, ..., 1] / height], -1) * 2 - 1
    tilt = (p * packed["slope"][:, None, None]).sum(-1)
    cloth = F.grid_sample(packed["cloth"], p, mode="bicubic", padding_mode="border", align_corners=False)[:, 0]
    light = 1 + 0.07 * tilt - 0.06 * (p**2).sum(-1) + 0.02 * cloth
    ground = packed["background"][:, None, None] * light[..., None] + 0.006 * cloth[..., None]
    return ground[:, None].expand(-1, frames, -1, -1, -1)


def _stamp(video, thing, light, glyphs, grid):
    """``video`` with one thing and its shadow on top, and the thing's coverage (B, T, H, W)."""
    b, t = thing["radius"].shape
    radius = thing["radius"].clamp(min=1e-3)[..., None, None]
    present = (thing["radius"] > 0)[..., None, None]
    glyph = glyphs[thing["glyph"]][:, None].expand(-1, t, -1, -1, -1).flatten(0, 1)
    sine, cosine = thing["angle"].sin()[..., None, None], thing["angle"].cos()[..., None, None]

    def look_up(shift: float):
        q = (grid - thing["centre"][..., None, None, :] - shift) / radius[..., None]  # (B, T, H, W, 2)
        u = torch.stack([cosine * q[..., 0] + sine * q[..., 1], cosine * q[..., 1] - sine * q[..., 0]], -1)
        level, ink = F.grid_sample(
            glyph, (u / world.GLYPH_REACH).flatten(0, 1), padding_mode="border", align_corners=False
        ).unflatten(0, (b, t)).unbind(2)  # fmt: skip
        return q, u, level, ink

    _, _, level, _ = look_up(3.0)
    shadow = (0.5 + level * radius / 9).clamp(0, 1) * present
    video = video * (1 - SHADOW * shadow[..., None])

    q, u, level, ink = look_up(0.0)
    alpha = (0.5 + level * radius / EDGE).clamp(0, 1) * present
    facing = (q * light[:, None, None, None]).sum(-1)
    glint = torch.exp(-((q - 0.45 * light[:, None, None, None]) ** 2).sum(-1) / 0.12)
    shade = (1 + 0.16 * facing) * (0.8 + 0.2 * (level / 0.22).clamp(0, 1)) * (0.75 + 0.25 * ink)
    band = (0.5 - (u[..., 1].abs() - BAND) * radius / EDGE).clamp(0, 1) * thing["stripe"][:, None, None, None]
    own, mark = (thing[name][:, None, None, None] for name in ("colour", "mark"))
    body = (own + band[..., None] * (mark - own)) * shade[..., None] + 0.10 * glint[..., None]
    return video + alpha[..., None] * (body.clamp(0, 1) - video), alpha
