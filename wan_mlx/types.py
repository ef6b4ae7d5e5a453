"""The values that travel between the stages, and a glossary of shapes.

Glossary, used throughout the package:

    B            batch; always 1 on the sampling path (guidance is two passes, not a batch of two)
    T, H, W      pixels: ``num_frames``, ``height``, ``width``; 4n+1, and multiples of 16 (TI2V-5B: of 32)
    t, h, w      latents, as many as the model's `Geometry` says: (T-1)/4+1, H/8, W/8 (TI2V-5B: H/16, W/16)
    C            latent channels: 16 (TI2V-5B: 48)
    L            tokens: ``seq_len`` = t * h/2 * w/2, one per 1x2x2 patch of latents
    D            width of the transformer ("dim")

Inside the package arrays are channels last: video ``(B, T, H, W, 3)`` in [-1, 1], latents
``(B, t, h, w, C)`` normalised as the transformer sees them, tokens ``(B, L, D)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from .errors import duration
from .geometry import WAN_2_1, Geometry
from .phases import read_phases

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np
    from PIL.Image import Image

# A picture or a video that a task starts from; in quotes, so that neither Pillow nor numpy is imported for it.
Source: TypeAlias = "str | Path | Image | np.ndarray"
# A LoRA's file, with its strength where that is not 1: also "path:strength".
LoraChoice: TypeAlias = "str | Path | tuple[str | Path, float]"
# One LoRA, several, or of a model of two experts those of each: {"high": …, "low": …}.
LoraChoices: TypeAlias = "Iterable[LoraChoice] | LoraChoice | Mapping[str, Iterable[LoraChoice] | LoraChoice] | None"

MOST_IMAGES = 10_000  # of a series
# Fields of a `Request` that hold one source each; src_ref_images holds several.
SOURCE_FIELDS = ("image", "last_image", "src_video", "src_mask", "video", "audio", "pose_video", "src_root_path")
# Files of the folder that is a source; without a replacement the first three.
PREPARED = ("src_pose.mp4", "src_face.mp4", "src_ref.png", "src_bg.mp4", "src_mask.mp4")


def describe_source(source: Source | None, name: Callable[[str], str] = str) -> str | None:
    """A source in JSON: ``name`` of its path or, of one in memory, its kind, size and SHA-256."""
    if not hasattr(source, "tobytes"):
        return None if source is None else name(str(source))
    held: Any = source  # of a class that is not imported here
    kind = f"array {held.dtype} {held.shape}" if hasattr(held, "dtype") else \
        f"image {held.mode} {held.width}x{held.height}"
    return f"{kind}, sha256 {hashlib.sha256(held.tobytes()).hexdigest()}"


@dataclass(frozen=True)
class Request:
    """The user's request, complete: no ``None`` is left where a preset has a default.

    Most fields are options of a call, which `options.RequestOptions` explains. Sizes are as the model's ``geometry``
    allows, ``seed`` is >= 0; ``cfg_zero`` is the number of CFG-Zero*'s first steps without motion, None for ordinary
    guidance; of a model of two experts ``guidance_scale`` may be two, the low-noise and the high-noise one's, in the
    official order, where the ``phases`` have none of their own (`phases.read_phases`). The file has ``fps`` frames a
    second: the model makes ``model_fps``, and what ``interpolate`` names makes those between. Sources are None where
    the task has no use for them. ``original_prompt`` is the user's own where ``prompt`` was written out by the language
    model ``extended_by``. ``source_sizes`` are the (width, height) of the sources that are brought to the video's
    size, by their fields' names. ``draft_of``: of a draft the width, height and steps of the video that it is for. A
    video is made in so many ``clips``, one after the other, each sampled on its own, as ``clip_frames`` frames.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    steps: int
    guidance_scale: float | tuple[float, float]
    shift: float
    solver: str
    seed: int
    fps: int = 16
    task: str = "t2v"
    image: Source | None = None
    last_image: Source | None = None
    src_video: Source | None = None
    src_mask: Source | None = None
    src_ref_images: tuple[Source, ...] = ()
    context_scale: float = 1.0
    cache: str = "none"
    guidance_range: tuple[float, float] = (0.0, 1.0)
    cfg_zero: int | None = None
    skip_layers: tuple[int, ...] = ()
    skip_range: tuple[float, float] = (0.1, 1.0)
    recipe: str | None = None
    phases: str | None = None
    video: Source | None = None
    strength: float = 1.0
    fit: str = "official"
    interpolate: str | None = None
    model_fps: int = 16
    original_prompt: str | None = None
    extended_by: str | None = None
    draft_of: tuple[int, int, int] | None = None
    audio: str | Path | None = None
    pose_video: Source | None = None
    num_clip: int | None = None
    infer_frames: int = 80
    start_from_ref: bool = False
    src_root_path: str | Path | None = None
    refert_num: int = 1
    replace_flag: bool = False
    clips: int = 1
    clip_frames: int | None = None
    geometry: Geometry = WAN_2_1
    source_sizes: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False)

    def settings(self, name: Callable[[str], str] = str) -> dict[str, Any]:
        """All but ``geometry`` and ``source_sizes``, as JSON takes it: sources as `describe_source` has them."""
        return {
            **{field: value for field, value in vars(self).items() if field not in ("geometry", "source_sizes")},
            **{field: describe_source(getattr(self, field), name) for field in (*SOURCE_FIELDS, "interpolate")},
            "src_ref_images": [describe_source(source, name) for source in self.src_ref_images],
        }

    @property
    def source_files(self) -> list[Path]:
        """The sources that are files, not pictures and videos in memory."""
        sources = [*(getattr(self, name) for name in SOURCE_FIELDS), *self.src_ref_images]
        if self.src_root_path is not None:
            prepared = PREPARED if self.replace_flag else PREPARED[:3]
            sources += [Path(self.src_root_path) / name for name in prepared]
        return [Path(source) for source in sources if isinstance(source, str | Path)]

    @property
    def speech(self) -> Path | None:
        """The file of the sound that the video is to have."""
        return None if self.audio is None else Path(self.audio)

    @property
    def has_sources(self) -> bool:
        """Whether it has a picture or video of any kind."""
        return bool(self.src_ref_images) or any(getattr(self, name) is not None for name in SOURCE_FIELDS)

    def series(self, count: int, name: str = "num_images") -> list[Request]:
        """``count`` of this request, with the seeds from its own on, each as it would be asked for alone.

        ``name``: "num_videos" where they need not be stills.

        Raises:
            ValueError: it is not for a still, ``count`` is not from 1 to `MOST_IMAGES`, or the seeds run out.
        """
        if not 1 <= count <= MOST_IMAGES:
            raise ValueError(f"{name} is {count}, expected 1 to {MOST_IMAGES}")
        if count > 1 and self.num_frames != 1 and name == "num_images":
            raise ValueError(f"num_images is {count}, but {self.num_frames} frames are a video; nearest: 1 frame")
        if self.seed + count > 2**64:
            raise ValueError(f"seed is {self.seed}, expected room for {count} seeds; nearest: {2**64 - count}")
        return [replace(self, seed=self.seed + number) for number in range(count)]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(t, h, w)`` of the latents; of a video in clips, of one of these."""
        return self.geometry.latent_shape(self.width, self.height, self.clip_frames or self.num_frames)

    @property
    def frames_written(self) -> int:
        """How many frames the file has: those of the model, and those between them."""
        return (self.num_frames - 1) * self.fps // self.model_fps + 1

    @property
    def noise_size(self) -> tuple[int, int] | None:
        """(h, w) of the latents whose noise a draft's is the coarse part of; None of others."""
        if self.draft_of is None:
            return None
        return self.geometry.latent_shape(*self.draft_of[:2], self.num_frames)[1:]

    @property
    def steps_made(self) -> int:
        """How many steps of the grid are made: all, unless a video is there to start from; of each clip as many."""
        return round(self.strength * self.steps)

    @property
    def steps_of_clips(self) -> int:
        """How many steps are made in all."""
        return self.clips * self.steps_made

    @property
    def guidance_scales(self) -> tuple[float, float]:
        """The low-noise and the high-noise expert's; twice the same of a model of one transformer."""
        scale = self.guidance_scale
        return scale if isinstance(scale, tuple) else (scale, scale)

    @property
    def passes(self) -> int:
        """Forwards of a step with guidance all along: two, or one if it is off."""
        scales = {phase.guidance for phase in read_phases(self.phases)} or {None}
        own = {*self.guidance_scales} if None in scales else set()
        return 1 if scales - {None} | own == {1} else 2

    @property
    def begin(self) -> int:
        """How many steps of the grid are left out."""
        return self.steps - self.steps_made


