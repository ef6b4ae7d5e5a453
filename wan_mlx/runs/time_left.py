"""The time left of a run: its plan's work, at the rates that the run itself has shown so far."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..events import Decoded, Event, StageEnded, StageStarted, Stepped
from ..planning.plan import Plan

ORDER = ("conditioning", "load", "denoise", "decode")  # first words of the stages' names
# Until they are measured: decoding's FLOP per second as a share of denoising's (on an H200 150 to 490 TFLOP/s), and
# bytes read per second.
DECODE_SHARE = 0.3
READING = 1e9
RECENT = 8  # steps: a Mac that gets warm becomes slower


class TimeLeft:
    """Hears a run's events, and tells how many seconds are left: from its first step on, or from its beginning if
    ``rate`` is given or the plan has times.

    Args:
        plan: of the run.
        steps: how many are made, ``first`` of them before this run, which then goes on after them.
        switch: the step at which another expert takes over, which is loaded then; None if none does.
        clips: how many clips the video is made in, each in so many ``steps``.
        rate: FLOP per second of denoising, if it is known about how fast the machine is.
        clock: seconds.
    """

    def __init__(
        self, plan: Plan, steps: int, first: int = 0, rate: float | None = None, switch: int | None = None,
        clock: Callable[[], float] = time.perf_counter, clips: int = 1,
    ):  # fmt: skip
        self._rows, self._streamed = {row.stage: row.times(1 / clips) for row in plan.rows}, plan.stream
        self._steps, self._rate, self._clock, self._clips = steps, rate, clock, clips
        self._clip = min(first // steps, clips - 1)
        self._done = first = first - self._clip * steps  # of the clip at work
        self._reached = 0 if not first else 1 if first < steps else 3
        self._began = clock()  # the stage, or the step, that is at work
        self._seconds: list[float] = []  # of the steps of this run
        self._decoded = 0.0  # share of the frames
        self._transformers = 1 if switch is None else 2  # whose bytes the plan counts
        self._later_loads = int(switch is not None and first < switch)  # in the midst of denoising
        self._load: float | None = None  # seconds that the first took

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            if event.name.startswith("load") and self._reached == ORDER.index("denoise"):
                self._later_loads = 0
            reached = ORDER.index(event.name.split()[0])
            if reached < self._reached and not reached:
                self._clip, self._done, self._decoded = self._clip + 1, 0, 0.0
            self._reached, self._began = reached, self._clock()
        elif isinstance(event, Stepped) and event.step.seconds:  # not one that an earlier run made
            self._clip, index = divmod(event.step.index, self._steps)
            self._done, self._began = index + 1, self._clock()
            self._seconds.append(event.step.seconds)
        elif isinstance(event, Decoded):
            self._decoded = min(1.0, max(0.0, event.done / event.total * self._clips - self._clip))
        elif isinstance(event, StageEnded) and event.name.startswith("load"):
            self._load = event.seconds

    def seconds(self) -> float | None:
        """To the last frame; None as long as that is not known."""
        later = self._clips - 1 - self._clip
        left = [self._left(stage) for stage in ORDER[self._reached :]]
        left += [self._whole(stage) for stage in ORDER] * later
        known = [seconds for seconds in left if seconds is not None]
        return sum(known) if len(known) == len(left) else None

    def _left(self, stage: str) -> float | None:
        spent = self._clock() - self._began if stage == ORDER[self._reached] else 0.0
        if stage == "decode" and self._decoded:
            return spent * (1 - self._decoded) / self._decoded
        if stage == "denoise":
            left, step = self._steps - self._done, self.step_seconds()
            if not left or step is None:
                return 0.0 if not left else None
            return max((left - 1) * step, left * step - spent) + self._later_loads * self._load_seconds()
        whole = self._whole(stage)
        return None if whole is None else max(0.0, whole - spent)

    def _whole(self, stage: str) -> float | None:
        """Seconds that a stage takes in all."""
        if stage == "load":
            return self._load_seconds()
        if stage == "denoise":
            return None if (step := self.step_seconds()) is None else step * self._steps
        begin = "encode" if stage == "conditioning" else stage
        rows = [row for name, row in self._rows.items() if name.startswith(begin)]
        if all(row.seconds is not None for row in rows):
            return sum(row.seconds or 0.0 for row in rows)
        step, flop = self.step_seconds(), sum(row.flop for row in rows)
        if step is None or not step:
            return None
        rate = self._rows["denoise"].flop / (step * self._steps)
        if stage == "decode":
            return flop / (DECODE_SHARE * rate)
        return max(flop / rate, sum(row.reads for row in rows) / READING)

    def _load_seconds(self) -> float:
        """Of one transformer: as long as the one before took."""
        if self._load is not None:
            return self._load
        return 0.0 if self._streamed else self._rows["denoise"].reads / self._transformers / READING

    def step_seconds(self) -> float | None:
        """Of one step: the mean of recent ones, the first of which compiles kernels; before that, as planned."""
        if self._seconds:
            recent = (self._seconds[1:] or self._seconds)[-RECENT:]
            return sum(recent) / len(recent)
        row = self._rows["denoise"]
        whole = row.seconds if row.seconds is not None else row.flop / self._rate if self._rate else None
        return None if whole is None else whole / self._steps
