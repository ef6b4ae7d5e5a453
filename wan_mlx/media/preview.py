"""Previews during sampling: small frames from the current estimate of the latents.

A linear map from a latent's channels to colours makes one pixel of each latent, in milliseconds; it was fitted to
the VAE's output (``examples/fit_preview.py``). Each latent space, identified by its VAE's mean and standard deviation,
has its own map; the maps and their sources are in ``assets/latent_rgb.json``. With TAEHV's weights, its decoder
replaces the map.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import WanError
from ..events import Previewed
from ..models.configs import VAE22Config, VAEConfig
from ..models.taehv import TAEHV
from ..storage import place_of
from ..types import Request, Step
from ..weights.load import config_of
from ..weights.parts import Checkpoint
from ..weights.taehv import load_taehv
from .write import check_output, contact_sheet, read_settings, save_video, to_uint8

log = logging.getLogger(__name__)

# Latents (1, t, h, w, C), normalised as for the transformer → uint8 (t, h, w, 3).
Previewer = Callable[[mx.array], np.ndarray]
MAPS = Path(__file__).parent.parent / "assets" / "latent_rgb.json"
SAME_SPACE = 1e-3  # largest difference between two VAEs' means or standard deviations
SHEET_FRAMES = 25


def map_preview(space: Mapping[str, Any], latents: mx.array) -> np.ndarray:
    """By an entry of `read_maps`; given the entry, a `Previewer`. The first latent frame, which encodes one video frame
    instead of four, may have a map of its own."""
    z = np.array(latents[0].astype(mx.float32))
    colours = _mapped(z, space)
    colours[0] = _mapped(z[0], space.get("first", space))
    return to_uint8(colours)


def _mapped(latents: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    """Colours in [-1, 1]: latents @ ``factors`` (C, 3) + ``bias`` (3,)."""
    return latents @ np.array(entry["factors"], np.float32) + np.array(entry["bias"], np.float32)


def tiny_preview(taehv: TAEHV, latents: mx.array) -> np.ndarray:
    """From TAEHV's decoder without upsampling; given the decoder, a `Previewer`."""
    return np.concatenate([to_uint8(frames[0]) for frames in taehv.decode(latents, small=True)])


def latent_map(config: VAEConfig) -> Previewer:
    """The map for a VAE's latents.

    Raises:
        ValueError: no map is known for this normalisation.
    """
    for space in read_maps().values():
        if is_same_space(config, VAEConfig(mean=space["mean"], std=space["std"])):
            return partial(map_preview, space)
    raise ValueError(
        "previews: no colours are known for this VAE's latents, expected those of "
        f"{' or '.join(read_maps())}; fit them with examples/fit_preview.py, or give --taehv"
    )


def is_same_space(a: VAEConfig, b: VAEConfig) -> bool:
    """Whether two VAEs share a latent space, judged by their normalisation."""
    pairs = (a.mean, b.mean), (a.std, b.std)
    return all(len(x) == len(y) and np.allclose(x, y, rtol=0, atol=SAME_SPACE) for x, y in pairs)


@cache
def read_maps() -> dict[str, dict[str, Any]]:
    """Latent space → mean, std, factors, bias, perhaps those of the ``first`` frame, and their ``source``."""
    return json.loads(MAPS.read_text(encoding="utf-8"))


def sheet_of(frames: np.ndarray) -> np.ndarray:
    """Up to `SHEET_FRAMES` of the frames, uint8 (T, H, W, 3), row by row in one roughly square image."""
    height, width = frames.shape[1:3]
    columns = max(1, round(math.sqrt(min(len(frames), SHEET_FRAMES) * height / width)))
    return np.asarray(contact_sheet(frames, columns, SHEET_FRAMES, columns * width))


def enlarge(frames: np.ndarray) -> np.ndarray:
    """uint8 (T, H, W, 3) → (T, 2H, 2W, 3), smoothed."""
    size = 2 * frames.shape[2], 2 * frames.shape[1]
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


