"""The table of options: each option of a run is declared once, here.

`RequestOptions` declares the keywords of a call, `ModelOptions` those of `WanPipeline.from_pretrained`: an annotation
gives a keyword's type, for editors too, and its `Option` the rest. `COMMAND_OPTIONS` are those that only the command
line has. From them are made the flags of ``wan-mlx`` and their help (`cli.flags`), the keys of ``--config`` and of
prompt files, the rules of ``--resume``, shell completion, the tables of docs/flags.md, signatures and docstrings
(`told`), and the JSON schema of HTTP (`server.schema`). To add an option, declare it here and use it.

Nothing here imports MLX: ``wan-mlx --help`` is to be quick.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

from .errors import nearest
from .option import COMMAND, MODEL, REQUEST, Limits, Option
from .option_texts import (
    SIZES,
    parse_guidance,
    parse_mode,
    parse_percent,
    parse_range,
    parse_size,
    parse_skip,
    read,
    skip_text,
)
from .presets import PRESETS
from .types import MOST_IMAGES, LoraChoices, Source

Function = TypeVar("Function", bound=Callable[..., Any])

# The groups of flags, in the order of --help and of docs/flags.md.
WHAT = "prompt and output"
EXTEND = "prompt extension"
SOURCES = "source pictures and videos"
WEIGHTS = "model"
SAMPLE = "sampling"
GUIDE = "speed and guidance"
RUN = "runs and memory"
SAY = "messages"
WATCH = "preview"
OFFICIAL = "official flags without effect here"
GROUPS = (WHAT, EXTEND, SOURCES, WEIGHTS, SAMPLE, GUIDE, RUN, SAY, WATCH, OFFICIAL)

# Those that hold LoRAs: for every transformer, for the high-noise expert, for the low-noise one.
LORAS = ("loras", "loras_high", "loras_low")
SOLVERS = ("unipc", "dpm++", "euler", "dmd")
RECIPES = (
    "lightx2v-4step", "lightx2v-8step", "lightx2v-3phase", "lightx2v-3phase-i2v", "fastwan-5B", "fastwan-3step",
    "causvid-1.3B", "causvid", "accvid", "fusionix", "turbowan-i2v", "rcm", "fun-reward", "nano-4step",
)  # fmt: skip
ONE_GPU = "there is one GPU"
FITS = ("official", "crop", "pad")
PARALLEL = ("auto", "cfg", "tokens", "cfg+tokens", "off")
CACHES = ("none", "teacache", "magcache", "easycache", "spectrum")
# Flags of the official generate.py by which the official S2V has another model make the sound.
TTS = ("--enable_tts", "--tts_prompt_audio FILE", "--tts_prompt_text TEXT", "--tts_text TEXT")


def parse_seeds(text: str) -> tuple[int, ...]:
    read(r"\d+(,\d+)*", text, "list of seeds", "whole numbers, such as 1,2,3")
    seeds = tuple(int(seed) for seed in text.split(","))
    for seed in seeds:
        named("seed").check(seed)
        if seeds.count(seed) > 1:
            raise ValueError(f"seed {seed} is in {text!r} {seeds.count(seed)} times, expected each once")
    return seeds


PROMPT = Option(
    "-p --prompt TEXT", "what the video should show; - reads standard input", WHAT,
    more="In English or Chinese. Of a .txt file that is there the one line is read. `--prompt` itself may be left out: "
    '`wan-mlx "a cat"`', empty=True, name="prompt",
    of=REQUEST,
)  # fmt: skip
MODEL_NAME = Option(
    "-m --model --ckpt_dir MODEL", "nano (default), a preset, a folder, a file, a hub id", WEIGHTS,
    more="nano is bundled; with --image the default is nano-i2v. See [formats](formats.md)", examples=tuple(PRESETS),
    place="name", name="model", type=str | Path, of=MODEL,
)  # fmt: skip
LIKEWISE = "use this for that part instead of downloading it"


class RequestOptions(TypedDict, total=False):
    """Keywords of `WanPipeline.request` and of a call beside the prompt, each a field of `Request`; one that is left
    out or None is the model's default."""

    negative_prompt: Annotated[str | None, Option(
        "--negative-prompt TEXT", "what to avoid (default: the model's own)", WHAT, more='`""` for nothing', empty=True,
    )]
    size: Annotated[str | tuple[int, int] | None, Option(
        "--size WxH", "832x480; or 16:9 9:16 1:1, 480p 720p (default: the model's)", WHAT,
        more="Multiples of 16 (TI2V-5B: of 32, S2V: of 64) up to 16384; `832*480` is taken too. 480p is 832x480, 720p "
        "1280x720, or what is allowed next to it; a ratio has at most as many pixels as the model's own size: see "
        "below. Where a source sets the proportions, it is the area",
        examples=SIZES, parse=parse_size, text="{}x{}".format, instead_of=("width", "height"),
    )]
    width: Annotated[int | None, Option("--width N", "pixels, with --height", WHAT, instead_of=("size",))]
    height: Annotated[int | None, Option("--height N", "pixels, with --width", WHAT, instead_of=("size",))]
    num_frames: Annotated[int | None, Option(
        "--frames --frame_num N", "4n+1 (default: the model's, five seconds of most)", WHAT,
        more="Not of S2V, whose sound says how many. That is 81 at 16 a second, of TI2V-5B 121 at 24; up to 100001; 1 "
        "is a picture; a shorter source makes it fewer",
    )]
    fps: Annotated[int | None, Option(
        "--fps N", "frames a second of the file; more than the model's (16; TI2V-5B 24): RIFE adds those between", WHAT,
        more="81 frames at 16 become 161 at 32. `--interpolate rife` is then asked for, too",
        limits=Limits(1, 240),
    )]
    interpolate: Annotated[str | Path | None, Option(
        "--interpolate NAME", "rife: frames between the model's, twice as many without --fps; or a file of its weights",
        WHAT, more="The weights (RIFE 4.25, 23 MB) are downloaded; also `owner/name:file`. See below",
        examples=("rife",), place="name",
    )]
    image: Annotated["Source | None", Option(
        "--image --first_frame FILE", "first frame (i2v, flf2v, ti2v, Fun); who speaks (s2v)", SOURCES, place="file",
    )]
    last_image: Annotated["Source | None", Option(
        "--last-image --last_frame FILE", "last frame (flf2v, Fun)", SOURCES, place="file",
    )]
    video: Annotated["Source | None", Option(
        "--video FILE", "video to start from instead of noise (t2v, ti2v)", SOURCES,
        more="Read at the model's frames a second (16; TI2V-5B: 24) and cut to the size", place="file",
    )]
    strength: Annotated[float | None, Option(
        "--strength S", "0 keeps that video, 1 replaces it (default 0.7)", SOURCES, more="The last S × steps are made",
        limits=Limits(0, 1, above=True),
    )]
    src_video: Annotated["Source | None", Option(
        "--src_video FILE", "video to edit or follow (vace, Fun-Control)", SOURCES, place="file",
    )]
    src_mask: Annotated["Source | None", Option(
        "--mask --src_mask FILE", "what to make anew in --src_video (vace) or --video (t2v, ti2v), white", SOURCES,
        more="A picture for the whole video, or a video of as many frames. What is black in --video stays: its latents "
        "are locked", place="file",
    )]
    src_ref_images: Annotated["Sequence[Source]", Option(
        "--src_ref_images FILES", "pictures of what should appear, a,b,c (vace; one: Fun-Control)", SOURCES, default=(),
        parse=lambda text: tuple(text.split(",")), place="file",
    )]
    audio: Annotated[str | Path | None, Option(
        "--audio FILE", "what the picture says or sings (s2v): a recording, or a video with sound", SOURCES,
        more="Of any format and rate, up to ten minutes. The video is as long, and an .mp4 has the sound", place="file",
    )]
    pose_video: Annotated["Source | None", Option(
        "--pose_video FILE", "poses that it takes meanwhile (s2v): a video of skeletons, as DWPose draws them", SOURCES,
        more="At about 16 frames a second; of a faster one every second, third … frame", place="file",
    )]
    num_clip: Annotated[int | None, Option(
        "--num_clip N", "make only the first N clips of it (s2v)", SOURCES, more="By default the sound says how many",
        limits=Limits(1),
    )]
    infer_frames: Annotated[int, Option(
        "--infer_frames N", "frames of a clip, 4n (s2v; default 80)", SOURCES,
        more="Less takes less memory, and more clips", default=80, limits=Limits(4, 1000),
    )]
    start_from_ref: Annotated[bool, Option(
        "--start_from_ref", "begin with the picture itself (s2v)", SOURCES,
    )]
    src_root_path: Annotated[str | Path | None, Option(
        "--src_root_path DIR", "folder that the official preprocessing made: poses, face, picture (animate)", SOURCES,
        more="Its videos set the size and the length. A --prompt may then be left out. See [tasks](tasks.md)",
        place="file",
    )]
    refert_num: Annotated[int, Option(
        "--refert_num N", "with how many frames of a clip the next one begins: 1 (default) or 5 (animate)", SOURCES,
        default=1,
    )]
    replace_flag: Annotated[bool, Option(
        "--replace_flag", "put the person into the video, whose folder has its background and mask (animate)", SOURCES,
    )]
    fit: Annotated[str | None, Option(
        "--fit NAME", "how a picture or video of other proportions comes to the size: {choices}", SOURCES,
        more="`official` takes the proportions of a picture (i2v, flf2v, ti2v, Fun-InP, s2v) or of --src_video, and "
        "--size as the area; `crop` cuts to exactly --size, `pad` adds black bars", default="official", choices=FITS,
    )]
    context_scale: Annotated[float, Option(
        "--context-scale S", "strength of the source (vace; default 1)", SOURCES, default=1.0, limits=Limits(),
    )]
    steps: Annotated[int | None, Option(
        "--steps --sample_steps N", "sampling steps", SAMPLE,
        more="Default 50; 40 for I2V and A14B; 12 for nano-i2v. nano makes 4 by the recipe nano-4step, but if this or "
        "another option of sampling is given: then 12. At most 1000",
        limits=Limits(1, 1000),
    )]
    guidance_scale: Annotated[float | tuple[float, float] | None, Option(
        "--guidance --sample_guide_scale G", "guidance scale, 1 is off; of two experts LOW,HIGH, such as 3,4", SAMPLE,
        more="Off takes half the time. LOW is the low-noise expert's, HIGH the high-noise one's: the order is the "
        "official one; Diffusers has the high-noise one's first",
        parse=parse_guidance, limits=Limits(),
    )]
    shift: Annotated[float | None, Option(
        "--shift --sample_shift S", "shift of the sigma schedule", SAMPLE, more="More for larger sizes",
        limits=Limits(0, above=True),
    )]
    solver: Annotated[str | None, Option(
        "--solver --sample_solver NAME", "{choices}", SAMPLE, default="unipc", choices=SOLVERS,
    )]
    seed: Annotated[int | None, Option(
        "-s --seed --base_seed N", "same seed, same video (default: drawn)", SAMPLE,
        more="A negative one is drawn, too", limits=Limits(0, 2**64 - 1), instead_of=("seeds",),
    )]
    cache: Annotated[str | None, Option(
        "--cache NAME", "step cache: {choices}; each takes settings after colons (easycache:0.05)", GUIDE,
        more="See below", default="none", examples=CACHES,
    )]
    recipe: Annotated[str | None, Option(
        "--recipe NAME",
        "for distilled models and LoRAs; sets steps, noise levels, solver, shift, guidance, phases: {choices}", GUIDE,
        more="Another value beside it is refused. `wan-mlx recipes` tells what each is for", choices=RECIPES,
    )]
    phases: Annotated[str | None, Option(
        "--phases LIST", "guidance, strengths of LoRAs and the expert for parts of the run, such as "
        "965:3.5:0,800:1,0:1", GUIDE,
        more="Each is FROM:GUIDANCE:LORA:EXPERT, of which the last three may be left out: down to which timestep it "
        "goes, its guidance, what it multiplies the strengths of LoRAs by, and high or low. See below",
    )]
    guidance_range: Annotated[tuple[float, float], Option(
        "--guidance-range A-B", "guidance only in this part of the steps, such as 0-0.6 (default 0-1)", GUIDE,
        default=(0.0, 1.0), parse=parse_range, text="{}-{}".format,
    )]
    cfg_zero: Annotated[bool | int | None, Option(
        "--cfg-zero STEPS", "CFG-Zero*: scaled guidance, and STEPS first steps without motion", GUIDE,
    )]
    skip_layers: Annotated[Sequence[int], Option(
        "--slg LAYERS[:A-B]", "skip-layer guidance, such as 9 or 9,10:0.1-0.9 (default part 0.1-1)", GUIDE, default=(),
        parse=parse_skip, sets=("skip_layers", "skip_range"), text=skip_text,
    )]
    skip_range: Annotated[tuple[float, float], Option(
        "", "in which part of the steps the layers are skipped (default 0.1-1)", default=(0.1, 1.0),
    )]


