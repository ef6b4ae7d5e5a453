"""kill -9 before every file operation of a run, and at random moments of runs, converts and batches: no byte lost."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile import snapshot
from killed import KilledProcess

KILLED, USAGE, KILLS = -9, 2, 50


@pytest.fixture(scope="module")
def command(flags):
    return [*flags, "--no-prompt-cache", "--output", "out.npz"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command):
    """The file operations of an uninterrupted run, and its bytes."""
    folder = tmp_path_factory.mktemp("whole")
    return KilledProcess.operations(command, folder), (folder / "out.npz").read_bytes()


def go_on(command: list[str], folder: Path) -> list[str]:
    """The command that completes what was killed: what a user would type."""
    begun = (folder / "out.npz.wan" / "run.json").exists() or (folder / "out.npz").exists()
    return ["--resume", "out.npz", "--quiet"] if begun else command


@pytest.mark.slow
def test_kill_9_before_every_file_operation(tmp_path, command, whole):
    """Resumed after each, and killed once more while it resumes."""
    operations, data = whole
    chance = random.Random(9)
    for number in range(len(operations)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
        code, _, err = KilledProcess(command, folder, number).finish()
        assert code in (KILLED, 0), err  # a thread writes, so that the last few may not be reached
        code, _, err = KilledProcess(go_on(command, folder), folder, chance.randrange(30)).finish()
        assert code in (KILLED, 0), (operations[number], err)
        for _ in range(2):  # the second finds it done
            code, _, err = KilledProcess(go_on(command, folder), folder).finish()
            assert code == 0, (operations[number], err)
        assert (folder / "out.npz").read_bytes() == data, operations[number]
        assert sorted(os.listdir(folder)) == ["mine.txt", "out.npz"], operations[number]
        shutil.rmtree(folder)


def timed(arguments: list[str], folder: Path, kill_after: float | None = None) -> int:
    """Exit code of a command line that is killed after some seconds."""
    command = [sys.executable, "-m", "wan_mlx.generate", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@pytest.mark.slow
def test_kill_9_at_random_moments_of_runs_converts_and_batches(tmp_path, command, pico):
    still = [*command[:2], *command[4:-2], "--frames", "1"]
    jobs = {
        "run": lambda folder: go_on(command, folder),
        "batch": lambda folder: [*still, "--prompts", "b.jsonl"],
        "convert": lambda folder: ["convert", str(pico), "m", "--quantize", "q8"],
    }

    def new(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
        lines = [f'{{"prompt": "a {colour} square", "output": "{colour}.npz"}}' for colour in ("red", "blue")]
        (folder / "b.jsonl").write_text("\n".join(lines))
        return folder

    want, seconds = {}, {}
    for name, job in jobs.items():
        folder, started = new(name), time.monotonic()
        assert timed(job(folder), folder) == 0
        want[name], seconds[name] = snapshot(folder), time.monotonic() - started
    chance, kills = random.Random(KILLS), dict.fromkeys(jobs, 0)
    number = 0
    while sum(kills.values()) < KILLS:
        name, number = chance.choice(list(jobs)), number + 1
        folder = new(f"{name} {number}")
        while sum(kills.values()) < KILLS:
            # Half of them towards the end, where files get their names.
            after = chance.choice([chance.uniform(0.2, 1), chance.uniform(0.8, 1.05)]) * seconds[name]
            code = timed(jobs[name](folder), folder, after)
            kills[name] += code == KILLED
            if code != KILLED:
                break
        # A converted folder is there, whole, or it is not: then the same command is refused, or makes it.
        assert timed(jobs[name](folder), folder) in (0, USAGE if name == "convert" else 0)
        for hidden in folder.glob(".wan_mlx-*"):  # empty: killed just before it got its marker, or had lost it
            assert all(not path.stat().st_size for path in hidden.iterdir())
            shutil.rmtree(hidden)
        got = snapshot(folder)
        changing = {"b.report.jsonl"}  # says of each line whether it was made now or before
        assert {path: got.get(path) for path in want[name] if path not in changing} == {
            path: what for path, what in want[name].items() if path not in changing
        }, name
        assert got.keys() == want[name].keys(), name
        shutil.rmtree(folder)
    print(f"{kills}")
