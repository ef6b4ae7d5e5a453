"""Progress as bars: of tqdm, in a terminal as in a notebook."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from .events import Event, Progress, StageEnded


class ProgressBars:
    """A listener that shows each `Progress` as a bar, which goes when the work, or its stage, is over."""

    def __init__(self):
        self._name: str | None = None
        self._bar: Any = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageEnded):
            self.close()
        elif isinstance(event, Progress):
            self._show(event)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._name, self._bar = None, None

    def _show(self, progress: Progress) -> None:
        if progress.name != self._name or progress.done < self._bar.n:
            self.close()
            self._name = progress.name
            self._bar = tqdm(
                desc=progress.name, total=progress.total, initial=progress.done, unit=progress.unit,
                unit_scale=progress.unit == "B", leave=False,
            )  # fmt: skip
        self._bar.update(progress.done - self._bar.n)
        if progress.done == progress.total:
            self.close()
