"""The pipeline: an opened model that makes videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from .distributed import open_group
from .experts import check_task, with_experts
from .geometry import Geometry
from .hub.names import parse_location
from .hub.resolve import Places, preset_of, resolve
from .lasting import computes
from .mac import awake
from .media.preview import published_taehv
from .media.video import Video
from .models.configs import TransformerConfig
from .opened import OpenedModel
from .option import MODEL, REQUEST
from .options import PROMPT, RequestOptions, filled, named, of, told
from .other_words import ATTRIBUTES, of_faces, ours
from .parallel import ALONE
from .planning.choose import Wanted, parse_tiling, plan_video
from .planning.machine import parse_memory
from .planning.plan import Plan
from .planning.sizes import not_here, sizes_of
from .presets import GIVEN_APART, MODULE, PRESETS, RELIGHTING, Preset, find_preset
from .progress_bars import ProgressBars, progress_of
from .prompts.extend import extend_requests
from .request_builder import build_request
from .runs.run import Output, Run
from .types import LoraChoices, Request, RunState, Source, Step
from .weights.checkpoint import check_here, find_part, joined, open_checkpoint
from .weights.load import parse_dtype
from .weights.lora import in_lists, lora_lists
from .weights.parts import Checkpoint, check_sizes
from .weights.quantize import check_mode

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of Python 3.11

# Options of `WanPipeline.from_pretrained` that may be given without their names.
IN_ORDER = ("dtype", "quantize", "memory", "preset", "progress")


def spelled(face: str, given: dict[str, Any]) -> dict[str, Any]:
    """Of a function's arguments those that are options of ``face``."""
    return {option.name: given[option.name] for option in of(face) if option is not PROMPT and option.name in given}


def checked(model: str | Path, given: dict[str, Any]) -> tuple[dict[str, Any], Places]:
    """All options of a model, and the places that they name; what can be wrong before a download is checked.

    Raises:
        TypeError, ValueError: an option is wrong.
    """
    if not isinstance(model, str | Path):
        raise ValueError(f"the model is {model!r}, expected a name such as \"nano\", or a path")
    given = filled(MODEL, ours(MODEL, {"model": model, **given}))
    parse_memory(given["memory"])
    parse_dtype(given["dtype"])
    for mode in ("quantize", "quantize_high", "quantize_low"):
        check_mode(given[mode])
    for name in ("boundary", "parallel", "stop_below"):
        named(name).check_type(given[name])
        named(name).check(given[name])
    parse_tiling(given["vae_tiling"])
    if given["preset"]:
        find_preset(given["preset"])
    parts = {part: given[part] for part in GIVEN_APART if given[part] is not None}
    if given["use_relighting_lora"]:
        given["loras"] = with_relighting(model, lora_lists(given)["loras"])
    return given, Places(model, parts, [lora for loras in lora_lists(given).values() for lora in loras])


def with_relighting(model: str | Path, loras: list[tuple[Path, float]]) -> list[tuple[Path, float]]:
    """The LoRAs with the one beside Animate's weights, which is there already where a run goes on."""
    folder = Path(model).expanduser()
    place = folder / RELIGHTING if folder.is_dir() else Path(f"{PRESETS['animate-14B'].repo}:{RELIGHTING}")
    return loras if any(path.name == place.name for path, _ in loras) else [*loras, (place, 1.0)]


def _missing(owner: str, name: str) -> AttributeError:
    hint = ATTRIBUTES.get(name)
    return AttributeError(f"a {owner} has no {name!r}" + f": {hint}" * bool(hint))


class _Hinting(type):
    if not TYPE_CHECKING:  # type checkers are to tell which attributes there are

        def __getattr__(cls, name: str) -> Any:
            raise _missing(cls.__name__, name)