class ModelOptions(TypedDict, total=False):
    """Keywords of `WanPipeline.from_pretrained` beside the model's name."""

    transformer: Annotated[str | Path | None, Option(
        "--transformer PATH",
        "use this for that part instead of downloading it: a file, folder or repository", WEIGHTS,
        more="It is also how a --model that is one file gets its other parts", place="name",
    )]
    text_encoder: Annotated[str | Path | None, Option("--text-encoder PATH", LIKEWISE, WEIGHTS, place="name")]
    vae: Annotated[str | Path | None, Option("--vae PATH", LIKEWISE, WEIGHTS, place="name")]
    image_encoder: Annotated[str | Path | None, Option("--image-encoder PATH", LIKEWISE, WEIGHTS, place="name")]
    audio_encoder: Annotated[str | Path | None, Option("--audio-encoder PATH", LIKEWISE, WEIGHTS, place="name")]
    tokenizer: Annotated[str | Path | None, Option("--tokenizer PATH", LIKEWISE, WEIGHTS, place="name")]
    high_noise: Annotated[str | Path | None, Option(
        "--high-noise PATH", "of a model of two experts (Wan2.2's A14B) the one for the first steps: file, folder or "
        "repository that has it; beside a --low-noise, or where --model or --transformer is the other one", WEIGHTS,
        more="What a file is, its keys do not tell: it is what it is given as", place="name",
    )]
    low_noise: Annotated[str | Path | None, Option(
        "--low-noise PATH", "the one for the last steps: likewise", WEIGHTS, place="name",
    )]
    boundary: Annotated[float | None, Option(
        "--boundary B", "where the high-noise expert ends: it serves the timesteps of at least 1000 B (default: the "
        "model's, 0.875 for T2V-A14B, 0.9 for I2V-A14B)", WEIGHTS, limits=Limits(0, 1, above=True, below=True),
    )]
    vace_module: Annotated[str | Path | None, Option(
        "--vace-module PATH", "file of VACE's part of a transformer, as Kijai publishes it, to add to a text-to-video "
        "one", WEIGHTS, place="name",
    )]
    source: Annotated[str | None, Option(
        "--source HUB", "hub to download from: {choices}", WEIGHTS, more="Default: `WAN_MLX_SOURCE`, or huggingface",
        choices=("huggingface", "modelscope"), variable="WAN_MLX_SOURCE", free=True,
    )]
    preset: Annotated[str | None, Option(
        "--task NAME", "take the sampling defaults of this official task, such as t2v-1.3B or ti2v-5B", WEIGHTS,
        more="`t2i-14B` makes stills", examples=(*PRESETS, "t2i-14B"),
    )]
    dtype: Annotated[str, Option(
        "--dtype NAME", "of the transformer and, but for float16, the text encoder: {choices}", WEIGHTS,
        more="With float16, for M1 and M2, the text encoder computes in bfloat16", default="bfloat16",
        examples=("bfloat16", "float16", "float32"),
    )]
    quantize: Annotated[str | int | None, Option(
        "-q --quantize MODE",
        "bits a weight: 8 6 5 4 3, auto, none, and others", WEIGHTS,
        more="Of transformer and text encoder. `8` is `q8`, `q4-g32` has another group; `mxfp8`, `mxfp4`, `nvfp4`; "
        "`none` unpacks packed weights. Default: as they are stored, and of GGUF files Q8_0 Q5_0 Q5_1 Q4_0 Q4_1 stay "
        "packed as they are; `nearest` packs the other GGUF types too, in the form that comes nearest",
        parse=parse_mode,
        examples=("q8", "q6", "auto", "q5", "q4", "q3", "mxfp8", "mxfp4", "nvfp4", "none", "nearest"),
    )]
    quantize_high: Annotated[str | int | None, Option(
        "--quantize-high MODE", "another one for the high-noise expert", WEIGHTS, parse=parse_mode,
    )]
    quantize_low: Annotated[str | int | None, Option(
        "--quantize-low MODE", "another one for the low-noise expert", WEIGHTS, parse=parse_mode,
    )]
    loras: Annotated["LoraChoices", Option(
        "--lora FILE[:STRENGTH]",
        "merge a LoRA: style.safetensors:0.8; may be repeated", WEIGHTS,
        more="It is merged into the transformer, or into both experts. Also from a hub: "
        'owner/name:style.safetensors:0.8. In Python also `{"high": …, "low": …}`', repeats=True, place="name",
    )]
    use_relighting_lora: Annotated[bool, Option(
        "--use_relighting_lora", "take the LoRA beside Animate's weights that lights the person as the scene is lit",
        WEIGHTS, more="For --replace_flag",
    )]
    loras_high: Annotated["LoraChoices", Option(
        "--lora-high FILE[:STRENGTH]", "into the high-noise expert alone", WEIGHTS, repeats=True, place="name",
    )]
    loras_low: Annotated["LoraChoices", Option(
        "--lora-low FILE[:STRENGTH]", "into the low-noise expert alone", WEIGHTS, repeats=True, place="name",
    )]
    memory: Annotated[str | None, Option(
        "--memory SIZE",
        "what MLX may hold, such as 8GB (default: what is free)", RUN,
        more="Also `auto`, the default: what this machine has to spare. It decides what stays resident, is streamed "
        "from disk or done in tiles", free=True,
    )]
    vae_tiling: Annotated[str | tuple[int, int] | None, Option(
        "--vae-tiling WxH",
        "decode and encode in tiles of at most so many pixels (384x384): the same video, less memory, more time; off: "
        "never (default: auto, where memory asks for it)", RUN, examples=("auto", "off"), text="{}x{}".format,
        free=True,
    )]
    caffeinate: Annotated[bool, Option(
        "--no-caffeinate", "let an idle Mac fall asleep while a run goes on", RUN,
        more="A closed lid always makes it sleep", default=True, free=True,
    )]
    parallel: Annotated[str, Option(
        "--parallel MODE", "how several machines share a video: {choices}", RUN,
        more="Of a command that `mlx.launch` starts on each of them; alone it has no effect. cfg: a pass of guidance "
        "each; tokens: each some tokens of every pass. See [several Macs](several-macs.md)",
        default="auto", choices=PARALLEL, free=True,
    )]
    stop_below: Annotated[int | None, Option(
        "--stop-below PERCENT", "stop after a step, as Ctrl-C does, if the Mac runs on a battery with less left", RUN,
        more="Such as 20%. `--resume` goes on", parse=parse_percent, limits=Limits(1, 99), free=True,
    )]
    prompt_cache: Annotated[bool, Option(
        "--no-prompt-cache", "encode prompts anew, and keep none on disk", RUN, default=True, free=True,
    )]
    taehv: Annotated[str | Path | None, Option(
        "--taehv FILE", "weights of the tiny autoencoder TAEHV, for finer previews: taew2_1.pth (TI2V-5B: "
        "taew2_2.pth), or on the hub lightx2v/Autoencoders:taew2_1.safetensors", WATCH, place="name",
        needs=("preview", "tiny_vae", "draft"), free=True,
    )]
    tiny_vae: Annotated[bool, Option("--tiny-vae", "decode the video with TAEHV, too: fast, less fine", WATCH)]
    draft: Annotated[bool, Option(
        "--draft", "a look at the idea, in a tenth of the time: half as wide and high, a quarter of the steps, decoded "
        "with TAEHV", WATCH,
        more="All other flags, --size and --steps too, are those of the video that it is a draft of, and so is its "
        "noise at low frequencies. --from-draft makes that video. TAEHV is fetched where --taehv does not name it",
    )]
    progress: Annotated[bool, Option(
        "", "show how far downloads and runs are; or a function, which then hears of them", default=True,
    )]


