"""``wan-mlx models``: the released models, their tasks and sizes, and which are on this machine."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import UsageError, some
from ..hub.model_folders import VARIABLE, model_folders, models_in
from ..hub.resolve import folders_of, is_cached
from ..presets import PRESETS, TASK_NAMES, Preset
from ..storage import gigabytes, size_of_folder
from .flags import Parser
from .terminal import write

NARROW, WIDE = 80, 112  # columns of a terminal: of every text; from which on there is room for repositories
ABOUT_WEIGHTS = (
    "GB: of the transformer in bfloat16, as loaded; of two, one is in memory at a time. The text encoder (11.4 GB in "
    "bfloat16) is streamed from disk and never in memory as a whole. What a model downloads: --model NAME --prompt x "
    "--dry-run"
)


def row_of(preset: Preset) -> dict[str, Any]:
    """The facts about a preset; parameters, and bytes in bfloat16 and in four bits (groups of 64), of its transformer,
    or of each of its two."""
    count = preset.parameters
    repositories = [*preset.repositories]
    return {
        "name": preset.name,
        "task": preset.task,
        "size": list(preset.size),
        "frames": preset.num_frames,
        "experts": preset.experts,
        "parameters": count,
        "bytes_bfloat16": 2 * count,
        "bytes_q4": count * 4.5 / 8,
        "repositories": repositories,
        "here": not preset.repo or is_cached(preset.repo),
        "vocabulary": list(preset.vocabulary),
        "bytes_on_disk": sum(size_of_folder(folder) for repo in repositories for folder in folders_of(repo)),
    }


def build_parser() -> Parser:
    parser = Parser(prog="wan-mlx models", description="Released models and what is on this machine.")
    parser.add_argument("action", nargs="?", choices=["list", "rm"], default="list", metavar="ACTION",
                        help="list (default); rm NAME: delete what was downloaded or converted")  # fmt: skip
    parser.add_argument("name", nargs="?", help="a model of the table, a hub id, or a folder that convert wrote")
    parser.add_argument("--yes", action="store_true", help="of rm: do not ask")
    parser.add_argument("--json", action="store_true", help="print a JSON array")
    return parser


def main(argv: list[str]) -> int:
    """Print the table, or with ``--json`` one JSON array; or with ``rm NAME`` delete a model."""
    args = build_parser().parse_args(argv)
    if args.action == "rm":
        if args.name is None:
            raise UsageError("models rm: expected the name of a model, such as t2v-1.3B")
        from .remove_models import remove

        return remove(args.name, args.yes)
    if args.yes or args.name is not None:
        raise UsageError("a name and --yes have no effect without rm; leave them out")
    rows = [row_of(preset) for preset in PRESETS.values()]
    if args.json:
        for line in json.dumps(rows, indent=1).splitlines():
            write(line)
        return 0
    is_wide = shutil.get_terminal_size((WIDE, 24)).columns >= WIDE
    write(f"{'--model':<17}{'task':<21}{'size':<9}frames{'GB':>9}{'in q4':>9} {'here':<13}"
          f"{'repository' * is_wide}".rstrip())  # fmt: skip
    for row in rows:
        size, on_disk = "x".join(map(str, row["size"])), row["bytes_on_disk"]
        here = ("yes" if row["here"] else "part" if on_disk else "no") + f", {gigabytes(on_disk)}" * bool(on_disk)
        times = "2 x " * (row["experts"] == 2)
        weights, packed = (f"{times}{row[key] / 1e9:.3g}" for key in ("bytes_bfloat16", "bytes_q4"))
        repository = row["repositories"][0] if row["repositories"] else "bundled"
        write(f"{row['name']:<17}{TASK_NAMES[row['task']]:<21}{size:<9}{row['frames']:>6}{weights:>9}{packed:>9} "
              f"{here:<13}{repository * is_wide}".rstrip())  # fmt: skip
    write("")
    for folder in filter(Path.is_dir, model_folders()):
        list_folder(folder)
    for line in textwrap.wrap(ABOUT_WEIGHTS, NARROW):
        write(line)
    for vocabulary, names in groupby((row for row in rows if row["vocabulary"]), key=lambda row: row["vocabulary"]):
        write("")
        write(f"{' and '.join(row['name'] for row in names)} know these words:")
        for language in vocabulary:
            for line in lines_of(language):
                write(f"  {line}")
    return 0


def lines_of(text: str) -> list[str]:
    """A text in lines of a narrow terminal; none of Chinese, whose letters are twice as wide, begins with a comma."""
    if text.isascii():
        return textwrap.wrap(text, NARROW - 2)
    lines = [""]
    for piece in re.findall("[^、，；]+[、，；]?", text):
        lines = [*lines[:-1], lines[-1] + piece] if 2 * len(lines[-1] + piece) <= NARROW - 2 else [*lines, piece]
    return lines


def list_folder(folder: Path) -> None:
    """What `--model` and `--lora` find by name in a folder of `WAN_MLX_MODELS`: LoRAs are counted."""
    found = [path.relative_to(folder) for path in models_in(folder)]
    loras = [path for path in found if "loras" in path.parts]
    write(f"in {folder} ({VARIABLE}):")
    for path in (path for path in found if path not in loras):
        place = folder / path
        write(f"  {path}  {gigabytes(size_of_folder(place) if place.is_dir() else place.stat().st_size)}")
    if loras:
        write(f"  loras: {some([path.stem for path in loras], 10)}")
    write("")
