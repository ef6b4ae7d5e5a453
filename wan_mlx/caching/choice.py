"""``--cache``: parses the user's text into a step cache, or an error."""

from __future__ import annotations

import math
from typing import Any

from ..errors import nearest
from ..models.configs import TransformerConfig
from ..option import Limits, Option
from ..options import CACHES
from ..presets import PRESETS
from .easycache import EasyCache
from .protocol import StepCache
from .residual import MAGCACHE, TEACACHE, MagCache, TeaCache
from .spectrum import HIDDEN, OUTPUTS, Spectrum

FORMS = "none, teacache[:THRESHOLD[:plain|ret]], magcache[:THRESHOLD[:MOST_SKIPS[:RETENTION]]], "\
        "easycache[:THRESHOLD[:FIRST_STEPS]] or spectrum[:WINDOW[:GROWTH[:outputs|hidden]]]"  # fmt: skip
# A cache needs steps that resemble each other; with fewer than these they do not (Wan2GP#659).
FEWEST_STEPS = 10
EASYCACHE_THRESHOLD = 0.05
EASYCACHE_FIRST = 10  # of 40 or 50 steps; a quarter of fewer

THRESHOLD = Option("NUMBER", "0 is off", name="threshold", type=float, limits=Limits(0))
RETENTION = Option("SHARE", "of the steps", name="retention", type=float, limits=Limits(0, 1))
COUNT = Option("NUMBER", "of steps", name="count of steps", type=int, limits=Limits(1))
MODE = Option("", "signal that decides", name="mode", choices=("plain", "ret"))
WINDOW = Option("NUMBER", "of steps, 0 is off", name="window", type=float, limits=Limits(0))
GROWTH = Option("NUMBER", "of the window", name="growth", type=float, limits=Limits(0))
PLACE = Option("", "what is forecast", name="place", choices=(OUTPUTS, HIDDEN))
SPECTRUM: list[float | str] = [2.0, 0.75, OUTPUTS]
# The settings of each cache, as the form of its text, its constants and its class have them in order.
SETTINGS: dict[str, tuple[Option, ...]] = {
    "none": (),
    "teacache": (THRESHOLD, MODE),
    "magcache": (THRESHOLD, COUNT, RETENTION),
    "easycache": (THRESHOLD, COUNT),
    "spectrum": (WINDOW, GROWTH, PLACE),
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
        raise ValueError(f"unknown cache {text!r}, expected {FORMS}{nearest(name, CACHES)}")
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
    for place, word in enumerate(given):
        setting = SETTINGS[name][place]
        try:
            values[place] = setting.read(word)
            setting.check(values[place])
        except ValueError as error:
            raise ValueError(f"cache {text!r}, {setting.name}: {error}") from error
    return ":".join(map(str, [name, *values]))


def make_cache(
    resolved: str, steps: int, model: str, left_out: int = 0, switch: int | None = None, with_image: bool = False
) -> StepCache:
    """A fresh cache, from the result of `resolve_cache` for the same steps and preset.

    ``left_out``: number of steps skipped at the start of the grid, because the run starts from a video. ``switch``: the
    step at which another expert takes over. ``with_image``: the run starts from one, for which constants may differ.
    """
    name, *words = resolved.split(":")
    values: list[Any] = [setting.read(word) for setting, word in zip(SETTINGS[name], words, strict=True)]
    if name == "teacache":
        threshold, mode = values
        return TeaCache(steps, threshold, mode, TEACACHE[model][mode], switch)
    if name == "magcache":
        threshold, most_skips, retention = values
        constants = MAGCACHE[model]
        whole_first = constants.get("whole_first", False)
        ratios = constants["ratios"]
        if with_image:
            ratios = constants.get("ratios_with_image", ratios)
        return MagCache(steps, threshold, most_skips, retention, ratios, left_out, switch, whole_first)
    if name == "spectrum":
        return Spectrum(steps, values[0], values[1], values[2], switch)
    return EasyCache(steps, values[0], values[1], switch) if name == "easycache" else StepCache(steps, switch)


def _defaults(name: str, steps: int, model: str, config: TransformerConfig) -> list:
    """The value of each setting that is not given."""
    if name == "easycache":
        return [EASYCACHE_THRESHOLD, min(EASYCACHE_FIRST, math.ceil(steps / 4))]
    if name == "spectrum":
        return [*SPECTRUM]
    table = TEACACHE if name == "teacache" else MAGCACHE
    if model not in table:
        raise ValueError(f"{name} has no published constants for {model}, only for {', '.join(table)}; "
                         "easycache and spectrum need none")  # fmt: skip
    published, sizes = PRESETS[model].transformer, "dim {0.dim}, {0.num_layers} layers"
    if (config.dim, config.num_layers) != (published.dim, published.num_layers):
        raise ValueError(f"{name} has constants for {model} ({sizes.format(published)}), not for this model "
                         f"({sizes.format(config)}); easycache and spectrum need none")  # fmt: skip
    return list(table[model].values())[: len(SETTINGS[name])]
