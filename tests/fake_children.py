"""Processes of the server's that are none: they say what a test has them say, at once, and die when it wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTINGS = {"width": 64, "height": 64, "num_frames": 5, "fps": 16, "seed": 7, "steps": 2, "strength": 1.0}


class FakeChild:
    """In the place of a `server.child.Child`; ``answer`` is called with each object that it is sent, and this."""

    def __init__(self, answer: Callable[[dict[str, Any], FakeChild], None], hear, gone):
        self.answer, self.say, self._gone, self.is_alive = answer, hear, gone, True
        self.sent: list[dict[str, Any]] = []

    def send(self, line: dict[str, Any]) -> None:
        self.sent.append(line)
        if self.is_alive:
            self.answer(line, self)

    def die(self, how: str = "signal 9") -> None:
        if self.is_alive:
            self.is_alive = False
            self._gone(how)

    kill = end = die


class Children:
    """Makes them: ``worker`` answers for workers, ``clerk`` for clerks; ``made`` has those that were."""

    def __init__(self, worker: Callable[[dict[str, Any], FakeChild], None], clerk=None):
        self.answers = {"worker": worker, "clerk": clerk or answer_plainly}
        self.made: list[FakeChild] = []

    def __call__(self, module: str, arguments: list[str], hear, gone) -> FakeChild:
        kind = module.rpartition(".")[2]
        child = FakeChild(lambda *said: self.answers[kind](*said), hear, gone)
        if kind == "worker":
            self.made.append(child)
            child.library = Path(arguments[0])
            child.say({"event": "ready"})
        return child


def answer_plainly(question: dict[str, Any], clerk: FakeChild) -> None:
    clerk.say({"answer": question["ask"], "value": {}})


def make(order: dict[str, Any], worker: FakeChild, steps: int = 2) -> None:
    """Make the video that is ordered, in no time."""
    if "make" in order:
        begin(order, worker, steps)
        finish(order, worker)


def begin(order: dict[str, Any], worker: FakeChild, steps: int = 2) -> None:
    worker.say({"event": "start", "output": order["output"], "settings": SETTINGS})
    worker.say({"event": "stage_started", "name": "denoise"})
    for index in range(steps):
        worker.say({"event": "step", "index": index, "total": 2, "seconds": 0.5, "sigma": 0.5, "forwards": 2})


def finish(order: dict[str, Any], worker: FakeChild) -> None:
    (worker.library / order["output"]).write_bytes(b"video of " + order["make"].encode())
    worker.say({"event": "stage", "name": "denoise", "seconds": 1.0, "peak_bytes": 5 << 20})
    worker.say({"event": "result", "output": str(worker.library / order["output"]), "seconds": 1.0,
                "complaint": None, "peak_gib": 0.0})  # fmt: skip
    worker.say({"event": "ended", "state": "done", "suspect": None, "seconds": 1.0})
