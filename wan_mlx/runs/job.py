"""A job: one request and the file that is made of it, with checkpoints, resume and a final check."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SamplingError, Stopped, WanError, resume_command
from ..events import Conditioned, Decoded, Event, Finished, Listener, Note, Started, Stepped, unheard
from ..lasting import computes
from ..media.checks import WHAT_TO_TRY, FrameStatistics, check_disk, disk_needed, latents_complaint
from ..media.preview import PreviewFiles
from ..media.write import VideoWriter, check_output, latents_to_numpy
from ..opened import OpenedModel
from ..storage import place_of
from ..types import Request
from .folder import Behind, FrameStore, RunFolder
from .record import check_identity, check_same, make_record, request_of
from .run import Run


@dataclass
class Job:
    """One request, the model that it is for, and the file that is to be made.

    Attributes:
        asked: the options of the request as they were given, by name; a run that goes on must have been asked the same.
        overwrite: replace the output if it exists, and begin anew where a run of it is unfinished.
        previews: files to keep up to date while it is made.
        kept: of a job that failed or was stopped, how many steps are kept to go on with; None if nothing is.
        not_finite: whether it failed because the latents stopped being finite.
    """

    pipe: OpenedModel = field(repr=False)
    request: Request
    output: Path
    asked: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False
    previews: PreviewFiles | None = None
    kept: int | None = None
    not_finite: bool = False
    _run: Run | None = field(default=None, repr=False)
    _stopping: bool = False

    @computes
    def make(self, listener: Listener = unheard, free: Collection[str] | None = None) -> Finished:
        """Make the file: from the start, or where ``free`` is given from where an unfinished run of it is.

        Args:
            listener: called with each event; what it tells of is kept by then, or being written.
            free: options that may differ from those that the unfinished run was asked.

        Raises:
            ValueError: the output exists, or a run of it is unfinished, and neither is to be replaced; or the
                unfinished run was asked other options.
            BusyError: another process is making it.
            Stopped: it was asked for; finished work is kept.
            SamplingError: the latents stopped being finite; the state before that is kept.
            WanError: too little disk, or the file could not be written; or weights or sources that an unfinished run
                still needs have changed.
        """
        if free is None:  # before there is a folder
            self.check_output()
        with RunFolder(self.output) as folder:
            if free is None and folder.is_unfinished and not self.overwrite:
                command = resume_command(self.output)
                raise ValueError(f"there is an unfinished run of {self.output}: go on with `{command}`, or start anew "
                                 "with --overwrite")  # fmt: skip
            if free is not None and folder.is_finished():  # but for its folder's end
                folder.delete()
                finished = Finished(self.output)
                listener(finished)
                return finished
            if self.overwrite or not folder.is_unfinished:
                self._begin(folder)
            else:
                record = folder.record()
                assert record is not None, "a run has begun there"
                folder.state()  # which is refused if damaged, before any work
                check_same({**self.pipe.opened_with, **self.asked}, record, free or ())
                for difference in check_identity(record, self.pipe, folder):
                    listener(Note(difference))
                self.request = request_of(record)
            return self.go_on(folder, listener)

    def check_output(self) -> None:
        """Raise ValueError if the output may not be written: as `media.write.check_output`, or it is a source."""
        check_output(self.output, self.overwrite)
        if place_of(self.output) in map(place_of, self.request.source_files):
            raise ValueError(f"output {self.output} is what the video is made from; choose another name")

    def _begin(self, folder: RunFolder) -> None:
        self.check_output()
        try:
            folder.begin(make_record(self.pipe, self.request, self.asked, self.overwrite, self.previews))
        except BaseException:
            folder.delete()
            raise

    @computes
    def go_on(self, folder: RunFolder, listener: Listener = unheard) -> Finished:
        """Make the file from where its folder is, which is locked and has begun; as `make`."""
        started, record = time.perf_counter(), folder.record() or {}
        try:
            listener(Started(self.output, record["settings"]))
            complaint = self._make(folder, record["settings"], listener)
        except BaseException as error:
            if isinstance(error, OSError | WanError) and not folder.path.is_dir():
                raise WanError(f"{folder.path} was removed while the run was at work; start anew") from error
            # A run without a step leaves nothing, unless it was stopped on purpose.
            if folder.steps_done or (isinstance(error, Stopped) and folder.is_unfinished):
                self.kept, self.not_finite = folder.steps_done, bool((folder.record() or {}).get("not_finite"))
            else:
                folder.delete()
            raise
        folder.delete()
        seconds, run = time.perf_counter() - started, self._run
        reports, forwards = (run.reports, run.forwards) if run else ([], None)
        finished = Finished(self.output, seconds, complaint and f"{complaint}; {WHAT_TO_TRY}", reports, forwards)
        listener(finished)
        return finished

    def stop(self) -> None:
        """End the job after the step or the frames at work, by `Stopped` where it is made; any thread may call this."""
        self._stopping = True
        if self._run is not None:
            self._run.stop()

    @property
    def stops_soon(self) -> bool:
        """Whether `stop` would be heard soon."""
        return self._run is not None and self._run.stops_soon

    def _make(self, folder: RunFolder, settings: dict[str, Any], listener: Listener) -> str | None:
        """Sample, decode and encode; returns a complaint about the video, if there is one."""
        request, size = self.request, (self.request.width, self.request.height)
        check_disk(folder.path, disk_needed(request, self.pipe.latent_channels) - folder.size)
        writer = VideoWriter(
            self.output, request.fps, size, settings, self.overwrite, folder.path, speech=request.speech
        )
        store = folder.open_frames(request.height, request.width)
        with _Encoding(writer, folder, store) as encoding:
            if store.count < request.frames_written or not folder.is_sampled:
                try:
                    self._sample(folder, store, encoding, listener)
                except SamplingError:
                    if not folder.is_sampled:  # then another dtype may go on
                        folder.amend(not_finite=True)
                    raise
            return encoding.finish(self._check)

    def _sample(self, folder: RunFolder, store: FrameStore, encoding: _Encoding, listener: Listener) -> None:
        state = folder.state()
        steps_before, clip_before = (0, -1) if state is None else (state.steps, state.conditioning.clip)
        run = self._run = Run(self.pipe, self.request, state)
        del state  # with every step the arrays it holds become old
        if self._stopping:
            run.stop()

        def keep(event: Event) -> None:
            if isinstance(event, Conditioned):
                if event.conditioning.clip > clip_before:
                    folder.save_conditioning(event.conditioning, run.plan.how)
            elif isinstance(event, Stepped):
                if event.step.index >= steps_before:
                    folder.save_step(event.step, {"forwards": run.forwards})
            elif isinstance(event, Decoded) and event.done > store.count:
                # Decoding starts at the first frame, and comes in the same chunks as those that are kept.
                encoding.add(event.frames)

        def show(event: Event) -> None:
            previews = self.previews
            if previews and isinstance(event, Stepped) and (self._stopping or previews.is_due(event.step)):
                listener(previews.write(event.step, self.request))

        run.listen(keep).listen(listener).listen(show)
        with closing(iter(run)) as events:
            for event in events:
                del event  # which frees its arrays

    def _check(self) -> None:
        if self._stopping:
            raise Stopped()


class _Encoding(ExitStack):
    """Keeps frames and takes them to the file, as they come: some are encoded while the next are being decoded.

    The file appears when the ``with`` block ends without an exception.
    """

    def __init__(self, writer: VideoWriter, folder: RunFolder, store: FrameStore):
        super().__init__()
        self.writer, self.folder, self.store = writer, folder, store
        self.statistics = FrameStatistics()
        self._begun = False
        self._encoded = 0  # chunks of the store

    def add(self, frames: np.ndarray) -> None:
        """Keep frames, and encode them in another thread, after those before, unless another clip is to be sampled;
        raises their exception."""
        if not self.folder.is_sampled:
            self.store.add(frames)
            return
        self._begin()
        self._adding.call(self._add, frames)

    def _add(self, frames: np.ndarray) -> None:
        self.store.add(frames)
        self._follow()

    def _begin(self) -> None:
        """Begin the file; sampling must be done, since notes of the last step go into the file's head."""
        if self._begun:
            return
        state = self.folder.state()
        if state is None or not self.folder.is_sampled:
            raise WanError(f"the last step in {self.folder.path} cannot be read; go on with --resume")
        self.writer.settings = self.writer.settings | state.notes
        self.writer.latents = latents_to_numpy(state.state["latents"][:, state.conditioning.trim_latents :])
        self.writer.when_whole = self.folder.mark_finished
        self.enter_context(self.writer)  # left after the thread that writes
        self._adding = Behind(self.enter_context(ThreadPoolExecutor(1, "wan_mlx-frames")))
        self._begun = True

    def _follow(self, check: Callable[[], None] | None = None) -> None:
        """Encode the kept frames that are not yet; ``check`` is called after each latent frame's worth."""
        for frames in self.store.chunks(self._encoded):
            self.statistics.add(frames)
            self.writer.write(frames)
            self._encoded += 1
            if check is not None:
                check()

    def finish(self, check: Callable[[], None]) -> str | None:
        """No more frames come: encode the rest, as `_follow`. Returns a complaint about the video, if there is one."""
        self._begin()
        self._adding.settle()
        self._follow(check)
        assert self.writer.latents is not None
        return self.statistics.complaint() or latents_complaint(self.writer.latents)
