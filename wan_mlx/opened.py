"""An opened model at work: each network is loaded when its stage comes, or kept loaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .events import Loading, counted
from .hub.resolve import Places
from .lasting import computes
from .mac import awake
from .media.interpolate import Between, even_moments, interpolate
from .media.preview import Previewer, latent_map, tiny_preview
from .media.write import to_uint8
from .model_choices import ModelChoices
from .models import vae_tiling as tiling
from .models.animate_face import FACES_AT_ONCE
from .models.execution import Execution, encode_face, encode_images
from .models.text_encoder import pad_context
from .models.vae_execution import VAEExecution
from .planning.choose import Wanted, plan_video
from .planning.plan import Plan
from .prompts.cache import PromptCache
from .storage import cache_folder
from .types import LoraChoices, Request
from .weights.check_sums import check_once
from .weights.component import open_component
from .weights.load import (
    check_loras,
    config_of,
    load_audio_encoder,
    load_face,
    load_image_encoder,
    load_text_encoder,
    load_transformer,
    load_vae,
    parameters_of,
    text_dtype,
)
from .weights.lora import in_lists, lora_lists
from .weights.parts import Checkpoint, Part
from .weights.rife import find_rife, load_rife
from .weights.set_loras import set_loras

CHANGING = " with changing LoRAs"  # a network kept loaded for requests whose phases change them


class OpenedModel(ModelChoices):
    """A Wan model, opened but not resident.

    Attributes: those of `ModelChoices`, and
        plan_at_work: the memory plan of the run that is under way.
    """

    def __init__(self, checkpoint: Checkpoint, **options: Any):
        super().__init__(checkpoint, **options)
        self._interpolators: dict[str, Path] = {}
        self._kept: dict[str, Any] | None = None  # within `keep_loaded`: the networks and texts that stay
        self.plan_at_work: Plan | None = None
        self.running = threading.Lock()  # held by the run that is under way

    @computes
    def set_loras(self, loras: LoraChoices = ()) -> None:
        """Use these LoRAs, in place of those before, from the next video on; none restores the model exactly.

        They are kept beside the transformer's weights, so that within `keep_loaded` they can be swapped without
        loading it again (but once, if LoRAs are merged into it).

        Args:
            loras: as for `from_pretrained`; {"high": …, "low": …} gives a model of two experts those of each.

        Raises:
            ValueError: an entry is no LoRA, or the model has one transformer and its LoRAs are given as of two.
            WeightsError: a file does not suit the model; then nothing has changed.
        """
        given = lora_lists({"loras": loras})
        row = [lora for one in given.values() for lora in one]
        found = in_lists(Places(self.checkpoint.path, loras=row).fetch(listener=self.listener).loras, like=given)
        own = tuple(found["loras_high"]), tuple(found["loras_low"])
        checkpoint = self.checkpoint
        if checkpoint.has_experts or any(own):
            checkpoint = checkpoint.with_experts(loras=own)
        check_loras(checkpoint, found["loras"])
        there = self._kept or {}
        for part in checkpoint.of_kind("transformer"):
            kept = there.get(part.name)
            if kept is not None and kept.model.source.merged:
                del there[part.name]
            elif kept is not None:
                set_loras(kept, [*found["loras"], *part.loras])
        self.checkpoint, self.loras, self._merge_loras = checkpoint, found["loras"], False
        self.opened_with |= given

    @computes
    def plan(
        self, request: Request, measure: bool = False, kept: bool = False, parallel: str | None = None
    ) -> Plan:
        """How a request keeps within the memory there is: which parts are resident, streamed or tiled, and the peaks.

        Args:
            measure: times too, for which parts of the networks are timed for some seconds.
            kept: as within `keep_loaded`.
            parallel: how several machines would share it, to be told how fast they would be.
        """
        kept = kept or self._kept is not None
        wanted = Wanted(
            self.preset.name, request, self.quantize, self.memory, self.vae_tiling, kept, self.tiny_vae, parallel
        )
        return plan_video(wanted, lru_cache(self.sizes), measure, partial(parameters_of, self.checkpoint))

    @property
    def keeps_loaded(self) -> bool:
        """Whether `keep_loaded` holds."""
        return self._kept is not None

    @contextmanager
    def keep_loaded(self) -> Iterator[None]:
        """Within this block transformer and VAE stay loaded from one video to the next, and texts stay encoded."""
        if self._kept is not None:
            yield
            return
        self._kept = {}
        try:
            with awake(self.caffeinate):
                yield
        finally:
            self._kept = None
            mx.clear_cache()

    @contextmanager
    def keeping(self, part: Part, model: Execution) -> Iterator[None]:
        """Within this block `keep_loaded` holds, and the network of ``part`` is ``model``, which is loaded already."""
        with self.keep_loaded():
            assert self._kept is not None
            self._kept[part.name] = model
            yield

    def _kept_or(self, name: str, load: Callable[[], Any]) -> Any:
        """The object kept under this name, or the result of ``load``, which is kept within `keep_loaded`."""
        if self._kept is None:
            return load()
        if name not in self._kept:
            self._kept[name] = load()
        return self._kept[name]

    @contextmanager
    def _loading(self, part: str) -> Iterator[None]:
        """Tell of a part that is loaded within this block."""
        self.listener(Loading(part))
        started = time.perf_counter()
        yield
        self.listener(Loading(part, time.perf_counter() - started))

    def check_files(self) -> None:
        """Raise WeightsError if a file is damaged, as far as check sums and the VAE's header tell."""
        open_component(self.checkpoint.part("vae").file, "vae")
        try:
            folder: Path | None = cache_folder()
        except (OSError, RuntimeError):  # without a home folder nothing is kept
            folder = None
        check_once(self.checkpoint.files.values(), folder, self.listener)

    def load_expert(self, part: Part, loras: Sequence[tuple[Path, float]] | None = None) -> Execution:
        """A transformer: loaded now, or kept since it was.

        ``loras``: to begin with, where they change later; None for the model's own.
        """
        plan = self.plan_at_work

        def load() -> Execution:
            with self._loading(part.label):
                model = load_transformer(
                    part,
                    self.dtype,
                    counted(self.listener, f"loading {part.label}"),
                    part.quantize or self.quantize,
                    stream=plan is not None and plan.stream,
                    loras=[*self.loras, *part.loras] if loras is None else loras,
                    merge=self._merge_loras and loras is None,
                )
            return model if isinstance(model, Execution) else Execution(model)

        names = {False: part.name, True: part.name + CHANGING}
        if self._kept is not None:
            self._kept.pop(names[loras is None], None)
        if plan is not None and not plan.all_stay and self._kept is not None:
            for other in self.checkpoint.of_kind("transformer"):
                if other is not part:
                    self._kept.pop(other.name, None)
                    self._kept.pop(other.name + CHANGING, None)
        model: Execution = self._kept_or(names[loras is not None], load)
        if loras is not None:
            set_loras(model, loras)
        if plan is not None:
            model.tokens_at_once, model.shares = plan.tokens_at_once, plan.shares
        return model

    def drop_beyond(self, plan: Plan) -> None:
        """Within `keep_loaded`, drop the transformers that an earlier video's plan kept and this one does not count."""
        parts = [part.name for part in self.checkpoint.of_kind("transformer") if part.name in (self._kept or ())]
        for place, name in enumerate(parts):
            assert self._kept is not None, "there are none without"
            is_streamed = self._kept[name].blocks is not None
            if (place and not plan.all_stay) or is_streamed != plan.stream:
                del self._kept[name]

    def load_vae(self) -> VAEExecution:
        """The VAE: loaded now, or kept since it was."""

        def load() -> VAEExecution:
            with self._loading("vae"):
                return VAEExecution(load_vae(self.checkpoint, progress=counted(self.listener, "loading VAE")))

        return self._kept_or("vae", load)

    @computes
    def encode_text(self, texts: Sequence[str]) -> list[mx.array]:
        """Texts → embeddings zero-padded to (1, 512, text_dim), in one pass over the encoder's weights.

        Texts whose embeddings are on disk are not encoded; if all are, the encoder is not opened.
        """
        known = self._kept_or("texts", dict)
        quantize = self.checkpoint.part("text_encoder").quantize or self.quantize
        dtype = text_dtype(self.dtype)
        cache = PromptCache.of(self.checkpoint, dtype, quantize) if self.prompt_cache else None
        for text in texts:
            if cache and text not in known and (kept := cache.get(text)) is not None:
                known[text] = kept
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            with self._loading("text encoder"):
                progress = counted(self.listener, "encoding text")
                encoder = load_text_encoder(self.checkpoint, dtype, progress, quantize)
                encoded = encoder([self.tokenizer(text, self.config.text_len) for text in new])
                mx.eval(encoded)
                mx.synchronize()  # only now a failed command buffer is sure to show
            known.update(zip(new, encoded, strict=True))
            if cache:
                for text in new:
                    cache.put(text, known[text])
        contexts = [pad_context(known[text], self.config.text_len) for text in texts]
        mx.eval(contexts)
        return contexts

    def encode_audio(self, sound: mx.array) -> mx.array:
        """Sound (samples,), 16,000 a second → wav2vec's hidden states (layers, frames, width), 50 a second."""
        with self._loading("audio encoder"):
            encoder = load_audio_encoder(self.checkpoint, progress=counted(self.listener, "loading wav2vec"))
        states = encoder(sound)
        mx.eval(states)
        mx.synchronize()  # only now a failed command buffer is sure to show
        return states

    def encode_images(self, images: mx.array) -> mx.array:
        """Images (N, H, W, 3) in [-1, 1] → CLIP features (N, 257, image_dim)."""
        with self._loading("image encoder"):
            encoder = load_image_encoder(self.checkpoint, progress=counted(self.listener, "loading CLIP"))
        return encode_images(encoder, images)

    def encode_face(self, pictures: Iterable[np.ndarray], blank: bool) -> tuple[mx.array, mx.array | None]:
        """Pictures float32 (side, side, 3) in [-1, 1] of a face → tokens float32 (1, t, tokens, D) for Animate, and the
        same of no face if ``blank``."""
        with self._loading("face encoder"):
            part = self.checkpoint.part("transformer")
            face = load_face(part, progress=counted(self.listener, "loading face encoder"))
        frames, left = 0, iter(pictures)

        def chunks() -> Iterator[mx.array]:
            nonlocal frames
            while chunk := list(islice(left, FACES_AT_ONCE)):
                frames += len(chunk)
                yield mx.array(np.stack(chunk))

        tokens = encode_face(face, counted(self.listener, "encoding face")(chunks()))
        nothing = face.blank(frames) if blank else None
        mx.eval(tokens, nothing)
        return tokens, nothing

    def encode_videos(self, videos: Sequence[Iterable[mx.array]]) -> list[mx.array]:
        """Videos in chunks of frames in [-1, 1] → normalised latents (1, t, h, w, C) each."""
        if not videos:
            return []
        vae, tile = self.load_vae(), self.tile_of("encode_tile")
        progress = counted(self.listener, "encoding video")
        return [tiling.encode(vae, progress(video), tile) for video in videos]

    def decode(self, latents: mx.array, last: tiling.LastFrames | None = None) -> Iterator[np.ndarray]:
        """Latents (1, t, h, w, C) → uint8 frames (n, H, W, 3), one latent frame's worth at a time.

        Of several machines the first has them.

        ``last``: takes the last of them as they are decoded, too.
        """
        still = latents.shape[1] == 1  # the official code rounds stills and truncates videos
        finish = partial(to_uint8, rounding=still)
        if self.tiny_vae and self._tiny:
            if self.group is not None and self.group.rank:
                return  # it is too little to share
            progress = counted(self.listener, "decoding by TAEHV")
            if last is not None:
                geometry = self.geometry
                height, width = (geometry.spatial * side for side in latents.shape[2:4])
                last.begin(height, width, geometry.num_frames(latents.shape[1]))
            for frames in progress(self._tiny.decode(latents), total=latents.shape[1]):
                if last is not None:
                    last.take(frames)
                yield finish(frames[0])
            return
        decode = tiling.decode if self.vae_tiling == "off" else tiling.decode_in_memory
        vae, tile, progress = self.load_vae(), self.tile_of("decode_tile"), counted(self.listener, "decoding")
        for frames in decode(vae, latents, tile, finish, progress, last, self.group):
            yield frames[0]

    def interpolator(self, name: str) -> Path:
        """The file of RIFE's weights that a request's ``interpolate`` names; downloaded if it is not here."""
        if name not in self._interpolators:
            self._interpolators[name] = find_rife(name, self.opened_with["source"], self.listener)
        return self._interpolators[name]

    def check_interpolation(self, request: Request) -> None:
        """Raise WeightsError if a request needs RIFE, and its weights cannot be had or used."""
        if request.interpolate:
            load_rife(self.interpolator(request.interpolate))

    def smoothed(self, request: Request, chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Frames uint8 (n, H, W, 3) of the model → those of the file."""
        if not request.interpolate:
            return chunks
        between = Between(load_rife(self.interpolator(request.interpolate)))
        return interpolate(chunks, even_moments(Fraction(request.model_fps), Fraction(request.fps)), between)

    def tile_of(self, which: str) -> tuple[int, int] | None:
        """The VAE's largest tile (width, height) in pixels, or None for whole frames; ``which``: a field of the plan.
        """
        return self.vae_tiling if isinstance(self.vae_tiling, tuple) else getattr(self.plan_at_work, which, None)

    @computes
    def preview(self, latents: mx.array) -> np.ndarray:
        """Small pictures of latents (1, t, h, w, C), such as `Step.denoised`: uint8 (t, h, w, 3).

        Raises:
            ValueError: no colours are known for this VAE's latents.
        """
        return self.previewer(latents)

    @cached_property
    def previewer(self) -> Previewer:
        return partial(tiny_preview, self._tiny) if self._tiny else latent_map(config_of(self.checkpoint, "vae"))
