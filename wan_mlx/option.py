"""One option of a run: its type, flag, limits, text and JSON schema. `options` has the table of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ForwardRef, get_args, get_origin

from .errors import nearest

REQUEST, MODEL, COMMAND = "request", "model", "command"


@dataclass(frozen=True)
class Limits:
    """The numbers from ``low``, or only those ``above`` it, to ``high``, or only ``below``; never infinite or NaN."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        over = self.low < value if self.above else self.low <= value
        return math.isfinite(value) and over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.below:
            return f"above {self.low} and below {self.high}"
        if self.low == -math.inf:
            return "a finite number"
        if self.high == math.inf:
            return f"a number above {self.low}" if self.above else f"at least {self.low}"
        return f"above {self.low} and up to {self.high}" if self.above else f"{self.low} to {self.high}"


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        spelled: the flags, a short one first, ours before the official ones, and the value's placeholder in ``--help``,
            if there is one and no ``choices``: "-s --seed --base_seed N"; empty for a keyword without its own flag.
        help: its effect, for ``--help`` and everywhere else; "{choices}" stands for them.
        group: of the flags.
        more: said in docs/flags.md beside ``help``.
        default: None where it is the model's, or drawn.
        choices: the only values there are.
        examples: some values, for completion; others may do as well.
        limits: of a number.
        parse: text → value, where the type does not say how; raises ValueError.
        instead_of: keys of options that it stands instead of: of these and this one the flag that is given last holds.
        repeats: the flag may be given again, for a list of all values.
        sets: the keywords that the flag sets together, where it is not the one that it is declared with.
        text: values of those keywords (or of a list) → the text that `parse` takes.
        place: "file", whose meaning depends on the folder one is in, or "name": a file or else a name on a hub.
        needs: keys of flags, one of which must be given with this one.
        empty: whether an empty text is a value; of others it is taken for a shell variable that is not set.
        free: it has no part in the picture, so that it may change when a run goes on.
        alone: it is of the whole command, free, and no key of a prompt or configuration file.
        hidden: left out of ``--help``.
        no_effect: why it has none here; it is accepted for the official command lines.
        name: the Python keyword, and its name in a video's settings.
        type: of the keyword.
        variable: of the environment, which says one of ``choices`` where none is given; else it is the first.
        of: `REQUEST`, `MODEL` or `COMMAND`: where the keyword is one.
    """

    spelled: str
    help: str
    group: str = ""
    more: str = ""
    default: Any = None
    choices: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    limits: Limits | None = None
    parse: Callable[[str], Any] | None = None
    instead_of: tuple[str, ...] = ()
    repeats: bool = False
    sets: tuple[str, ...] = ()
    text: Callable[..., str] = field(default=lambda *values: ",".join(map(str, values)))
    place: str = ""
    needs: tuple[str, ...] = ()
    empty: bool = False
    free: bool = False
    alone: bool = False
    hidden: bool = False
    no_effect: str = ""
    name: str = ""
    type: Any = str
    variable: str = ""
    of: str = COMMAND

    @property
    def flags(self) -> tuple[str, ...]:
        """Ours first, then the official spellings."""
        return tuple(word for word in self.spelled.split() if word.startswith("--"))

    @property
    def short(self) -> tuple[str, ...]:
        """The flag of one letter, if it has one."""
        return tuple(word for word in self.spelled.split() if word.startswith("-") and not word.startswith("--"))

    @property
    def metavar(self) -> str | None:
        """The value's placeholder in ``--help``; None for a switch."""
        value = [word for word in self.spelled.split() if not word.startswith("-")]
        return value[0] if value else "{" + ",".join(self.choices) + "}" if self.choices else None

    @property
    def key(self) -> str:
        """Its name among parsed flags: the keyword's, or the flag's where that sets several keywords."""
        return self.label if self.sets else self.name

    @property
    def label(self) -> str:
        """Its name in errors: the flag without its dashes."""
        return _bare(self.flags[0]) if self.flags else self.name

    @property
    def keys(self) -> list[str]:
        """Its names in prompt and configuration files."""
        spelled = [word for flag in self.flags for word in (flag.lstrip("-"), _bare(flag))]
        return list(dict.fromkeys([*spelled, *(() if self.sets else (self.name,))]))

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have, but None; pictures and files are text where they are not in memory."""
        if isinstance(self.type, ForwardRef):
            return (Sequence[str] if self.repeats or self.default == () else str,)
        kinds = get_args(self.type) if isinstance(self.type, UnionType) else (self.type,)
        return tuple(kind for kind in kinds if kind is not NoneType)

    @property
    def keyword(self) -> str:
        """The keyword, with the value that the flag gives it where that is False."""
        return f"{self.name}=False" if self.default is True and self.flags else self.name

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.metavar is None

    @property
    def value_is_optional(self) -> bool:
        """Whether the flag may stand alone, which means True."""
        return bool in self.kinds and not self.is_switch

    @property
    def described(self) -> str:
        """`help` with the choices."""
        words = [f"{word} (default)" if word == self.default else word for word in self.choices or self.examples]
        return self.help.replace("{choices}", ", ".join(words))

    def read(self, text: str) -> Any:
        """The value that ``text`` stands for.

        Raises:
            ValueError: it stands for none.
        """
        if not text.strip() and not self.empty:
            raise ValueError(f"it is empty, expected {self.metavar}; leave it out for the default")
        if not is_utf8(text):
            raise ValueError("its name is not UTF-8; rename it" if self.place else "it is not UTF-8")
        number = next((kind for kind in self.kinds if kind in (int, float)), None)
        if self.parse or number is None:
            return self.parse(text) if self.parse else text
        try:
            return number(text)
        except ValueError:
            raise ValueError(f"{text!r} is no {'whole ' if number is int else ''}number") from None

    def check(self, value: Any, least: str | None = None) -> None:
        """Raise ValueError, with the nearest valid value, if ``value`` is not one of the choices or within the limits.

        ``least``: the nearest to a value below the limits, where they do not tell.
        """
        if self.limits and isinstance(value, tuple):
            for one in value:
                self.check(one, least)
            return
        if self.choices and value is not None and value not in self.choices:
            expected = f"one of {', '.join(self.choices)}{nearest(value, self.choices)}"
            raise ValueError(f"unknown {self.label} {value!r}, expected {expected}")
        if self.limits and value is not None and value not in self.limits:
            if value > self.limits.high and not self.limits.below:
                least = str(self.limits.high)
            elif least is None and value < self.limits.low and not self.limits.above:
                least = str(self.limits.low)
            near = f"; nearest: {least}" if least and math.isfinite(value) else ""
            raise ValueError(f"{self.label} is {value}, expected {self.limits}{near}")

    def left_out(self) -> Any:
        """The value where none is given: that of its `variable`, or the default.

        Raises:
            ValueError: the variable holds none of the choices.
        """
        if not self.variable:
            return self.default
        value = os.environ.get(self.variable) or self.choices[0]
        if value not in self.choices:
            raise ValueError(f"{self.variable} is {value!r}, expected {' or '.join(self.choices)}")
        return value

    def meaning(self, value: Any) -> Any:
        """What a keyword's value stands for: text is taken as the flag takes it."""
        is_text = isinstance(value, str) or ({str, int} <= {*self.kinds} and isinstance(value, int))
        return self.parse(str(value)) if self.parse and is_text and not self.sets else value

    def suits(self, value: Any) -> bool:
        """Whether a value is None or of the keyword's type."""
        return value is None or any(_suits(value, kind) for kind in self.kinds)

    def check_type(self, value: Any) -> None:
        """Raise ValueError if ``value`` is of another type; of sources and LoRAs those tell who read them."""
        if not isinstance(self.type, ForwardRef) and not self.suits(value):
            kinds = " or ".join(map(_in_words, self.kinds))
            raise ValueError(f"{self.label} is {value!r}, expected {kinds}")

    def schema(self) -> dict[str, Any]:
        """The JSON schema of a value."""
        kinds, limits = [_schema_of(kind) for kind in self.kinds], self.limits or Limits()
        found = {
            "description": self.described,
            **(kinds[0] if len(kinds) == 1 else {"anyOf": kinds}),
            "enum": list(self.choices) or None,
            "examples": list(self.examples) or None,
            "default": list(self.default) if isinstance(self.default, tuple) else self.default,
            "exclusiveMinimum" if limits.above else "minimum": limits.low,
            "exclusiveMaximum" if limits.below else "maximum": limits.high,
        }
        return {name: value for name, value in found.items() if value not in (None, -math.inf, math.inf)}


def _bare(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def is_utf8(text: str) -> bool:
    """Whether it came from UTF-8: bytes of other names are half surrogates, which files cannot hold."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _suits(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (tuple, Sequence):
        items = get_args(kind)
        right = isinstance(value, list | tuple) and (get_origin(kind) is Sequence or len(value) == len(items))
        return right and all(_suits(item, items[0]) for item in value)
    plain = {int: Integral, float: Real, bool: bool}.get(kind, kind)
    return isinstance(value, plain) and (kind is bool or not isinstance(value, bool))


def _in_words(kind: Any) -> str:
    found = _schema_of(kind)
    return f"{found['type']} of {found['maxItems']}" if "maxItems" in found else str(found["type"])


def _schema_of(kind: Any) -> dict[str, Any]:
    """The JSON schema of a Python type."""
    plain = {int: "integer", float: "number", bool: "boolean"}
    if get_origin(kind) is tuple:
        items = get_args(kind)
        return {"type": "array", "items": _schema_of(items[0]), "minItems": len(items), "maxItems": len(items)}
    if get_origin(kind) is Sequence:
        return {"type": "array", "items": _schema_of(get_args(kind)[0])}
    return {"type": plain.get(kind, "string")}
