"""``python benchmarks/serve.py kills|clients``: what the server bears.

kills: a queue of three, the server killed (kill -9) at 20 random moments; every video must have the bytes of an
undisturbed run. clients: 50 clients ask for a video's status once a second, and 10 listen to its events, while nano
runs: how much slower the run is, in turns with runs that nobody asks for, and how long an answer takes.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from served import Served

KILLS, CLIENTS, LISTENERS, TURNS = 20, 50, 10, 2
TINY = {"size": "32x32", "num_frames": 5, "steps": 4, "dtype": "float32"}
ASKED = [{"prompt": "a red circle", "seed": 1, **TINY}, {"prompt": "a blue square", "seed": 2, **TINY},
         {"prompt": "it moves", "seed": 3, **TINY, "model": "nano-i2v"}]  # fmt: skip


def undisturbed(folder: Path, sources: list[dict]) -> list[bytes]:
    """The bytes of the videos, made without a kill."""
    with Served(folder) as server:
        ids = [server.ask(**fields, **more) for fields, more in zip(ASKED, sources, strict=True)]
        return [server.client.get(f"/v1/videos/{server.until(id, 'done')['id']}/content").content for id in ids]


def kills(folder: Path) -> int:
    """Prints how often each video went on; 1 if a byte differs."""
    first = Path(__file__).parent.parent / "examples/sources/first.png"
    for library in (folder / "plain", folder / "killed"):
        library.mkdir()
        (library / "first.png").write_bytes(first.read_bytes())
    sources = [{}, {}, {"image": "library:first.png"}]
    begun = time.monotonic()
    expected = undisturbed(folder / "plain", sources)
    whole, drawn, rounds, dead, resumed = time.monotonic() - begun, random.Random(), 0, 0, 0
    print(f"undisturbed: {whole:.0f} s")
    while dead < KILLS:
        rounds += 1
        server = Served(folder / "killed")
        ids = [server.ask(**fields, **more) for fields, more in zip(ASKED, sources, strict=True)]
        while True:
            end = time.monotonic() + drawn.uniform(0, whole / 4)
            while time.monotonic() < end and server.video(ids[-1])["state"] != "done":
                time.sleep(0.05)
            if server.video(ids[-1])["state"] == "done":
                break
            server.end()
            dead += 1
            server = Served(folder / "killed")
        for id, content in zip(ids, expected, strict=True):
            video = server.until(id, "done")
            resumed += video["resumed"]
            if server.client.get(f"/v1/videos/{id}/content").content != content:
                print(f"round {rounds}, {dead} kills: {video['prompt']} differs: {video}")
                return 1
        server.end()
        print(f"round {rounds}: {dead} kills so far, bytes equal")
    print(f"{dead} kills in {rounds} rounds of three videos, jobs went on {resumed} times: every byte is equal")
    return 0


def clients(folder: Path) -> int:
    """Prints seconds of runs with clients and without, and percentiles of the answers' times."""
    fields = {"prompt": "a red circle moves right", "seed": 1, "dtype": "float32"}
    with Served(folder) as server:
        print(f"usable after {server.seconds:.2f} s")
        server.until(server.ask(**fields), "done", seconds=600)
        alone, asked, times = [], [], []
        for turn in range(2 * TURNS):
            crowd = Crowd(server.address) if turn % 2 else None
            id = server.ask(**fields)
            if crowd:
                crowd.start(id)
            # Asked for rarely, so that the measuring itself is no client.
            while server.video(id)["state"] != "done":
                time.sleep(1)
            (asked if crowd else alone).append(server.video(id)["inference_time_s"])
            if crowd:
                times += crowd.end()
                print(f"{crowd.events} events heard by {LISTENERS}")
    ordered = sorted(times)
    print(f"alone {alone} s, median {median(alone):.1f}; with {CLIENTS} clients {asked} s, median {median(asked):.1f}: "
          f"{100 * (median(asked) / median(alone) - 1):+.1f} %")  # fmt: skip
    print(f"{len(ordered)} answers: median {1000 * median(ordered):.1f} ms, "
          f"p99 {1000 * ordered[int(0.99 * len(ordered))]:.1f} ms, longest {1000 * ordered[-1]:.1f} ms")  # fmt: skip
    return 0


class Crowd:
    """Clients that ask once a second, and listeners to the events."""

    def __init__(self, address: str):
        self.address, self.over = address, threading.Event()
        self.times: list[float] = []
        self.events = 0
        self.threads: list[threading.Thread] = []

    def start(self, id: str) -> None:
        for number in range(CLIENTS):
            self.threads.append(threading.Thread(target=self._poll, args=(id, number / CLIENTS)))
        for _ in range(LISTENERS):
            self.threads.append(threading.Thread(target=self._listen, args=(id,)))
        for thread in self.threads:
            thread.start()

    def _poll(self, id: str, late: float) -> None:
        time.sleep(late)
        with httpx.Client(base_url=self.address, timeout=30) as client:
            client.get("/health")
            while not self.over.is_set():
                begun = time.perf_counter()
                client.get(f"/v1/videos/{id}").raise_for_status()
                self.times.append(time.perf_counter() - begun)
                self.over.wait(max(0, 1 - (time.perf_counter() - begun)))

    def _listen(self, id: str) -> None:
        with httpx.Client(base_url=self.address, timeout=60) as client:
            with client.stream("GET", f"/v1/videos/{id}/events") as answer:
                for line in answer.iter_lines():
                    self.events += line.startswith("data:")

    def end(self) -> list[float]:
        self.over.set()
        for thread in self.threads:
            thread.join()
        return self.times


def main() -> int:
    what = {"kills": kills, "clients": clients}[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        return what(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
