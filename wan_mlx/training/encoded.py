"""Clips and captions encoded once and kept on disk: VAE and text encoder are gone before training begins.

Each file's name is a hash of everything that its contents depend on, so that a changed picture, caption or VAE is
encoded anew, and an interrupted encoding goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import WanError
from ..events import Listener, counted, unheard
from ..files.safetensors import load_arrays
from ..media.read import in_chunks, to_float
from ..models.execution import encode_images
from ..models.image_encoder import ImageEncoder
from ..opened import OpenedModel
from ..request_builder import build_request
from ..storage import fingerprint, whole_file
from ..tasks import TASKS
from ..types import Encoders
from ..weights.load import load_image_encoder
from .dataset import TrainingClip

FORMAT = 1
# What `Conditioning` has that a model is given beside latents and text, and its names among the network's arguments.
CONDITIONS = ("condition", "image_features")


class Encoded:
    """Latents, conditions and texts of a data set, read from ``folder`` when a step asks for them."""

    def __init__(self, opened: OpenedModel, folder: Path):
        self.opened, self.folder = opened, folder
        folder.mkdir(parents=True, exist_ok=True)
        vae, text = opened.checkpoint.part("vae"), opened.checkpoint.part("text_encoder")
        images = [opened.checkpoint.part("image_encoder")] if opened.config.has_image_branch else []
        self._vae = [FORMAT, fingerprint(vae.file), opened.preset.task, *(fingerprint(part.file) for part in images)]
        self._text = [FORMAT, fingerprint(text.file), text.quantize or opened.quantize, opened.dtype]
        self._prints: dict[Path, Any] = {}

    def prepare(self, clips: Sequence[TrainingClip], captions: Iterable[str], listener: Listener = unheard) -> None:
        """Encode what is not on disk yet."""
        texts = [text for text in dict.fromkeys(captions) if not _is_whole(self._place("text", self._text, text))]
        # Few at a time: the encoder's weights are read once for all of them, their results are kept in memory.
        for start in range(0, len(texts), 64):
            some = texts[start : start + 64]
            for text, context in zip(some, self.opened.encode_text(some), strict=True):
                rows = np.flatnonzero(np.abs(np.array(context[0].astype(mx.float32))).max(axis=1))
                self._write("text", self._text, text, {"context": context[:, : int(rows[-1]) + 1 if len(rows) else 1]})
        new = [clip for clip in clips if not _is_whole(self._place("clip", self._vae, self._about(clip)))]
        if new:
            encoders = _ForClips(self.opened)
            with self.opened.keep_loaded():  # the VAE, for all of them
                for clip in counted(listener, "encoding clips")(new):
                    self._write("clip", self._vae, self._about(clip), self._encode(clip, encoders))

    def text(self, caption: str) -> mx.array:
        """(1, length, text_dim), without padding."""
        return self._read("text", self._text, caption)["context"]

    def clip(self, clip: TrainingClip) -> tuple[mx.array, dict[str, Any]]:
        """Clean latents, float32 (1, t, h, w, C), and the model's other inputs by name."""
        arrays = self._read("clip", self._vae, self._about(clip))
        latents = arrays.pop("latents")
        return latents, arrays

    def _encode(self, clip: TrainingClip, encoders: Encoders) -> dict[str, mx.array]:
        opened, frames = self.opened, list(clip.read())
        (latents,) = opened.encode_videos([in_chunks((to_float(frame) for frame in frames), opened.geometry)])
        found = {"latents": latents.astype(mx.float32)}
        if opened.preset.task in ("i2v", "flf2v"):
            conditioning = TASKS[opened.preset.task].condition(self._request(clip, frames), encoders)
            found |= {name: array for name in CONDITIONS if (array := getattr(conditioning, name)) is not None}
        mx.eval(found)
        mx.synchronize()
        return found

    def _request(self, clip: TrainingClip, frames: list[np.ndarray]) -> Any:
        opened = self.opened
        images: dict[str, Any] = {"image": frames[0]}
        if opened.preset.task == "flf2v":
            images["last_image"] = frames[-1]
        request = build_request(
            opened.preset, opened.config, opened.geometry, "a clip", width=clip.width, height=clip.height,
            num_frames=len(frames), fit="crop", seed=0, **images,
        )  # fmt: skip
        return replace(request, guidance_scale=1.0)

    def _about(self, clip: TrainingClip) -> list[Any]:
        """What a clip's latents depend on. Its file is read once, and may change or go while a run trains."""
        if clip.path not in self._prints:
            self._prints[clip.path] = fingerprint(clip.path)
        return [self._prints[clip.path], clip.frames, clip.width, clip.height]

    def _place(self, kind: str, settings: Any, about: Any) -> Path:
        told = json.dumps([settings, about], sort_keys=True, default=str)
        return self.folder / f"{kind}-{hashlib.sha256(told.encode()).hexdigest()[:32]}.safetensors"

    def _write(self, kind: str, settings: Any, about: Any, arrays: dict[str, mx.array]) -> None:
        with whole_file(self._place(kind, settings, about)) as temporary:
            mx.save_safetensors(str(temporary), arrays)

    def _read(self, kind: str, settings: Any, about: Any) -> dict[str, mx.array]:
        return load_arrays(self._place(kind, settings, about))[0]


class _ForClips:
    """Encoders of a model, for the conditions of many clips: texts are not encoded, and CLIP is loaded once."""

    def __init__(self, opened: OpenedModel):
        self._opened = opened

    @cached_property
    def _image_encoder(self) -> ImageEncoder:
        return load_image_encoder(self._opened.checkpoint)

    def encode_images(self, images: mx.array) -> mx.array:
        return encode_images(self._image_encoder, images)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def encode_text(self, texts: Sequence[str]) -> list[mx.array]:
        return [mx.zeros((1, 1, 1)) for _ in texts]


def _is_whole(path: Path) -> bool:
    """Whether a file is there, and neither cut short nor without its header; a damaged one is made anew."""
    try:
        load_arrays(path)
    except (OSError, RuntimeError, ValueError, WanError):
        return False
    return True
