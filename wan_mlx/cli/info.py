"""``wan-mlx info FILE``: a LoRA, a video of ours, or a model, described from the file itself."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UsageError
from ..events import Listener, unheard
from ..hub.names import expert_named
from ..hub.resolve import keys_of, resolve, survey
from ..media.write import ENDINGS, read_settings
from ..options import named
from ..presets import EXPERTS
from ..progress_bars import ProgressBars
from ..storage import no_file
from ..weights.checkpoint import look_at
from ..weights.load import open_network
from ..weights.lora import file_of
from ..weights.lora_config import are_of_adapter
from ..weights.lora_info import inspect_lora, is_lora
from ..weights.parts import Part
from . import convert
from .flags import Parser
from .summary import recipe_notes
from .terminal import write


def build_parser() -> Parser:
    description = "Describe a LoRA, a video made here, or a model."
    parser = Parser("wan-mlx info cat.mp4", prog="wan-mlx info", description=description)
    about = "a LoRA or its folder; a video, picture or .npz of ours; or what --model takes"
    parser.add_argument("file", metavar="FILE", help=about)
    parser.add_argument("--model", help="a transformer or whole model: how much of it a LoRA changes")
    parser.add_argument("--source", metavar="HUB", help=named("source").described)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(argv: list[str]) -> int:
    """Print what is known; 1 if the file cannot be used."""
    args = build_parser().parse_args(argv)
    args.source = args.source or named("source").left_out()
    listener: Listener = unheard if args.quiet else ProgressBars()
    if not Path(args.file).exists() and Path(args.file).suffix.lower() in ENDINGS:
        raise UsageError(no_file("file", Path(args.file), ENDINGS))
    path = found_at(args.file, args.source, listener)
    is_adapter = path.exists() and is_lora(path)
    if args.model and not is_adapter:
        raise UsageError(f"--model goes with a LoRA, and {args.file} is none")
    if path.suffix.lower() in ENDINGS and path.is_file():
        return show_settings(path)
    if not is_adapter:
        return convert.inspect(args.file, {}, args.source, listener)
    base = None
    if args.model:
        base = open_network(transformer_for(path, args.model, args.source, listener), "transformer")
    found = inspect_lora(path, base, listener)
    for line in (*found.lines(), *recipe_notes([file_of(path)], None)):
        write(line)
    return 0 if found.is_sound else 1


def transformer_for(lora: Path, model: str, source: str, listener: Listener) -> Part:
    """The transformer of a model; of two experts the one that a LoRA's name speaks of, else the high-noise one."""
    expert = expert_named(file_of(lora)) or EXPERTS[0]
    found = look_at(resolve(model, source, listener, [expert]))
    part = next((part for part in found.parts if part.name == expert), found.part("transformer"))
    if found.has_experts:
        write(f"{'beside':<15}the {part.label} expert of {model}")
    return part


def found_at(name: str, source: str, listener: Listener) -> Path:
    """The path of what is named. A LoRA on a hub is fetched, if its header shows that it is one; else nothing is."""
    found = survey(name, source)
    if isinstance(found, Path):
        return found
    is_here = not found.missing
    return resolve(name, source, listener) if is_here or are_of_adapter(keys_of(found)) else Path(name)


def show_settings(path: Path) -> int:
    """The settings that a file of ours was made with, without those that were left out."""
    for name, value in read_settings(path).items():
        if value is None:
            continue
        plain = isinstance(value, str) and value.isprintable()
        write(f"{name:<19}{value if plain else json.dumps(value, ensure_ascii=False)}")
    return 0
