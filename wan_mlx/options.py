"""The table of options: each option of a run is declared once, here.

Three classes declare them: `RequestOptions`, the keywords of a call; `ModelOptions`, those of
`WanPipeline.from_pretrained`; `CommandOptions`, which only the command line has. An annotation gives a keyword's type,
for editors too, and its `Option` the rest. From them are made the flags of ``wan-mlx`` and their help (`cli.flags`),
the keys of ``--config`` and of prompt files, the rules of ``--resume``, shell completion, the tables of docs/flags.md,
and a JSON schema (`schema`). To add an option, declare it here and use it.

Nothing here imports MLX: ``wan-mlx --help`` is to be quick.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

from .option import COMMAND, MODEL, REQUEST, Limits, Option
from .presets import PRESETS
from .types import LoraChoice, Source

Function = TypeVar("Function", bound=Callable[..., Any])

# The groups of flags, in the order of --help and of docs/flags.md.
WHAT = "what to make"
EXTEND = "how to have the prompt written out in detail, as the models like it"
SOURCES = "from which pictures or videos"
WEIGHTS = "with which model"
SAMPLE = "how to sample"
GUIDE = "how to guide, and how to leave out work"
RUN = "how to run"
SAY = "what is said"
WATCH = "how to watch it come"
OFFICIAL = "accepted for the official command lines; without effect here"
GROUPS = (WHAT, EXTEND, SOURCES, WEIGHTS, SAMPLE, GUIDE, RUN, SAY, WATCH, OFFICIAL)

SOLVERS = ("unipc", "dpm++", "euler", "dmd")
RECIPES = ("lightx2v-4step", "fastwan-3step", "causvid", "rcm")
ONE_GPU = "there is one GPU"
CACHES = ("none", "teacache", "magcache", "easycache")


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x*×](\d+)", text.strip().lower())
    if not match:
        raise ValueError(f"{text!r} is no size; expected WIDTHxHEIGHT in pixels, such as 832x480")
    return int(match[1]), int(match[2])


def parse_range(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"([\d.]+)-([\d.]+)", text.strip())
    try:
        first, last = match.groups() if match else ("", "")
        return float(first), float(last)
    except ValueError:
        raise ValueError(
            f"{text!r} is no range; expected FROM-TO in fractions of the steps, such as 0.1-0.9"
        ) from None


def parse_skip(text: str) -> tuple[tuple[int, ...], tuple[float, float] | None]:
    layers, colon, span = text.partition(":")
    if not re.fullmatch(r"\d+(,\d+)*", layers):
        raise ValueError(f"{text!r}; expected layers and where to skip them, such as 9,10:0.1-0.9")
    return tuple(int(layer) for layer in layers.split(",")), parse_range(span) if colon else None


def _pair(first: float, second: float) -> str:
    return f"{first}-{second}"


def _size(width: int | None, height: int | None) -> str:
    if width is None or height is None:
        raise ValueError(f"{'width' if height is None else 'height'} is given alone; expected both, such as 832x480")
    return f"{width}x{height}"


def _skip(*values: Any) -> str:
    """Of layers and a range, or of layers alone; "" if there are none."""
    layers, span = (values, None) if all(isinstance(value, int) for value in values) else values
    return ",".join(map(str, layers)) + (f":{_pair(*span)}" if span else "") if layers else ""


PROMPT = Option(
    "what the video should show", "In English or Chinese", WHAT, ("--prompt",), "TEXT", name="prompt", of=REQUEST
)


class RequestOptions(TypedDict, total=False):
    """Keywords of `WanPipeline.request` and of a call beside the prompt, each a field of `Request`; one that is left
    out or None is the model's default."""

    negative_prompt: Annotated[str | None, Option(
        "what to avoid (default: the model's own)", '`""` for nothing', WHAT, ("--negative-prompt",), "TEXT",
    )]
    width: Annotated[int | None, Option(
        "pixels, multiples of 16 (default: the model's)",
        "`832*480` is taken too. It is the area where a source sets the proportions", WHAT, ("--size",), "WxH",
        parse=parse_size, sets=("width", "height"), text=_size,
    )]
    height: Annotated[int | None, Option("pixels, a multiple of 16 (default: the model's)")]
    num_frames: Annotated[int | None, Option(
        "4n+1 (default 81: five seconds)", "1 is a picture; a shorter source makes it fewer", WHAT,
        ("--frames", "--frame_num"), "N",
    )]
    image: Annotated["Source | None", Option(
        "first frame (i2v, flf2v)", "", SOURCES, ("--image", "--first_frame"), "FILE", place="file",
    )]
    last_image: Annotated["Source | None", Option(
        "last frame (flf2v)", "", SOURCES, ("--last-image", "--last_frame"), "FILE", place="file",
    )]
    video: Annotated["Source | None", Option(
        "video to start from instead of noise (t2v)", "Read at 16 frames a second and cut to the size", SOURCES,
        ("--video",), "FILE", place="file",
    )]
    strength: Annotated[float | None, Option(
        "0 keeps that video, 1 replaces it (default 0.7)", "The last S × steps are made", SOURCES, ("--strength",), "S",
        limits=Limits(0, 1, above=True),
    )]
    src_video: Annotated["Source | None", Option(
        "video to edit or follow (vace)", "", SOURCES, ("--src_video",), "FILE", place="file",
    )]
    src_mask: Annotated["Source | None", Option(
        "what to generate anew in it, white (vace)", "A picture for the whole video, or a video", SOURCES,
        ("--src_mask",), "FILE", place="file",
    )]
    src_ref_images: Annotated["Sequence[Source]", Option(
        "pictures of what should appear, a,b,c (vace)", "", SOURCES, ("--src_ref_images",), "FILES", (),
        parse=lambda text: tuple(text.split(",")), place="file",
    )]
    context_scale: Annotated[float, Option(
        "strength of the source (vace; default 1)", "", SOURCES, ("--context-scale",), "S", 1.0, limits=Limits(),
    )]
    steps: Annotated[int | None, Option(
        "sampling steps", "Default 50; 40 for I2V; 12 for nano", SAMPLE, ("--steps", "--sample_steps"), "N",
        limits=Limits(1),
    )]
    guidance_scale: Annotated[float | None, Option(
        "guidance scale; 1 is off", "That takes half the time", SAMPLE, ("--guidance", "--sample_guide_scale"), "G",
        limits=Limits(),
    )]
    shift: Annotated[float | None, Option(
        "shift of the sigma schedule", "More for larger sizes", SAMPLE, ("--shift", "--sample_shift"), "S",
        limits=Limits(0, above=True),
    )]
    solver: Annotated[str | None, Option(
        "{choices}", "", SAMPLE, ("--solver", "--sample_solver"), "NAME", "unipc", SOLVERS,
    )]
    seed: Annotated[int | None, Option(
        "same seed, same video (default: drawn)", "A negative one is drawn, too", SAMPLE, ("--seed", "--base_seed"),
        "N", limits=Limits(0, 2**64 - 1),
    )]
    cache: Annotated[str | None, Option(
        "step cache: {choices}; each takes a threshold after a colon (easycache:0.05)", "See below", GUIDE,
        ("--cache",), "NAME", "none", examples=CACHES,
    )]
    recipe: Annotated[str | None, Option(
        "for distilled models and LoRAs; sets steps, noise levels, solver, shift and guidance: {choices}",
        "Another value beside it is refused", GUIDE, ("--recipe",), "NAME", None, RECIPES,
    )]
    guidance_range: Annotated[tuple[float, float], Option(
        "guidance only in this part of the steps, such as 0-0.6 (default 0-1)", "", GUIDE, ("--guidance-range",), "A-B",
        (0.0, 1.0), parse=parse_range, text=_pair,
    )]
    cfg_zero: Annotated[bool | int | None, Option(
        "CFG-Zero*: scaled guidance, and STEPS first steps without motion", "", GUIDE, ("--cfg-zero",), "STEPS",
    )]
    skip_layers: Annotated[Sequence[int], Option(
        "skip-layer guidance, such as 9 or 9,10:0.1-0.9 (default part 0.1-1)", "", GUIDE, ("--slg",), "LAYERS[:A-B]",
        (), parse=parse_skip, sets=("skip_layers", "skip_range"), text=_skip,
    )]
    skip_range: Annotated[tuple[float, float], Option(
        "in which part of the steps the layers are skipped (default 0.1-1)", default=(0.1, 1.0),
    )]


