"""``wan-mlx convert SOURCE OUT``: a checkpoint made into one MLX folder; ``wan-mlx inspect SOURCE``: describe one.

``python weights_convert.py SOURCE OUT`` and ``--inspect SOURCE`` in a clone are the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import Stopped, UsageError, WanError
from ..events import Listener, counted, unheard
from ..hub.names import parse_location
from ..hub.resolve import Places, preset_of
from ..mac import awake
from ..options import named
from ..presets import GIVEN_APART
from ..progress_bars import ProgressBars
from ..weights.checkpoint import check_here, open_checkpoint
from ..weights.convert import check_target, convert
from ..weights.inspect import inspect_source
from .flags import Parser
from .terminal import write

DESCRIPTION = "Convert a published checkpoint into one MLX folder.\n\nTo describe one: wan-mlx inspect."
ABOUT_INSPECT = "What a model's files hold, and whether they are whole."
OF_WRITING = ("overwrite", "dtype", "vae_dtype", "quantize", "model")  # options without a meaning for --inspect


def build_parser(inspects: bool = False) -> Parser:
    """``inspects``: its help is that of `wan-mlx inspect`."""
    example = "wan-mlx inspect t2v-1.3B" if inspects else "wan-mlx convert t2v-1.3B folder"
    parser = Parser(example, prog="wan-mlx convert", description=DESCRIPTION)
    parser.register("type", None, _filled)  # of every argument without a type
    parser.add_argument(
        "checkpoint", metavar="SOURCE", help="what --model takes: a folder or file, a preset such as t2v-1.3B, a hub id"
    )
    parser.add_argument("out", metavar="OUT", nargs="?", help="folder to write; must not exist")
    parser.add_argument("--inspect", action="store_true", help=argparse.SUPPRESS)  # for it there is a command
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, if it is an MLX folder and no more")
    parser.add_argument("--dtype", default="bfloat16", help="of transformer and text encoder (default bfloat16)")
    parser.add_argument("--vae-dtype", default="float32", help="of the VAE (default float32)")
    parser.add_argument(
        "--quantize",
        metavar="MODE",
        help="keep the blocks of transformer and text encoder in few bits: q8 q6 auto q5 q4 q3 (q4-g32 for another "
        "group), mxfp8 mxfp4 nvfp4; none unpacks packed weights, nearest packs every GGUF type in the form that comes "
        "nearest (default: as stored, and Q8_0 Q5_0 Q5_1 Q4_0 Q4_1 stay packed as they are)",
    )
    parser.add_argument("--model", help="preset whose sampling defaults to record, such as t2v-1.3B")
    for part in GIVEN_APART:
        parser.add_argument(
            f"--{part.replace('_', '-')}", metavar="PATH", help="taken instead of SOURCE's own"
        )
    parser.add_argument("--source", metavar="HUB", help=named("source").described)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    if inspects:
        parser.prog, parser.description = "wan-mlx inspect", ABOUT_INSPECT
        for action in parser._actions:
            if action.dest in (*OF_WRITING, "inspect", "out"):
                action.help = argparse.SUPPRESS
    return parser


def main(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    parser = build_parser(inspects=argv[:1] == ["--inspect"])
    args = parser.parse_args(argv)
    parts = {part: getattr(args, part) for part in GIVEN_APART if getattr(args, part) is not None}
    args.source = args.source or named("source").left_out()
    listener: Listener = unheard if args.quiet else ProgressBars()
    if args.inspect == (args.out is not None):
        raise UsageError("give SOURCE and OUT, the folder to write; to describe one: wan-mlx inspect")
    for name in OF_WRITING:
        if args.inspect and getattr(args, name) != parser.get_default(name):
            raise UsageError(f"--{name.replace('_', '-')} has no effect with --inspect; leave it out")
    if args.inspect:
        return inspect(args.checkpoint, parts, args.source, listener)
    try:
        with awake():
            folder = convert_source(args, parts, listener)
        write(folder)
    except KeyboardInterrupt:
        raise Stopped(go_on="; nothing was written, a download goes on where it was") from None
    except RuntimeError as error:  # MLX's, of a file that cannot be read
        raise WanError(str(error)) from error
    return 0


def _filled(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give it a value, or leave it out")
    return text


def convert_source(args: argparse.Namespace, parts: dict[str, str], listener: Listener) -> Path:
    """Fetch and convert the named files; returns the folder that is written."""
    check_target(args.out, args.overwrite, args.model)  # before a download of 69 GB
    places = Places(args.checkpoint, parts)
    check_here(*places.here())
    for download in places.downloads(args.source):
        if download.missing:
            write(f"download  {download}", to="stderr")
    here = places.fetch(args.source, listener)
    checkpoint = open_checkpoint(here.model, here.parts)
    location = None if Path(args.checkpoint).expanduser().exists() else parse_location(args.checkpoint)
    return convert(
        checkpoint,
        args.out,
        args.dtype,
        args.vae_dtype,
        args.model or checkpoint.model or getattr(preset_of(args.checkpoint), "name", None),
        counted(listener, "converting"),
        named("quantize").meaning(args.quantize),
        args.overwrite,
        name=str(location) if location else None,
    )


def inspect(source: str, parts: dict[str, str], hub: str, listener: Listener) -> int:
    """Describe a model, or list the files that would have to be downloaded first; 1 if it cannot be loaded."""
    places = Places(source, parts)
    missing = [download for download in places.downloads(hub) if download.missing]
    if missing:
        for download in missing:
            write(f"not on this machine: {download}")
        return 0
    here = places.fetch(hub)
    found = inspect_source(here.model, here.parts, listener)
    for line in found.lines():
        write(line)
    return 0 if found.is_sound else 1

