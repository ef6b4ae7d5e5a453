"""The commands of ``wan-mlx`` and their pages of help: the first word of a command line, and what it stands for.

``generate``, ``plan`` and ``resume`` take the flags of a run, the others have a parser of their own.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from .. import options
from ..errors import UsageError
from ..hub.names import HUB_ID, WEIGHT_ENDINGS
from ..presets import PRESETS
from .flags import ABOUT, USAGE, Parser, arguments_of, run_parser

NEAR = 0.75  # of difflib's ratios, from which on a word is taken for a command that is misspelled


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        about: a line of help.
        module: whose ``main`` takes what follows, and whose ``build_parser`` says what that may be; "" for those that
            take the flags of a run.
        takes: of those: the option that a word without a flag is for.
        flags: of those: what the command stands for.
        usual: of those: keys of the options that its page shows, besides what ``takes``.
    """

    about: str
    module: str = ""
    takes: str = ""
    flags: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()


COMMANDS = {
    "generate": Command(
        "make a video or pictures; the word itself may be left out",
        takes="prompt",
        usual=(
            "prompt", "size", "num_frames", "output", "prompts", "image", "video", "model", "loras",
            "quantize", "seed", "steps", "guidance_scale", "cache", "memory", "dry_run", "preview",
        ),
    ),
    "plan": Command(
        "what a video would need in memory and time; nothing is downloaded",
        takes="model", flags=("--plan",),
        usual=("size", "num_frames", "fps", "image", "loras", "quantize", "dtype", "steps", "guidance_scale", "recipe",
               "cache", "memory", "vae_tiling"),
    ),
    "resume": Command(
        "go on with a run that was cut; without a name: the list of them",
        takes="resume", usual=("dtype", "memory", "preview", "dry_run"),
    ),
    "models": Command("released models, and what is on this machine", ".list_models"),
    "train": Command("a LoRA from pictures and videos with captions", ".train"),
    "recipes": Command("how distilled models and LoRAs are sampled", ".list_recipes"),
    "smooth": Command("a video with more frames a second, those between by RIFE", ".smooth"),
    "convert": Command("a checkpoint into one MLX folder, packed if wanted", ".convert"),
    "inspect": Command("what a model's files hold, and whether they are whole", ".convert"),
    "info": Command("a LoRA, a video made here, or a model, described", ".info"),
    "serve": Command("a page in the browser, and an API, over a queue that survives", ".serve"),
    "queue": Command("the same queue on the command line: add, run, order, stop", ".queue"),
    "mcp": Command("the queue as tools for agents (Model Context Protocol)", ".mcp"),
    "doctor": Command("whether this machine computes correctly, and how fast", ".doctor"),
    "completion": Command("a script that completes commands and flags, for bash, zsh or fish", ".completion"),
    "help": Command("this page; or a command's, as in wan-mlx help plan"),
}  # fmt: skip

EXAMPLES = """\
examples:
  wan-mlx "a red circle moves right"             nano's video, no download
  wan-mlx plan t2v-1.3B                          does it fit, and how fast?
  wan-mlx -m t2v-1.3B -p "a cat boxing" -o cat.mp4
  wan-mlx -m nano-i2v --image first.png "it moves right"
  wan-mlx resume cat.mp4

Every flag: wan-mlx --help-all. Of a command: wan-mlx help COMMAND."""

# Endings of a file's name → the command that may have been meant.
MEANT = {
    (".jsonl", ".txt"): "wan-mlx --prompts {}",
    (".png", ".jpg", ".jpeg"): 'wan-mlx --image {} "what it should show"',
    (".avi", ".mov", ".mkv", ".m4v", ".webm"): 'wan-mlx --video {} "what it should show"',
    (".mp4", ".webp", ".gif", ".npz", *WEIGHT_ENDINGS): "wan-mlx info {}",
    (".wan",): "wan-mlx resume {}",
}


def help_page(name: str) -> str:
    """The page of a command that takes the flags of a run; ``generate`` has the page of all commands."""
    command, everything = COMMANDS[name], name == "generate"
    known = {option.key: option for option in options.flags()}
    word = (known[command.takes].metavar or "").join("[]" if name == "resume" else ("", ""))
    parser = Parser(
        prog="wan-mlx",
        usage=USAGE if everything else f"wan-mlx {name} {word} [flags]",
        description=f"{ABOUT}\n\n{commands_table()}" if everything else f"{command.about}.".capitalize(),
        epilog=EXAMPLES if everything else "The other flags are those of a run: wan-mlx --help-all.",
        add_help=False,
    )
    shown = [known[key] for key in command.usual]
    for title in options.GROUPS:
        group = parser.add_argument_group(title)
        for option in shown:
            if option.group == title:
                group.add_argument(*option.short, option.flags[0], **arguments_of(option))
    page = parser.format_help()
    heads = [f"\n\n{title}:\n" for title in options.GROUPS if f"\n\n{title}:\n" in page]
    for head in heads[1:]:
        page = page.replace(head, head[1:])  # one screen
    return page


