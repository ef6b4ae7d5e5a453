"""Tasks: each turns a `Request` into the `Conditioning` of the sampling loop."""

from __future__ import annotations

from collections.abc import Callable

from ..types import Conditioning, Encoders, Request
from . import t2v

Task = Callable[[Request, Encoders], Conditioning]

TASKS: dict[str, Task] = {"t2v": t2v.condition}