class PreviewFiles:
    """Updates an animated WebP, and a contact sheet (PNG) beside it, during sampling; viewers never see half a file.

    A failure to write during a run is reported once, and the run goes on.

    Args:
        path: of the animation, ending in ``.webp``; that of the sheet is ``sheet``.
        every: number of steps between updates; the last step always updates.
        overwrite: replace files that are not previews.
        outputs: files of the run, which previews must not overwrite.

    Raises:
        ValueError: another ending, no such folder, an existing file that is not our preview, or one of ``outputs``.
    """

    def __init__(self, path: str | Path, every: int = 1, overwrite: bool = False, outputs: Iterable[Path] = ()):
        self.path = Path(path)
        if self.path.suffix.lower() != ".webp":
            raise ValueError(f"preview {path} ends in {self.path.suffix!r}, expected .webp; nearest: "
                             f"{self.path.with_suffix('.webp')}")  # fmt: skip
        self.every, self.sheet, self._failed = every, self.path.with_suffix(".png"), False
        for file in (self.path, self.sheet):
            check_output(file, overwrite=True)
            if file.exists() and not overwrite and not _is_preview(file):
                raise ValueError(f"preview {file} exists and is no preview; choose another name, or --overwrite")
        for output in outputs:
            if place_of(output) in (place_of(self.path), place_of(self.sheet)):
                raise ValueError(f"preview {path} would be written over {output}; choose another name")

    def is_due(self, step: Step) -> bool:
        return (step.index + 1) % self.every == 0 or step.index + 1 == step.total

    def write(self, step: Step, request: Request) -> Previewed:
        """Show a step of the requested video."""
        started = time.perf_counter()
        frames = step.preview()
        about = {"preview": {"step": step.index + 1, "steps": step.total}, "prompt": request.prompt}
        fps = request.model_fps * len(frames) / request.num_frames
        try:
            save_video(self.path, enlarge(frames), fps, about)
            save_video(self.sheet, sheet_of(frames)[None], 1, about)
        except (OSError, WanError) as error:
            if not self._failed:
                log.warning("the preview could not be written: %s", error)
            self._failed = True
        return Previewed(self.path, self.sheet, step.index, time.perf_counter() - started)


def _is_preview(path: Path) -> bool:
    try:
        return "preview" in read_settings(path)
    except ValueError:
        return False


PUBLISHED_AT = "lightx2v/Autoencoders"


def published_taehv(checkpoint: Checkpoint) -> str | None:
    """The file on a hub of the TAEHV for a model's latents; None if there is none."""
    vae = config_of(checkpoint, "vae")
    known = {"taew2_1": VAEConfig(), "taew2_2": VAE22Config()}
    return next((f"{PUBLISHED_AT}:{name}.safetensors" for name, of in known.items() if is_same_space(vae, of)), None)


def tiny_autoencoder(checkpoint: Checkpoint, path: str | Path | None, needed: bool) -> TAEHV | None:
    """TAEHV, small enough to stay loaded; None without ``path``.

    Raises:
        ValueError: it is not for this model's latents, or it is ``needed`` and there is no ``path``.
        WeightsError: the file is not TAEHV.
    """
    if path is None:
        if needed:
            raise ValueError(f"tiny_vae is TAEHV, which is for the latents of Wan's VAEs, and {checkpoint.path} has "
                             "others; leave it out")  # fmt: skip
        return None
    found, vae = load_taehv(path), config_of(checkpoint, "vae")
    new = found.config.z_dim == VAE22Config().z_dim
    if not is_same_space(vae, VAE22Config() if new else VAEConfig()):
        raise ValueError(
            f"taehv is for Wan 2.{1 + new}'s latents, but {checkpoint.path} has others; leave it out"
            + ", or give taew2_2.pth" * is_same_space(vae, VAE22Config())
        )
    return found
