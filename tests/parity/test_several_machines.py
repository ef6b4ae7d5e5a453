"""Every task, made by two processes as by one: the same bytes, though only the first has sources and encoders."""

import sys

import machines
import numpy as np
import official_checkpoints as checkpoints
import pytest
from test_animate import prepared
from test_clips import speech
from test_resume_tasks import SOURCES, pictures

KINDS = [*SOURCES, "s2v", "animate"]
SCRIPT = "import sys; from wan_mlx.cli.main import main; sys.exit(main(sys.argv[1:]))"


def given(folder, models, kind: str) -> tuple[str, list[str]]:
    """A tiny model's folder, and what its task is given, of sources in ``folder``."""
    size = ["--size", "48x32", "--frames", "9"]
    if kind == "animate":
        prepared(folder, 8)
        return str(models(kind)[1]), ["--src_root_path", str(folder), "--frames", "5"]
    if kind == "s2v":
        made = speech(folder / "model")
        return str(folder / "model"), [word for name, value in made.items() for word in (f"--{name}", str(value))]
    pictures(folder)
    checkpoints.write_official_folder(folder / "model", checkpoints.networks(3, kind), kind)
    return str(folder / "model"), [*size, *SOURCES[kind]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_of_two_machines_is_that_of_one(tmp_path, monkeypatch, models, kind):
    (here := tmp_path / "here").mkdir()
    model, words = given(here, models, kind)
    monkeypatch.chdir(here)
    command = [sys.executable, "-c", SCRIPT, "--model", model, "--prompt", "a cat", "--steps", "2", "--seed", "1",
               "--dtype", "float32", "--quiet", *words, "--output"]  # fmt: skip
    modes = ("tokens", "cfg")[KINDS.index(kind) % 2]
    for size, name in ((1, "one.npz"), (2, "two.npz")):
        shared = [*command, name, "--parallel", modes]
        elsewhere = [*shared[:2], f"import os; os.chdir({str(tmp_path)!r}); {SCRIPT}", *shared[3:]]  # no sources there
        for code, _, error in machines.ended(machines.start(tmp_path, size, shared, {1: elsewhere})):
            assert code == 0, error
    with np.load("one.npz") as a, np.load("two.npz") as b:
        assert np.array_equal(a["frames"], b["frames"]) and np.array_equal(a["latents"], b["latents"])
