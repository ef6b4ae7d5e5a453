"""Draw the example sources: a red circle on navy that moves right. Needs numpy and wan_mlx alone.

    python examples/sources/draw.py [FOLDER]

first.png and last.png are the ends of clip.mp4 (17 frames, 16 per second, 128x128); mask.png is white around the
circle's way; guide.mp4 is the clip as a scribble, white outlines on black.
"""

import sys
from pathlib import Path

import numpy as np

from wan_mlx.media.write import save_video

SIZE, FRAMES, RADIUS = 128, 17, 18
RED, NAVY = np.array([222, 40, 38]), np.array([22, 34, 116])


def cover(distance: np.ndarray) -> np.ndarray:
    """How much of each pixel lies inside, from its distance to the edge in pixels: an edge one pixel soft."""
    return np.clip(0.5 - distance, 0, 1)[..., None]


def main(folder: Path) -> None:
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    centres = np.linspace(30, 98, FRAMES)
    distances = [np.hypot(x - centre, y - 64) - RADIUS for centre in centres]
    clip = np.stack([np.rint(NAVY + (RED - NAVY) * cover(d)).astype(np.uint8) for d in distances])
    guide = np.stack([np.rint(255 * cover(abs(d) - 1.5)).astype(np.uint8).repeat(3, axis=-1) for d in distances])
    way = np.where(abs(y - 64) < RADIUS + 8, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=-1)
    for name, frames in {
        "first.png": clip[:1], "last.png": clip[-1:], "mask.png": way[None], "clip.mp4": clip, "guide.mp4": guide
    }.items():  # fmt: skip
        save_video(folder / name, frames, 16, {"made by": "examples/sources/draw.py"})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
