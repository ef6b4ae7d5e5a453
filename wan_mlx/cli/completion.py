"""``wan-mlx completion bash|zsh|fish``: a script that completes commands and flags, made by shtab from the parsers."""

from __future__ import annotations

import argparse
import importlib

import shtab

from .. import options
from ..presets import PRESETS
from .commands import COMMANDS
from .flags import Parser
from .flags import build_parser as of_run

SHELLS = ("bash", "zsh", "fish")
DESCRIPTION = 'A script that completes commands and flags: eval "$(wan-mlx completion bash)"'
# Positional arguments of other commands → their values; the rest are files.
VALUES = {"command": (*COMMANDS,), "shell": SHELLS, "name": (*PRESETS,)}


def build_parser() -> Parser:
    parser = Parser("wan-mlx completion zsh", prog="wan-mlx completion", description=DESCRIPTION)
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return parser


def main(argv: list[str]) -> int:
    """Print the script for one shell."""
    print(script(build_parser().parse_args(argv).shell))
    return 0


def script(shell: str) -> str:
    parser = _with_values(of_run())
    commands = parser.add_subparsers(parser_class=argparse.ArgumentParser)
    for name, command in COMMANDS.items():
        if command.module:
            of_command = importlib.import_module(command.module, __package__).build_parser()
        else:
            of_command = of_run() if command.takes else Parser(add_help=False)
            of_command.add_argument(command.takes or "command", nargs="?")
        commands.add_parser(name, help=command.about, parents=[_with_values(of_command)], add_help=False)
    return shtab.complete(parser, shell)


def _with_values(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, whose actions know which values or files complete them."""
    known = {option.key: option for option in options.flags()}
    for action in parser._actions:
        option = known.get(action.dest)
        if option:
            action.choices = option.choices or option.examples or None
        elif not action.option_strings:
            action.choices = VALUES.get(action.dest)
        is_place = option.place if option else not action.option_strings
        if is_place and not action.choices:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser
