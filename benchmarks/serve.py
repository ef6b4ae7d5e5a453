"""``python benchmarks/serve.py kills|clients``: what the server bears.

kills: a queue of three, the server killed (kill -9) at 20 random moments; every video must have the bytes of an
undisturbed run. clients: 50 clients ask for a video's status once a second, and 10 listen to its events, while nano
runs: how much slower the run is, in turns with runs that nobody asks for, and how long an answer takes.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from served import Served

KILLS, CLIENTS, LISTENERS, TURNS = 20, 50, 10, 4
LONG = {"num_frames": 17, "steps": 10, "dtype": "float32"}  # half a minute on two cores
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
    """Prints seconds of runs with clients and without, in turns, and percentiles of the answers' times."""
    fields = {"prompt": "a red circle moves right", "seed": 1, **LONG}
    with Served(folder) as server:
        print(f"usable after {server.seconds:.2f} s")
        server.until(server.ask(**fields), "done", seconds=600)
        alone, asked, arrived, read = [], [], [], []
        for turn in range(2 * TURNS):
            id = server.ask(**fields)
            crowd = crowd_of(server.address, id) if turn % 2 else None
            # Asked for rarely, so that the measuring itself is no client.
            while server.video(id)["state"] != "done":
                time.sleep(1)
            (asked if crowd else alone).append(server.video(id)["inference_time_s"])
            if crowd:
                told = json.loads(crowd.communicate()[0])
                arrived, read = arrived + told["arrived"], read + told["read"]
                print(f"{asked[-1]} s with {len(told['arrived'])} answers, {told['events']} events heard", flush=True)
            else:
                print(f"{alone[-1]} s alone", flush=True)
    slower = [100 * (one / other - 1) for one, other in zip(asked, alone, strict=True)]
    print(f"alone {alone} s, median {median(alone):.1f}; with {CLIENTS} clients and {LISTENERS} listeners {asked} s, "
          f"median {median(asked):.1f}: {100 * (median(asked) / median(alone) - 1):+.1f} %; by pairs "
          f"{', '.join(f'{one:+.1f}' for one in slower)} %, median {median(slower):+.1f} %")  # fmt: skip
    for name, times in (("arrived", sorted(arrived)), ("read by the client", sorted(read))):
        p50, p99 = (1000 * times[int(part * len(times))] for part in (0.5, 0.99))
        print(f"{len(times)} answers {name}: median {p50:.1f} ms, p99 {p99:.1f} ms, longest {1000 * times[-1]:.1f} ms")
    return 0


def crowd_of(address: str, id: str) -> subprocess.Popen[bytes]:
    """Clients and listeners of a video, at work until their standard input ends."""
    words = [sys.executable, str(Path(__file__).parent / "crowd.py"), address, id, str(CLIENTS), str(LISTENERS)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def main() -> int:
    what = {"kills": kills, "clients": clients}[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        return what(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
