"""``--cache``: parses the user's text into a step cache, or an error."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..errors import closest
from ..models.configs import TransformerConfig
from ..options import CACHES
from ..presets import PRESETS
from .constants import MAGCACHE, TEACACHE, MagCacheConstants, TeaCacheConstants
from .easycache import EasyCache
from .magcache import MagCache
from .protocol import StepCache
from .teacache import TeaCache

FORMS = "none, teacache[:THRESHOLD[:plain|ret]], magcache[:THRESHOLD[:MOST_SKIPS[:RETENTION]]] or "\
        "easycache[:THRESHOLD[:FIRST_STEPS]]"  # fmt: skip
# A cache needs steps that resemble each other; with fewer than these they do not (Wan2GP#659).
FEWEST_STEPS = 10
EASYCACHE_THRESHOLD = 0.05
EASYCACHE_FIRST = 10  # of 40 or 50 steps; a quarter of fewer


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
    if name == "none":
        if given:
            raise ValueError(f"cache {text!r} gives settings to none; expected {FORMS}")
        return name
    if steps < FEWEST_STEPS:
        raise ValueError(
            f"{name} makes no sense with {steps} steps, expected at least {FEWEST_STEPS}: with few steps, each changes "
            "too much to be left out; leave the cache out"
        )
    defaults, kinds = _settings(name, steps, model, config)
    if len(given) > len(defaults):
        raise ValueError(f"cache {text!r} has {len(given)} settings, expected {FORMS}")
    settings = list(defaults)
    for place, (word, kind) in enumerate(zip(given, kinds, strict=False)):
        settings[place] = kind(word, text)
    return ":".join([name, *(repr(value) if isinstance(value, float) else str(value) for value in settings)])


def make_cache(resolved: str, steps: int, model: str, left_out: int = 0) -> StepCache:
    """A fresh cache, from the result of `resolve_cache` for the same steps and preset.

    ``left_out``: number of steps skipped at the start of the grid, because the run starts from a video.
    """
    name, *settings = resolved.split(":")
    if name == "teacache":
        return TeaCache.of(model, steps, float(settings[0]), settings[1])
    if name == "magcache":
        return MagCache.of(model, steps, float(settings[0]), int(settings[1]), float(settings[2]), left_out)
    if name == "easycache":
        return EasyCache(steps, float(settings[0]), int(settings[1]))
    return StepCache(steps)


def planned_forwards(resolved: str, steps: int, model: str, passes: int, left_out: int = 0) -> int | None:
    """Number of the ``steps * passes`` forwards that will be computed, with guidance at all steps (2 passes) or none
    (1); None if the cache decides during the run. Arguments as for `make_cache`."""
    cache = make_cache(resolved, steps, model, left_out)
    if isinstance(cache, MagCache):
        return cache.planned(passes)
    return steps * passes if type(cache) is StepCache else None


def _settings(name: str, steps: int, model: str, config: TransformerConfig) -> tuple[tuple, tuple]:
    """The default of each setting, and its parser."""
    if name == "easycache":
        return (EASYCACHE_THRESHOLD, min(EASYCACHE_FIRST, math.ceil(steps / 4))), (_threshold, _count)
    table: Mapping[str, TeaCacheConstants | MagCacheConstants] = TEACACHE if name == "teacache" else MAGCACHE
    if model not in table:
        raise ValueError(f"{name} has no published constants for {model}, only for {', '.join(table)}; "
                         "easycache needs none")  # fmt: skip
    published, sizes = PRESETS[model].transformer, "dim {0.dim}, {0.num_layers} layers"
    if (config.dim, config.num_layers) != (published.dim, published.num_layers):
        raise ValueError(f"{name} has constants for {model} ({sizes.format(published)}), not for this model "
                         f"({sizes.format(config)}); easycache needs none")  # fmt: skip
    row = table[model]
    if isinstance(row, TeaCacheConstants):
        return (row.threshold, row.mode), (_threshold, _mode)
    return (row.threshold, row.most_skips, row.retention), (_threshold, _count, _share)


def _threshold(word: str, text: str) -> float:
    return _number(word, text, "threshold", "a number from 0 (off) up, such as 0.1", lambda v: v >= 0)


def _share(word: str, text: str) -> float:
    return _number(word, text, "retention", "a share from 0 to 1, such as 0.2", lambda v: 0 <= v <= 1)


def _count(word: str, text: str) -> int:
    value = _number(word, text, "count of steps", "a whole number from 1 up", lambda v: v >= 1 and v == int(v))
    return int(value)


def _number(word, text, what, expected, valid) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and valid(value)):
        raise ValueError(f"cache {text!r}: the {what} is {word!r}, expected {expected}")
    return value


def _mode(word: str, text: str) -> str:
    if word not in ("plain", "ret"):
        raise ValueError(f"cache {text!r}: the mode is {word!r}, expected plain or ret")
    return word
