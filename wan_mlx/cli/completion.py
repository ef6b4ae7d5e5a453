"""``wan-mlx completion bash|zsh|fish``: a script that completes the command's flags, made by shtab from the parser."""

from __future__ import annotations

import shtab

from .. import options
from ..errors import UsageError
from .flags import build_parser
from .main import COMMANDS

SHELLS = ("bash", "zsh", "fish")


def main(argv: list[str]) -> int:
    """Print the script for one shell.

    Raises:
        UsageError: no such shell.
    """
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise UsageError(f"completion {' '.join(argv)}: expected one of {', '.join(SHELLS)}, as in "
                         'eval "$(wan-mlx completion bash)"')  # fmt: skip
    print(script(argv[0]))
    return 0


def script(shell: str) -> str:
    parser = build_parser()
    parser.prog = "wan-mlx"
    known = {option.key: option for option in options.flags()}
    for action in parser._actions:
        if option := known.get(action.dest):
            action.choices = option.choices or option.examples or None
            if option.place and not action.choices:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    parser.add_argument("command", nargs="?", choices=[*COMMANDS])
    return shtab.complete(parser, shell)