@dataclass(repr=False)
class Conditioning:
    """The result of a task, for the sampling loop.

    Attributes:
        noise: float32 (1, t, h, w, C), the start of sampling.
        context: (1, 512, text_dim), text embeddings zero-padded to 512 rows.
        negative_context: likewise; None when guidance is off.
        source_latents: as ``noise``: the video to start from under this noise, if there is one.
        remade: bool (1, t or 1, h, w, 1): where that video is made anew; elsewhere it stays. None: everywhere.
        first_latents: float32 (1, n, h, w, C), ti2v, and 5B's inp and control: the first latent frames, which are given
            and stay as they are.
        condition: float32 (1, t, h, w, 4 + C), i2v, flf2v, inp and animate: a mask channel for each of a latent frame's
            frames, 1 where they are given, then latents; control: after C channels of the control video.
        reference: float32 (1, 1, h, w, C), control: latents of the reference image.
        image_features: (N, 257, image_dim), CLIP features of the N given images.
        vace_context: float32 (1, t, h, w, 2C + 64), VACE: latents of the kept part, of the changed part, and the mask.
        audio: float32 (1, layers, T, width), S2V: what is heard in each frame of all clips; the pass without prompt
            hears nothing.
        heard: (first, end): the frames of this clip.
        motion: float32 (1, n, h, w, C), S2V: latents of the frames before the clip, if there are such.
        pose: float32 (1, t, h, w, C), S2V and animate: latents of the poses, if there are such; t without animate's
            reference image.
        last_frames: float32 (n, H, W, 3), S2V: the frames before the clip, where the next one needs these too.
        context_scale: strength of VACE's hints.
        face: float32 (1, t, tokens, D), animate: what the face does in each latent frame.
        negative_face: the same of no face, for the pass without prompt.
        trim_latents: latent frames to cut from the start before decoding: VACE's and animate's reference images,
            counted in t.
        trim_frames: decoded frames to leave out of the start.
        clip: which of the request's clips it is, from 0; when it begins there are ``frames_before``, and
            ``forwards_before`` are computed.
    """

    noise: mx.array
    context: mx.array
    negative_context: mx.array | None = None
    source_latents: mx.array | None = None
    remade: mx.array | None = None
    first_latents: mx.array | None = None
    condition: mx.array | None = None
    reference: mx.array | None = None
    image_features: mx.array | None = None
    vace_context: mx.array | None = None
    audio: mx.array | None = None
    heard: tuple[int, int] = (0, 0)
    motion: mx.array | None = None
    pose: mx.array | None = None
    face: mx.array | None = None
    negative_face: mx.array | None = None
    last_frames: mx.array | None = None
    context_scale: float = 1.0
    trim_latents: int = 0
    trim_frames: int = 0
    clip: int = 0
    frames_before: int = 0
    forwards_before: int = 0

    def __repr__(self) -> str:
        return f"Conditioning({', '.join(f'{name} {array.shape}' for name, array in self.arrays().items())})"

    def arrays(self) -> dict[str, mx.array]:
        """The fields that hold an array, by name."""
        return {name: value for name, value in vars(self).items() if hasattr(value, "dtype")}

    def of_pass(self, negative: bool) -> dict[str, mx.array | None]:
        """What the passes with the prompt and without it do not share beside the text: the latter hears nothing, and
        sees no face."""
        if self.face is not None:
            return {"face": self.negative_face if negative else self.face}
        if self.audio is None:
            return {}
        heard = self.audio[:, :, slice(*self.heard)]
        return {"audio": heard * 0 if negative else heard}


