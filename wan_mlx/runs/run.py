"""One request to one file: kept as it goes, continued where it was cut, looked at when it is done."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import SamplingError
from ..events import Conditioned, Decoded, Event, Listener, Stepped, unheard
from ..media.checks import WHAT_TO_TRY, FrameStatistics, check_disk, disk_needed, latents_complaint
from ..media.write import VideoWriter, latents_to_numpy
from ..run import Run
from ..types import Request, StageReport
from .folder import Behind, FrameStore, RunFolder
from .interrupt import Interrupts

if TYPE_CHECKING:
    from ..pipeline import WanPipeline


@dataclass
class Result:
    """What became of a request.

    Attributes:
        path: the video.
        seconds: of this process's part.
        complaint: what is wrong with the video, if anything looks wrong.
        reports, forwards: of its `Run`.
    """

    path: Path
    seconds: float
    complaint: str | None = None
    reports: list[StageReport] = field(default_factory=list)
    forwards: tuple[int, int] | None = None


def make_file(
    pipe: WanPipeline,
    request: Request,
    folder: RunFolder,
    overwrite: bool = False,
    interrupts: Interrupts | None = None,
    listener: Listener = unheard,
) -> Result:
    """Make the video ``folder.output`` and delete ``folder``, which is locked and has begun or goes on.

    Args:
        overwrite: replace the output if it exists.
        interrupts: asked for after each step and each decoded latent frame.
        listener: called with each event of the run, which is kept by then.

    Raises:
        Stopped: it was asked for; what is done is kept.
        SamplingError: the latents stopped being finite; the state before that is kept.
        WanError: too little disk, or the file could not be written.
    """
    started = time.perf_counter()
    interrupts = interrupts or Interrupts()
    check_disk(folder.path, disk_needed(request, pipe.latent_channels) - folder.size)
    VideoWriter(folder.output, request.fps, (request.width, request.height), folder.record()["settings"], overwrite)
    frames = folder.open_frames(request.height, request.width)
    with _Encoding(request, folder, frames, overwrite) as encoding:
        run = None
        if frames.count < request.num_frames:
            try:
                run = _sample(pipe, request, folder, frames, encoding, interrupts, listener)
            except SamplingError:
                folder.mark_not_finite()
                raise
        complaint = encoding.finish(interrupts)
    folder.delete()
    if complaint:
        complaint = f"{complaint}; {WHAT_TO_TRY}"
    reports, forwards = (run.reports, run.forwards) if run else ([], None)
    return Result(folder.output, time.perf_counter() - started, complaint, reports, forwards)


def _sample(
    pipe: WanPipeline,
    request: Request,
    folder: RunFolder,
    store: FrameStore,
    encoding: _Encoding,
    interrupts: Interrupts,
    listener: Listener,
) -> Run:
    state = folder.state()
    steps_before = 0 if state is None else state.steps
    known = state is not None
    run = pipe.run(request, state)
    del state  # with every step the arrays it holds become old
    interrupts.patient = lambda: run.stops_soon

    def keep(event: Event) -> None:
        if isinstance(event, Conditioned):
            if not known:
                folder.save_conditioning(event.conditioning, run.plan.how)
        elif isinstance(event, Stepped):
            if event.step.index >= steps_before:
                folder.save_step(event.step, {"forwards": run.forwards})
        elif isinstance(event, Decoded) and event.done > store.count:
            # Decoding starts at the first frame, and comes in the same chunks as those that are kept.
            encoding.add(event.frames)

    run.listen(keep).listen(listener)
    with closing(iter(run)) as events:
        for event in events:
            del event
            interrupts.check()
    return run


class _Encoding:
    """Keeps frames and takes them to the file, as they come: some are encoded while the next are being decoded.

    The file appears when the ``with`` block ends without an exception.
    """

    def __init__(self, request: Request, folder: RunFolder, store: FrameStore, overwrite: bool):
        self.request, self.folder, self.store, self.overwrite = request, folder, store, overwrite
        self.statistics = FrameStatistics()
        self._writer: VideoWriter | None = None
        self._chunks = 0
        self._thread = ThreadPoolExecutor(1, "wan_mlx-frames")
        self._adding = Behind(self._thread)

    def __enter__(self) -> _Encoding:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if self._writer is not None:  # first, or frames that ffmpeg does not take would be waited for
                self._writer.__exit__(kind, error, traceback)
        finally:
            self._thread.shutdown()

    def add(self, frames: np.ndarray) -> None:
        """Keep frames and encode them in another thread, once those before are; raises what went wrong with them."""
        self._adding.settle()
        self._open()
        self._adding.call(self._add, frames)

    def _add(self, frames: np.ndarray) -> None:
        self.store.add(frames)
        self._follow()

    def _open(self) -> None:
        """Begin the file, if it has not begun; sampling must be done, since its notes go into the file's head."""
        if self._writer is None:
            request, folder = self.request, self.folder
            settings = folder.record()["settings"] | folder.notes()
            size = (request.width, request.height)
            writer = VideoWriter(folder.output, request.fps, size, settings, self.overwrite, folder.path)
            self._writer = writer.__enter__()

    def _follow(self, interrupts: Interrupts | None = None) -> None:
        """Encode the kept frames that are not yet; ``interrupts`` are asked for after each latent frame's worth."""
        for frames in self.store.chunks(self._chunks):
            self.statistics.add(frames)
            self._writer.write(frames)
            self._chunks += 1
            if interrupts is not None:
                interrupts.check()

    def finish(self, interrupts: Interrupts) -> str | None:
        """No more frames come: encode the rest. Returns what is wrong with the video, if anything."""
        self._adding.settle()
        self._open()
        self._follow(interrupts)
        state = self.folder.state()
        latents = latents_to_numpy(state.state["latents"][:, state.conditioning.trim_latents :])
        self._writer.latents, self._writer.when_whole = latents, self.folder.mark_finished
        return self.statistics.complaint() or latents_complaint(latents)
