"""The command line's flags, made from the table of options: the parser, and JSON objects of flags.

Our own flags follow the Python API; every flag of the official ``generate.py`` is accepted too, with its meaning.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from .. import options
from ..errors import UsageError, nearest
from ..option import Option
from ..option_texts import guidance_text
from ..other_words import suggestion
from ..presets import PRESETS
from ..storage import parse_json

USAGE = '''wan-mlx "what the video should show" [flags]
       wan-mlx COMMAND [flags]'''
ABOUT = "Makes videos with the open Wan models, on Apple silicon or another MLX backend."
ABOUT_GROUP = {options.SAMPLE: "Defaults are the model's own: see the table below."}
WIDEST = 100  # columns of a page of help
SAME_WORDS = {"remove": "rm", "delete": "rm", "ls": "list"}  # of other programs → of our commands


class Page(argparse.RawDescriptionHelpFormatter):
    """A page of help, as wide as the terminal within reason."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, max_help_position=30, width=min(shutil.get_terminal_size().columns, WIDEST))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """``-s, --seed N``: the value once, behind the flags."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class Instead(argparse.Action):
    """Stores a value, and forgets those of the options that it stands instead of."""

    def __init__(self, *words: Any, instead_of: Sequence[str], **options: Any):
        super().__init__(*words, **options)
        self.instead_of = instead_of

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        for key in self.instead_of:
            setattr(namespace, key, None)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Raises `UsageError`, for one line, where argparse would print its usage and exit.

    Args:
        example: a command line, for who leaves out what is required.
    """

    def error(self, message: str):
        _, is_missing, names = message.partition("arguments are required: ")
        raise UsageError(f"{names} is missing, as in {self._example}" if is_missing and self._example else message)

    def __init__(self, example: str = "", **options: Any):
        super().__init__(**{"formatter_class": Page, "allow_abbrev": False, **options})
        self._example = example

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            of = self.prog.removeprefix("wan-mlx ")
            near = nearest(SAME_WORDS.get(value, value), action.choices)
            raise UsageError(f"{of} {value}: expected one of {', '.join(action.choices)}{near}")

    def parse_args(  # type: ignore[override]  # argparse has overloads for other namespaces
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:  # a prompt before an unknown flag is not what is wrong
            unknown = unknown[next((n for n, word in enumerate(unknown) if word.startswith("-")), 0) :]
            near = suggestion(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"unknown argument {' '.join(unknown)}{near}")
        for action in self._actions:
            if getattr(parsed, action.dest, None) in ([], [[]]):  # argparse drops a value that is two dashes
                flag = next(flag for flag in action.option_strings if flag.startswith("--"))
                self.error(f"argument {flag}: expected a value, not '--'")
        return parsed


def run_parser() -> Parser:
    """`build_parser`'s, to parse with: built once, for a command asks several times."""
    return _parser_of(tuple(options.flags()))


@lru_cache(maxsize=1)
def _parser_of(flags: tuple[Option, ...]) -> Parser:
    return build_parser()


def build_parser() -> Parser:
    """The flags of a run, as `generate`, `plan` and `resume` take them."""
    parser = Parser(
        prog="wan-mlx",
        usage=USAGE,
        description=ABOUT,
        epilog=defaults_table(),
        formatter_class=Page,
        allow_abbrev=False,
        add_help=False,
    )
    words = " ".join(option.flags[0] for option in options.flags() if option.no_effect)
    unused = textwrap.fill(words, 76, break_on_hyphens=False)
    about = {**ABOUT_GROUP, options.OFFICIAL: unused}
    groups = {title: parser.add_argument_group(title, about.get(title)) for title in options.GROUPS}
    for option in options.flags():
        groups[option.group].add_argument(*option.short, *option.flags, **arguments_of(option))
    groups[options.SAY].add_argument("-h", "--help", action="store_true", help="show the commands and the usual flags")
    groups[options.SAY].add_argument("--help-all", action="help", help="show every flag")
    return parser


def arguments_of(option: Option) -> dict[str, Any]:
    """`add_argument`'s arguments for a flag. Defaults of a request are filled in later: a recipe has its own."""
    default = None if option.of == options.REQUEST else option.default
    shown = argparse.SUPPRESS if option.hidden or option.no_effect else option.described
    common = {"dest": option.key, "default": default, "help": shown}
    if option.is_switch:
        return {**common, "action": "store_false" if option.default else "store_true"}
    if option.repeats:
        common["action"] = "append"
    if option.instead_of:
        common["action"] = partial(Instead, instead_of=option.instead_of)
    if option.value_is_optional:
        common |= {"nargs": "?", "const": True}
    return {**common, "metavar": option.metavar, "type": reader(option)}


