"""The command line's flags, grouped by what people do with them.

Our own flags follow the Python API; every flag of the official ``generate.py`` is accepted too, with its meaning.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from ..errors import UsageError
from ..presets import PRESETS

DESCRIPTION = "Make a video with a Wan2.1 model, on Apple silicon or any other MLX backend."

EXAMPLES = """\
examples:
  python -m wan_mlx.generate --model nano --prompt "a red circle moves right on a blue background" --output demo.mp4
  python -m wan_mlx.generate --model ./Wan2.1-T2V-1.3B --prompt "a cat boxing" --output cat.mp4
  python -m wan_mlx.generate --model ./Wan2.1-T2V-1.3B --prompt "a cat boxing" --frames 1 --output cat.png
  python -m wan_mlx.generate --resume cat.mp4
  python -m wan_mlx.generate --config cat.mp4 --seed 7 --output cat7.mp4
  python -m wan_mlx.generate --model ./Wan2.1-T2V-1.3B --prompts cats.jsonl
  python -m wan_mlx.generate --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "a cat boxing"
"""

MODEL_HELP = """\
which model? give --model one of
  nano                     bundled: shapes moving on plain backgrounds, 128x128, in seconds
  nano-i2v                 bundled: the same from a first frame, given with --image
  a folder                 ./Wan2.1-T2V-1.3B, downloaded from the hub
  owner/name:path/file     one file of a repository on the hub
  Wan-AI/Wan2.1-T2V-1.3B   text to video, 480p (17.5 GB to download)
  Wan-AI/Wan2.1-T2V-14B    text to video, 480p and 720p (69 GB to download)
  Wan-AI/Wan2.1-I2V-14B-480P, -I2V-14B-720P, -FLF2V-14B-720P, -VACE-1.3B, -VACE-14B   from pictures and videos"""

# Flags of the official generate.py that mean nothing on one Mac. Each is accepted, with one line saying so.
NO_MEANING = {
    "offload_model": "weights are always dropped as soon as a stage is done",
    "t5_cpu": "the text encoder is always streamed from disk",
    "t5_fsdp": "there is one GPU",
    "dit_fsdp": "there is one GPU",
    "ulysses_size": "there is one GPU",
    "ring_size": "there is one GPU",
}
# Values that are paths: what they mean depends on the folder that the command is run in.
PATH_FLAGS = ("image", "last_image", "src_video", "src_mask", "src_ref_images", "video", "output", "preview")
# Values that are paths if there is something by that name, or else names on a hub.
MODEL_FLAGS = ("model", "transformer", "text_encoder", "vae", "image_encoder", "tokenizer", "taehv")
# What may differ from the first command when a run goes on: it has no part in what the video shows.
FREE_ON_RESUME = (
    "resume", "overwrite", "dry_run", "quiet", "debug", "version", "memory", "vae_tiling", "no_prompt_cache",
    "prompts", "report", "verbose", "json", "config", "preview", "preview_every", "taehv",
    *NO_MEANING,
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x*×](\d+)", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected WIDTHxHEIGHT in pixels, such as 832x480")
    return int(match[1]), int(match[2])


def parse_range(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"([\d.]+)-([\d.]+)", text.strip())
    try:
        return float(match[1]), float(match[2])
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no range; expected FROM-TO in fractions of the steps, such as 0.1-0.9"
        ) from None


def parse_skip(text: str) -> tuple[tuple[int, ...], tuple[float, float] | None]:
    layers, colon, span = text.partition(":")
    if not re.fullmatch(r"\d+(,\d+)*", layers):
        raise argparse.ArgumentTypeError(f"{text!r}; expected layers and where to skip them, such as 9,10:0.1-0.9")
    return tuple(int(layer) for layer in layers.split(",")), parse_range(span) if colon else None


def build_parser() -> Parser:
    """The whole command line; a group of flags is one function below."""
    parser = Parser(
        prog="python -m wan_mlx.generate",
        description=DESCRIPTION,
        epilog=f"{defaults_table()}\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for add in (
        add_what, add_prompt_extension, add_sources, add_model, add_sampling, add_fewer_forwards, add_run, add_watching,
        add_official,
    ):  # fmt: skip
        add(parser)
    return parser


def defaults_table() -> str:
    """What is taken for each model where a flag is left out."""
    lines = [f"{'defaults of':<18}{'size':<11}{'frames':>6}{'steps':>7}{'shift':>7}{'guidance':>10}"]
    for preset in PRESETS.values():
        sampling, size = preset.sampling_for(*preset.size), "x".join(map(str, preset.size))
        lines.append(f"  {preset.name:<16}{size:<11}{preset.num_frames:>6}{sampling.steps:>7}{sampling.shift:>7g}"
                     f"{sampling.guidance_scale:>10g}")  # fmt: skip
    return "\n".join(lines) + "\n"


def given_flags(argv: list[str]) -> dict[str, Any]:
    """The flags that a command line gives, without those left to their defaults."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def flag_names() -> dict[str, str]:
    """Attribute of the parsed arguments → the flag that sets it."""
    return {action.dest: action.option_strings[0] for action in build_parser()._actions}


