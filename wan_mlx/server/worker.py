"""The worker: a process that holds the model and makes the queue's videos, one after the other.

Its orders are objects on standard input: ``{"make": id, "options": {…}, "output": name, "preview": name}`` and
``{"stop": id}``. What it says is what ``wan-mlx --json`` says, and after a job ``{"event": "ended", "state": …}``. It
may be killed at any moment: a run goes on from its last step that is kept.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from .. import options
from ..cli.flags import arguments, free_on_resume, keywords, run_parser
from ..cli.jobs import check_flags, extend, extension_of, jobs_from, open_model, request_from
from ..cli.terminal import Terminal, explain, write
from ..errors import (
    BusyError,
    GPUError,
    MemoryPlanError,
    SamplingError,
    Stopped,
    UsageError,
    WeightsError,
    is_out_of_memory,
)
from ..events import Event, Finished
from ..pipeline import WanPipeline
from ..planning.choose import Wanted, plan_video
from ..runs.folder import RunFolder
from ..runs.job import Job
from ..runs.record import seed_of_made
from ..types import Request
from .child import follow

IDLE = 120.0  # seconds after which a model that nobody asks for is let go
CODES = {MemoryPlanError: "does_not_fit", SamplingError: "not_finite", GPUError: "gpu", WeightsError: "weights",
         UsageError: "invalid_value", ValueError: "invalid_value"}  # fmt: skip
PATIENCE = 30.0  # seconds for which another process may hold a run's folder
# Of a plan: what decides how fast a run is, and its last bits.
PIECES = ("stream", "tokens_at_once", "decode_tile", "encode_tile")


class Worker:
    """Makes one job at a time; the model of the last stays loaded for the next, where there is room for it."""

    def __init__(self):
        self.say = Said(as_json=True)
        self._orders: SimpleQueue[Mapping[str, Any]] = SimpleQueue()
        self._job: Job | None = None
        self._id = ""
        self._pipe: WanPipeline | None = None
        self._key = ""  # the options that it was opened with
        self._kept = ExitStack()  # within it the model stays loaded
        self._keeps = False

    def hear(self, order: Mapping[str, Any]) -> None:
        """An order has come, in another thread."""
        if "stop" not in order:
            self._orders.put(order)
        elif order["stop"] == self._id:
            job = self._job
            soon = job is not None and job.stops_soon
            if job is not None and soon:
                job.stop()
            self.say.tell("stopping", soon=soon)

    def work(self) -> None:
        """Make what is ordered, until the process ends."""
        self.say.tell("ready")
        while True:
            try:
                order = self._orders.get(timeout=IDLE)
            except Empty:
                self._let_go()
                continue
            self._id = order["make"]
            self.say.tell("ended", **self._make(order))
            self._id, self._job = "", None

    def _make(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out an order; returns how it ended."""
        try:
            made = self._made(order["options"], Path(order["output"]), order.get("preview"))
            return {"state": "done", "suspect": made.complaint, "seconds": made.seconds}
        except Stopped as stopped:
            return {"state": "stopped", "error": stopped.why}
        except Exception as error:
            message, _ = explain(error)
            code = next((code for kind, code in CODES.items() if isinstance(error, kind)), "failed")
            code = "out_of_memory" if is_out_of_memory(error) else code
            # A GPU that has failed once may go on failing, and memory that ran out may stay so.
            return {"state": "failed", "error": message, "code": code, "is_spent": code in ("gpu", "out_of_memory")}

    def _made(self, given: Mapping[str, Any], output: Path, preview: str | None) -> Finished:
        """The file, made from the start or from where its run was cut."""
        watched = {"preview": preview} if preview else {}
        args = run_parser().parse_args(arguments({**given, **watched}))
        check_flags(args)
        pipe = self._opened(keywords(args, options.MODEL))
        request = request_from(pipe, args)
        try:
            (job,) = jobs_from(pipe, args, request, output)
        except ValueError:
            if not preview:
                raise
            args.preview = None  # no colours are known for its latents
            (job,) = jobs_from(pipe, args, request, output)
        extension = extension_of(args)
        if seed_of_made(pipe, request, output, extension=extension) is not None:  # cut when all was done
            finished = Finished(output)
            self.say(finished)
            return finished
        if extension and not RunFolder(output).is_unfinished:
            extend(extension, [job], self.say)
        self._keep_if_free(pipe, request)
        self._job = job
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return job.make(self.say, free_on_resume())
            except BusyError:  # the worker of a server that was killed just now is about to end
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    def _opened(self, model: dict[str, Any]) -> WanPipeline:
        """The model that these options open: the one that is there, if they are the same."""
        key = json.dumps(model, default=str, sort_keys=True)
        if self._pipe is None or key != self._key:
            self._let_go()
            self._pipe, self._key = open_model(model, self.say), key
        return self._pipe

    def _keep_if_free(self, pipe: WanPipeline, request: Request) -> None:
        """Let the model stay loaded after this video, if that makes the video neither slower nor other."""
        wanted = Wanted(pipe.preset.name, request, pipe.quantize, pipe.memory, pipe.vae_tiling, tiny_vae=pipe.tiny_vae)
        alone, kept = (plan_video(replace(wanted, kept=kept), pipe.sizes) for kept in (False, True))
        is_free = kept.fits and all(getattr(kept, name) == getattr(alone, name) for name in PIECES)
        if is_free and not self._keeps:
            self._kept.enter_context(pipe.keep_loaded())
        elif not is_free:
            self._kept.close()
        self._keeps = is_free

    def _let_go(self) -> None:
        self._kept.close()
        self._keeps = False
        self._pipe, self._key = None, ""


class Said(Terminal):
    """Says events, and what is no run's, from any thread, a line at a time."""

    _saying = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._saying:
            super().__call__(event)

    def tell(self, kind: str, **rest: Any) -> None:
        with self._saying:
            write(json.dumps({"event": kind, **rest}))


def main(words: list[str]) -> int:
    """Work in the library that is named."""
    (library,) = words
    os.chdir(library)
    with suppress(OSError):
        os.nice(10)  # whoever asks how far it is should not wait for it
    worker = Worker()
    follow(worker.hear)
    worker.work()
    return 0