def reader(option: Option) -> Callable[[str], Any]:
    """From the flag's text to its value; a request's are checked together, later."""

    def read(text: str) -> Any:
        try:
            value = option.read(text)
            if option.of != options.REQUEST:
                option.check(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    return read


def defaults_table() -> str:
    """Each model's defaults, for flags that are left out."""
    lines = [f"{'defaults of':<18}{'size':<11}{'frames':>6}{'steps':>7}{'shift':>7}{'guidance':>10}"]
    for preset in PRESETS.values():
        sampling, size = preset.sampling_for(*preset.size), "x".join(map(str, preset.size))
        lines.append(f"  {preset.name:<16}{size:<11}{preset.num_frames:>6}{sampling.steps:>7}{sampling.shift:>7g}"
                     f"{guidance_text(sampling.guidance_scale):>10}")  # fmt: skip
        if preset.recipe:
            lines.append(f"    or, with no option of sampling, the recipe {preset.recipe}")
    return "\n".join(lines) + "\n"


def given_flags(argv: list[str]) -> dict[str, Any]:
    """The flags that a command line gives, without those left to their defaults."""
    parser = run_parser()
    nothing = argparse.Namespace(**dict.fromkeys(action.dest for action in parser._actions))
    return {key: value for key, value in vars(parser.parse_args(argv, nothing)).items() if value is not None}


def free_on_resume() -> set[str]:
    """Parsed flags that may differ from the first command's when a run goes on."""
    return {option.key for option in options.flags() if option.free or option.alone or option.no_effect}


def keywords(args: argparse.Namespace, face: str) -> dict[str, Any]:
    """The keywords of ``face`` that parsed flags come to; those left to their default are None or not there."""
    found: dict[str, Any] = {}
    for option in options.flags():
        given = getattr(args, option.key)
        if option.of == face and option.sets:
            found.update(zip(option.sets, given or (), strict=False))
        elif option.of == face:
            found[option.name] = option.left_out() if given is None and option.variable else given
    return found


def json_flags(text: str) -> list[str]:
    """A JSON object of options and their values, as arguments; a line of a prompt file is one.

    Raises:
        UsageError: it is no such thing; names the nearest option.
    """
    try:
        line = parse_json(text)
    except ValueError as error:
        raise UsageError(f"is no JSON: {error}; of a .txt file each line is a prompt") from error
    if not isinstance(line, dict):
        raise UsageError(f"is a JSON {type(line).__name__}, expected an object such as " '{"prompt": "a cat"}')
    return arguments(line)


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Options by any of their names, with values as JSON has them, as a command line has them.

    Raises:
        UsageError: an unknown name, or a value that cannot be; names the nearest.
    """
    known = {key: option for option in options.flags() if not option.alone for key in option.keys}
    settings, found = dict(settings), []
    for option in options.flags():
        given = settings.get(option.key)
        if option.sets and isinstance(given, list) and len(given) == len(option.sets):
            settings |= zip(option.sets, settings.pop(option.key), strict=True)
        values = [settings.pop(name, None) for name in option.sets]
        for name, value in zip(option.sets, values, strict=True):
            if not options.named(name).suits(value):
                raise _wrong(option, name, value)
        if any(value is not None for value in values) and (text := option.text(*values)):
            settings[option.key] = text
    for key, value in settings.items():
        if key not in known:
            raise UsageError(f"unknown key {key!r}{suggestion(key, known)}")
        found += _argument(known[key], key, value)
    return found


def _argument(option: Option, key: str, value: Any) -> list[str]:
    """A flag with its value; none for null, an empty list, and a switch's default."""
    flag, stands_alone = option.flags[0], option.is_switch or option.value_is_optional
    if option.is_switch and key == option.name and option.default and isinstance(value, bool):
        value = not value  # prompt_cache: false is --no-prompt-cache
    if value is None or (value == [] and option.suits(value)) or (value is False and stands_alone):
        return []
    if value is True and stands_alone:
        return [flag]
    if isinstance(value, list) and option.repeats and option.suits(value):
        return [f"{flag}={entry}" for entry in value]
    is_value = option.suits(value) and not (option.sets or isinstance(value, bool))
    if option.is_switch or not (is_value or isinstance(value, str)):
        raise _wrong(option, key, value)
    return [f"{flag}={option.text(*value) if isinstance(value, list) else value}"]


def _wrong(option: Option, key: str, value: Any) -> UsageError:
    expected = "true or false" if option.is_switch else f"a value as in {option.flags[0]} {option.metavar}"
    return UsageError(f"{key!r} is {json.dumps(value)}, expected {expected}")
