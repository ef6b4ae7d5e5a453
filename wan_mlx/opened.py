"""An opened model: its files, choices and sizes; each network is loaded when its stage comes, or kept loaded."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import __version__
from .distributed import Group, open_group
from .events import Listener, Loading, counted
from .experts import check_task, with_experts
from .files.sentencepiece import read_tokenizer
from .geometry import Geometry
from .hub.resolve import Places, preset_of
from .lasting import computes
from .mac import awake
from .media.interpolate import Between, even_moments, interpolate
from .media.preview import Previewer, latent_map, tiny_autoencoder, tiny_preview
from .media.write import to_uint8
from .models import vae_tiling as tiling
from .models.animate_face import FACES_AT_ONCE
from .models.configs import geometry_of
from .models.execution import Execution, encode_images
from .models.text_encoder import pad_context
from .models.tokenizer import CHINESE, Tokenizer, most_tokens
from .models.vae_execution import VAEExecution
from .option import MODEL
from .options import filled, named
from .parallel import ALONE
from .planning.choose import Wanted, parse_tiling, plan_video
from .planning.machine import mlx_version
from .planning.plan import Plan
from .planning.sizes import Networks, sizes_of
from .presets import EXPERTS, FOUR_STEPS, MODULE, find_preset, preset_for
from .progress_bars import progress_of
from .prompts.cache import PromptCache
from .recipes import phase_of, timesteps_of
from .storage import cache_folder, sha256
from .tasks import notes as canvas_notes
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
    modes_of,
    parameters_of,
    text_dtype,
)
from .weights.lora import describe_lora, in_lists, lora_lists
from .weights.lora_info import trigger_words
from .weights.parts import Checkpoint, Part, check_fit
from .weights.rife import find_rife, load_rife
from .weights.set_loras import set_loras

CHANGING = " with changing LoRAs"  # a network kept loaded for requests whose phases change them


class OpenedModel:
    """A Wan model, opened but not resident.

    Attributes:
        preset: the released model whose sampling defaults are used.
        guessed_preset: whether it was chosen by the weights' shapes, no name being known.
        config: sizes of the transformer, from its weights.
        quantized: mode in which the transformer and the text encoder are packed, for those that are.
        loras: path and strength of each LoRA in use; `set_loras` changes them.
        opened_with: the options that it was opened with, as `from_pretrained` takes them.
        taehv: the file of TAEHV's weights, if it is used; ``tiny_vae`` tells whether for the video itself.
        draft: whether what it makes are drafts.
        listener: hears the `Progress` of all work: progress bars, if wanted; during a run, the run.
        plan_at_work: the memory plan of the run that is under way.
    """

    def __init__(self, checkpoint: Checkpoint, **options: Any):
        """``options``: as for `from_pretrained`; LoRAs and TAEHV are files of this machine here."""
        given = filled(MODEL, {"model": checkpoint.path, **options})
        loras = lora_lists(given)
        self.opened_with = {name: value for name, value in {**given, **loras}.items() if name != "progress"}
        self.config = config_of(checkpoint)
        name = given["preset"] or checkpoint.model
        experts = checkpoint.of_kind("transformer")
        known = find_preset(name) if name else preset_of(given["model"])  # models of the same sizes differ in defaults
        self.guessed_preset, self.preset = known is None, known or preset_for(self.config, len(experts))
        named("boundary").check(given["boundary"])
        self.checkpoint = checkpoint = with_experts(checkpoint, self.preset, given, loras)
        if not checkpoint.of_kind("transformer")[0].file.with_name(FOUR_STEPS).exists():
            self.preset = replace(self.preset, recipe="")
        self.dtype, self.quantize, self.memory = given["dtype"], given["quantize"], given["memory"]
        self.vae_tiling = parse_tiling(given["vae_tiling"])
        self.quantized = modes_of(checkpoint, self.quantize)
        self.prompt_cache: bool = given["prompt_cache"]
        self.caffeinate: bool = given["caffeinate"]
        named("parallel").check(given["parallel"])
        self.parallel: str = given["parallel"]
        named("stop_below").check(given["stop_below"])
        self.stop_below: int | None = given["stop_below"]
        check_fit(checkpoint.parts)
        self.latent_channels, self.reads_images = self.config.out_dim, self.config.has_image_branch
        self.listener: Listener = progress_of(given["progress"])
        self.loras = loras["loras"]
        check_loras(checkpoint, self.loras)
        self._merge_loras = True
        self.taehv, self.draft = given["taehv"] and Path(given["taehv"]), given["draft"]
        self._tiny = tiny_autoencoder(checkpoint, self.taehv, given["tiny_vae"])
        self.tiny_vae: bool = self._tiny is not None and (given["tiny_vae"] or given["draft"])
        self._interpolators: dict[str, Path] = {}
        self._kept: dict[str, Any] | None = None  # within `keep_loaded`: the networks and texts that stay
        self.plan_at_work: Plan | None = None
        self.running = threading.Lock()  # held by the run that is under way
        check_task(checkpoint.path, self.config, self.preset, given)

    def __repr__(self) -> str:
        loras = f"{len(self.loras)} LoRA{'s' * (len(self.loras) > 1)}" if self.loras else ""
        said = (self.preset.name, self.preset.task, self.dtype, *sorted({*self.quantized.values()}), loras)
        return f"{type(self).__name__}({', '.join(filter(None, said))})"

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

    @property
    def group(self) -> Group | None:
        """The machines that make its videos together; None if this one is alone."""
        return None if self.parallel == ALONE else open_group()

    @property
    def wider_dtype(self) -> str:
        """The dtype to try where the latents stop being finite: bfloat16 has float32's range."""
        return "bfloat16" if self.dtype == "float16" else "float32"

    @cached_property
    def geometry(self) -> Geometry:
        """The sizes of the model's latents and tokens, from its weights."""
        return geometry_of(self.config, config_of(self.checkpoint, "vae"))

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

    def sizes(self, quantize: str | None = None) -> Networks:
        """The sizes of its networks, the transformer and the text encoder packed so."""
        return sizes_of(self.checkpoint, self.dtype, quantize, loras=self.loras, merge=self._merge_loras)

    def settings(self, request: Request) -> dict[str, Any]:
        """Everything needed to make the video again, as embedded in its file."""
        module = self.checkpoint.files.get(MODULE)
        experts = {part.name: part for part in self.checkpoint.parts if part.name in EXPERTS}
        chosen = {
            "boundary": self.checkpoint.boundary,
            "quantize": self.quantize,
            **{f"quantize_{name.removesuffix('_noise')}": part.quantize for name, part in experts.items()},
            "quantized": self.quantized,
            "loras": [describe_lora(path, strength) for path, strength in self.loras],
            **{
                f"loras_{name.removesuffix('_noise')}": [describe_lora(path, strength) for path, strength in part.loras]
                for name, part in experts.items()
            },
            MODULE: module and module.name,
            **{name: Path(given).name for name in EXPERTS if (given := self.opened_with[name])},
            "draft": self.draft,
            "tiny_vae": self.tiny_vae and self.taehv and self.taehv.name,
            "tokens": self.cut_texts(request),
            # A name alone does not tell files apart.
            "source_sha256": [sha256(path) for path in request.source_files if path.is_file()],
        }
        return {
            "model": self.preset.name,
            "checkpoint": self.checkpoint.path.name,
            **request.settings(os.path.basename),  # where files lie on this machine is nobody's business
            "dtype": self.dtype,
            **{name: value for name, value in chosen.items() if value},
            "versions": {"wan_mlx": __version__, "mlx": mlx_version()},
        }

    def cut_texts(self, request: Request) -> dict[str, tuple[int, int]]:
        """Of the texts that are too long for the model: how many tokens it reads, and how many there are."""
        most = self.config.text_len
        texts = {name: getattr(request, name) for name in ("prompt", "negative_prompt")[: request.passes]}
        tokens = {name: self.tokenizer.length(text) for name, text in texts.items() if most_tokens(text) > most}
        return {name: (most, count) for name, count in tokens.items() if count > most}

    def notes(self, request: Request) -> list[str]:
        """Lines about texts and sources that are not taken whole, or as they are."""
        texts = [
            f"the {name.replace('_', ' ')} has {count} tokens, of which the model reads {most}: its end is left out"
            for name, (most, count) in self.cut_texts(request).items()
        ]
        return [*texts, *self.unknown_words(request), *canvas_notes(request)]

    def unknown_words(self, request: Request) -> list[str]:
        """For a model that knows few words: which of the prompt neither it nor a LoRA knows, and the ones it does."""
        if not self.preset.vocabulary or not (strange := self.tokenizer.unknown(request.prompt)):
            return []
        taught = " ".join(trigger_words(path) for path, _ in self.loras).casefold()
        if not (strange := [word for word in strange if word.casefold() not in taught]):
            return []
        english, chinese = self.preset.vocabulary
        known = chinese if CHINESE.search(request.prompt) else english
        return [f"{self.preset.name} does not know {', '.join(strange)}. It knows: {known}"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(read_tokenizer(self.checkpoint.part("tokenizer").file))

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

    def expert(self, timestep: float, request: Request | None = None) -> Part:
        """The transformer that serves a timestep: by its boundary, unless the phases of a request say otherwise."""
        phase = request and phase_of(request, timestep)
        parts = self.checkpoint.of_kind("transformer")
        if phase and phase.expert:
            return next(part for part in parts if part.name == phase.expert)
        return next(part for part in parts if part.serves(timestep))

    def switch(self, request: Request) -> int | None:
        """The step of a request at which another expert takes over; None if none does."""
        experts = [self.expert(timestep, request) for timestep in timesteps_of(request)]
        return next((index for index, expert in enumerate(experts) if expert is not experts[0]), None)

    def loras_at(self, request: Request, timestep: float) -> list[tuple[Path, float]]:
        """The LoRAs of the transformer that serves a timestep, with the strengths that they have in its phase; none at
        strength 0. With the preset's own recipe goes its LoRA.

        Raises:
            ValueError: the phase has strengths for another number of LoRAs.
        """
        own, phase = self.expert(timestep, request).loras, phase_of(request, timestep)
        loras = [*self.loras, *own]
        factors = phase.factors(len(own), len(self.loras)) if phase else [1.0] * len(loras)
        found = [(path, strength * factor) for (path, strength), factor in zip(loras, factors, strict=True)]
        if self._by_own_recipe(request):
            found.append((self.expert(timestep, request).file.with_name(FOUR_STEPS), 1.0))
        return [lora for lora in found if lora[1]]

    def _by_own_recipe(self, request: Request) -> bool:
        return bool(self.preset.recipe) and request.recipe == self.preset.recipe

    def changes_loras(self, request: Request, part: Part) -> bool:
        """Whether a transformer's LoRAs change in the course of a request, or one is there for this request alone."""
        if self._by_own_recipe(request):
            return True
        served = [timestep for timestep in timesteps_of(request) if self.expert(timestep, request) is part]
        loras = [self.loras_at(request, timestep) for timestep in served]
        return any(one != loras[0] for one in loras)

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

        tokens = face(counted(self.listener, "encoding face")(chunks()))
        nothing = face.blank(frames) if blank else None
        mx.eval(tokens, nothing)
        return tokens, nothing

    def encode_videos(self, videos: Sequence[Iterable[mx.array]]) -> list[mx.array]:
        """Videos in chunks of frames in [-1, 1] → normalised latents (1, t, h, w, C) each."""
        vae, tile = self.load_vae(), self.tile_of("encode_tile")
        progress = counted(self.listener, "encoding video")
        return [tiling.encode(vae, progress(video), tile) for video in videos]

    def decode(self, latents: mx.array, last: tiling.LastFrames | None = None) -> Iterator[np.ndarray]:
        """Latents (1, t, h, w, C) → uint8 frames (n, H, W, 3), one latent frame's worth at a time.

        ``last``: takes the last of them as they are decoded, too.
        """
        still = latents.shape[1] == 1  # the official code rounds stills and truncates videos
        finish = partial(to_uint8, rounding=still)
        if self.tiny_vae and self._tiny:
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