class CommandOptions(TypedDict, total=False):
    """Flags that are no keyword, as the parsed command line has them."""

    prompts: Annotated[str | None, Option(
        "many requests: a JSON object a line, with any flags as keys", "See below", WHAT, ("--prompts",), "FILE",
        place="file", free=True, alone=True,
    )]
    num_images: Annotated[int | None, Option(
        "N stills with the seeds from --seed on", "The output's name gets `_seedN`", WHAT, ("--num-images",), "N",
        limits=Limits(1),
    )]
    output: Annotated[str | None, Option(
        ".mp4 .gif .webp .png .npz (default: named by the prompt)", "The ending picks the format", WHAT,
        ("--output", "--save_file"), "FILE", place="file",
    )]
    overwrite: Annotated[bool, Option(
        "replace the output if it exists", "", WHAT, ("--overwrite",), default=False, free=True, alone=True,
    )]
    report: Annotated[str | None, Option(
        "of --prompts: what became of each line (default: FILE.report.jsonl)", "", WHAT, ("--report",), "FILE",
        place="file", free=True, alone=True,
    )]
    extend_prompt: Annotated[bool, Option(
        "by a language model on this machine, before anything else is loaded",
        "It writes the detailed kind of prompt that Wan was trained on, which is shown and kept in the file", EXTEND,
        ("--extend-prompt",), default=False,
    )]
    prompt_extend_model: Annotated[str | None, Option(
        "any instruct model that mlx-lm runs: hub id or folder (default: mlx-community/Qwen2.5-7B-Instruct-4bit)", "",
        EXTEND, ("--extend-model", "--prompt_extend_model"), "MODEL", place="name",
    )]
    prompt_extend_target_lang: Annotated[str | None, Option(
        "default: the prompt's own (--use_prompt_extend: zh)", "", EXTEND,
        ("--extend-language", "--prompt_extend_target_lang"), choices=("zh", "en"),
    )]
    use_prompt_extend: Annotated[bool, Option(
        "the official --extend-prompt", "The prompt is then Chinese, unless a language is given", EXTEND,
        ("--use_prompt_extend",), default=False, hidden=True,
    )]
    prompt_extend_method: Annotated[str | None, Option(
        "of the official command lines", "`dashscope`, a service, is not used: a model here writes the prompt out",
        EXTEND, ("--prompt_extend_method",), choices=("local_qwen", "dashscope"), hidden=True,
    )]
    resume: Annotated[str | None, Option(
        "go on with the run that was making FILE, where it was cut",
        "All flags are those it was started with", RUN, ("--resume",), "FILE", place="file", free=True, alone=True,
    )]
    plan: Annotated[bool, Option(
        "print each stage's memory and time, and stop; no download", "Exit code 1 if it does not fit", RUN, ("--plan",),
        default=False, alone=True,
    )]
    dry_run: Annotated[bool, Option(
        "say what would run or be downloaded, and stop", "", RUN, ("--dry-run",), default=False, free=True, alone=True,
    )]
    config: Annotated[str | None, Option(
        "take the settings of an earlier video or of a .json file; flags beside it win", "", RUN, ("--config",), "FILE",
        place="file", free=True, alone=True,
    )]
    quiet: Annotated[bool, Option(
        "say nothing but the result and what went wrong", "", SAY, ("--quiet",), default=False, free=True, alone=True,
    )]
    verbose: Annotated[bool, Option(
        "say more: what is read, fetched and chosen", "", SAY, ("--verbose",), default=False, free=True, alone=True,
    )]
    json: Annotated[bool, Option(
        "one JSON event a line on stdout, for programs", "", SAY, ("--json",), default=False, free=True, alone=True,
    )]
    debug: Annotated[bool, Option(
        "show a traceback when something fails", "", SAY, ("--debug",), default=False, free=True, alone=True,
    )]
    version: Annotated[bool, Option(
        "show versions and stop", "", SAY, ("--version",), default=False, free=True, alone=True,
    )]
    preview: Annotated[str | None, Option(
        "what it is becoming, after every step: a small animation FILE.webp, and FILE.png with its frames side by side",
        "", WATCH, ("--preview",), "FILE", place="file", free=True,
    )]
    preview_every: Annotated[int, Option(
        "only after every N steps", "", WATCH, ("--preview-every",), "N", 1, limits=Limits(1), free=True,
    )]
    offload_model: Annotated[str | None, Option(
        "", "", OFFICIAL, ("--offload_model",), "BOOL",
        no_effect="weights are always dropped as soon as a stage is done",
    )]
    t5_cpu: Annotated[bool, Option(
        "", "", OFFICIAL, ("--t5_cpu",), no_effect="the text encoder is always streamed from disk",
    )]
    t5_fsdp: Annotated[bool, Option("", "", OFFICIAL, ("--t5_fsdp",), no_effect=ONE_GPU)]
    dit_fsdp: Annotated[bool, Option("", "", OFFICIAL, ("--dit_fsdp",), no_effect=ONE_GPU)]
    ulysses_size: Annotated[str | None, Option("", "", OFFICIAL, ("--ulysses_size",), "N", no_effect=ONE_GPU)]
    ring_size: Annotated[str | None, Option("", "", OFFICIAL, ("--ring_size",), "N", no_effect=ONE_GPU)]