# Flags that are no keyword.
COMMAND_OPTIONS = [
    Option(
        "--prompts FILE", "many videos: .txt, a prompt a line, or .jsonl", WHAT,
        more="Of .jsonl a line is an object with any flags as keys. See below", place="file", alone=True,
    ),
    Option(
        "--seeds LIST", "a video for each seed, such as 1,2,3", WHAT,
        more="The model is loaded once, and the output's name gets `_seedN`", parse=parse_seeds, instead_of=("seed",),
        type=Sequence[int],
    ),
    Option(
        "--num-videos N", "N videos, with the seeds from --seed on", WHAT, more="Likewise; up to 10000",
        limits=Limits(1, MOST_IMAGES), type=int,
    ),
    Option(
        "--num-images N", "N stills, with the seeds from --seed on", WHAT, more="Likewise; --frames is 1",
        limits=Limits(1, MOST_IMAGES), type=int,
    ),
    Option(
        "-o --output --save_file FILE", ".mp4 .gif .webp .png .npz (default: from the prompt)", WHAT,
        more="The ending picks the format. A name that is made of the prompt is always a new one", place="file",
    ),
    Option("--overwrite", "replace the output if it exists", WHAT, alone=True),
    Option(
        "--report FILE", "of --prompts: what became of each line (default: FILE.report.jsonl)", WHAT, place="file",
        needs=("prompts",), alone=True,
    ),
    Option(
        "--extend-prompt", "by a language model on this machine, before anything else is loaded", EXTEND,
        more="It writes the detailed kind of prompt that Wan was trained on, of Wan2.2 in a film crew's words, which "
        "is shown and kept in the file. With I2V-A14B, and TI2V-5B and an image, the prompt may be `\"\"`: it is then "
        "written out of the picture by a model that sees",
    ),
    Option(
        "--extend-model --prompt_extend_model MODEL",
        "any instruct model that mlx-lm runs: hub id or folder (default: mlx-community/Qwen2.5-7B-Instruct-4bit)",
        EXTEND, place="name", needs=("extend_prompt", "use_prompt_extend"), name="prompt_extend_model",
    ),
    Option(
        "--extend-language --prompt_extend_target_lang", "default: the prompt's own (--use_prompt_extend: zh)", EXTEND,
        choices=("zh", "en"), needs=("extend_prompt", "use_prompt_extend"), name="prompt_extend_target_lang",
    ),
    Option(
        "--use_prompt_extend", "the official --extend-prompt", EXTEND,
        more="The prompt is then Chinese, unless a language is given", hidden=True,
    ),
    Option(
        "--prompt_extend_method", "of the official command lines", EXTEND,
        more="`dashscope`, a service, is not used: a model here writes the prompt out",
        choices=("local_qwen", "dashscope"), hidden=True,
    ),
    Option(
        "--resume FILE", "the same as wan-mlx resume FILE: go on with the run that was making it", RUN,
        more="All flags are those it was started with", place="file", alone=True,
    ),
    Option(
        "--plan", "the same as wan-mlx plan: print each stage's memory and time, and stop", RUN,
        more="Of the run that the other flags ask for; pictures and videos may be left out. Exit code 1 if it does not "
        "fit", alone=True,
    ),
    Option("--dry-run", "say what would run or be downloaded, and stop", RUN, alone=True),
    Option(
        "--config FILE", "the settings of an earlier video, or of a .json file", RUN,
        more="Flags beside it win", place="file", alone=True,
    ),
    Option(
        "--from-draft FILE", "make the video that FILE is a draft of", RUN,
        more="With its settings and seed, at its full size and number of steps. Flags beside it win", place="file",
        alone=True,
    ),
    Option(
        "--no-notify", "no notification when a run of minutes ends", RUN,
        more="It is macOS's, elsewhere the terminal's bell", default=True, name="notify", alone=True,
    ),
    Option("--quiet", "print only the output path and errors", SAY, alone=True),
    Option("--verbose", "print also what is read, fetched and chosen", SAY, alone=True),
    Option("--json", "print one JSON event a line on stdout, for programs", SAY, alone=True),
    Option("--debug", "show a traceback when something fails", SAY, alone=True),
    Option("--version", "show versions and stop", SAY, alone=True),
    Option(
        "--preview FILE",
        "animation FILE.webp and FILE.png, after every step", WATCH,
        more="A small video of what it is becoming, and its frames side by side", place="file", free=True,
    ),
    Option(
        "--preview-every N", "only after every N steps", WATCH, default=1, limits=Limits(1), needs=("preview",),
        free=True, type=int,
    ),
    Option("--offload_model BOOL", "", OFFICIAL, no_effect="weights are always dropped as soon as a stage is done"),
    Option("--convert_model_dtype", "", OFFICIAL, no_effect="--dtype says in which dtype the weights are"),
    Option("--t5_cpu", "", OFFICIAL, no_effect="the text encoder is always streamed from disk"),
    Option("--t5_fsdp", "", OFFICIAL, no_effect=ONE_GPU),
    Option("--dit_fsdp", "", OFFICIAL, no_effect=ONE_GPU),
    Option("--ulysses_size N", "", OFFICIAL, no_effect=ONE_GPU),
    Option("--ring_size N", "", OFFICIAL, no_effect=ONE_GPU),
    *(Option(flag, "", OFFICIAL, no_effect="no speech is made here; give a recording with --audio") for flag in TTS),
]