def add_what(parser: Parser) -> None:
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", help="what the video should show")
    what.add_argument("--prompts", metavar="FILE", help="many requests: a JSON object a line, with any flags as keys")
    what.add_argument("--negative-prompt", metavar="TEXT", help="what to avoid (default: the model's own)")
    what.add_argument("--size", type=parse_size, metavar="WxH", help="pixels, multiples of 16 (default: the model's)")
    what.add_argument("--frames", "--frame_num", type=int, metavar="N", help="4n+1 (default 81: five seconds)")
    what.add_argument("--num-images", type=int, metavar="N", help="N stills with N seeds (with --frames 1)")
    what.add_argument("--output", "--save_file", metavar="FILE", help=".mp4 .gif .webp .png .npz (default: by prompt)")
    what.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    what.add_argument("--report", metavar="FILE", help="of --prompts: what became of each line (FILE.report.jsonl)")


def add_prompt_extension(parser: Parser) -> None:
    extension = parser.add_argument_group("how to have the prompt written out in detail, as the models like it")
    extension.add_argument("--extend-prompt", action="store_true", help="by a language model on this machine, before "
                           "anything else is loaded")  # fmt: skip
    extension.add_argument("--extend-model", "--prompt_extend_model", dest="prompt_extend_model", metavar="MODEL",
                           help="any instruct model that mlx-lm runs: hub id or folder (default: "
                           "mlx-community/Qwen2.5-7B-Instruct-4bit)")  # fmt: skip
    extension.add_argument("--extend-language", "--prompt_extend_target_lang", dest="prompt_extend_target_lang",
                           choices=("zh", "en"), help="default: the prompt's own (--use_prompt_extend: zh)")
    extension.add_argument("--use_prompt_extend", action="store_true", default=None, help=argparse.SUPPRESS)
    extension.add_argument("--prompt_extend_method", choices=("local_qwen", "dashscope"), help=argparse.SUPPRESS)


def add_sources(parser: Parser) -> None:
    sources = parser.add_argument_group("from which pictures or videos")
    sources.add_argument("--image", "--first_frame", metavar="FILE", help="first frame (i2v, flf2v)")
    sources.add_argument("--last-image", "--last_frame", metavar="FILE", help="last frame (flf2v)")
    sources.add_argument("--video", metavar="FILE", help="video to start from instead of noise (t2v)")
    sources.add_argument("--strength", type=float, metavar="S", help="0 keeps that video, 1 replaces it (default 0.7)")
    sources.add_argument("--src_video", metavar="FILE", help="video to edit or follow (vace)")
    sources.add_argument("--src_mask", metavar="FILE", help="what to generate anew in it, white (vace)")
    sources.add_argument("--src_ref_images", metavar="FILES", help="pictures of what should appear, a,b,c (vace)")
    sources.add_argument("--context-scale", type=float, default=1.0, metavar="S", help="strength of the source (vace)")


def add_model(parser: Parser) -> None:
    model = parser.add_argument_group("with which model")
    model.add_argument("--model", "--ckpt_dir", metavar="MODEL",
                       help="nano or nano-i2v (bundled), a folder, a file, or a hub id")  # fmt: skip
    for part in ("transformer", "text-encoder", "vae", "image-encoder", "tokenizer"):
        given = "where --model is one file, or instead of what it has" if part == "transformer" else "likewise"
        model.add_argument(f"--{part}", metavar="PATH", help=f"file, folder or repository that has it: {given}")
    model.add_argument("--source", metavar="HUB", default="huggingface", help="huggingface (default) or modelscope")
    model.add_argument("--task", help="take the sampling defaults of this official task, such as t2v-1.3B")
    model.add_argument("--dtype", default="bfloat16", help="of transformer and text encoder: bfloat16, float32")
    model.add_argument(
        "--quantize",
        metavar="MODE",
        help="keep transformer and text encoder in few bits: q8 q6 auto q5 q4 q3 (q4-g32 for another group), "
        "mxfp8 mxfp4 nvfp4; none unpacks packed weights. Default: as they are stored, and of GGUF files Q8_0 Q5_0 Q5_1 "
        "Q4_0 Q4_1 stay packed as they are; nearest packs the other GGUF types too, in the form that comes nearest",
    )
    model.add_argument(
        "--lora",
        metavar="FILE[:STRENGTH]",
        action="append",
        default=[],
        help="merge a LoRA into the transformer, as in style.safetensors:0.8 or owner/name:style.safetensors:0.8; "
        "may be given again",
    )


