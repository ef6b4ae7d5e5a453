"""``wan-mlx``: from the command line to the command, and from a failure to its exit code."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from io import TextIOWrapper
from pathlib import Path

from .. import check_backend
from ..errors import Stopped, UsageError, nearest
from .commands import COMMANDS, as_flags, check_command, help_page, is_prompt_file
from .config_file import config_arguments, read_text
from .flags import given_flags, run_parser
from .interrupt import Interrupts
from .notify import end_told
from .terminal import INTERRUPTED, USAGE, Terminal, explain, say_logs, write


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
    has_begun = False
    try:
        is_said = bool(argv) and argv[0] in COMMANDS
        name, rest = (argv[0], argv[1:]) if is_said else ("generate", argv)
        if argv and not is_said:
            check_command(argv[0], argv)
        if name == "help":
            return show_help(rest)
        if module := COMMANDS[name].module:
            rest = ["--inspect", *rest] if name == "inspect" else rest
            return importlib.import_module(module, __package__).main(rest)
        if not argv or {"-h", "--help"} & {*rest}:
            return show_help([name]) or (0 if argv else USAGE)
        flags = as_flags(name, rest, is_said)
        argv = with_config(with_prompt(flags))
        args = run_parser().parse_args(argv)
        args.is_bare = not is_said and f"--prompt={args.prompt}" in {*flags} - {*rest}
        args.given = given_flags(argv)
        say = Terminal.of(args)
        check_backend()

        from ..distributed import open_group, rank_given
        from .batch import run_batch  # with MLX, which --help does without
        from .follow import follow, told_in_file
        from .generate import resume, run, show_version
        from .list_runs import list_runs
        from .summary import tell_no_effect

        if args.version:
            return show_version()
        if rank_given():
            group = None if args.parallel == "off" else open_group()
            has_begun = True
            return 0 if group is None else follow(group)
        has_begun = True
        with Interrupts() as interrupts, end_told(args), told_in_file(args) as status:
            if name == "resume" and not args.resume:
                return list_runs(args.json)
            tell_no_effect(args, say)
            if args.prompts:
                return status(run_batch(args, argv, say, interrupts))
            if args.resume:
                return status(resume(args, given_flags(argv), say, interrupts))
            return status(run(args, say, interrupts))
    except Stopped as stopped:
        return say.fail(f"{stopped.why}{stopped.go_on}", stopped.code)
    except KeyboardInterrupt:
        return say.fail("interrupted", INTERRUPTED)
    except Exception as error:
        if "--debug" in argv:
            raise
        message, code = explain(error)
        if "MLX_RANK" in os.environ and not has_begun and not isinstance(error, ImportError):
            from .follow import write_refusal

            write_refusal(argv, message, code)
        return say.fail(message, code)


def show_help(words: list[str]) -> int:
    """``help`` and ``help COMMAND``."""
    name = words[0] if words else "generate"
    if len(words) > 1 or name not in COMMANDS:
        raise UsageError(f"help {' '.join(words)}: expected one of {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    if module := COMMANDS[name].module:
        of_inspect = {"inspects": True} if name == "inspect" else {}
        page = importlib.import_module(module, __package__).build_parser(**of_inspect).format_help()
    else:
        page = help_page("generate" if name == "help" else name)
    for line in page.splitlines():
        write(line)
    return 0


def with_prompt(argv: list[str]) -> list[str]:
    """The command line with what comes on standard input for ``--prompt -``, or stands in a file for ``--prompt
    FILE.txt``."""
    prompt: str = given_flags(argv).get("prompt", "")
    if is_prompt_file(prompt):
        lines = [line.strip() for line in read_text(Path(prompt), "--prompt").splitlines() if line.strip()]
        if len(lines) != 1:
            raise UsageError(f"--prompt {prompt} holds {len(lines)} lines, expected one prompt; each line as a prompt: "
                             f"wan-mlx --prompts {shlex.quote(prompt)}")  # fmt: skip
        return [*argv, f"--prompt={lines[0]}"]
    if prompt != "-":
        return argv
    if "MLX_RANK" in os.environ:
        raise UsageError("--prompt - waits for the end of standard input, which mlx.launch does not pass on; put the "
                         "text in quotes, or in a file: --prompt FILE.txt")  # fmt: skip
    if not (text := sys.stdin.read().strip()):
        raise UsageError("--prompt - reads the prompt from standard input, where nothing came")
    return [*argv, f"--prompt={text}"]


def with_config(argv: list[str]) -> list[str]:
    """The command line with the settings of ``--config FILE`` before it, so that its own flags win."""
    given = given_flags(argv)
    if "config" in given and "from_draft" in given:
        raise UsageError("--config and --from-draft both take settings from a file; give one of them")
    if "from_draft" in given:
        return [*config_arguments(Path(given["from_draft"]), given, from_draft=True), *argv]
    return [*config_arguments(Path(given["config"]), given), *argv] if "config" in given else argv