def _whole(option: Option, of: str, name: str = "", kind: Any = None) -> Option:
    """The option, completed from its place in the table: the keyword's name, its type, and that a switch is off."""
    kind = kind or (bool if option.is_switch else option.type)
    off = False if kind is bool and option.default is None and not option.no_effect else option.default
    return replace(option, name=name or option.name or option.label, type=kind, of=of, default=off)


def _declared(keywords: type, of: str) -> list[Option]:
    """The options that a class declares, in their order."""
    return [
        _whole(annotation.__metadata__[0], of, name, annotation.__origin__)
        for name, annotation in keywords.__annotations__.items()
    ]


OPTIONS: list[Option] = [
    PROMPT,
    *_declared(RequestOptions, REQUEST),
    *(_whole(option, COMMAND) for option in COMMAND_OPTIONS),
    MODEL_NAME,
    *_declared(ModelOptions, MODEL),
]


def named(name: str) -> Option:
    """The option of that Python keyword."""
    return next(option for option in OPTIONS if option.name == name)


def keyed(key: str) -> Option:
    """The option of that name among parsed flags."""
    return next(option for option in OPTIONS if option.flags and option.key == key)


def of(face: str) -> list[Option]:
    """The options whose keyword is one of `REQUEST`, `MODEL` or `COMMAND`."""
    return [option for option in OPTIONS if option.of == face]


