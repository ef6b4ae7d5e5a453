"""How the text of an option is read, where it is more than a word or a number, and written again."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .geometry import LANDSCAPE

SIZES = ("16:9", "9:16", "1:1", *LANDSCAPE)


def read(pattern: str, text: str, kind: str, expected: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, text.strip().lower())
    if not match:
        raise ValueError(f"{text!r} is no {kind}; expected {expected}")
    return match.groups()


def parse_size(text: str) -> str | tuple[int, int]:
    """(width, height), or a name that `Geometry.named_size` knows."""
    expected = f"WIDTHxHEIGHT in pixels, such as 832x480, or {', '.join(SIZES)}"
    ratio = r"[1-9]\d{0,3}:[1-9]\d{0,3}"
    width, height, name = read(rf"(\d+)[x*×](\d+)|({'|'.join([ratio, *LANDSCAPE])})", text, "size", expected)
    return name or (int(width), int(height))


def parse_range(text: str) -> tuple[float, float]:
    expected = "FROM-TO in fractions of the steps, such as 0.1-0.9"
    first, last = read(r"(\d+(?:\.\d+)?|\.\d+)-(\d+(?:\.\d+)?|\.\d+)", text, "range", expected)
    return float(first), float(last)


def parse_guidance(text: str) -> float | tuple[float, float]:
    try:
        scales = [float(word) for word in text.split(",")]
    except ValueError:
        scales = []
    if not 1 <= len(scales) <= 2:
        raise ValueError(f"{text!r} is no guidance; expected one number, or two, LOW,HIGH, such as 3,4")
    return scales[0] if len(scales) == 1 else (scales[0], scales[1])


def guidance_text(scale: float | tuple[float, float]) -> str:
    return ",".join(f"{one:g}" for one in (scale if isinstance(scale, tuple) else (scale,)))


def parse_skip(text: str) -> tuple[tuple[int, ...], tuple[float, float] | None]:
    expected = "layers and where to skip them, such as 9,10:0.1-0.9"
    layers, span = read(r"(\d+(?:,\d+)*)(?::(.*))?", text, "list of layers", expected)
    return tuple(int(layer) for layer in layers.split(",")), parse_range(span) if span is not None else None


def skip_text(layers: Sequence[int] | None, span: Sequence[float] | None) -> str:
    """"" if there are no layers."""
    return ",".join(map(str, layers)) + (":{}-{}".format(*span) if span else "") if layers else ""


def parse_percent(text: str) -> int:
    (number,) = read(r"(\d+) ?%?", text, "share", "percent, such as 20%")
    return int(number)


def parse_mode(text: str) -> str:
    return f"q{text}" if text.isdecimal() else text
