"""``wan-mlx train``: what it says, what it refuses before anything is read, and what Python's `train` tells."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image
from test_training import SIZE, clips_of, data, picture, pipe  # noqa: F401

from wan_mlx import WanPipeline
from wan_mlx.cli import train as command
from wan_mlx.cli.main import main
from wan_mlx.errors import UsageError
from wan_mlx.geometry import WAN_2_1
from wan_mlx.planning.sizes import sizes_of
from wan_mlx.presets import PRESETS
from wan_mlx.training import Recipe, encoded, timing, train
from wan_mlx.training.dataset import DataSet
from wan_mlx.training.estimate import plan_training
from wan_mlx.training.loop import Training

SMALL = ["--size", "32x32", "--frames", "5", "--rank", "2", "--dtype", "float32"]


def run(*words):
    return main(["train", *map(str, words)])


@pytest.fixture
def nothing_is_opened(monkeypatch):
    def opened(*given, **options):
        raise AssertionError("the model was opened")

    monkeypatch.setattr(command.WanPipeline, "from_pretrained", opened)


@pytest.mark.parametrize(
    "words, said",
    [
        (["-m", "vace-1.3B"], "vace-1.3B is a vace model, whose LoRAs are not trained here; models for t2v, i2v"),
        (["-m", "t2v-1.3B", "--expert", "high"], "expert is 'high', but the model has one transformer; leave it out"),
        (["-m", "t2v-A14B", "--expert", "hihg"], "expert is 'hihg', expected one of both, high, low; nearest: high"),
        (["-m", "t2v-1.3B", "--preserve", "0.3"], "preserve is 0.3, which is of captions without the trigger"),
        (["-m", "t2v-1.3B", "--given-frame", "0.3"], "given frame is 0.3, which only TI2V is trained with"),
        (["-m", "i2v-14B-480P", "--sample-prompts", "p.txt"], "makes no video of a prompt alone"),
        (["--sample-prompts", "gone.txt"], "--sample-prompts gone.txt does not exist, expected a file"),
        (["--sample-prompts", "latin.txt"], "--sample-prompts latin.txt cannot be read: 'utf-8'"),
        (["--sample-prompts", "none.txt"], "--sample-prompts none.txt is empty, expected a prompt a line"),
        (["-o", "full"], "full exists and holds no training run, but mine.txt; give a new folder"),
        (["-o", "p.txt/x"], "p.txt is a file; give a new folder"),
        ([], "-o/--output is missing, as in wan-mlx train clips -o zorb"),
    ],
)
def test_what_cannot_be_is_told_before_the_model_is_opened(
    words, said, data, tmp_path, capsys, monkeypatch, nothing_is_opened  # noqa: F811
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert run(data, *(["-o", "x"] if words and "-o" not in words else []), *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    if "-m" in words:
        assert run(data, *words, "--dry-run") == 2


def test_a_folder_that_may_not_be_written_to_is_told(data, tmp_path, capsys, monkeypatch, nothing_is_opened):  # noqa: F811
    monkeypatch.setattr(command.os, "access", lambda *given: False)
    assert run(data, "-o", tmp_path / "x") == 2
    assert f"{tmp_path} may not be written to; give a folder elsewhere" in capsys.readouterr().err


def test_a_plan_needs_no_output_and_a_hub_s_name_no_network(data, capsys, monkeypatch, nothing_is_opened):  # noqa: F811
    monkeypatch.setattr(timing, "_step", lambda *given: 1.0)  # of a real block takes seconds
    words = [data, "-m", "Wan-AI/Wan2.1-T2V-1.3B", "--size", "480p", "--frames", "5", "--memory", "24GB"]
    assert run(*words, "--plan") == 0
    said = capsys.readouterr().out
    assert "3 clips to train, 0 held out: 1 of" in said and "(while the clips are encoded; then " in said


def test_two_experts_take_twice_the_time(data, capsys, monkeypatch, nothing_is_opened):  # noqa: F811
    monkeypatch.setattr(command, "with_seconds", lambda plan, *given: replace(plan, seconds=36.0))
    words = [data, "-m", "t2v-A14B", "--size", "480p", "--frames", "5", "--memory", "64GB", "--steps", "100", "--plan"]
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "100 steps for each of 2 LoRAs" in said and "2 h 0 min in all" in said
    assert run(*words, "--expert", "low") == 0
    said = capsys.readouterr().out
    assert "100 steps\n" in said and "1 h 0 min in all" in said


def test_a_plan_counts_what_encoding_the_clips_needs(data):  # noqa: F811
    """Of a streamed model more than a step; in tiles where memory asks for it."""
    nets, recipe, (clip, *_) = sizes_of(PRESETS["t2v-1.3B"], "bfloat16"), Recipe(), clips_of(data)
    large = [replace(clip, width=832, height=480)]
    plan = plan_training(nets, large, recipe, 16 << 30)
    assert plan.encode_tile is None and plan.peak == plan.encoding > plan.steps
    plan = plan_training(nets, large, recipe, 3 << 30)
    assert plan.encode_tile and plan.stream and plan.steps < plan.peak == plan.encoding <= 3 << 30
    assert not plan_training(nets, large, recipe, 1 << 30).fits


def test_clips_are_encoded_in_the_plan_s_tiles(pipe, data, tmp_path, monkeypatch):  # noqa: F811
    asked = []
    encode_videos = pipe.encode_videos

    def encoded(videos):
        asked.append(pipe.tile_of("encode_tile"))
        return encode_videos(videos)

    monkeypatch.setattr(pipe, "encode_videos", encoded)
    before = pipe.vae_tiling
    training = Training(pipe, clips_of(data), Recipe(rank=2, steps=1), tmp_path / "style")
    training.encode_tile = (16, 24)
    list(training.run())
    assert asked == [(16, 24)] * 3 and pipe.vae_tiling == before


class TestNotes:
    def test_what_a_folder_holds_beside_is_told(self, data, tmp_path):  # noqa: F811
        picture(tmp_path / "a.png", 9)
        (tmp_path / "b.heic").write_bytes(b"")
        (tmp_path / "more").mkdir()
        notes = DataSet.open(tmp_path).notes
        assert notes == ["not taken: b.heic is no picture, video or caption that is known",
                         "not taken: more is a folder"]  # fmt: skip
        (tmp_path / "a.png").unlink()
        with pytest.raises(UsageError, match=r"holds no picture and no video \(not taken: b.heic"):
            DataSet.open(tmp_path)

    def test_a_missing_caption_is_named_as_it_should_be(self, tmp_path):
        Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
        (tmp_path / "set.toml").write_text('[[datasets]]\nimage_directory = "."\ncaption_extension = ".caption"\n')
        found = DataSet.open(tmp_path / "set.toml")
        found.clips(WAN_2_1, 16, SIZE, 5)
        assert "no caption: a.png has no text beside it (a.caption)" in found.notes

    def test_the_trigger_is_looked_for_as_a_word(self, tmp_path):
        picture(tmp_path / "a.png", 9)
        (tmp_path / "a.txt").write_text("a cart")
        found = DataSet.open(tmp_path)
        (clip,) = found.clips(WAN_2_1, 16, SIZE, 5, "art")
        assert clip.caption == "art, a cart"
        assert "trigger: art is put in front of 1 of 1 captions" in found.notes

    def test_most_of_a_video_left_out_is_told(self, tmp_path):
        picture(tmp_path / "a.webp", 9, frames=12)
        found = DataSet.open(tmp_path)
        found.clips(WAN_2_1, 16, SIZE, 5)
        assert any(note.startswith("long: of a.webp the first 5 of 12 frames are trained") for note in found.notes)
        found = DataSet.open(tmp_path)
        found.clips(WAN_2_1, 16, SIZE, 9)
        assert not any(note.startswith("long") for note in found.notes)

    def test_many_alike_are_counted(self, pico, tmp_path, capsys):
        for number in range(9):
            Image.new("RGB", (32, 32)).save(tmp_path / f"{number}.png")
        assert run(tmp_path, "-m", pico, "-o", tmp_path / "x" / "z", *SMALL, "--steps", "1") == 0
        said = capsys.readouterr().out
        assert said.count("note: no caption: ") == 6 and "no caption: 4 more; --dry-run names them all" in said
        assert run(tmp_path, "-m", pico, *SMALL, "--dry-run") == 0
        assert capsys.readouterr().out.count("note: no caption: ") == 9

    def test_python_tells_them_and_how_far_it_is(self, pipe, data, tmp_path, caplog, monkeypatch):  # noqa: F811
        heard = []
        monkeypatch.setattr(pipe, "listener", heard.append)
        train(data, pipe, tmp_path / "z", size=SIZE, frames=5, rank=2, steps=2)
        assert any(record.message.startswith("few: 3 clips") for record in caplog.records)
        kinds = [(event.kind, getattr(event, "done", None)) for event in heard if event.kind != "load"]
        assert kinds[-5:] == [("progress", 1), ("eta", None), ("progress", 2), ("eta", None), ("stage", None)]


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(size="64x64"), r"size is '64x64', expected \(width, height\) in pixels, such as \("),
        (dict(frames="5"), "frames is '5', expected a whole number"),
        (dict(validate="10%"), "validate is '10%', expected a share from 0 to below 1, such as 0.1"),
        (dict(rnak=3), "a training has no option 'rnak'; nearest: rank"),
        (dict(sample_prompts=["a cat", " "]), r"sample_prompts is \['a cat', ' '\], expected prompts"),
    ],
)
def test_a_wrong_argument_of_python_s_is_named(given, words, pipe, data, tmp_path):  # noqa: F811
    with pytest.raises((UsageError, TypeError), match=words):
        train(data, pipe, tmp_path / "z", **{"size": SIZE, "frames": 5, **given})
    assert not (tmp_path / "z").exists()


def test_one_sample_prompt_is_one(pipe, data, tmp_path, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr(Training, "_show", lambda self, *given: asked.append(self.sample_prompts))
    train(data, pipe, tmp_path / "z", size=SIZE, frames=5, rank=2, steps=1, sample_prompts="a cat")
    assert asked == [["a cat"]]


def test_a_stop_before_the_first_step_says_how_to_go_on(pico, data, tmp_path, capsys, monkeypatch):  # noqa: F811
    def stopped(training, resume=False):
        signal.raise_signal(signal.SIGTERM)
        yield

    monkeypatch.setattr(Training, "run", stopped)
    assert run(data, "-m", pico, "-o", tmp_path / "z", *SMALL) == 143
    assert "interrupted; to go on: the same command with --resume" in capsys.readouterr().err


def test_lines_come_now_and_then_with_the_mean_of_the_losses(pico, data, tmp_path, capsys, monkeypatch):  # noqa: F811
    words = [data, "-m", pico, *SMALL, "--steps", "6", "--save-every", "5"]
    assert run(*words, "-o", tmp_path / "z") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1", "5", "6"] and "(mean of 4)" in lines[1]
    monkeypatch.setattr(command, "LINE_EVERY", 0.0)
    assert run(*words, "-o", tmp_path / "y") == 0
    assert capsys.readouterr().out.count("\nstep ") == 6


def test_a_terminal_shows_a_bar_with_the_time_left(pico, data, tmp_path):  # noqa: F811
    ours, theirs = pty.openpty()
    words = ["train", data, "-m", pico, "-o", tmp_path / "z", *SMALL, "--steps", "8"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-m", "wan_mlx.generate", *map(str, words)], env=environment,
                               stdin=theirs, stdout=theirs, stderr=theirs)  # fmt: skip
    os.close(theirs)
    said = b""
    while process.poll() is None or select.select([ours], [], [], 0.2)[0]:
        try:
            said += os.read(ours, 1 << 16) if select.select([ours], [], [], 0.2)[0] else b""
        except OSError:
            break
    os.close(ours)
    assert process.wait() == 0, said
    text = said.decode()
    assert "training" in text and " of 8" in text and " left" in text
    assert text.rstrip().endswith("z.safetensors") or "use it with --lora" in text.replace("\r\n", "")


def test_a_video_takes_the_folder_of_a_training(pico, data, tmp_path, flags):  # noqa: F811
    assert run(data, "-m", pico, "-o", tmp_path / "z", *SMALL, "--steps", "1", "--lr", "1e-2", "--warmup", "0") == 0
    assert main([*flags, "--lora", str(tmp_path / "z"), "-o", str(tmp_path / "a.mp4")]) == 0


def test_the_hash_of_the_data_is_of_what_files_hold(pipe, data, tmp_path):  # noqa: F811
    shutil.copytree(data, tmp_path / "data")
    Image.new("RGB", (32, 32), (1, 2, 3)).save(tmp_path / "data" / "d.bmp")

    def begun(**options):
        return Training(pipe, clips_of(tmp_path / "data"), Recipe(rank=2, steps=1), tmp_path / "z").run(**options)

    list(begun())
    Image.new("RGB", (32, 32), (3, 2, 1)).save(tmp_path / "data" / "d.bmp")  # of the same size
    with pytest.raises(UsageError, match="was begun otherwise: the clips are others: a file, a caption, --size"):
        next(begun(resume=True))


def test_another_base_does_not_go_on(pipe, data, tmp_path, monkeypatch):  # noqa: F811
    """Other weights of the same kind, or other LoRAs."""
    asked = dict(size=SIZE, frames=5, rank=2, warmup=0, learning_rate=1e-2, schedule="constant")
    found = train(data, pipe, tmp_path / "one", steps=1, **asked)
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="otherwise: the base is another one: the tra"):
        patch.setattr(pipe, "loras", [(found, 1.0)])
        train(data, pipe, tmp_path / "one", steps=2, resume=True, **asked)
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="otherwise: the base is another one: the tra"):
        patch.setattr("wan_mlx.training.loop.fingerprint", lambda path: {"sha256": f"{path}"})
        training = Training(pipe, clips_of(data), Recipe(rank=2, steps=2), tmp_path / "one")
        told = json.loads((tmp_path / "one" / "recipe.json").read_text())
        (tmp_path / "one" / "recipe.json").write_text(json.dumps({**told, "recipe": training.recipe.as_json(),
                                                                  "data": training._data}))  # fmt: skip
        next(training.run(resume=True))


def test_conditions_are_of_their_image_encoder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(encoded, "fingerprint", lambda path: asked.append(path))
    pipe = WanPipeline.from_pretrained("nano-i2v", progress=False)  # noqa: F811
    encoded.Encoded(pipe, tmp_path)
    assert pipe.checkpoint.part("image_encoder").file in asked
