"""What a model was opened with: its files, options, LoRAs and experts, and what follows for a request."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from . import __version__
from .distributed import Group, open_group
from .events import Listener
from .experts import check_task, with_experts
from .files.sentencepiece import read_tokenizer
from .geometry import Geometry
from .hub.resolve import preset_of
from .media.preview import tiny_autoencoder
from .models.configs import geometry_of
from .models.tokenizer import CHINESE, Tokenizer, most_tokens
from .option import MODEL
from .options import filled, named
from .parallel import ALONE
from .planning.choose import parse_tiling
from .planning.machine import mlx_version
from .planning.sizes import Networks, sizes_of
from .presets import EXPERTS, FOUR_STEPS, MODULE, find_preset, preset_for
from .progress_bars import progress_of
from .recipes import phase_of, timesteps_of
from .storage import sha256
from .tasks import notes as source_notes
from .types import Request
from .weights.load import check_loras, config_of, modes_of
from .weights.lora import describe_lora, lora_lists
from .weights.lora_info import trigger_words
from .weights.parts import Checkpoint, Part, check_fit


class ModelChoices:
    """The files and options of a model, none of whose networks is loaded.

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
    """

    def __init__(self, checkpoint: Checkpoint, **options: Any):
        """``options``: as for `from_pretrained`; LoRAs and TAEHV are files of this machine here."""
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(f"write {type(self).__name__}.from_pretrained({str(checkpoint)!r}, ...)")
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
        check_task(checkpoint.path, self.config, self.preset, given)

    def __repr__(self) -> str:
        loras = f"{len(self.loras)} LoRA{'s' * (len(self.loras) > 1)}" if self.loras else ""
        said = (self.preset.name, self.preset.task, self.dtype, *sorted({*self.quantized.values()}), loras)
        return f"{type(self).__name__}({', '.join(filter(None, said))})"

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
        return [*texts, *self.unknown_words(request), *self.unknown_size(request), *source_notes(request)]

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

    def unknown_size(self, request: Request) -> list[str]:
        """For a model that knows few sizes: that a video's is none of them."""
        learned, asked = self.preset.learned, (request.width, request.height)
        if not learned or asked in learned:
            return []
        sizes = ", ".join(f"{width}x{height}" for width, height in learned)
        return [f"{self.preset.name} learned to draw at {sizes}; at {asked[0]}x{asked[1]} things may come out wrong"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(read_tokenizer(self.checkpoint.part("tokenizer").file))

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