class ModelOptions(TypedDict, total=False):
    """Keywords of `WanPipeline.from_pretrained`."""

    model: Annotated[str | Path, Option(
        "nano or nano-i2v (bundled), a preset, a folder, a file, or a hub id", "See [formats](formats.md)", WEIGHTS,
        ("--model", "--ckpt_dir"), "MODEL", examples=tuple(PRESETS), place="name",
    )]
    transformer: Annotated[str | Path | None, Option(
        "file, folder or repository that has it: where --model is one file, or instead of what it has",
        "It is then not fetched from the model's repository", WEIGHTS, ("--transformer",), "PATH", place="name",
    )]
    text_encoder: Annotated[str | Path | None, Option(
        "file, folder or repository that has it: likewise", "", WEIGHTS, ("--text-encoder",), "PATH", place="name",
    )]
    vae: Annotated[str | Path | None, Option(
        "file, folder or repository that has it: likewise", "", WEIGHTS, ("--vae",), "PATH", place="name",
    )]
    image_encoder: Annotated[str | Path | None, Option(
        "file, folder or repository that has it: likewise", "", WEIGHTS, ("--image-encoder",), "PATH", place="name",
    )]
    tokenizer: Annotated[str | Path | None, Option(
        "file, folder or repository that has it: likewise", "", WEIGHTS, ("--tokenizer",), "PATH", place="name",
    )]
    source: Annotated[str, Option(
        "hub to download from: {choices}", "", WEIGHTS, ("--source",), "HUB", "huggingface",
        ("huggingface", "modelscope"),
    )]
    preset: Annotated[str | None, Option(
        "take the sampling defaults of this official task, such as t2v-1.3B", "`t2i-14B` makes stills", WEIGHTS,
        ("--task",), "NAME", examples=(*PRESETS, "t2i-14B"),
    )]
    dtype: Annotated[str, Option(
        "of transformer and text encoder: {choices}", "", WEIGHTS, ("--dtype",), "NAME", "bfloat16",
        examples=("bfloat16", "float32"),
    )]
    quantize: Annotated[str | None, Option(
        "keep transformer and text encoder in few bits: q8 q6 auto q5 q4 q3 (q4-g32 for another group), mxfp8 mxfp4 "
        "nvfp4; none unpacks packed weights. Default: as they are stored, and of GGUF files Q8_0 Q5_0 Q5_1 Q4_0 Q4_1 "
        "stay packed as they are; nearest packs the other GGUF types too, in the form that comes nearest", "", WEIGHTS,
        ("--quantize",), "MODE",
        examples=("q8", "q6", "auto", "q5", "q4", "q3", "mxfp8", "mxfp4", "nvfp4", "none", "nearest"),
    )]
    loras: Annotated["Iterable[LoraChoice] | LoraChoice | None", Option(
        "merge a LoRA into the transformer, as in style.safetensors:0.8 or owner/name:style.safetensors:0.8; may be "
        "given again", "", WEIGHTS, ("--lora",), "FILE[:STRENGTH]", repeats=True, place="name",
    )]
    memory: Annotated[str | None, Option(
        "what MLX may hold, such as 8GB: it decides what stays resident, is streamed from disk or done in tiles "
        "(default: auto, what this machine has to spare)", "", RUN, ("--memory",), "SIZE", free=True,
    )]
    vae_tiling: Annotated[str | tuple[int, int] | None, Option(
        "decode and encode in tiles of at most so many pixels (384x384): the same video, less memory, more time; off: "
        "never (default: auto, where memory asks for it)", "", RUN, ("--vae-tiling",), "WxH", examples=("auto", "off"),
        text=_size, free=True,
    )]
    prompt_cache: Annotated[bool, Option(
        "encode prompts anew, and keep none on disk", "", RUN, ("--no-prompt-cache",), default=True, free=True,
    )]
    taehv: Annotated[str | Path | None, Option(
        "weights of the tiny autoencoder TAEHV, for finer previews: taew2_1.pth, or on the hub "
        "lightx2v/Autoencoders:taew2_1.safetensors", "", WATCH, ("--taehv",), "FILE", place="name", free=True,
    )]
    draft: Annotated[bool, Option(
        "decode the video with TAEHV, too: fast, less fine", "", WATCH, ("--draft",), default=False,
    )]
    progress: Annotated[bool, Option("show progress bars", default=True)]