def flags() -> list[Option]:
    """The options that have a flag."""
    return [option for option in OPTIONS if option.flags]


def flag_names() -> dict[str, str]:
    """Attribute of the parsed flags → the flag that sets it."""
    return {option.key: option.flags[0] for option in flags()}


def filled(face: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All keywords of ``face``: as they are given or, left out or None, with their defaults.

    Raises:
        TypeError: there is none of such a name; names the nearest.
        ValueError: a text that stands for nothing.
    """
    known = {option.name: option.left_out() for option in of(face)}
    for name in given:
        if name not in known:
            raise TypeError(f"a {face} has no option {name!r}{nearest(name, known)}")
    return known | {name: named(name).meaning(value) for name, value in given.items() if value is not None}


def told(face: str, in_order: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Decorates a function that takes the keywords of ``face``, spelled out or as ``**options``: each of them appears
    in its signature and docstring, for help() and notebooks; first those that it takes ``in_order`` without names.
    """

    def tell(function: Function) -> Function:
        signature = inspect.signature(function)
        taken = [option for option in of(face) if option not in (PROMPT, MODEL_NAME)]
        taken.sort(key=lambda option: [*in_order, option.name].index(option.name))
        named = [
            inspect.Parameter(
                option.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD if option.name in in_order else inspect.Parameter.KEYWORD_ONLY,
                default=option.default,
                annotation=getattr(option.type, "__forward_arg__", option.type),
            )
            for option in taken
        ]
        several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        options = {option.name for option in taken}
        own = [p for name, p in signature.parameters.items() if p.kind not in several and name not in options]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *named])
        lines = [f"    {option.keyword}: {option.described}" for option in taken]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines])
        return function

    return tell