def add_sampling(parser: Parser) -> None:
    defaults = "Defaults are the model's own: see the table below."
    how = parser.add_argument_group("how to sample", defaults)
    how.add_argument("--steps", "--sample_steps", type=int, metavar="N", help="sampling steps")
    how.add_argument("--guidance", "--sample_guide_scale", type=float, metavar="G", help="guidance scale; 1 is off")
    how.add_argument("--shift", "--sample_shift", type=float, metavar="S", help="shift of the sigma schedule")
    how.add_argument("--solver", "--sample_solver", help="unipc (default), dpm++, euler, or dmd")
    how.add_argument("--seed", "--base_seed", type=int, metavar="N", help="same seed, same video (default: drawn)")


def add_fewer_forwards(parser: Parser) -> None:
    fewer = parser.add_argument_group("how to guide, and how to leave out work")
    fewer.add_argument("--cache", metavar="NAME", help="step cache: teacache, magcache, easycache, each with its "
                       "threshold after a colon (easycache:0.05), or none (default)")  # fmt: skip
    fewer.add_argument("--recipe", metavar="NAME", help="for distilled models and LoRAs; sets steps, solver, shift and "
                       "guidance: lightx2v-4step, fastwan-3step, causvid, rcm")  # fmt: skip
    fewer.add_argument("--guidance-range", type=parse_range, default=(0.0, 1.0), metavar="A-B",
                       help="guidance only in this part of the steps, such as 0-0.6 (default 0-1)")  # fmt: skip
    fewer.add_argument("--cfg-zero", nargs="?", type=int, const=True, metavar="STEPS",
                       help="CFG-Zero*: scaled guidance, and STEPS first steps without motion")  # fmt: skip
    fewer.add_argument("--slg", type=parse_skip, default=((), None), metavar="LAYERS[:A-B]",
                       help="skip-layer guidance, such as 9 or 9,10:0.1-0.9 (default part 0.1-1)")  # fmt: skip


def add_run(parser: Parser) -> None:
    run = parser.add_argument_group("how to run")
    run.add_argument("--resume", metavar="FILE", help="go on with the run that was making FILE, where it was cut")
    run.add_argument(
        "--memory",
        metavar="SIZE",
        help="what MLX may hold, such as 8GB: it decides what stays resident, is streamed from disk or done in tiles "
        "(default: auto, what this machine has to spare)",
    )
    run.add_argument("--plan", action="store_true", help="print each stage's memory and time, and stop; no download")
    run.add_argument(
        "--vae-tiling",
        metavar="WxH",
        help="decode and encode in tiles of at most so many pixels (384x384): the same video, less memory, more time; "
        "off: never (default: auto, where memory asks for it)",
    )
    run.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
    run.add_argument("--no-prompt-cache", action="store_true", help="encode prompts anew, and keep none on disk")
    run.add_argument("--config", metavar="FILE",
                     help="take the settings of an earlier video or of a .json file; flags beside it win")  # fmt: skip
    run.add_argument("--quiet", action="store_true", help="say nothing but the result and what went wrong")
    run.add_argument("--verbose", action="store_true", help="say more: what is read, fetched and chosen")
    run.add_argument("--json", action="store_true", help="one JSON event a line on stdout, for programs")
    run.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    run.add_argument("--version", action="store_true", help="show versions and stop")


def add_watching(parser: Parser) -> None:
    watching = parser.add_argument_group("how to watch it come")
    watching.add_argument("--preview", metavar="FILE", help="what it is becoming, after every step: a small animation "
                          "FILE.webp, and FILE.png with its frames side by side")  # fmt: skip
    watching.add_argument("--preview-every", type=int, default=1, metavar="N", help="only after every N steps")
    watching.add_argument("--taehv", metavar="FILE", help="weights of the tiny autoencoder TAEHV, for finer previews: "
                          "taew2_1.pth, or on the hub lightx2v/Autoencoders:taew2_1.safetensors")  # fmt: skip
    watching.add_argument("--draft", action="store_true", help="decode the video with TAEHV, too: fast, less fine")


def add_official(parser: Parser) -> None:
    official = parser.add_argument_group("accepted for the official command lines; without effect here")
    official.add_argument("--offload_model", metavar="BOOL", help=argparse.SUPPRESS)
    official.add_argument("--ulysses_size", metavar="N", help=argparse.SUPPRESS)
    official.add_argument("--ring_size", metavar="N", help=argparse.SUPPRESS)
    for flag in ("t5_fsdp", "t5_cpu", "dit_fsdp"):
        official.add_argument(f"--{flag}", action="store_true", default=None, help=argparse.SUPPRESS)
    official.description = " ".join(f"--{flag}" for flag in NO_MEANING)
