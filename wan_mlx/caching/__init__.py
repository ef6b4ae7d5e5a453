"""Step caches: fewer forwards of the transformer, behind one protocol (`StepCache`)."""

from __future__ import annotations

from .choice import FORMS, make_cache, planned_forwards, resolve_cache
from .easycache import EasyCache
from .magcache import MagCache
from .protocol import COND, UNCOND, StepCache
from .teacache import TeaCache

__all__ = [
    "COND", "FORMS", "UNCOND", "EasyCache", "MagCache", "StepCache", "TeaCache",
    "make_cache", "planned_forwards", "resolve_cache",
]  # fmt: skip
