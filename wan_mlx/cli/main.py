"""``python -m wan_mlx.generate``: from the command line to the command, and from a failure to its exit code."""

from __future__ import annotations

import importlib
import os
import sys
from io import TextIOWrapper
from pathlib import Path

from .. import check_backend
from ..errors import Stopped
from .config_file import config_arguments
from .flags import build_parser, given_flags
from .interrupt import Interrupts
from .terminal import INTERRUPTED, Terminal, explain, say_logs

# The other subcommands: first argument → module whose ``main`` takes the rest.
COMMANDS = {"models": ".list_models", "doctor": ".doctor", "completion": ".completion",
            "convert": ".convert", "inspect": ".convert", "info": ".info"}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0; 1: failed; 2: wrong usage; 3: the video was written, but it is black, flat or saturated; 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed; the next file to be opened would have its number, and get what is said
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding lacks
    say = Terminal(as_json="--json" in argv)
    say_logs("--verbose" in argv)
    try:
        if argv and argv[0] in COMMANDS:
            command, *rest = argv
            rest = ["--inspect", *rest] if command == "inspect" else rest
            return importlib.import_module(COMMANDS[command], __package__).main(rest)
        argv = with_config(argv)
        args = build_parser().parse_args(argv)
        say = Terminal.of(args)
        check_backend()

        from .batch import run_batch  # with MLX, which --help does without
        from .generate import resume, run, show_version
        from .summary import tell_no_effect

        with Interrupts() as interrupts:
            if args.version:
                return show_version()
            tell_no_effect(args, say)
            if args.prompts:
                return run_batch(args, argv, say, interrupts)
            return resume(args, given_flags(argv), say, interrupts) if args.resume else run(args, say, interrupts)
    except Stopped as stopped:
        return say.fail(f"{stopped.why}{stopped.go_on}", stopped.code)
    except KeyboardInterrupt:
        return say.fail("interrupted", INTERRUPTED)
    except Exception as error:
        if "--debug" in argv:
            raise
        return say.fail(*explain(error))


def with_config(argv: list[str]) -> list[str]:
    """The command line with the settings of ``--config FILE`` before it, so that its own flags win."""
    given = given_flags(argv)
    return [*config_arguments(Path(given["config"]), given), *argv] if "config" in given else argv
