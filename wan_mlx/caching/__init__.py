"""Step caches: fewer forwards of the transformer, behind one protocol (`StepCache`)."""

from __future__ import annotations

from .choice import make_cache, resolve_cache
from .easycache import EasyCache
from .protocol import COND, UNCOND, StepCache
from .residual import MagCache, TeaCache
from .spectrum import Spectrum

__all__ = [
    "COND", "UNCOND", "EasyCache", "MagCache", "Spectrum", "StepCache", "TeaCache",
    "make_cache", "resolve_cache",
]  # fmt: skip
