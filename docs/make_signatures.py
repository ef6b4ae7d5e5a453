"""``python docs/make_signatures.py`` writes the options in the signatures of wan_mlx/pipeline.py anew.

They are made from the table of options, and stand in the text, since editors and notebooks complete only what they can
read there: of a function with overloads in one of these.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_mlx import options, pipeline
from wan_mlx.option import MODEL, Option
from wan_mlx.recipes import Recipe

FILE = Path(pipeline.__file__)


def parameter(option: Option) -> str:
    """One option as it stands in a signature; None where a recipe has another default."""
    kind = getattr(option.type, "__forward_arg__", None) or annotation(option.type)
    default = None if option.name in Recipe.__dataclass_fields__ else option.default
    return f"        {option.name}: {kind} = {quoted(default)},\n"


def annotation(kind: Any) -> str:
    """A type as it is written."""
    written = kind.__name__ if isinstance(kind, type) else str(kind)
    return re.sub(r"\b(pathlib|_local|collections|abc)\.", "", written)


def quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def parameters(face: str, in_order: Sequence[str] = ()) -> str:
    """Those of ``face`` that a signature does not begin with; first those that may be given without their names."""
    taken = [option for option in options.of(face) if option not in (options.PROMPT, options.MODEL_NAME)]
    first = [options.named(name) for name in in_order]
    rest = [option for option in taken if option not in first]
    return "".join([*map(parameter, first), "        *,\n", *map(parameter, rest)])


def text(old: str) -> str:
    """The file with the options below each comment that names their face made anew."""

    def made(found: re.Match) -> str:
        face = found[2]
        return found[1] + parameters(face, pipeline.IN_ORDER if face == MODEL else ()) + found[3]

    begin, end = r"( +# options: (\w+), by docs/make_signatures\.py\n)", r"(        \*\*|    \))"
    return re.sub(rf"{begin}(?:        .*,\n)*?{end}", made, old)


if __name__ == "__main__":
    FILE.write_text(text(FILE.read_text(encoding="utf-8")), encoding="utf-8")
