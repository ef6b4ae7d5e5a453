"""Step caches: fewer forwards of the transformer, behind one protocol (`StepCache`)."""

from __future__ import annotations

from .protocol import COND, UNCOND, StepCache

__all__ = ["COND", "UNCOND", "StepCache"]
