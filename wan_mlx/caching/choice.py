"""``--cache``: parses the user's text into a step cache, or an error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import closest
from ..models.configs import TransformerConfig
from ..options import CACHES
from ..presets import PRESETS
from .easycache import EasyCache
from .protocol import StepCache
from .residual import MAGCACHE, TEACACHE, MagCache, TeaCache

FORMS = "none, teacache[:THRESHOLD[:plain|ret]], magcache[:THRESHOLD[:MOST_SKIPS[:RETENTION]]] or "\
        "easycache[:THRESHOLD[:FIRST_STEPS]]"  # fmt: skip
# A cache needs steps that resemble each other; with fewer than these they do not (Wan2GP#659).
FEWEST_STEPS = 10
EASYCACHE_THRESHOLD = 0.05
EASYCACHE_FIRST = 10  # of 40 or 50 steps; a quarter of fewer


@dataclass(frozen=True)
class Setting:
    """One setting of a cache: its name and its values in words, its type, and which values it takes."""

    name: str
    expected: str
    kind: type
    takes: Callable[[Any], bool]

    def parse(self, word: str, text: str) -> Any:
        """The value of ``word`` in the user's ``text``.

        Raises:
            ValueError: it is of another kind, or out of range.
        """
        try:
            value = self.kind(word)
        except ValueError:
            value = math.nan
        if not self.takes(value):
            raise ValueError(f"cache {text!r}: the {self.name} is {word!r}, expected {self.expected}")
        return value


THRESHOLD = Setting("threshold", "a number from 0 (off) up, such as 0.1", float, lambda value: 0 <= value < math.inf)
RETENTION = Setting("retention", "a share from 0 to 1, such as 0.2", float, lambda value: 0 <= value <= 1)
COUNT = Setting("count of steps", "a whole number from 1 up", int, lambda value: value >= 1)
MODE = Setting("mode", "plain or ret", str, lambda value: value in ("plain", "ret"))
# The settings of each cache, as the form of its text, its constants and its class have them in order.
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "none": (),
    "teacache": (THRESHOLD, MODE),
    "magcache": (THRESHOLD, COUNT, RETENTION),
    "easycache": (THRESHOLD, COUNT),
}


def resolve_cache(text: str | None, steps: int, model: str, config: TransformerConfig) -> str:
    """``text`` with defaults filled in for missing settings, as `make_cache` takes it.

    Args:
        text: in the form `FORMS`; None or "none" for no cache.
        steps: number of sampling steps.
        model: the preset's name, for its constants.
        config: the transformer's; must be the preset's, since constants belong to one model.

    Raises:
        ValueError: another form, a setting out of range, too few steps, or a model without constants.
    """
    name, *given = (text or "none").strip().lower().split(":")
    if name not in CACHES:
        raise ValueError(f"unknown cache {text!r}, expected {FORMS}; nearest: {closest(name, CACHES)}")
    if len(given) > len(SETTINGS[name]):
        raise ValueError(f"cache {text!r} has {len(given)} settings, expected {FORMS}")
    if name == "none":
        return name
    if steps < FEWEST_STEPS:
        raise ValueError(
            f"{name} makes no sense with {steps} steps, expected at least {FEWEST_STEPS}: with few steps, each changes "
            "too much to be left out; leave the cache out"
        )
    values = _defaults(name, steps, model, config)
    values[: len(given)] = [kind.parse(word, text or "") for kind, word in zip(SETTINGS[name], given, strict=False)]
    return ":".join(map(str, [name, *values]))


def make_cache(resolved: str, steps: int, model: str, left_out: int = 0) -> StepCache:
    """A fresh cache, from the result of `resolve_cache` for the same steps and preset.

    ``left_out``: number of steps skipped at the start of the grid, because the run starts from a video.
    """
    name, *words = resolved.split(":")
    values: list[Any] = [setting.kind(word) for setting, word in zip(SETTINGS[name], words, strict=True)]
    if name == "teacache":
        threshold, mode = values
        return TeaCache(steps, threshold, mode, TEACACHE[model][mode])
    if name == "magcache":
        threshold, most_skips, retention = values
        return MagCache(steps, threshold, most_skips, retention, MAGCACHE[model]["ratios"], left_out)
    return EasyCache(steps, *values) if name == "easycache" else StepCache(steps)


def _defaults(name: str, steps: int, model: str, config: TransformerConfig) -> list:
    """The value of each setting that is not given."""
    if name == "easycache":
        return [EASYCACHE_THRESHOLD, min(EASYCACHE_FIRST, math.ceil(steps / 4))]
    table = TEACACHE if name == "teacache" else MAGCACHE
    if model not in table:
        raise ValueError(f"{name} has no published constants for {model}, only for {', '.join(table)}; "
                         "easycache needs none")  # fmt: skip
    published, sizes = PRESETS[model].transformer, "dim {0.dim}, {0.num_layers} layers"
    if (config.dim, config.num_layers) != (published.dim, published.num_layers):
        raise ValueError(f"{name} has constants for {model} ({sizes.format(published)}), not for this model "
                         f"({sizes.format(config)}); easycache needs none")  # fmt: skip
    return list(table[model].values())[: len(SETTINGS[name])]
