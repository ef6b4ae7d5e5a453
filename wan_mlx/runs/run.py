"""One run of an opened model: encode, denoise, decode; a stage's weights are gone before the next stage's are read."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import mac
from ..caching import make_cache
from ..denoise import denoise, step_of, with_condition, without_references
from ..errors import BusyError, SamplingError, Stopped, WanError, gpu_failures_told
from ..events import (
    ClipStarted,
    Conditioned,
    Decoded,
    Eta,
    Event,
    Listener,
    Note,
    StageEnded,
    StageStarted,
    Stepped,
    Within,
    counted,
)
from ..guidance import Guidance, Model
from ..lasting import computes, yields_computed
from ..media.video import Video
from ..media.write import latents_to_numpy
from ..models import chips
from ..models.execution import Execution
from ..models.vae_tiling import LastFrames
from ..opened import OpenedModel
from ..parallel import Team
from ..planning.plan import Plan, limited_memory
from ..recipes import scheduler_for
from ..tasks import TASKS
from ..types import Conditioning, Request, RunState, Step
from ..weights.parts import Part
from ..weights.set_loras import set_loras
from .time_left import TimeLeft
from .together import FINISH, STOP, assemble, failing_together, shared_state

log = logging.getLogger(__name__)

@dataclass
class Loaded:
    """A transformer at work: its part, the network, how a step calls it, and its LoRAs if they change later."""

    part: Part
    network: Execution
    model: Model
    loras: list[tuple[Path, float]] | None


ETA_EVERY = 0.5  # seconds, beside those of steps, frames and stages
# The outputs of `Run.outputs`: the conditioning, then each step, then decoded frames uint8 (n, H, W, 3).
Output = Conditioning | Step | np.ndarray


class Run:
    """One request on its way to a video: iterate over it, once, for the events as they happen.

    The run happens while it is iterated over, in that thread, and ends when the iteration does; a model makes one
    video at a time. Listeners (`listen`) hear each event before it is yielded.

    Attributes:
        pipe, request: the model, and the request.
        plan: which parts are resident, streamed or tiled.
        stage: the one that is at work, as it will be called in ``reports``; None between stages.
        reports: seconds and peak memory of each stage that has ended.
        forwards: the transformer's forwards computed so far, and how many a run without step cache and with guidance
            all along makes; None before the first step.
        stopped_after: the number of steps after which `finish` ended sampling; None if it did not.
        team: the machines that make it, once it has begun; None if this one is alone.

    Raises:
        MemoryPlanError: it does not fit.
        WanError: there is no prompt, because none could be written out of the picture.
    """

    def __init__(self, pipe: OpenedModel, request: Request, resume: RunState | None = None):
        if not request.prompt.strip():
            raise WanError("the prompt is empty, and none was written out of the picture; give one")
        self.pipe, self.request = pipe, request
        plan = pipe.plan(request)
        plan.check()
        self.plan: Plan = plan if resume is None else plan.as_begun(resume.how)
        self.stage: str | None = None
        self.reports: list[StageEnded] = []
        self.forwards: tuple[int, int] | None = None
        self.stopped_after: int | None = None
        self._resume = resume
        self._frames = 0  # decoded, of the clips that are done
        self._forwards_noted = (resume and resume.notes.get("forwards")) or (0, 0)  # where no step is left to make
        self._expert: Loaded | None = None  # the transformer that is there
        self._listeners: list[Listener] = []
        self._happened: deque[Event] = deque()
        self._begun = False
        self.team: Team | None = None
        self._finishing, self._stopping = False, ""  # what this machine was asked: `finish`, and why `stop`
        self._agreed = 0  # what all machines do: `STOP`, `FINISH`, or neither
        first, switch = resume.steps if resume else 0, pipe.switch(request)
        self._left = TimeLeft(self.plan, request.steps_made, first, chips.likely_rate(), switch, clips=request.clips)
        self._eta_at = 0.0

    def listen(self, listener: Listener) -> Run:
        """Have ``listener`` called with each event the moment it happens, in the thread of the run; returns the run.

        An exception of a listener ends the run.
        """
        self._listeners.append(listener)
        return self

    def stop(self, why: str = "interrupted") -> None:
        """End the run after the step or the decoded frames at work: the iteration then raises `Stopped`, with ``why``.

        Any thread may call this.
        """
        self._stopping = why

    def finish(self) -> None:
        """Sample no more after the step at work: the video is that step's estimate. Any thread may call this."""
        self._finishing = True

    @property
    def stops_soon(self) -> bool:
        """Whether `stop` would be heard soon: in the midst of steps or decoded frames, not while weights are read, nor
        where a video is decoded in tiles, whose frames all come at the end."""
        whole = self.pipe.tiny_vae or self.pipe.tile_of("decode_tile") is None
        return self.stage == "denoise" or (self.stage == "decode" and whole)

    @yields_computed
    def __iter__(self) -> Generator[Event, None, None]:
        """Run, and yield every event but those `Within` the work between two of them.

        Raises:
            BusyError: another run of this model is under way.
            ValueError: the run has begun before.
            SamplingError: the latents stopped being finite.
            GPUError: the GPU's work failed.
            Stopped: `stop` was called, or the battery is below the model's ``stop_below``.
        """
        if self._begun:
            raise ValueError("this run has begun already; pipe.run(request) makes another")
        with self._alone(), mac.awake(self.pipe.caffeinate), failing_together(self.pipe.group), gpu_failures_told():
            self._begun = True
            self._assemble()
            with limited_memory(self.plan):
                yield from self._events()

    def _assemble(self) -> None:
        """Have the other machines, if there are any, begin the same run."""
        if (group := self.pipe.group) is not None:
            note = partial(Note, important=True)
            self.team, self.request, self.plan = assemble(
                group, self.pipe, self.request, self.plan, lambda text: self._tell(note(text))
            )
            self.pipe.plan_at_work = self.plan
            self._tell(Note(f"machines  {group.size}, by {group.backend}: {self.team.mode}"))

    def _events(self) -> Iterator[Event]:
        for _ in self._stages():
            while self._happened:
                yield self._happened.popleft()
            # Several machines agree after a step; elsewhere the others end as if this one had failed.
            if self._stopping and not (self.team is not None and self.stage == "denoise"):
                raise Stopped(why=self._stopping)
        while self._happened:
            yield self._happened.popleft()

    def outputs(self) -> Generator[Output, None, None]:
        """Run, and yield the stages' results: the Conditioning, each Step, then decoded frames uint8 (n, H, W, 3)."""
        with closing(iter(self)) as events:
            for event in events:
                if isinstance(event, Conditioned):
                    yield event.conditioning
                elif isinstance(event, Stepped):
                    yield event.step
                elif isinstance(event, Decoded):
                    yield event.frames
                elif isinstance(event, Note):
                    log.warning("%s", event.text)

    @computes
    def video(self, callback: Callable[[Step], Any] | None = None) -> Video:
        """Run to the end, and gather the frames.

        Args:
            callback: called with each step; if it returns False, sampling ends there (`finish`).
        """
        settings = self.pipe.settings(self.request)
        frames: list[np.ndarray] = []
        latents: Any = None
        estimate: Any = None
        with closing(self.outputs()) as outputs:
            for output in outputs:
                if isinstance(output, Step):
                    latents, estimate = output.latents, output.denoised
                    if callback is not None and callback(output) is False:
                        self.finish()
                elif isinstance(output, np.ndarray):
                    frames.append(output)
        if self.stopped_after is not None:
            latents, settings["stopped_after"] = estimate, self.stopped_after
        if self.forwards:
            settings["forwards"] = list(self.forwards)
        return Video(
            frames=np.concatenate(frames or [np.zeros((0, self.request.height, self.request.width, 3), np.uint8)]),
            latents=latents_to_numpy(latents),
            fps=self.request.fps,
            settings=settings,
            stages=self.reports,
            speech=self.request.speech,
        )

    # The stages. A generator below yields wherever events have been told that are to be passed on.

    def _stages(self) -> Iterator[None]:
        self.pipe.check_files()  # a damaged file is not for after an hour's work to find
        if self._is_first:
            self.pipe.check_interpolation(self.request)
        reached = yield from self._condition()
        while True:
            latents = yield from self._sample(reached)
            conditioning = reached.conditioning
            del reached
            last = yield from self._decode(latents, conditioning)
            if conditioning.clip + 1 == self.request.clips:
                return
            if self._ends_early:
                self.stopped_after = self.stopped_after or (conditioning.clip + 1) * self.request.steps_made
                return
            reached = yield from self._follow(conditioning, last)
            del conditioning, last

    def _condition(self) -> Generator[None, None, RunState]:
        reached, self._resume = self._resume, None
        if reached is None and self._is_first:
            for line in self.pipe.notes(self.request):
                self._tell(Note(line, important=True))
            with self._stage("conditioning"):
                yield
                reached = RunState(TASKS[self.request.task].condition(self.request, self.pipe))
                mx.eval(reached.conditioning.arrays())
        return (yield from self._shared(reached))

    def _shared(
        self, reached: RunState | None, before: Conditioning | None = None
    ) -> Generator[None, None, RunState]:
        """What rank 0 has encoded, on all machines, which have that of the clip ``before``, if there is one; tells it.
        """
        if self.team is not None:
            self.team.group.meet("conditioned")
            reached = shared_state(self.team.group, reached if self._is_first else None, before)
        assert reached is not None, "rank 0 has it"
        self._tell(Conditioned(reached.conditioning))
        yield
        return reached

    def _follow(self, conditioning: Conditioning, last: np.ndarray) -> Generator[None, None, RunState]:
        """The next clip, from the conditioning of the one before and its last frames (n, H, W, 3)."""
        clips, number = TASKS[self.request.task].clips, conditioning.clip + 1
        assert clips is not None, "there is more than one"
        reached = None
        if self._is_first:
            with self._stage("conditioning"):
                yield
                following = clips.following(self.request, self.pipe, conditioning, last)
                forwards, _ = self.forwards or self._forwards_noted
                following = replace(following, clip=number, frames_before=self._frames, forwards_before=forwards)
                mx.eval(following.arrays())
                reached = RunState(following, number * self.request.steps_made)
        return (yield from self._shared(reached, conditioning))

    def _sample(self, reached: RunState) -> Generator[None, None, mx.array]:
        """Make the steps of a clip that are left; returns the latents (1, t, h, w, C) to decode."""
        request, conditioning = self.request, reached.conditioning
        scheduler = scheduler_for(request)
        total = len(scheduler.timesteps)
        first = max(0, reached.steps - conditioning.clip * total)
        if request.clips > 1:
            self._tell(ClipStarted(conditioning.clip, request.clips))
        if first:
            latents = self._step(step_of(scheduler, first - 1, reached.state), conditioning)
            yield
        if first == total:
            return latents
        with ExitStack() as stage:
            serving = partial(self._serving, stage, conditioning)
            serving(float(scheduler.timesteps[first]))
            yield
            switch = self.pipe.switch(request)
            start = request.begin, switch, request.image is not None
            cache = make_cache(request.cache, request.steps_made, self.pipe.preset.name, *start)
            steps = denoise(serving, conditioning, scheduler, cache, first, reached.state, self.pipe.wider_dtype,
                            self.team)  # fmt: skip
            with closing(counted(self._tell, "denoising")(steps, total=total, initial=first)) as steps:
                for step in steps:
                    computed = conditioning.forwards_before + cache.computed
                    self.forwards = (computed, request.passes * total * (conditioning.clip + 1))
                    latents = self._step(step, conditioning)
                    self._heed_battery()
                    yield
                    self._heed_others()
                    if self._ends_early and step.index + 1 < total:
                        self.stopped_after = conditioning.clip * total + step.index + 1
                        return without_references(step, conditioning.trim_latents).denoised
        return latents

    def _serving(self, stage: ExitStack, conditioning: Conditioning, timestep: float) -> tuple[Model, Guidance]:
        """The transformer that serves a timestep, loaded when the one before it is gone; ``stage`` is that of sampling.
        """
        part = self.pipe.expert(timestep, self.request)
        changing = self.pipe.changes_loras(self.request, part)
        loras = self.pipe.loras_at(self.request, timestep) if changing else None
        if self._expert is None or self._expert.part is not part:
            self._expert = None
            stage.close()
            with self._stage(f"load {part.label}"):
                network = self.pipe.load_expert(part, loras)
                if self.team is not None:  # a GPU that waits for a machine which still reads would look as if it hung
                    self.team.group.meet(f"load {part.label}")
                self._expert = Loaded(part, network, with_condition(network, conditioning), loras)
            stage.callback(setattr, self, "_expert", None)
            stage.enter_context(self._stage("denoise"))
        elif loras is not None and loras != self._expert.loras:
            set_loras(self._expert.network, loras)
            self._expert.loras = loras
        return self._expert.model, Guidance.of(self.request, part.name, timestep)

    def _step(self, step: Step, conditioning: Conditioning) -> mx.array:
        """Tell a step, counted through all clips, without the references that it has; returns its latents."""
        before, total = conditioning.clip * step.total, self.request.clips * step.total
        shown = replace(without_references(step, conditioning.trim_latents), previewer=self.pipe.preview,
                        index=before + step.index, total=total)  # fmt: skip
        mx.eval(shown.latents, shown.denoised)  # whoever sees them computes nothing
        self._tell(Stepped(shown))
        return shown.latents

    def _heed_battery(self) -> None:
        least = self.pipe.stop_below
        if least is not None and (left := mac.battery()) is not None and left < least:
            self.stop(f"the battery is at {left} %, below {least} %")

    @property
    def _is_first(self) -> bool:
        """Whether this machine is alone, or the one that encodes and makes the file."""
        return self.team is None or self.team.group.rank == 0

    @property
    def _ends_early(self) -> bool:
        """Whether no more is sampled: as this machine was asked, or with others as all have agreed."""
        return self._finishing if self.team is None else self._agreed == FINISH

    def _heed_others(self) -> None:
        """After a step: what one machine was asked, all do.

        Raises:
            Stopped: that is to stop.
        """
        if self.team is not None:
            self._agreed = self.team.group.most(STOP if self._stopping else FINISH if self._finishing else 0)
            if self._agreed == STOP:
                raise Stopped(why=self._stopping or "another machine had to stop", agreed=True)

    def _decode(self, latents: mx.array, conditioning: Conditioning) -> Generator[None, None, np.ndarray]:
        """Decode a clip; returns its last frames, as many as the next one needs, as they were before rounding."""
        clips = TASKS[self.request.task].clips
        if clips is not None and clips.before is not None:
            latents = mx.concatenate([clips.before(conditioning), latents], axis=1)
        last = LastFrames(clips.last_frames(self.request) if clips and self.request.clips > 1 else 0)
        done, trim, most = conditioning.frames_before, conditioning.trim_frames, self.request.frames_written
        with self._stage("decode"):
            yield
            decoded = self._told_if_bad(self.pipe.decode(latents, last))
            for frames in self.pipe.smoothed(self.request, decoded) if self._is_first else decoded:
                mx.synchronize()  # only now a failed command buffer is sure to show
                frames, trim = frames[trim : trim + most - done], max(0, trim - len(frames))
                if len(frames):
                    done += len(frames)
                    self._tell(Decoded(frames, done, most))
                    del frames
                    yield
        self._frames = done
        return last.frames

    def _told_if_bad(self, decoded: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Decoded frames, none on other machines than the first; these are told if one is not finite."""
        try:
            yield from decoded
        except SamplingError as error:
            if self.team is not None:
                self.team.group.heartbeat.fail(str(error))
            raise

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)
        if not isinstance(event, Within):
            self._happened.append(event)
        self._tell_time_left(event)

    def _tell_time_left(self, event: Event) -> None:
        self._left(event)
        is_due = isinstance(event, Stepped | Decoded | StageStarted)
        if is_due or (isinstance(event, Within) and time.perf_counter() > self._eta_at + ETA_EVERY):
            self._eta_at = time.perf_counter()
            eta = Eta(self._left.seconds(), mx.get_active_memory(), mx.get_peak_memory())
            for listener in self._listeners:
                listener(eta)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Time a stage, note its peak memory, and give freed memory back when it ends."""
        mx.clear_cache()
        mx.reset_peak_memory()
        self.stage = name
        self._tell(StageStarted(name))
        started, left = time.perf_counter(), True
        try:
            yield
            left = False
        finally:
            self.stage = None
            report = StageEnded(name, time.perf_counter() - started, mx.get_peak_memory(), left)
            self.reports.append(report)
            mx.clear_cache()
            log.info("%s: %.1f s, peak %.2f GiB", name, report.seconds, report.peak_bytes / 2**30)
            self._tell(report)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self.pipe.running.acquire(blocking=False):
            raise BusyError("this pipeline is making another video; wait until that run ends, or open another pipeline")
        listener = self.pipe.listener
        if listener not in self._listeners:  # a command line's is both
            self._listeners.insert(0, listener)
        self.pipe.listener, self.pipe.plan_at_work = self._tell, self.plan
        self.pipe.drop_beyond(self.plan)
        try:
            yield
        finally:
            self.pipe.listener, self.pipe.plan_at_work = listener, None
            self.pipe.running.release()