class Encoders(Protocol):
    """The encoders of a pipeline, as a task uses them; each call loads one stage's weights and drops them."""

    latent_channels: int
    reads_images: bool  # whether the model has an image encoder

    def encode_text(self, texts: Sequence[str]) -> list[mx.array]:
        """Texts → embeddings zero-padded to (1, 512, text_dim) each."""

    def encode_audio(self, sound: mx.array) -> mx.array:
        """Sound float32 (samples,), 16,000 a second → hidden states (layers, frames, width), 50 a second."""

    def encode_images(self, images: mx.array) -> mx.array:
        """Images float32 (N, H, W, 3) in [-1, 1] → CLIP features (N, 257, image_dim)."""

    def encode_face(self, pictures: Iterable[np.ndarray], blank: bool) -> tuple[mx.array, mx.array | None]:
        """Pictures float32 (side, side, 3) in [-1, 1] of a face → float32 (1, t, tokens, D); the same of a ``blank``
        one, if it is asked for."""

    def encode_videos(self, videos: Sequence[Iterable[mx.array]]) -> list[mx.array]:
        """Videos, each in chunks float32 (1, 1, H, W, 3), then (1, 4, H, W, 3), in [-1, 1] → normalised latents
        float32 (1, t, h, w, C) each."""


@dataclass(repr=False)
class Step:
    """One finished sampling step.

    ``index`` counts from 0 to ``total - 1``; ``timestep`` (in [0, 1000]) and ``sigma`` (in [0, 1]) are those before the
    step; ``latents`` is float32 (1, t, h, w, C) after it, and ``denoised`` the solver's estimate of the clean latents.
    ``forwards`` are those computed, of the ``passes`` that a run without step cache and with guidance all along makes.
    ``state`` is all that `denoise` needs to go on from here; it may be emptied when the next step is asked for.
    ``previewer`` makes small pictures of latents, where the steps are a pipeline's.
    """

    index: int
    total: int
    timestep: float
    sigma: float
    latents: mx.array
    denoised: mx.array
    forwards: int = 0
    passes: int = 0
    seconds: float = 0.0
    state: dict[str, mx.array] = field(default_factory=dict)
    previewer: Callable[[mx.array], Any] | None = None

    def __repr__(self) -> str:
        return f"Step({self.index + 1} of {self.total}, sigma {self.sigma:.3f}, {duration(self.seconds)})"

    def preview(self) -> Any:
        """The current estimate of the video as small frames, numpy uint8 (t, h, w, 3), a pixel for each latent.

        Raises:
            ValueError: the step is not of a pipeline, or no colours are known for its VAE's latents.
        """
        if self.previewer is None:
            raise ValueError("only a pipeline's steps have previews; of others: pipe.preview(step.denoised)")
        return self.previewer(self.denoised)


@dataclass(repr=False)
class RunState:
    """How far a run has come: its conditioning, how many steps are done, and `Step.state` of the last of them.

    The conditioning is that of a clip, and the steps are those of all clips so far.

    ``how`` is the `Plan.how` of the run; empty if that does not matter. ``notes`` were kept with the last step.
    """

    conditioning: Conditioning
    steps: int = 0
    state: dict[str, mx.array] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"RunState({self.steps} steps, {self.conditioning})"
