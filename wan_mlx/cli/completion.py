"""``wan-mlx completion bash|zsh|fish``: a script that completes the command's flags, made from the table of options."""

from __future__ import annotations

import shlex

from .. import options
from ..errors import UsageError
from ..option import Option
from .main import COMMANDS


def main(argv: list[str]) -> int:
    """Print the script for one shell.

    Raises:
        UsageError: no such shell.
    """
    scripts = {"bash": bash, "zsh": zsh, "fish": fish}
    if len(argv) != 1 or argv[0] not in scripts:
        raise UsageError(f"completion {' '.join(argv)}: expected one of {', '.join(scripts)}, as in "
                         'eval "$(wan-mlx completion bash)"')  # fmt: skip
    print(scripts[argv[0]](), end="")
    return 0


HELP = Option("show this help message and exit", flags=("-h", "--help"), type=bool)


def shown() -> list[Option]:
    """The options whose flags ``--help`` shows."""
    return [HELP, *(option for option in options.flags() if not (option.hidden or option.no_effect))]


def words_of(option: Option) -> str:
    """The words that may follow the flag, where there are a few."""
    return " ".join(option.choices or option.examples)


def takes_file(option: Option) -> bool:
    return bool(option.place) and not words_of(option)


def bash() -> str:
    words = " ".join(flag for option in shown() for flag in option.flags if flag.startswith("--"))
    cases = "".join(
        f'    {"|".join(option.flags)}) COMPREPLY=($(compgen -W "{words_of(option)}" -- "$cur"));;\n'
        for option in shown()
        if words_of(option)
    )
    files = "|".join(flag for option in shown() if takes_file(option) for flag in option.flags)
    return f"""\
_wan_mlx() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}}
  case $prev in
{cases}    {files}) COMPREPLY=($(compgen -f -- "$cur"));;
    *)
      COMPREPLY=($(compgen -W "{words}" -- "$cur"))
      [ "$COMP_CWORD" = 1 ] && COMPREPLY+=($(compgen -W "{" ".join(COMMANDS)}" -- "$cur"));;
  esac
}}
complete -o filenames -F _wan_mlx wan-mlx
"""


def zsh() -> str:
    lines = []
    for option in shown():
        words, value = words_of(option), ""
        if not option.is_switch:
            value = f":{option.key}:" + (f"({words})" if words else "_files" if takes_file(option) else " ")
        for flag in option.flags:
            described = f"{flag}[{option.described.translate(str.maketrans('[]:', '() '))}]{value}"
            lines.append(f"    {shlex.quote(described)}")
    body = " \\\n".join(lines)
    commands = " ".join(COMMANDS)
    return f"#compdef wan-mlx\n_wan_mlx() {{\n  _arguments \\\n{body} \\\n    '1::command:({commands})'\n}}\n" \
           "compdef _wan_mlx wan-mlx\n"  # fmt: skip


def fish() -> str:
    lines = [f"complete -c wan-mlx -n __fish_is_first_arg -a {shlex.quote(' '.join(COMMANDS))}"]
    for option in shown():
        words = words_of(option)
        takes = "" if option.is_switch else " -r" if takes_file(option) else " -x"
        known = f" -a {shlex.quote(words)}" if words else ""
        for flag in option.flags:
            name = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            lines.append(f"complete -c wan-mlx {name}{takes}{known} -d {shlex.quote(option.described)}")
    return "\n".join(lines) + "\n"