class WanPipeline(OpenedModel, metaclass=_Hinting):
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
        audio_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        high_noise: str | Path | None = None,
        low_noise: str | Path | None = None,
        boundary: float | None = None,
        vace_module: str | Path | None = None,
        source: str | None = None,
        quantize_high: str | int | None = None,
        quantize_low: str | int | None = None,
        loras: LoraChoices = None,
        use_relighting_lora: bool = False,
        loras_high: LoraChoices = None,
        loras_low: LoraChoices = None,
        vae_tiling: str | tuple[int, int] | None = None,
        caffeinate: bool = True,
        parallel: str = "auto",
        stop_below: int | None = None,
        prompt_cache: bool = True,
        taehv: str | Path | None = None,
        tiny_vae: bool = False,
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
        given, places = checked(model, {**spelled(MODEL, locals()), **other})
        if given["parallel"] != ALONE:
            open_group()  # early: the others wait for it
        loras = lora_lists(given)
        source, listener = given["source"], progress_of(given["progress"])
        check_here(*places.here())
        try:
            with awake(given["caffeinate"]):
                here = places.fetch(source, listener)
                taehv = given["taehv"] and resolve(given["taehv"], source, listener)
        finally:
            if isinstance(listener, ProgressBars):  # of a download that was cut
                listener.close()
        found = {**in_lists(here.loras, like=loras), "taehv": taehv, "progress": listener}
        checkpoint = open_checkpoint(here.model, here.parts)
        if taehv is None and (given["draft"] or given["tiny_vae"]) and (published := published_taehv(checkpoint)):
            with awake(given["caffeinate"]):
                found["taehv"] = resolve(published, source, listener)
        opened = cls(checkpoint, **{**given, **found})
        opened.opened_with |= {**loras, "taehv": given["taehv"]}
        return opened

    @overload
    def __call__(
        self,
        prompt: str,
        callback: Callable[[Step], Any] | None = None,
        extend_prompt: bool | str | Path = False,
        # options: request, by docs/make_signatures.py
        *,
        negative_prompt: str | None = None,
        size: str | tuple[int, int] | None = None,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        fps: int | None = None,
        interpolate: str | Path | None = None,
        image: Source | None = None,
        last_image: Source | None = None,
        video: Source | None = None,
        strength: float | None = None,
        src_video: Source | None = None,
        src_mask: Source | None = None,
        src_ref_images: Sequence[Source] = (),
        audio: str | Path | None = None,
        pose_video: Source | None = None,
        num_clip: int | None = None,
        infer_frames: int = 80,
        start_from_ref: bool = False,
        src_root_path: str | Path | None = None,
        refert_num: int = 1,
        replace_flag: bool = False,
        fit: str | None = "official",
        context_scale: float = 1.0,
        steps: int | None = None,
        guidance_scale: float | tuple[float, float] | None = None,
        shift: float | None = None,
        solver: str | None = None,
        seed: int | None = None,
        cache: str | None = "none",
        recipe: str | None = None,
        phases: str | None = None,
        guidance_range: tuple[float, float] = (0.0, 1.0),
        cfg_zero: bool | int | None = None,
        skip_layers: Sequence[int] = (),
        skip_range: tuple[float, float] = (0.1, 1.0),
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
        **options: Any,
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
        return build_request(self.preset, self.config, self.geometry, prompt, experts, draft=self.draft, **given)

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
        raise _missing(type(self).__name__, name)


@computes
def plan(
    model: str | Path,
    width: int | None = None,
    height: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    memory: str | int | None = None,
    *,
    measure: bool = False,
    kept: bool = False,
    **options: Any,
) -> Plan:
    """Plan a video in a memory budget: how it would be made with these options, and whether it fits.

    Downloads nothing and reads no weights. Of a released model that is not on this machine the published sizes are
    taken; of its parts and LoRAs, those that are here.

    Args:
        model: as for `WanPipeline.from_pretrained`.
        width, height, num_frames, steps: None takes the model's defaults.
        memory: the limit for MLX, such as "8GB"; None or "auto" takes this machine's free memory.
        measure: give times too, if it fits: parts of the networks are timed for some seconds (`planning.speed`).
        kept: as within `keep_loaded`, for several videos.
        options: ``parallel``, and then it says how fast several machines would be; any others of
            `WanPipeline.from_pretrained`, and of a call but the prompt: quantize="q8", loras=…,
            image=…, size="480p", recipe="lightx2v-4step". A task's pictures and videos may be left out all together.

    Returns:
        The `Plan`; print it for a table. `Plan.fits` says whether it fits, `Plan.advice` which changes would help.

    Raises:
        TypeError, ValueError: an option is wrong, or the model is on a hub and not one of `PRESETS`.
        WeightsError: a local model is not whole, its parts are not of one model, or a LoRA does not suit it.
    """
    sizes = dict(width=width, height=height, num_frames=num_frames, steps=steps, memory=memory)
    of_model, of_request = of_faces({**options, **{name: value for name, value in sizes.items() if value is not None}})
    parallel = of_model.get("parallel")
    given, places = checked(model, of_model)
    asked = ours(REQUEST, of_request)
    path, parts, found_loras = places.on_machine()
    row = [(place or Path(), strength) for place, (_, strength) in zip(found_loras, places.loras, strict=True)]
    lists = in_lists(row, like=lora_lists(given)).items()
    loras = {name: [lora for lora in own if lora[0] != Path()] for name, own in lists}
    tiny, draft = given["tiny_vae"] or given["draft"], given["draft"]
    given |= {**loras, "progress": False, "taehv": None, "tiny_vae": False}  # its weights need not be here
    released = None if path else PRESETS.get(str(model)) or preset_of(model)
    if released is not None and MODULE not in parts:
        given |= {"tiny_vae": tiny, "parallel": parallel}
        found = _plan_of_released(released, parts, given, asked, measure, kept)
    else:
        for place, here in zip([model, *places.parts.values()], [path, *parts.values()], strict=True):
            if here is None and parse_location(place) is not None:
                raise ValueError(f"the sizes of {place} are not known before it is here; known: {', '.join(PRESETS)}")
        pipe = WanPipeline(open_checkpoint(path or model, {**places.parts, **parts}), **given)
        pipe.tiny_vae = tiny and published_taehv(pipe.checkpoint) is not None
        request = _asked_of(pipe.preset, pipe.config, pipe.geometry, pipe.checkpoint, asked, draft)
        found = pipe.plan(request, measure, kept, parallel)
    without = [str(lora) for place, (lora, _) in zip(found_loras, places.loras, strict=True) if place is None]
    return replace(found, without=tuple(without))


def _plan_of_released(
    released: Preset, parts: Mapping[str, Path | None], given: dict[str, Any], asked: dict[str, Any], measure: bool,
    kept: bool,
) -> Plan:  # fmt: skip
    """The plan of a model that is not on this machine, with those of its ``parts`` that are."""
    preset = find_preset(given["preset"]) if given["preset"] else released
    apart = {name: find_part(place, name) for name, place in parts.items() if place is not None}
    checkpoint = not_here(released)
    checkpoint = replace(checkpoint, parts=tuple(joined(checkpoint.parts, apart)))
    checkpoint = with_experts(checkpoint, preset, given, lora_lists(given))
    sizes = lru_cache(partial(sizes_of, checkpoint, given["dtype"], released=released, loras=given["loras"]))
    nets = sizes(given["quantize"])
    check_task(checkpoint.path, nets.transformer, preset, given)
    configs = {part.name: part.config for part in nets.parts}
    check_sizes([(part, configs[part.name]) for part in checkpoint.parts if part.name in configs])
    request = _asked_of(preset, nets.transformer, nets.geometry, checkpoint, asked, given["draft"])
    tiling = parse_tiling(given["vae_tiling"])
    wanted = Wanted(preset.name, request, given["quantize"], given["memory"], tiling, kept, given["tiny_vae"],
                    given["parallel"])  # fmt: skip
    return plan_video(wanted, sizes, measure)


def _asked_of(
    preset: Preset, config: TransformerConfig, geometry: Geometry, checkpoint: Checkpoint, asked: dict[str, Any],
    draft: bool,
) -> Request:  # fmt: skip
    """The request of a plan, whose text does not matter."""
    experts = len(checkpoint.of_kind("transformer"))
    return build_request(preset, config, geometry, "a video", experts, planned=True, draft=draft, **asked)