def declared(options: type, of: str) -> list[Option]:
    """The options that a class declares, in their order."""
    return [
        replace(annotation.__metadata__[0], name=name, type=annotation.__origin__, of=of)
        for name, annotation in options.__annotations__.items()
    ]


OPTIONS: list[Option] = [
    PROMPT,
    *declared(RequestOptions, REQUEST),
    *declared(CommandOptions, COMMAND),
    *declared(ModelOptions, MODEL),
]


def named(name: str) -> Option:
    """The option of that Python keyword."""
    return next(option for option in OPTIONS if option.name == name)


def of(face: str) -> list[Option]:
    """The options whose keyword is one of `REQUEST`, `MODEL` or `COMMAND`."""
    return [option for option in OPTIONS if option.of == face]


def flags() -> list[Option]:
    """The options that have a flag."""
    return [option for option in OPTIONS if option.flags]


def flag_names() -> dict[str, str]:
    """Attribute of the parsed flags → the flag that sets it."""
    return {option.key: option.flags[0] for option in flags()}


def keywords(parsed: Mapping[str, Any], face: str) -> dict[str, Any]:
    """The keywords of ``face`` that parsed flags come to; those left to their default are None or not there."""
    found: dict[str, Any] = {}
    for option in flags():
        if option.of == face and option.sets:
            found.update(zip(option.sets, parsed[option.key] or (), strict=False))
        elif option.of == face:
            found[option.name] = parsed[option.key]
    return found


