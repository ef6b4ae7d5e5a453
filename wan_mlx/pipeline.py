"""The pipeline: encode the texts, denoise, decode; each stage's weights are gone before the next stage's are read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from tqdm.auto import tqdm

from . import __version__
from .caching import make_cache
from .denoise import denoise, step_reached, with_condition, without_references
from .files.sentencepiece import read_tokenizer
from .geometry import Geometry
from .guidance import Guidance
from .hub.resolve import Places, preset_of, resolve, resolve_loras
from .media.preview import Previewer, TinyDecoder, latent_map, tiny_autoencoder
from .media.write import latents_to_numpy, to_uint8
from .models import vae_tiling as tiling
from .models.configs import TEXT_LEN, geometry_of
from .models.text_encoder import pad_context
from .models.tokenizer import Tokenizer
from .models.vae_tiling import parse_tiling
from .planning.choose import Plan, limited_cache, plan_request
from .planning.machine import parse_memory
from .presets import PARTS, Preset, find_preset, preset_for
from .prompts.cache import PromptCache
from .prompts.extend import extend_requests
from .recipes import scheduler_for
from .request_builder import build_request
from .tasks import TASKS
from .types import Conditioning, Options, Request, RunState, StageReport, Step
from .video import Video
from .weights.checkpoint import Checkpoint, open_checkpoint
from .weights.component import open_component
from .weights.load import (
    check_loras,
    config_of,
    load_image_encoder,
    load_text_encoder,
    load_transformer,
    load_vae,
    modes_of,
    no_progress,
    parse_dtype,
    sizes_of,
    vae_config_of,
)
from .weights.lora import LoraChoice, describe_lora, normalise_loras
from .weights.quantize import check_mode
from .weights.set_loras import set_loras

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of Python 3.11

log = logging.getLogger(__name__)

# What `WanPipeline.stages` yields: the conditioning, then each step, then decoded frames uint8 (n, H, W, 3).
Event = Conditioning | Step | np.ndarray


class WanPipeline:
    """A Wan2.1 model, opened but not resident: calling it makes a video.

    Attributes:
        preset: the released model whose sampling defaults are used.
        guessed_preset: whether it was chosen by the weights' shapes, no name being known.
        config: sizes of the transformer, from its weights.
        quantized: mode in which the transformer and the text encoder are packed, for those that are.
        loras: path and strength of each LoRA in use; `set_loras` changes them.
        sizes: quantisation → the sizes of its networks (`Networks`), as plans need them.
        reports: seconds and peak memory of each stage of the latest run.
        forwards: of the latest run, the transformer's forwards computed, and how many a run without step cache and
            with guidance all along makes; None before its first step.
        stage: the one that is running, as it will be called in ``reports``.
        taehv: the file of TAEHV's weights, if it is used; ``draft`` tells whether for the video itself.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str = "bfloat16",
        preset: Preset | None = None,
        progress: bool = True,
        quantize: str | None = None,
        vae_tiling: str | tuple[int, int] | None = None,
        loras: Iterable[LoraChoice] | LoraChoice | None = None,
        prompt_cache: bool = True,
        memory: str | int | None = None,
        taehv: str | Path | None = None,
        draft: bool = False,
    ):
        kind = parse_dtype(dtype)
        parse_memory(memory)
        self.memory = memory
        self.prompt_cache = prompt_cache
        self.vae_tiling = parse_tiling(vae_tiling)
        self.quantized = modes_of(checkpoint, quantize)
        self.checkpoint = checkpoint
        self.dtype, self.quantize = dtype, quantize
        self.config = config_of(checkpoint)
        self.guessed_preset = preset is None and checkpoint.model is None
        self.preset = preset or (find_preset(checkpoint.model) if checkpoint.model else preset_for(self.config))
        self.progress = progress
        self.latent_channels = self.config.out_dim
        self.reports: list[StageReport] = []
        self.loras = normalise_loras(loras)
        check_loras(checkpoint, self.loras)
        self._merge_loras = True
        self.stage: str | None = None
        self.taehv, self.draft = taehv and Path(taehv), draft
        self._tiny = tiny_autoencoder(checkpoint, taehv, draft)
        self._kept: dict[str, Any] | None = None  # what stays loaded within `keep_loaded`
        self._plan: Plan | None = None  # of the latest run
        self.sizes = lru_cache(partial(sizes_of, checkpoint, kind))
        self.forwards: tuple[int, int] | None = None
        if self.preset.task != self.config.model_type:
            raise ValueError(
                f"{checkpoint.path} holds a {self.config.model_type} model, "
                f"but the task {self.preset.name} needs a {self.preset.task} model"
            )
        if self.preset.task not in TASKS:
            raise ValueError(f"{self.preset.task} models are not supported yet; supported: {', '.join(TASKS)}")

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        dtype: str = "bfloat16",
        quantize: str | None = None,
        memory: str | None = None,
        preset: str | None = None,
        progress: bool = True,
        vae_tiling: str | tuple[int, int] | None = None,
        source: str = "huggingface",
        loras: Iterable[LoraChoice] | LoraChoice | None = None,
        prompt_cache: bool = True,
        taehv: str | Path | None = None,
        draft: bool = False,
        transformer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        image_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
    ) -> WanPipeline:
        """Open a model.

        Args:
            model: "nano" or "nano-i2v" (come with the package); a folder (official, Diffusers' or ComfyUI's layout,
                written by ``weights_convert.py``, or single files); the transformer's own file (safetensors, GGUF or
                .pth), the other parts given apart; a preset's name; a hub id such as "Wan-AI/Wan2.1-T2V-1.3B", or one
                file of such a repository, "owner/name:path/to/file". What is not here is downloaded.
            dtype: of the transformer and the text encoder: "bfloat16" or "float32". The VAE is float32.
            quantize: keep the blocks of transformer and text encoder in few bits: "q8", "q6", "q5", "q4" or "q3"
                (groups of 64; "q4-g32" for others), "mxfp8", "mxfp4", "nvfp4", or "auto", which gives sensitive layers
                more bits. None takes the weights as they are
                stored, "none" unpacks those stored packed. A GGUF's Q8_0, Q5_0, Q5_1, Q4_0 and Q4_1 stay packed with
                None; "nearest" packs its other types in the form that comes nearest.
            memory: what MLX may hold, such as "8GB": decides whether the transformer is resident or its blocks are read
                at every pass, and whether the VAE works in tiles (`plan`). "auto" (or None) is what this machine has
                to spare.
            preset: name in `PRESETS` to take the sampling defaults from, instead of the nearest one.
            progress: show progress bars.
            vae_tiling: decode and encode in tiles of at most this size, (width, height) in pixels or "384x256": the
                same video in less memory and more time; "off" never, "auto" (or None) where memory asks for it.
            source: hub to download from: "huggingface", or "modelscope" (an extra).
            loras: LoRA files to merge into the transformer as it is loaded: each a path, "path:strength" or
                (path, strength); the path may be a repository's file as in ``model``. Quantised weights keep them
                beside, as `set_loras` does.
            prompt_cache: keep encoded prompts on disk (`wan_mlx.prompts.cache`), to encode each only once.
            taehv: weights of TAEHV for Wan 2.1's latents (``taew2_1.pth`` or .safetensors) or their name on a hub, such
                as "lightx2v/Autoencoders:taew2_1.safetensors": its decoder makes the previews.
            draft: decode the video with TAEHV as well: in a fraction of the VAE's time, and a little less fine.
            transformer, text_encoder, vae, image_encoder, tokenizer: a file in any format that is read, or a folder
                or repository that has it, to use instead of what ``model`` has; that is then not downloaded.

        Raises:
            ValueError: an argument is wrong, or the model's task is not supported.
            WeightsError: the folder is incomplete, a file is not what it should be, or the download failed.
        """
        parse_memory(memory)
        check_mode(quantize)
        parse_tiling(vae_tiling)  # before a download
        found, loras = find_preset(preset) if preset else None, normalise_loras(loras)
        parts = dict(zip(PARTS, (transformer, text_encoder, vae, image_encoder, tokenizer), strict=True))
        places = Places(model, {part: place for part, place in parts.items() if place is not None}, loras)
        here = places.resolve(source, progress)
        taehv = None if taehv is None else resolve(taehv, source, progress)
        checkpoint = open_checkpoint(here.model, here.parts)
        if found is None and checkpoint.model is None:
            found = preset_of(model)  # two models of the same sizes differ in their defaults
        return cls(
            checkpoint, dtype, found, progress, quantize, vae_tiling, here.loras, prompt_cache, memory, taehv, draft
        )

    def set_loras(self, loras: Iterable[LoraChoice] | LoraChoice | None = ()) -> None:
        """Use these LoRAs, in place of those before, from the next video on; none restores the model exactly.

        They are kept beside the transformer's weights, so that within `keep_loaded` they can be swapped without
        loading it again (but once, if LoRAs are merged into it).

        Args:
            loras: as for `from_pretrained`.

        Raises:
            ValueError: an entry is no LoRA.
            WeightsError: a file does not suit the model; then nothing has changed.
        """
        loras = resolve_loras(normalise_loras(loras), progress=self.progress)
        check_loras(self.checkpoint, loras)
        kept = (self._kept or {}).get("transformer")
        if kept is not None and kept.lora_state.merged:
            del self._kept["transformer"]
        elif kept is not None:
            set_loras(kept, loras)
        self.loras, self._merge_loras = loras, False

    def __call__(
        self,
        prompt: str,
        callback: Callable[[Step], Any] | None = None,
        extend_prompt: bool | str | Path = False,
        **options: Unpack[Options],
    ) -> Video:
        """Make a video.

        Args:
            prompt: what it should show.
            callback: called with each `Step` as it ends; `Step.preview` shows it. If it returns False, sampling stops
                there and the video is the estimate of that step, `Step.denoised`; its settings then say
                ``stopped_after``.
            extend_prompt: have the prompt written out in detail first, in its own language: True for the default
                language model, or one that mlx-lm runs (`wan_mlx.prompts.extend`).
            options: as for `request`: negative_prompt, width, height, num_frames, steps, guidance_scale, shift,
                solver, seed, and the task's sources. What is left out or None takes the preset's default.

        Raises:
            ValueError: an option is wrong.
            SamplingError: the latents stopped being finite.
        """
        return self._make(*extend_requests([self.request(prompt, **options)], extend_prompt), callback)

    def images(
        self,
        prompt: str,
        num_images: int = 1,
        callback: Callable[[Step], Any] | None = None,
        extend_prompt: bool | str | Path = False,
        **options: Unpack[Options],
    ) -> list[Video]:
        """Make stills of one prompt, with the seeds ``seed``, ``seed + 1``, ...: the model is loaded once.

        Args:
            prompt, callback, extend_prompt, options: as for a video; ``num_frames`` is 1.
            num_images: how many.

        Returns:
            a `Video` of one frame each, the same as if it had been made alone with its seed.

        Raises:
            ValueError: an option is wrong.
            SamplingError: the latents stopped being finite.
        """
        first = self.request(prompt, **{"num_frames": 1, **options})
        requests = extend_requests(first.series(num_images), extend_prompt)
        with self.keep_loaded():
            return [self._make(request, callback) for request in requests]

    def _make(self, request: Request, callback: Callable[[Step], Any] | None) -> Video:
        settings = self.settings(request)
        frames, latents = [], None
        with closing(self.stages(request)) as events:
            for event in events:
                if isinstance(event, Step):
                    latents = event.latents
                    if callback is not None and callback(event) is False and event.index + 1 < event.total:
                        latents, settings["stopped_after"] = event.denoised, event.index + 1
                        break
                elif isinstance(event, np.ndarray):
                    frames.append(event)
        if not frames:
            frames = list(self.decode(latents))
        if self.forwards:
            settings["forwards"] = list(self.forwards)
        return Video(
            frames=np.concatenate(frames),
            latents=latents_to_numpy(latents),
            fps=request.fps,
            settings=settings,
            stages=self.reports,
        )

    @cached_property
    def geometry(self) -> Geometry:
        """The sizes of the model's latents and tokens, from its weights."""
        return geometry_of(self.config, vae_config_of(self.checkpoint))

    request = build_request  # (prompt, **options) → Request
    plan = plan_request  # (request, measure=False) → Plan

    def settings(self, request: Request) -> dict[str, Any]:
        """Everything needed to make the video again, as embedded in its file."""
        return {
            "model": self.preset.name,
            "checkpoint": self.checkpoint.path.name,
            **request.settings(),
            "dtype": self.dtype,
            **({"quantize": self.quantize} if self.quantize else {}),
            **({"quantized": self.quantized} if self.quantized else {}),
            **({"loras": [describe_lora(path, strength) for path, strength in self.loras]} if self.loras else {}),
            **({"draft": self.taehv.name} if self.draft else {}),
            "versions": {"wan_mlx": __version__, "mlx": mx.__version__},
        }

    def stages(self, request: Request, resume: RunState | None = None) -> Iterator[Event]:
        """Run the stages in order and yield what each gives: Conditioning, Steps, decoded frames.

        The caller may stop at any point; what was loaded is then dropped.

        Args:
            resume: what an earlier run of the same request had reached: it goes on from there, bit for bit, and
                yields the step reached once more, with ``seconds`` 0.
        """
        self.reports, self.forwards = [], None
        plan = self.plan(request)
        plan.check()
        if resume is not None:
            plan = plan.as_begun(resume.how)
        self._plan = plan
        with limited_cache(plan):
            yield from self._stages(request, resume)

    @property
    def how(self) -> dict[str, Any]:
        """How the latest run was computed: `Plan.how`, which a resumed run is to follow."""
        return {} if self._plan is None else self._plan.how

    def _stages(self, request: Request, resume: RunState | None) -> Iterator[Event]:
        open_component(self.checkpoint.files["vae"], "vae")  # a damaged file is not for after an hour's work to find
        if resume is None:
            with self._stage("conditioning"):
                resume = RunState(TASKS[request.task].condition(request, self))
                mx.eval(resume.conditioning.arrays())
        yield resume.conditioning
        trim = resume.conditioning.trim_latents
        for step in self._denoise(request, resume):
            latents = without_references(step, trim).latents
            yield replace(without_references(step, trim), previewer=self.preview)
        del resume, step
        yield from self.decode(latents)

    def _denoise(self, request: Request, reached: RunState) -> Iterator[Step]:
        """The step reached and those that are left, for which alone the transformer is loaded."""
        scheduler = scheduler_for(request)
        if reached.steps:
            yield step_reached(scheduler, reached)
        if reached.steps == len(scheduler.timesteps):
            return
        with self._stage("load transformer"):
            model = with_condition(self._load("transformer"), reached.conditioning)
        with self._stage("denoise"):
            cache = make_cache(request.cache, request.steps_made, self.preset.name, request.begin)
            steps = denoise(
                model,
                reached.conditioning,
                scheduler,
                Guidance.of(request),
                cache,
                first=reached.steps,
                state=reached.state,
            )
            for step in self._bar("denoising")(steps, total=len(scheduler.timesteps), initial=reached.steps):
                self.forwards = (cache.computed, step.passes * step.total)
                yield step

    @property
    def keeps_loaded(self) -> bool:
        """Whether it is within `keep_loaded`."""
        return self._kept is not None

    @contextmanager
    def keep_loaded(self) -> Iterator[None]:
        """Within this block transformer and VAE stay loaded from one video to the next, and texts stay encoded."""
        if self._kept is not None:
            yield
            return
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None
            mx.clear_cache()

    def _load(self, network: str) -> Any:
        """The transformer or the VAE: loaded now, or kept since it was."""
        kept = {} if self._kept is None else self._kept
        if network not in kept:
            if network == "transformer":
                bar = self._bar("loading transformer")
                stream = self._plan is not None and self._plan.stream
                kept[network] = load_transformer(
                    self.checkpoint, self.dtype, bar, self.quantize, stream, self.loras, self._merge_loras
                )
            else:
                kept[network] = load_vae(self.checkpoint, progress=self._bar("loading VAE"))
        if network == "transformer" and self._plan is not None:
            kept[network].tokens_at_once = self._plan.tokens_at_once
        return kept[network]

    def encode_text(self, texts: Sequence[str]) -> list[mx.array]:
        """Texts → embeddings zero-padded to (1, 512, text_dim), in one pass over the encoder's weights.

        Texts whose embeddings are on disk are not encoded; if all are, the encoder is not opened.
        """
        known = {} if self._kept is None else self._kept.setdefault("texts", {})
        cache = PromptCache.of(self.checkpoint, self.dtype, self.quantize) if self.prompt_cache else None
        for text in texts:
            if cache and text not in known and (kept := cache.get(text)) is not None:
                known[text] = kept
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            tokenizer = Tokenizer(read_tokenizer(self.checkpoint.files["tokenizer"]))
            encoder = load_text_encoder(self.checkpoint, self.dtype, self._bar("encoding text"), self.quantize)
            known.update(zip(new, encoder([tokenizer(text) for text in new]), strict=True))
            mx.eval([known[text] for text in new])
            for text in new if cache else ():
                cache.put(text, known[text])
        contexts = [pad_context(known[text], TEXT_LEN) for text in texts]
        mx.eval(contexts)
        return contexts

    def encode_images(self, images: mx.array) -> mx.array:
        """Images (N, H, W, 3) in [-1, 1] → CLIP features (N, 257, image_dim)."""
        features = load_image_encoder(self.checkpoint, progress=self._bar("loading CLIP"))(images)
        mx.eval(features)
        return features

    def encode_videos(self, videos: Sequence[Iterable[mx.array]]) -> list[mx.array]:
        """Videos in chunks of frames in [-1, 1] → normalised latents (1, t, h, w, C) each."""
        vae = self._load("vae")
        tile = self._tile("encode_tile")
        return [tiling.encode(vae, self._bar("encoding video")(video), tile) for video in videos]

    def preview(self, latents: mx.array) -> np.ndarray:
        """Small pictures of latents (1, t, h, w, C), such as `Step.denoised`: uint8 (t, h, w, 3).

        Raises:
            ValueError: no colours are known for this VAE's latents.
        """
        return self.previewer(latents)

    @cached_property
    def previewer(self) -> Previewer:
        return TinyDecoder(self._tiny) if self._tiny else latent_map(vae_config_of(self.checkpoint))

    def decode(self, latents: mx.array) -> Iterator[np.ndarray]:
        """Latents (1, t, h, w, C) → uint8 frames (n, H, W, 3), one latent frame's worth at a time."""
        still = latents.shape[1] == 1  # the official code rounds stills and truncates videos
        finish = partial(to_uint8, rounding=still)
        if self.draft:
            with self._stage("decode"):
                for frames in self._bar("decoding a draft")(self._tiny.decode(latents), total=latents.shape[1]):
                    yield finish(frames[0])
            return
        with self._stage("decode"):
            decode = tiling.decode if self.vae_tiling == "off" else tiling.decode_in_memory
            for frames in decode(self._load("vae"), latents, self._tile(), finish, self._bar("decoding")):
                yield frames[0]

    @property
    def tiled(self) -> bool:
        """Whether videos are decoded in tiles, whose frames all come at the end."""
        return self._tile() is not None and not self.draft

    def _tile(self, which: str = "decode_tile") -> tuple[int, int] | None:
        """The VAE's largest tile (width, height) in pixels, or None for whole frames."""
        if isinstance(self.vae_tiling, tuple):
            return self.vae_tiling
        return None if self._plan is None else getattr(self._plan, which)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Time a stage, note its peak memory, and give freed memory back when it ends."""
        mx.clear_cache()
        mx.reset_peak_memory()
        self.stage = name
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stage = None
            self.reports.append(StageReport(name, time.perf_counter() - started, mx.get_peak_memory()))
            mx.clear_cache()
            log.info("%s: %.1f s, peak %.2f GiB", name, self.reports[-1].seconds, self.reports[-1].peak_bytes / 2**30)

    def _bar(self, description: str):
        return partial(tqdm, desc=description, leave=False) if self.progress else no_progress
