"""``wan-mlx completion bash|zsh|fish``: a script that completes the command's flags, made from the parser itself."""

from __future__ import annotations

import argparse
import shlex

from ..errors import UsageError
from ..presets import PRESETS
from ..recipes import RECIPES
from ..schedulers import SOLVERS
from .flags import MODEL_FLAGS, PATH_FLAGS, build_parser
from .main import COMMANDS

SHELLS = ("bash", "zsh", "fish")
# Flags that take one of a few values.
CHOICES = {
    "solver": tuple(SOLVERS),
    "recipe": tuple(RECIPES),
    "dtype": ("bfloat16", "float32"),
    "quantize": ("q8", "q6", "auto", "q5", "q4", "q3", "mxfp8", "mxfp4", "nvfp4", "none", "nearest"),
    "cache": ("none", "teacache", "magcache", "easycache"),
    "source": ("huggingface", "modelscope"),
    "vae_tiling": ("auto", "off"),
}
FILES = {*PATH_FLAGS, *MODEL_FLAGS, "prompt_extend_model", "lora", "prompts", "report", "resume", "config"} - {"model"}


def main(argv: list[str]) -> int:
    """Print the script for one shell.

    Raises:
        UsageError: no such shell.
    """
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise UsageError(f"completion {' '.join(argv)}: expected one of {', '.join(SHELLS)}, as in "
                         'eval "$(wan-mlx completion bash)"')  # fmt: skip
    print({"bash": bash, "zsh": zsh, "fish": fish}[argv[0]](), end="")
    return 0


def flags() -> list[argparse.Action]:
    """The flags that ``--help`` shows."""
    return [action for action in build_parser()._actions if action.help != argparse.SUPPRESS]


def values_of(action: argparse.Action) -> tuple[str, ...]:
    """What may follow the flag, where that is one of a few words."""
    return tuple(PRESETS) if action.dest in ("model", "task") else CHOICES.get(action.dest, tuple(action.choices or ()))


def bash() -> str:
    words = " ".join(option for action in flags() for option in action.option_strings if option.startswith("--"))
    cases = ""
    for action in flags():
        if words_of_value := " ".join(values_of(action)):
            names = "|".join(action.option_strings)
            cases += f'    {names}) COMPREPLY=($(compgen -W "{words_of_value}" -- "$cur"));;\n'
    files = "|".join(option for action in flags() if action.dest in FILES for option in action.option_strings)
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
    for action in flags():
        value = ""
        if action.nargs != 0:
            words = values_of(action)
            kind = f"({' '.join(words)})" if words else "_files" if action.dest in FILES else " "
            value = f":{action.dest}:{kind}"
        for option in action.option_strings:
            described = f"{option}[{(action.help or '').translate(str.maketrans('[]:', '() '))}]{value}"
            lines.append(f"    {shlex.quote(described)}")
    body = " \\\n".join(lines)
    commands = " ".join(COMMANDS)
    return f"#compdef wan-mlx\n_wan_mlx() {{\n  _arguments \\\n{body} \\\n    '1::command:({commands})'\n}}\n" \
           "compdef _wan_mlx wan-mlx\n"  # fmt: skip


def fish() -> str:
    lines = [f"complete -c wan-mlx -n __fish_is_first_arg -a {shlex.quote(' '.join(COMMANDS))}"]
    for action in flags():
        for option in action.option_strings:
            name = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            words = values_of(action)
            takes = "" if action.nargs == 0 else " -r" if action.dest in FILES else " -x"
            known = f" -a {shlex.quote(' '.join(words))}" if words else ""
            lines.append(f"complete -c wan-mlx {name}{takes}{known} -d {shlex.quote(action.help or '')}")
    return "\n".join(lines) + "\n"
