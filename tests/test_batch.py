"""Many requests from one file: strict about every line, the model loaded once, and going on where it was cut."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from paused_process import PausedProcess
from PIL import Image

from wan_mlx.cli import batch
from wan_mlx.cli.main import main
from wan_mlx.cli.terminal import Terminal
from wan_mlx.errors import WanError
from wan_mlx.media.write import read_settings
from wan_mlx.runs.folder import RunFolder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(flags):
    """The flags of every line, and the file."""
    flags = [*flags[:2], *flags[4:], "--no-prompt-cache", "--prompts", "batch.jsonl"]
    return [*flags, "--frames", "1", "--steps", "1"]


def write(*lines) -> None:
    with open("batch.jsonl", "w", encoding="utf-8") as file:
        for line in lines:
            file.write((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n")


def report(name: str = "batch.report.jsonl") -> list[dict]:
    with open(name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"prompt": "a"', ["no JSON"]),
        ("[1]", ["JSON list", "an object"]),
        ({"promt": "a"}, ["'promt'", "nearest: prompt"]),
        ({"prompt": "a", "framess": 5}, ["'framess'", "nearest: frames"]),
        ({"prompt": "a", "quiet": True}, ["unknown key 'quiet'"]),
        ({"prompt": "a", "frames": 6}, ["frames is 6", "nearest: 5"]),
        ({"prompt": "a", "frames": "many"}, ["--frames", "many"]),
        ({"prompt": "a", "steps": True}, ["'steps' is true", "a value"]),
        ({"prompt": "a", "t5_cpu": 3}, ["'t5_cpu' is 3", "true or false"]),
        ({"prompt": "a", "solver": "unipcc"}, ["unipcc"]),
        ({"prompt": "a", "output": "a.avi"}, [".avi", ".mp4"]),
        ({"prompt": "a", "output": "first.npz"}, ["first.npz", "line 1"]),
        ({"prompt": "a", "output": "taken.npz"}, ["taken.npz exists"]),
        ({"prompt": "a", "image": "b.png"}, ["image was given to a t2v model"]),
        ({"prompt": "a", "num_images": 2, "seed": -1}, ["num_images without a seed"]),
        ({"prompt": "a", "num_images": 2, "seed": 1, "frames": 5}, ["num_images is 2", "5 frames are a video"]),
        ({"steps": 3}, ["--prompt is missing"]),
        ('{"prompt": "a", "prompt": "b"}', ["'prompt' is given twice"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"prompt": ' + "[" * 5000 + "]" * 5000 + "}", ["nested too deeply"]),
        ({"prompt": "a", "output": "sub/../first.npz"}, ["first.npz", "line 1"]),
        ({"prompt": "a", "output": "link/first.npz"}, ["first.npz", "line 1"]),
        ({"prompt": "a", "num_images": 10**9, "seed": 1}, ["num_images is 1000000000"]),
        ({"prompt": "a", "lora": "none.safetensors"}, ["none.safetensors"]),
        ({"prompt": "a", "output": "a\0.npz"}, ["null byte"]),
    ],
)
def test_a_wrong_line_is_named_before_anything_runs(command, capsys, line, says):
    with open("taken.npz", "wb") as file:
        file.write(b"mine")
    os.mkdir("sub")
    os.symlink(".", "link")
    write({"prompt": "fine", "output": "first.npz"}, "", line)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: batch.jsonl line 3: ") and len(error.splitlines()) == 1, error
    assert all(word in error for word in says), error
    assert sorted(os.listdir()) == ["batch.jsonl", "link", "sub", "taken.npz"]


NO_REPORTS = {"thesis.txt": "mine", "list.jsonl": "[1]\n", "deep.jsonl": "[" * 100_000, "other.jsonl": '{"line": 1}\n'}


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    "name", ["batch.jsonl", "sub/../batch.jsonl", "folder", "dangling", "none/r.jsonl", *NO_REPORTS]
)
def test_a_report_replaces_nothing_but_a_report(command, capsys, name, dry):
    write({"prompt": "fine", "output": "first.npz"})
    for folder in ("folder", "sub"):
        os.mkdir(folder)
    os.symlink("nowhere", "dangling")
    for taken, text in NO_REPORTS.items():
        Path(taken).write_text(text)
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert main([*command, "--report", name, *dry]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: report {name}") and len(error.splitlines()) == 1, error
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before
    assert not os.path.exists("nowhere")


def test_the_default_report_replaces_nothing_either(command, capsys):
    write({"prompt": "fine", "output": "first.npz"})
    Path("batch.report.jsonl").write_text("mine")
    assert main(command) == 2 and "batch.report.jsonl exists and is no report" in capsys.readouterr().err
    assert Path("batch.report.jsonl").read_text() == "mine" and not os.path.exists("first.npz")


@pytest.mark.parametrize("name", ["sub/../first.npz", "first.npz.wan", "seen.webp", "seen.png"])
def test_a_report_is_not_where_a_line_writes(command, capsys, name):
    os.mkdir("sub")
    write({"prompt": "fine", "output": "first.npz", "preview": "seen.webp"})
    assert main([*command, "--report", name]) == 2
    assert "which line 1 makes" in capsys.readouterr().err and sorted(os.listdir()) == ["batch.jsonl", "sub"]


def test_a_report_cut_short_is_a_report(command):
    write({"prompt": "fine", "output": "first.npz"})
    assert main([*command, "--report", os.devnull]) == 0  # nothing is lost there
    os.unlink("first.npz")
    Path("batch.report.jsonl").write_text('{"line": 1, "status": "done", "output": "a", "seed": 1}\n{"line": 2, "sta')
    assert main(command) == 0 and [entry["status"] for entry in report()] == ["done"]


def test_what_a_line_starts_from_or_shows_is_not_what_another_makes(command, capsys):
    Image.new("RGB", (32, 32)).save("a.png")
    write({"prompt": "a", "output": "b.webp"}, {"prompt": "b", "video": "./a.png"}, {"prompt": "c", "output": "a.png"})
    before = Path("a.png").read_bytes()
    assert main([*command, "--overwrite"]) == 2
    assert capsys.readouterr().err == "error: batch.jsonl line 2: a.png is also the output of line 3\n"
    assert Path("a.png").read_bytes() == before
    write({"prompt": "a", "output": "b.webp"}, {"prompt": "b", "preview": "b.webp", "output": "c.npz"})
    assert main(command) == 2 and "line 2: b.webp is also the output of line 1" in capsys.readouterr().err


def test_a_line_may_hold_what_other_systems_take_for_its_end(command, capsys):
    write({"prompt": "a\u2028b\u0085c", "output": "first.npz"})
    assert main([*command, "--dry-run"]) == 0 and "line 1: first.npz: a" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_report_that_cannot_be_written_is_one_line(command):
    write({"prompt": "fine", "output": "first.npz"})
    (line,) = batch.read_lines(Path("batch.jsonl"), command, False, Terminal())
    with open("/dev/full", "wb", 0) as full, pytest.raises(WanError, match="report cannot be written: .*No space"):
        batch.Report(full, 1).add(line, "done")


def test_wrong_command(command, capsys):
    for extra, says in ((["--prompt", "x"], "--prompt does not go"), (["--resume", "x"], "the same command again")):
        assert main([*command, *extra]) == 2
        assert says in capsys.readouterr().err
    assert main(command) == 2 and "does not exist" in capsys.readouterr().err
    write("", " ")
    assert main(command) == 2 and "holds no request" in capsys.readouterr().err


def test_requests_are_those_of_single_commands(command, flags, capsys, monkeypatch):
    """One load of each network, and one pass over the text encoder, for all of them."""
    from wan_mlx import opened

    write(
        {"prompt": "一只猫", "output": "a.npz"},
        {"prompt": "b", "negative-prompt": "c", "base_seed": 4, "sample_steps": 2, "save_file": "b.npz"},
        {"prompt": "-d", "size": [32, 16], "cfg-zero": True, "steps": 4, "shift": None},
    )
    loads = []
    with monkeypatch.context() as patch:
        for name in ("load_transformer", "load_vae", "load_text_encoder"):
            load = getattr(opened, name)
            patch.setattr(opened, name, lambda *a, load=load, **k: loads.append(load.__name__) or load(*a, **k))
        assert main([*command, "--report", "r.jsonl"]) == 0
    assert sorted(loads) == ["load_text_encoder", "load_transformer", "load_vae"]
    assert capsys.readouterr().out.split() == ["a.npz", "b.npz", "batch_0003.png"]
    assert [(entry["line"], entry["status"], entry["seed"]) for entry in report("r.jsonl")] == [
        (1, "done", 3), (2, "done", 4), (3, "done", 3)
    ]  # fmt: skip
    single = [*flags[:2], *flags[4:], "--frames", "1"]
    assert main([*single, "--prompt", "b", "--negative-prompt", "c", "--seed", "4", "--steps", "2", "--output",
                 "alone.npz"]) == 0  # fmt: skip
    with np.load("alone.npz") as alone, np.load("b.npz") as batch:
        assert np.array_equal(alone["latents"], batch["latents"])
    assert sorted(os.listdir()) == ["a.npz", "alone.npz", "b.npz", "batch.jsonl", "batch_0003.png", "r.jsonl"]


def test_several_stills_of_a_line(command, capsys):
    write({"prompt": "a cat", "seed": 5, "num_images": 2, "output": "cat.png"}, {"prompt": "b", "output": "b.png"})
    assert main(command) == 0
    assert [(entry["output"], entry["line"]) for entry in report()] == [
        ("cat_seed5.png", 1), ("cat_seed6.png", 1), ("b.png", 2)
    ]  # fmt: skip
    assert [read_settings(f"cat_seed{seed}.png")["seed"] for seed in (5, 6)] == [5, 6]
    assert main(command) == 0  # all are there
    assert [entry["status"] for entry in report()] == ["skipped"] * 3


def test_one_failure_does_not_stop_the_others(command, capsys, monkeypatch):
    from wan_mlx import denoise

    velocity, count = denoise.guided_velocity, iter(range(9))

    def failing(*args):
        if next(count) == 0:
            raise RuntimeError("the first one fails")
        return velocity(*args)

    write({"prompt": "a", "output": "a.npz"}, {"prompt": "b", "output": "b.npz"})
    with monkeypatch.context() as patch:
        patch.setattr(denoise, "guided_velocity", failing)
        assert main(command) == 1
    first, second = report()
    assert first["status"] == "failed" and "the first one fails" in first["error"] and second["status"] == "done"
    assert "\nerror: line 1: RuntimeError: the first one fails" in capsys.readouterr().err  # though --quiet
    assert sorted(os.listdir()) == ["b.npz", "batch.jsonl", "batch.report.jsonl"]
    # Again: what is complete is left alone, even its time of change, and the other is made.
    before = os.stat("b.npz").st_mtime_ns
    assert main(command) == 0
    assert [entry["status"] for entry in report()] == ["skipped", "done"] and os.stat("b.npz").st_mtime_ns == before
    # A line that asks for something else now does not lose what is there.
    write({"prompt": "another", "output": "a.npz"})
    assert main(command) == 2 and "a.npz exists" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0 and [entry["status"] for entry in report()] == ["done"]


def test_a_drawn_seed_is_no_difference(command):
    command = [*command, "--seed", "-1"]
    write({"prompt": "a", "output": "a.npz"})
    assert main(command) == 0
    seed = report()[0]["seed"]
    assert main(command) == 0
    assert [(entry["status"], entry["seed"]) for entry in report()] == [("skipped", seed)]


def test_another_source_of_the_same_name_is_another_video(command, capsys):
    for folder, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        os.mkdir(folder)
        Image.new("RGB", (32, 32), colour).save(f"{folder}/x.png")
    line = {"prompt": "a", "output": "a.npz", "seed": 1, "strength": 1}
    write({**line, "video": "red/x.png"})
    assert main(command) == 0 and main(command) == 0
    assert [entry["status"] for entry in report()] == ["skipped"]
    write({**line, "video": "blue/x.png"})
    assert main(command) == 2 and "a.npz exists" in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_same_command_goes_on(command, how):
    command = [*command, "--steps", "2"]
    write(*({"prompt": name, "output": f"{name}.npz"} for name in "ab"))
    assert main(command) == 0
    want = [Path(f"{name}.npz").read_bytes() for name in "ab"]
    for name in "ab":
        os.unlink(f"{name}.npz")
    paused = PausedProcess("step", 3, *command)
    paused.process.send_signal(how)
    if how == signal.SIGINT:
        paused.wait_for("Ctrl-C again")
        paused.go_on()
    code, errors = paused.finish()
    if how == signal.SIGINT:
        assert code == 130 and errors.strip().splitlines()[-1] == "interrupted; go on with the same command"
        assert [entry["status"] for entry in report()] == ["done", "interrupted"]
    with RunFolder("b.npz") as folder:
        weights = folder.record()["weights"]
        folder.amend(weights={})  # others now
    assert main(command) == 1 and "not the file that the run was begun with" in report()[1]["error"]
    with RunFolder("b.npz") as folder:
        folder.amend(weights=weights)
    assert main(command) == 0
    assert [entry["status"] for entry in report()] == ["skipped", "done"]
    assert [Path(f"{name}.npz").read_bytes() for name in "ab"] == want
    assert not os.path.exists("b.npz.wan")
