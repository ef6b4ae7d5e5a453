"""The pipeline: an opened model that makes videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from .hub.resolve import Places, resolve
from .lasting import computes
from .mac import awake
from .media.video import Video
from .opened import OpenedModel
from .option import MODEL, REQUEST
from .options import PROMPT, RequestOptions, filled, named, of, told
from .other_words import ATTRIBUTES, ours
from .planning.choose import parse_tiling
from .planning.machine import parse_memory
from .presets import GIVEN_APART, find_preset
from .progress_bars import ProgressBars, progress_of
from .prompts.extend import extend_requests
from .request_builder import build_request
from .runs.run import Output, Run
from .types import LoraChoices, Request, RunState, Source, Step
from .weights.checkpoint import check_here, open_checkpoint
from .weights.lora import in_lists, lora_lists
from .weights.quantize import check_mode

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of Python 3.11

# Options of `WanPipeline.from_pretrained` that may be given without their names.
IN_ORDER = ("dtype", "quantize", "memory", "preset", "progress")


def spelled(face: str, given: dict[str, Any]) -> dict[str, Any]:
    """Of a function's arguments those that are options of ``face``."""
    return {option.name: given[option.name] for option in of(face) if option is not PROMPT and option.name in given}


class WanPipeline(OpenedModel):
    """A Wan model, opened but not resident: calling it makes a video. Its attributes are `OpenedModel`'s."""

    @classmethod
    @told(MODEL, IN_ORDER)
    @computes
    def from_pretrained(
        cls,
        model: str | Path,
        # options: model, by docs/make_signatures.py
        dtype: str = "bfloat16",
        quantize: str | int | None = None,
        memory: str | None = None,
        preset: str | None = None,
        progress: bool = True,
        *,
        transformer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        image_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        high_noise: str | Path | None = None,
        low_noise: str | Path | None = None,
        boundary: float | None = None,
        vace_module: str | Path | None = None,
        source: str | None = None,
        quantize_high: str | int | None = None,
        quantize_low: str | int | None = None,
        loras: LoraChoices = None,
        loras_high: LoraChoices = None,
        loras_low: LoraChoices = None,
        vae_tiling: str | tuple[int, int] | None = None,
        caffeinate: bool = True,
        stop_below: int | None = None,
        prompt_cache: bool = True,
        taehv: str | Path | None = None,
        draft: bool = False,
        **other: Any,
    ) -> WanPipeline:
        """Open a model.

        Args:
            model: "nano" or "nano-i2v" (come with the package); a folder (official, Diffusers' or ComfyUI's layout,
                written by ``weights_convert.py``, or single files); the transformer's own file (safetensors, GGUF or
                .pth), the other parts given apart; a preset's name; a hub id such as "Wan-AI/Wan2.1-T2V-1.3B", or one
                file of such a repository, "owner/name:path/to/file". Missing files are downloaded.

        Raises:
            ValueError: an option is wrong, or the model's task is not supported.
            WeightsError: the folder is incomplete, a file is of another kind, or the download failed.
        """
        if not isinstance(model, str | Path):
            raise ValueError(f"the model is {model!r}, expected a name such as \"nano\", or a path")
        given = filled(MODEL, ours(MODEL, {**spelled(MODEL, locals()), **other}))
        parse_memory(given["memory"])
        for mode in ("quantize", "quantize_high", "quantize_low"):
            check_mode(given[mode])
        named("boundary").check(given["boundary"])
        parse_tiling(given["vae_tiling"])  # before a download
        if given["preset"]:
            find_preset(given["preset"])
        loras = lora_lists(given)
        source, listener = given["source"], progress_of(given["progress"])
        parts = {part: given[part] for part in GIVEN_APART if given[part] is not None}
        places = Places(model, parts, [lora for one in loras.values() for lora in one])
        check_here(*places.here())
        try:
            with awake(given["caffeinate"]):
                here = places.fetch(source, listener)
                taehv = given["taehv"] and resolve(given["taehv"], source, listener)
        finally:
            if isinstance(listener, ProgressBars):  # of a download that was cut
                listener.close()
        found = {**in_lists(here.loras, like=loras), "taehv": taehv, "progress": listener}
        opened = cls(open_checkpoint(here.model, here.parts), **{**given, **found})
        opened.opened_with |= {**loras, "taehv": given["taehv"]}
        return opened

    @overload
    def __call__(
        self,
        prompt: str,
        callback: Callable[[Step], Any] | None = None,
        extend_prompt: bool | str | Path = False,
        **options: Unpack[RequestOptions],
    ) -> Video: ...

    @overload
    def __call__(
        self,
        prompt: list[str] | tuple[str, ...],
        callback: Callable[[Step], Any] | None = None,
        extend_prompt: bool | str | Path = False,
        **options: Unpack[RequestOptions],
    ) -> list[Video]: ...

    @told(REQUEST)
    @computes
    def __call__(
        self,
        prompt: str | Sequence[str],
        callback: Callable[[Step], Any] | None = None,
        extend_prompt: bool | str | Path = False,
        # options: request, by docs/make_signatures.py
        *,
        negative_prompt: str | None = None,
        size: str | tuple[int, int] | None = None,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        image: Source | None = None,
        last_image: Source | None = None,
        video: Source | None = None,
        strength: float | None = None,
        src_video: Source | None = None,
        src_mask: Source | None = None,
        src_ref_images: Sequence[Source] = (),
        fit: str | None = "official",
        context_scale: float = 1.0,
        steps: int | None = None,
        guidance_scale: float | tuple[float, float] | None = None,
        shift: float | None = None,
        solver: str | None = None,
        seed: int | None = None,
        cache: str | None = "none",
        recipe: str | None = None,
        guidance_range: tuple[float, float] = (0.0, 1.0),
        cfg_zero: bool | int | None = None,
        skip_layers: Sequence[int] = (),
        skip_range: tuple[float, float] = (0.1, 1.0),
        **other: Any,
    ) -> Video | list[Video]:
        """Make a video, or of a list of prompts one of each, for which the model is loaded once.

        The command line's names of options (``frames``, ``size="832x480"``) and Diffusers' do as well.

        Args:
            prompt: a description of the video, or a list of them: then a list of videos is returned, each with the
                ``seed``, or with one of its own if none is given.
            callback: called with each `Step` as it ends; `Step.preview` shows it. If it returns False, sampling stops
                there and the video is the estimate of that step, `Step.denoised`; its settings then say
                ``stopped_after``.
            extend_prompt: have the prompt written out in detail first, in its own language: True for the default
                language model, or one that mlx-lm runs (`wan_mlx.prompts.extend`). Of Wan2.2's models with an image the
                prompt may then be empty.
            options: as for `request`.

        Raises:
            ValueError: an option is wrong.
            SamplingError: the latents stopped being finite.
        """
        options = {**spelled(REQUEST, locals()), **other}
        if isinstance(prompt, str):
            asked = [self.request(prompt, **options)]
            (request,) = extend_requests(self.preset, asked, extend_prompt, self.caffeinate)
            return self.run(request).video(callback)
        if not isinstance(prompt, Sequence) or not prompt:
            raise ValueError(f"the prompt is {prompt!r}, expected a text, or a list of texts for a list of videos")
        asked = [self.request(text, **options) for text in prompt]
        requests = extend_requests(self.preset, asked, extend_prompt, self.caffeinate)
        with self.keep_loaded():
            texts = [text for made in requests for text in (made.prompt, made.negative_prompt)[: made.passes]]
            self.encode_text(list(dict.fromkeys(texts)))
            return [self.run(request).video(callback) for request in requests]

    @told(REQUEST)
    @computes
    def images(
        self,
        prompt: str,
        num_images: int = 1,
        callback: Callable[[Step], Any] | None = None,
        extend_prompt: bool | str | Path = False,
        **options: Unpack[RequestOptions],
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
        first = self.request(prompt, **{"num_frames": 1, **ours(REQUEST, cast(dict[str, Any], options))})
        requests = extend_requests(self.preset, first.series(num_images), extend_prompt, self.caffeinate)
        with self.keep_loaded():
            return [self.run(request).video(callback) for request in requests]

    @told(REQUEST)
    def request(self, prompt: str, **options: Unpack[RequestOptions]) -> Request:
        """Fill in the model's defaults and check every value; ``options`` are those of `RequestOptions`.

        Raises:
            ValueError: a value is wrong; names the nearest valid one.
        """
        given = ours(REQUEST, cast(dict[str, Any], options))
        experts = len(self.checkpoint.of_kind("transformer"))
        return build_request(self.preset, self.config, self.geometry, prompt, experts, **given)

    def run(self, request: Request, resume: RunState | None = None) -> Run:
        """One request on its way to a video: iterate over the `Run` for its events.

        Args:
            resume: the state of an earlier run of the same request: this one goes on from there, bit for bit, and
                tells the step reached once more, with ``seconds`` 0.

        Raises:
            MemoryPlanError: it does not fit.
        """
        return Run(self, request, resume)

    def stages(self, request: Request, resume: RunState | None = None) -> Iterator[Output]:
        """Run the stages in order and yield their results: Conditioning, Steps, decoded frames uint8 (n, H, W, 3).

        The caller may stop at any point; loaded networks are then dropped.

        Args:
            resume: as for `run`.
        """
        run = self.run(request, resume)
        del resume  # with every step the arrays it holds become old
        yield from run.outputs()

    def __getattr__(self, name: str) -> Any:
        hint = ATTRIBUTES.get(name)
        raise AttributeError(f"a {type(self).__name__} has no {name!r}" + f": {hint}" * bool(hint))
