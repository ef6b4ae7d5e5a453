"""The foreman: has the queue's jobs made, one after the other, by a worker that may die at any moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import Any

from ..errors import WanError
from ..runs.queue import DONE, FAILED, PAUSED, STOPPED, Queue, Queued
from .child import Child

WORKER = "wan_mlx.server.worker"
OFTEN = 0.2  # seconds between two looks at what is asked of the queue
MOST_DEATHS = 3  # of the worker at one job, without a step between them
ENDED = {"pause": PAUSED, "stop": STOPPED, "delete": STOPPED}  # a wish → the state of a job that has heard it
Told = Callable[[str, Mapping[str, Any]], Any]  # of a job's id, or "" of the worker, and an event


class Foreman:
    """A thread that takes the queue's jobs and has them made.

    Args:
        queue: whose jobs they are.
        told: called with each event, in threads of this one's.
        make_child: starts a worker; of tests.
        until_empty: end when nothing waits any more.

    Attributes:
        state, message: of the worker: idle, starting, working or died, and how it died.
        death: how the last one died at the job that is at work.
        restarts: how often one had to be started in the place of one that died.
        live: id → what the events of a job have told so far.
    """

    def __init__(
        self, queue: Queue, told: Told, make_child: Callable[..., Child] = Child, until_empty: bool = False
    ):
        self.queue, self._told, self._make_child, self.until_empty = queue, told, make_child, until_empty
        self.state, self.restarts = "idle", 0
        self.message: str | None = None
        self.death: str | None = None
        self.live: dict[str, dict[str, Any]] = {}
        self._worker: Child | None = None
        self._heard: SimpleQueue[Any] = SimpleQueue()
        self._deaths: dict[str, list[int]] = {}  # id → the step that each death was at
        self._asked, self._ending = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="wan_mlx-foreman", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def look(self) -> None:
        """Something was asked of the queue: have a look at once."""
        self._asked.set()

    def end(self) -> None:
        """End the worker and the thread; a job that runs goes on the next time."""
        self._ending.set()
        self._asked.set()
        self._thread.join()

    def join(self) -> None:
        """Wait until nothing is left to do."""
        self._thread.join()

    # The thread

    def _work(self) -> None:
        try:
            while not self._ending.is_set():
                try:
                    with self.queue.working():
                        self._take_jobs()
                    return
                except WanError as error:  # another process works, or the queue's disk is full, or away for now
                    if self.until_empty:
                        raise
                    self._end_worker()
                    self._say("waiting", str(error))
                self._ending.wait(OFTEN * 5)
        except Exception as error:
            self.error = error
            self._say("died", str(error))
        finally:
            if self._worker is not None:
                self._worker.end()

    def _take_jobs(self) -> None:
        self._say("idle")
        while not self._ending.is_set():
            job = self.queue.take(self.accepts)
            if job is not None:
                self._tell_state(job.id)
                self._make(job)
                continue
            if self.until_empty and self._is_over():
                return
            self._asked.wait(OFTEN)
            self._asked.clear()

    def accepts(self, job: Queued) -> bool:
        """Whether a job that waits is for this worker."""
        return True

    def _is_over(self) -> bool:
        """Whether nothing is left, where no more is waited for."""
        return True

    def _make(self, job: Queued) -> None:
        """Have a job made, as far as that goes."""
        if self._worker is None or not self._worker.is_alive:
            self._start_worker()
        assert self._worker is not None
        self._say("working")
        self.live[job.id] = {"stage": "waiting for the worker"}
        watch = Watch(job)
        self._worker.send(self._order(job))
        told_wish = ""
        while not self._ending.is_set():
            try:
                line = self._heard.get(timeout=OFTEN)
            except Empty:
                line = {}
            if isinstance(line, str):
                return self._died(watch, line)
            if line.get("event") == "ended":
                return self._ended(watch, line)
            if line.get("event") == "stopping" and not line["soon"]:
                return self._cut(watch, told_wish)
            if line and line["event"] not in ("ready", "stopping"):
                watch.hear(line)
                self.live[job.id] = watch.live
                if line["event"] == "result":
                    watch.last = line
                else:
                    self._told(job.id, line)
            wish = self._wish(job.id)
            if wish != told_wish and wish:
                if wish == "delete":
                    return self._cut(watch, wish)
                told_wish = wish
                self._worker.send({"stop": job.id})

    def _order(self, job: Queued) -> dict[str, Any]:
        """What the worker is told to make."""
        order = {"make": job.id, "options": job.options, "output": job.output}
        preview = self.queue.folder / "previews"
        if preview.is_dir():
            order["preview"] = str(preview.relative_to(self.queue.library) / f"{job.id}.webp")
        return order

    def _wish(self, id: str) -> str:
        try:
            return self.queue.get(id).wish
        except KeyError:
            return "delete"

    def _start_worker(self) -> None:
        self._say("starting")
        self._heard = SimpleQueue()  # the last one's words are over
        self._worker = self._child()

    def _child(self) -> Child:
        return self._make_child(WORKER, [str(self.queue.library)], self._heard.put, self._heard.put)

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _cut(self, watch: Watch, wish: str) -> None:
        """The worker would not hear of a wish soon: it is ended, which loses a step at most."""
        self._end_worker()
        self._close(watch, ENDED[wish], {})

    def _ended(self, watch: Watch, line: Mapping[str, Any]) -> None:
        """The worker has said how a job ended."""
        if line.get("is_spent"):
            self._end_worker()
        changes: dict[str, Any] = {}
        if line["state"] == "done":
            state, changes = DONE, {"suspect": line.get("suspect"), "error": None, "code": None}
        elif line["state"] == "stopped":
            wish = self._wish(watch.job.id)
            if not wish and line["error"] == "interrupted":  # to go on, after all
                return self.queue.put_back(watch.job.id)
            state = ENDED.get(wish, STOPPED)
            changes = {"error": line["error"]} if line["error"] != "interrupted" else {}
        else:
            state, changes = FAILED, {"error": line["error"], "code": line["code"]}
            watch.last = {"event": "error", "message": line["error"], "code": 1}
        self._close(watch, state, changes)

    def _close(self, watch: Watch, state: str, changes: dict[str, Any]) -> None:
        """A job is over, or paused."""
        job, id = watch.job, watch.job.id
        self._deaths.pop(id, None)
        self.death = None
        if state == STOPPED:
            changes = {"code": "stopped", **changes}
        about = {**job.about, **{name: watch.live[name] for name in KEPT if watch.live.get(name) is not None}}
        try:
            wish = self.queue.get(id).wish
            self.queue.end(id, state, about=about, **watch.spent(), **changes)
            if wish == "delete":
                self.queue.delete(id)
        except KeyError:
            wish = "delete"
        if wish == "delete":
            self._told(id, {"event": "deleted", "id": id, "output": job.output})
            self.live.pop(id, None)
        else:
            self._tell_state(id)
            if watch.last is not None:
                self._told(id, watch.last)
        self._say("idle")

    def _died(self, watch: Watch, how: str) -> None:
        """The worker has died: the job goes on with another one, unless that does not help."""
        self._worker = None
        id, deaths = watch.job.id, self._deaths.setdefault(watch.job.id, [])
        wish = self._wish(id)
        deaths.append(watch.live.get("step") or 0)
        self.restarts += 1
        self.death = f"the worker ended ({how}); another one goes on from the last step"
        self._say("died", self.death)
        if wish:
            return self._close(watch, ENDED[wish], {})
        if deaths[-MOST_DEATHS:] == [deaths[-1]] * MOST_DEATHS:
            said = (f"the process that makes it ended {MOST_DEATHS} times after step {deaths[-1]} ({how}); resume it "
                    "to try once more")  # fmt: skip
            watch.last = {"event": "error", "message": said, "code": 1}
            return self._close(watch, FAILED, {"error": said, "code": "worker_died"})
        self.queue.note(id, **watch.spent())
        self.queue.put_back(id)
        self._tell_state(id)

    def _say(self, state: str, message: str | None = None) -> None:
        if (state, message) != (self.state, self.message):
            self.state, self.message = state, message
            self._told("", {"event": "worker", **self.worker})

    @property
    def worker(self) -> dict[str, Any]:
        """The worker's state, as the API shows it."""
        return {"state": self.state, "message": self.message, "death": self.death, "restarts": self.restarts}

    def _tell_state(self, id: str) -> None:
        try:
            self._told(id, {"event": "state", "state": self.queue.get(id).state})
        except KeyError:
            pass


