"""Tasks: each turns a `Request` into the `Conditioning` of the sampling loop."""

from __future__ import annotations

from collections.abc import Callable

from ..types import Conditioning, Request
from . import t2v

# Request, text encoder, latent channels → Conditioning
Task = Callable[[Request, Callable, int], Conditioning]

TASKS: dict[str, Task] = {"t2v": t2v.condition}
