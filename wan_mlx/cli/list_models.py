"""``wan-mlx models``: the released models, their tasks and sizes, and which are on this machine."""

from __future__ import annotations

import json
import textwrap
from itertools import groupby
from typing import Any

from ..hub.resolve import is_cached
from ..presets import PRESETS, TASK_NAMES, Preset
from .flags import Parser
from .terminal import write


def row_of(preset: Preset) -> dict[str, Any]:
    """The facts about a preset; bytes of the transformer in bfloat16 and in four bits (groups of 64)."""
    count = preset.parameters
    return {
        "name": preset.name,
        "task": preset.task,
        "size": list(preset.size),
        "frames": preset.num_frames,
        "parameters": count,
        "bytes_bfloat16": 2 * count,
        "bytes_q4": count * 4.5 / 8,
        "repositories": [*preset.repositories],
        "here": not preset.repo or is_cached(preset.repo),
        "vocabulary": list(preset.vocabulary),
    }


def build_parser() -> Parser:
    parser = Parser(prog="wan-mlx models", description="Released models and what is on this machine.")
    parser.add_argument("--json", action="store_true", help="print a JSON array")
    return parser


def main(argv: list[str]) -> int:
    """Print the table, or with ``--json`` one JSON array."""
    args = build_parser().parse_args(argv)
    rows = [row_of(preset) for preset in PRESETS.values()]
    if args.json:
        for line in json.dumps(rows, indent=1).splitlines():
            write(line)
        return 0
    write(f"{'--model':<16}{'task':<22}{'size':<10}{'frames':>6}{'weights':>11}{'in q4':>10}  {'here':<5}repository")
    for row in rows:
        size, here = "x".join(map(str, row["size"])), "yes" if row["here"] else "no"
        weights, packed = (f"{row[key] / 1e9:.2f} GB" for key in ("bytes_bfloat16", "bytes_q4"))
        repository = row["repositories"][0] if row["repositories"] else "bundled"
        write(f"{row['name']:<16}{TASK_NAMES[row['task']]:<22}{size:<10}{row['frames']:>6}{weights:>11}{packed:>10}  "
              f"{here:<5}{repository}")  # fmt: skip
    write("")
    write("weights: of the transformer in bfloat16, as loaded. The text encoder (11.4 GB in bfloat16) is streamed")
    write("from disk and never in memory as a whole. What a model downloads: --model NAME --prompt x --dry-run")
    for vocabulary, names in groupby((row for row in rows if row["vocabulary"]), key=lambda row: row["vocabulary"]):
        write("")
        write(f"{' and '.join(row['name'] for row in names)} know these words:")
        for language in vocabulary:
            for line in textwrap.wrap(language, 100 if language.isascii() else 50):  # Chinese is twice as wide
                write(f"  {line}")
    return 0