def commands_table() -> str:
    return "\n".join(["commands:", *(f"  {name:<12}{command.about}" for name, command in COMMANDS.items())])


def as_flags(name: str, argv: list[str], is_said: bool) -> list[str]:
    """A command line of flags alone: those that the command stands for, and one for the word that has none.

    Args:
        is_said: whether the command's name is typed: else the word may be meant for one.

    Raises:
        UsageError: there are several such words, its flag is given too, or it is clearly no prompt.
    """
    command = COMMANDS[name]
    _check_pairs({word.split("=")[0] for word in argv})
    placed = [_Word(word) for word in argv]  # equal words are told apart
    given, unknown = run_parser().parse_known_args(placed)
    words = [word for word in unknown if not _is_flag(word)]
    if words and not is_said:
        check_command(words[0], argv)
    if not words or len(words) < len(unknown):  # an unknown flag: the parser says so, later
        return [*command.flags, *argv]
    word, option = words[0], options.keyed(command.takes)
    place = next(place for place, other in enumerate(placed) if other is word)
    for flag, file, after in zip(argv, argv[1:], placed[2:], strict=False):
        if flag == "--lora" and any(after is word for word in words) and re.fullmatch(r"-?[\d.]+", after):
            raise UsageError(f"a LoRA's strength is given behind a colon: --lora {shlex.quote(file)}:{after}")
    if len(words) > 1:
        whole = shlex.quote(" ".join(words))
        raise UsageError(f"{shlex.join(words)}: {len(words)} words without flags, expected one; put a text in quotes: "
                         f"wan-mlx {name} {whole}")  # fmt: skip
    if getattr(given, option.key) is not None:
        raise UsageError(f"{word!r} stands without a flag, and {option.flags[0]} is given; leave out one of the two")
    if not is_said:
        _check_prompt(word)
    return [*command.flags, *argv[:place], f"{option.flags[0]}={word}", *argv[place + 1 :]]


def _check_pairs(words: set[str]) -> None:
    """Refuse two flags of which one would do nothing; where one is of a file's or a batch's, the later holds."""
    for option in options.flags():
        for other in map(options.keyed, option.instead_of):
            given = [{*of.short, *of.flags} & words for of in (option, other)]
            if all(given):
                raise UsageError(f"{min(given[0])} and {min(given[1])} are both given; leave out one of the two")


class _Word(str):
    """A word of a command line, which is itself alone."""


def _is_flag(word: str) -> bool:
    return word.startswith("-") and word != "-" and " " not in word


def check_command(word: str, argv: Sequence[str]) -> None:
    """Refuse a word without a flag that is a command misspelled, or one that stands behind options.

    Args:
        argv: the whole command line.
    """
    near = difflib.get_close_matches(word.lower(), COMMANDS, 1, NEAR)
    if near and not _is_flag(word) and len(word.split()) == 1:
        place = [*argv].index(word)
        meant = shlex.join(["wan-mlx", near[0], *argv[place + 1 :], *argv[:place]])
        text = " ".join(takewhile(lambda other: not _is_flag(other), argv[place:]))
        wrong = "stands behind options, and a command goes first" if word in COMMANDS else "looks like no prompt"
        raise UsageError(f"{word!r} {wrong}; nearest: {meant}; as a prompt: wan-mlx -p {shlex.quote(text)}")


def _check_prompt(word: str) -> None:
    """Refuse one word that is a model or a file: a prompt is hardly so."""
    if not word.isascii() or len(word.split()) != 1:
        return
    quoted, path = shlex.quote(word), Path(word).expanduser()
    meant = next((text.format(quoted) for endings, text in MEANT.items() if path.suffix.lower() in endings), "")
    near = difflib.get_close_matches(word.lower(), known := {name.lower(): name for name in PRESETS}, 1, NEAR)
    if near or path.is_dir() or (not meant and HUB_ID.fullmatch(word)):
        model = known[near[0]] if near and not path.is_dir() else quoted
        meant = f'wan-mlx plan {model}, or wan-mlx -m {model} "what the video should show"'
    if meant or re.fullmatch(r"\.[A-Za-z]\w{1,9}", path.suffix):
        nearest = f"; nearest: {meant}" if meant else ", but like a file's name"
        as_prompt = "" if is_prompt_file(word) else f"; as a prompt: wan-mlx -p {quoted}"
        raise UsageError(f"{word!r} looks like no prompt{nearest}{as_prompt}")


def is_prompt_file(text: str) -> bool:
    """Whether a prompt is a text file's name, whose text is meant."""
    return text.lower().endswith(".txt") and os.path.isfile(text)