def value_in(request: Mapping[str, Any], key: str) -> Any:
    """The value of a parsed flag that a request's fields come from; None if they do not tell."""
    option = next(option for option in flags() if option.key == key)
    if not option.sets:
        return request.get(option.name)
    values = [request[name] for name in option.sets]
    return values if values[0] else None


def told(function: Function) -> Function:
    """``function``, which takes ``**options: Unpack[RequestOptions]``, with each of them in its signature and
    docstring, for help() and notebooks."""
    signature, taken = inspect.signature(function), [option for option in of(REQUEST) if option is not PROMPT]
    named = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=getattr(option.type, "__forward_arg__", option.type),
        )
        for option in taken
    ]
    vars(function)["__signature__"] = signature.replace(parameters=[*list(signature.parameters.values())[:-1], *named])
    lines = [f"    {option.name}: {option.described}" for option in taken]
    function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines])
    return function


def free_on_resume() -> set[str]:
    """Parsed flags that may differ from the first command's when a run goes on."""
    return {option.key for option in flags() if option.free or option.no_effect}


def schema(*faces: str) -> dict[str, Any]:
    """The JSON schema of a request, as an object of its keywords; of other ``faces`` too, if given."""
    options = [option for option in OPTIONS if option.of in (faces or (REQUEST,))]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {option.name: option.schema() for option in options},
        "required": [PROMPT.name] if REQUEST in (faces or (REQUEST,)) else [],
        "additionalProperties": False,
    }
