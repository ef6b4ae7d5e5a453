"""What the command line says: lines for people on stderr, or for programs one JSON event a line on stdout (``--json``).

Events have a key "event": start, stage, step, frames, preview, note, result, error; the keys of each are those that its
call names. Colours are used on a terminal alone, and not where ``NO_COLOR`` is set.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..events import Decoded, Event, Previewed, StageEnded, Stepped

if TYPE_CHECKING:
    import argparse


RED, DIM, PLAIN = "\033[31m", "\033[2m", "\033[0m"
LABEL_WIDTH = 10  # of the lines that say what will run


@dataclass
class Voice:
    """How much is said, and in which form."""

    quiet: bool = False
    as_json: bool = False


_voice = Voice()


def set_voice(args: argparse.Namespace) -> None:
    """Speak as the flags ``--quiet``, ``--verbose`` and ``--json`` ask for, from now on."""
    import logging

    _voice.quiet, _voice.as_json = args.quiet and not args.dry_run, args.json
    if args.verbose:
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s", level=logging.INFO, force=True)


def note(message: str, important: bool = False) -> None:
    """A line that helps and is not the result; an ``important`` one is said even where ``--quiet`` was asked for."""
    if _voice.as_json:
        event("note", text=message.strip())
    elif important or not _voice.quiet:
        label, rest = message[:LABEL_WIDTH], message[LABEL_WIDTH:]
        is_label = rest and label.endswith(" ") and label.strip().isalpha()
        print(_coloured(label, DIM) + rest if is_label else message, file=sys.stderr)


def result(path: object, **data: Any) -> None:
    """A file that was made: its path, alone on a line of stdout."""
    if _voice.as_json:
        event("result", output=str(path), **data)
    else:
        print(path, flush=True)


def fail(message: str, code: int) -> int:
    """Say what went wrong, in one line; returns the exit code."""
    if _voice.as_json:
        event("error", message=message, code=code)
    else:
        print(f"{_coloured('error:', RED)} {message}", file=sys.stderr)
    return code


def event(kind: str, **data: Any) -> None:
    """Tell a program, if one listens."""
    if _voice.as_json:
        print(json.dumps({"event": kind, **data}, ensure_ascii=False), flush=True)


def _coloured(text: str, colour: str) -> str:
    plain = "NO_COLOR" in os.environ or not sys.stderr.isatty()
    return text if plain else f"{colour}{text}{PLAIN}"


def hear(event: Event) -> None:
    """Listen to a run."""
    if _voice.as_json and isinstance(event, StageEnded | Stepped | Decoded | Previewed):
        print(json.dumps(event.as_json(), ensure_ascii=False), flush=True)