KEPT = ("model", "size", "num_frames", "fps", "model_fps", "steps", "seed", "step")  # of what events tell, with the job


class Watch:
    """What the events of one go of a job tell.

    Attributes:
        live: stage, step, steps, eta_seconds, active_bytes; size, frames and seed, once they are known.
        last: the last event, which is told when the queue knows of the end, too.
    """

    def __init__(self, job: Queued):
        self.job = job
        self.live: dict[str, Any] = {"stage": None}
        self.last: Mapping[str, Any] | None = None
        self._peak, self._seconds = job.peak, 0.0
        self._steps: list[float] = []

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take note of an event of ``wan-mlx --json``."""
        kind, live = event["event"], dict(self.live)
        if kind == "start":
            settings = event["settings"]
            live |= {name: settings.get(name) for name in ("num_frames", "fps", "model_fps", "seed")}
            live["size"] = [settings.get("width"), settings.get("height")]
            live["steps"] = round((settings.get("strength") or 1) * settings["steps"])
        elif kind == "stage_started":
            live["stage"] = event["name"]
        elif kind == "stage":
            self._peak, self._seconds = max(self._peak, event["peak_bytes"]), self._seconds + event["seconds"]
        elif kind == "download":
            live["stage"] = "download"
            live["downloaded"], live["to_download"] = event["bytes"], event["total"]
        elif kind == "step":
            live["step"], live["steps"] = event["index"] + 1, event["total"]
            if event["seconds"]:
                self._steps.append(event["seconds"])
        elif kind == "eta":
            live["eta_seconds"], live["active_bytes"] = event["seconds"], event["active_bytes"]
            self._peak = max(self._peak, event["peak_bytes"])
        elif kind == "frames":
            live["decoded"] = event["done"] / event["total"]
        self.live = live

    def spent(self) -> dict[str, Any]:
        """Time and memory of the job, this go and those before."""
        found = {"seconds": self.job.seconds + self._seconds, "peak": self._peak}
        steps = self._steps[1:] or self._steps  # the first compiles kernels
        return {**found, "step_seconds": sum(steps) / len(steps)} if steps else found
