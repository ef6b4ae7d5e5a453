"""Trainings in several processes, killed ones, of experts, and with the settings that keep what a model knew."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from killed import KilledProcess
from PIL import Image
from test_training import RECIPE, clips_of, data, picture, pipe, trained  # noqa: F401
from two_experts import pair  # noqa: F401

from wan_mlx import WanPipeline
from wan_mlx.cli.main import main
from wan_mlx.errors import UsageError, WanError
from wan_mlx.files.safetensors import load_arrays
from wan_mlx.geometry import WAN_2_1
from wan_mlx.models.execution import Execution
from wan_mlx.presets import Sampling
from wan_mlx.storage import locked
from wan_mlx.training import Training, TrainingError, encoded, train
from wan_mlx.training.backward import loss_and_gradients
from wan_mlx.training.batches import Batches, with_word
from wan_mlx.training.dataset import DataSet
from wan_mlx.training.encoded import Encoded
from wan_mlx.training.recipe import Recipe
from wan_mlx.weights.load import load_transformer

KILLED = -9
SETTINGS = ["--size", "32x32", "--frames", "5", "--rank", "2", "--dtype", "float32", "--lr", "1e-2", "--warmup", "0",
            "--quiet", "--seed", "3"]  # fmt: skip


def arrays_of(path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in load_arrays(path)[0].items()}


@pytest.fixture(scope="module")
def command(pico, data):  # noqa: F811
    return ["train", str(data), "--model", str(pico), "-o", "style", *SETTINGS, "--steps", "3", "--save-every", "1",
            "--validate", "30%", "--resume"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return KilledProcess.operations(command, folder), bytes_in(folder)


def bytes_in(folder: Path) -> bytes:
    return (folder / "style" / "style.safetensors").read_bytes()


@pytest.fixture(scope="module")
def experts(pair):  # noqa: F811
    return WanPipeline.from_pretrained(pair, dtype="float32", progress=False, prompt_cache=False)


class TestKills:
    """kill -9 at any place: the same command with --resume ends with the bytes of a run that nothing disturbed."""

    def killed_often(self, command, folder: Path, numbers) -> None:
        for number in numbers:
            code, _, err = KilledProcess(command, folder, number).finish()
            assert code in (KILLED, 0), err
        code, _, err = KilledProcess(command, folder).finish()
        assert code == 0, err
        assert not list(folder.rglob(".wan_mlx-*"))

    def test_a_kill_while_the_second_state_is_written(self, command, whole, tmp_path):
        operations, data = whole  # noqa: F811
        states = [i for i, (_, name) in enumerate(operations) if name == "step-0000002.safetensors"]
        self.killed_often(command, tmp_path, [states[0]])
        assert bytes_in(tmp_path) == data
        rows = [json.loads(line) for line in (tmp_path / "style" / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1, 2, 3]

    @pytest.mark.slow
    def test_ten_kills_over_one_training(self, command, whole, tmp_path):
        operations, data = whole  # noqa: F811
        chance = random.Random(24)
        self.killed_often(command, tmp_path, [chance.randrange(8, len(operations)) for _ in range(10)])
        assert bytes_in(tmp_path) == data

    @pytest.mark.slow
    def test_a_kill_before_every_fourth_file_operation(self, command, whole, tmp_path):
        operations, data = whole  # noqa: F811
        for number in range(0, len(operations), 4):
            (tmp_path / str(number)).mkdir()
            self.killed_often(command, tmp_path / str(number), [number])
            assert bytes_in(tmp_path / str(number)) == data, operations[number]


class TestRanks:
    """Processes of one training, as ``mlx.launch`` starts them."""

    def launched(self, folder: Path, words: list[str]) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        launcher = Path(sys.executable).with_name("mlx.launch")
        port = 20_000 + os.getpid() % 10_000  # another test process may launch at the same time
        return subprocess.run(
            [launcher, "-n", "2", "--backend", "ring", "--starting-port", str(port), sys.executable,
             "-m", "wan_mlx.generate", *words],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    def test_two_that_share_a_folder_learn_what_one_does_of_both_their_clips(self, pico, data, tmp_path):  # noqa: F811
        words = ["train", str(data), "--model", str(pico), *SETTINGS, "--batch", "1", "--accumulate", "2",
                 "--validate", "30%", "--schedule", "constant"]  # fmt: skip
        done = self.launched(tmp_path, [*words, "-o", "two", "--steps", "2"])
        assert done.stdout.count("two.safetensors") == 1, (done.stdout, done.stderr)  # the first process alone speaks
        done = self.launched(tmp_path, [*words, "-o", "two", "--steps", "3", "--resume"])
        assert done.stdout.count("two.safetensors") == 1, done.stderr
        assert main([*words, "-o", str(tmp_path / "one"), "--steps", "3"]) == 0
        one, two = (arrays_of(tmp_path / name / f"{name}.safetensors") for name in ("one", "two"))
        for name, array in one.items():
            assert np.abs(two[name] - array).max() <= 1e-5 * np.abs(array).max(), name
        logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
        for mine, theirs in zip(*[[json.loads(line) for line in log] for log in logs], strict=True):
            assert mine["step"] == theirs["step"]
            assert mine.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-4)

    def test_all_end_when_the_first_fails(self, pico, data, tmp_path):  # noqa: F811
        (tmp_path / "two").mkdir()
        words = ["train", str(data), "--model", str(pico), *SETTINGS, "--accumulate", "2", "-o", "two", "--steps", "2"]
        ports = [20_000 + 2 * (os.getpid() % 10_000) + rank for rank in (0, 1)]
        (tmp_path / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        # By themselves, since mlx.launch ends the second when the first has ended.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                       "MLX_HOSTFILE": str(tmp_path / "hosts.json")}  # fmt: skip
        with locked(tmp_path / "two"):
            both = [
                subprocess.Popen([sys.executable, "-m", "wan_mlx.generate", *words], cwd=tmp_path, text=True,
                                 env={**environment, "MLX_RANK": str(rank)}, stderr=subprocess.PIPE)
                for rank in (0, 1)
            ]  # fmt: skip
            said = [one.communicate(timeout=120)[1] for one in both]
        assert "another process trains in two; wait until it ends" in said[0]
        assert "another process of this training failed" in said[1]


class TestExperts:
    def test_each_gets_a_lora_over_the_levels_that_it_serves(self, pair, data, tmp_path, capsys, monkeypatch):  # noqa: F811
        levels: dict[str, list[float]] = {"high": [], "low": []}
        of_step = Batches.of_step

        def heard(batches, *given):
            samples, names = of_step(batches, *given)
            levels["high" if batches.levels[1] == 1 else "low"] += [one.timestep for one in samples]
            return samples, names

        monkeypatch.setattr(Batches, "of_step", heard)
        words = [data, "-m", pair, "-o", tmp_path / "two", *SETTINGS[:-3], "--steps", "8", "--batch", "2"]
        assert main(["train", *map(str, words)]) == 0
        assert len(levels["high"]) == len(levels["low"]) == 16
        assert min(levels["high"]) >= 800 > max(levels["low"])
        files = {side: tmp_path / "two" / side / f"two-{side}.safetensors" for side in ("high", "low")}
        said = capsys.readouterr().out
        assert f"use it with --lora-high {files['high']} --lora-low {files['low']}" in said
        assert WanPipeline.from_pretrained(pair, progress=False, loras=files)
        high, low = map(arrays_of, files.values())
        assert any((high[name] != low[name]).any() for name in high)

    def test_ctrl_c_in_the_first_s_last_step_does_not_begin_the_second(self, pair, data, tmp_path, capsys, monkeypatch):  # noqa: F811
        run = Training.run

        def stopped(training, resume=False):
            for step in run(training, resume):
                if step.step == 2 and training.expert == "high":
                    signal.raise_signal(signal.SIGINT)
                yield step

        words = ["train", str(data), "-m", str(pair), "-o", str(tmp_path / "two"), *SETTINGS[:-3], "--steps", "2"]
        with monkeypatch.context() as patch:
            patch.setattr(Training, "run", stopped)
            assert main(words) == 130
        assert "stopped; to go on: the same command with --resume" in capsys.readouterr().out
        assert not (tmp_path / "two" / "low").exists()
        assert main([*words, "--resume"]) == 0
        assert (tmp_path / "two" / "low" / "two-low.safetensors").exists()

    def test_both_may_be_trained_at_once(self, experts, data, tmp_path):  # noqa: F811
        """What one writes to the cache of both is not taken for left behind."""
        (tmp_path / "one" / "cache").mkdir(parents=True)
        half = tmp_path / "one" / "cache" / ".wan_mlx-1.safetensors"
        half.write_bytes(b"half")
        train(data, experts, tmp_path / "one", expert="low", size=(32, 32), frames=5, rank=2, steps=1, warmup=0)
        assert half.exists()

    def test_one_alone_by_name(self, experts, data, tmp_path):  # noqa: F811
        options = dict(size=(32, 32), frames=5, rank=2, steps=1, warmup=0)
        found = train(data, experts, tmp_path / "one", expert="low", **options)
        assert found == {"low": tmp_path / "one" / "low" / "one-low.safetensors"} and found["low"].exists()
        with pytest.raises(UsageError, match="expert is 'hihg', expected one of both, high, low; nearest: high"):
            train(data, experts, tmp_path / "x", expert="hihg", **options)

    def test_a_sample_video_has_the_expert_in_training(self, experts, data, tmp_path, monkeypatch):  # noqa: F811
        asked = {}

        class Made:
            def save(self, path):
                asked["path"] = path

        def call(self, prompt, **how):
            asked.update(high=[one.loras for one in self.checkpoint.of_kind("transformer")][0], loras=self.loras)
            return Made()

        monkeypatch.setattr(WanPipeline, "__call__", call)
        found = train(data, experts, tmp_path / "one", expert="high", size=(32, 32), frames=5, rank=2, steps=1,
                      warmup=0, sample_prompts=["a square"])  # fmt: skip
        assert asked["high"] == ((found["high"], 1.0),) and not asked["loras"]
        assert not experts.checkpoint.of_kind("transformer")[0].loras

    def test_a_model_of_one_has_none(self, pipe, data, tmp_path):  # noqa: F811
        with pytest.raises(UsageError, match="expert is 'high', but the model has one transformer"):
            train(data, pipe, tmp_path / "x", expert="high", size=(32, 32), frames=5)


def batches_of(pipe, data, folder, recipe, **options):  # noqa: F811
    encoded = Encoded(pipe, folder)
    made = Batches(encoded, recipe, clips_of(data), [], "square", **options)
    encoded.prepare(made.clips, made.captions())
    return made


class TestWhatStays:
    def test_clips_that_are_preserved_have_the_models_own_answer(self, pipe, data, tmp_path):  # noqa: F811
        """Without the trigger, before anything is learned, nothing is left to learn."""
        training, _ = trained(pipe, data, tmp_path / "style", Recipe(rank=2, steps=1, batch=2))
        recipe = Recipe(batch=4, preserve=0.5, caption_dropout=0.0)
        model = Execution(load_transformer(pipe.checkpoint, "float32"))
        batches = batches_of(pipe, data, tmp_path / "cache", recipe)
        samples, _ = batches.of_step(3)
        kept = recipe.preserved(3)
        assert sum(kept) == 2
        losses, _ = loss_and_gradients(model, {}, samples, 1.0)
        assert [value < 1e-9 for value in losses] == kept

    def test_the_trigger_is_left_out_as_a_word(self):
        assert with_word("zorb, a cat", "zorb", "") == "a cat"
        assert with_word("a Zorb circle on zorbs", "zorb", "") == "a circle on zorbs"
        assert with_word("zorb，一个zorb圆形", "zorb", "") == "一个圆形"

    def test_other_words_stand_in_its_place(self, pipe, data, tmp_path):  # noqa: F811
        assert with_word("zorb, a cat", "zorb", "red") == "red, a cat"
        recipe = Recipe(batch=4, preserve=0.5, preserve_words="red, blue,", caption_dropout=0.0)
        assert {recipe.word(step, 1) for step in range(20)} == {"red", "blue", ""}
        batches = batches_of(pipe, data, tmp_path / "cache", recipe)
        assert {"a red of 10", "a blue of 10", "a of 10", "a square of 10"} <= set(batches.captions())
        asked = []
        batches.encoded.text = lambda caption, text=batches.encoded.text: asked.append(caption) or text(caption)
        batches.of_step(3)
        want = [recipe.word(3, number) if kept else "square" for number, kept in enumerate(recipe.preserved(3))]
        assert [caption.removeprefix("a ").partition("of")[0].strip() for caption in asked] == want

    def test_it_needs_a_trigger(self, pipe, data, tmp_path):  # noqa: F811
        with pytest.raises(UsageError, match="preserve is 0.5, which is of captions without the trigger"):
            Training(pipe, clips_of(data), Recipe(preserve=0.5), tmp_path / "style")

    def test_the_share_is_kept_to(self):
        recipe = Recipe(batch=3, preserve=0.4)
        assert sum(sum(recipe.preserved(step)) for step in range(100)) in (119, 120, 121)


class TestGivenFrame:
    def test_a_given_first_frame_is_clean_and_has_no_loss(self, pipe, data, tmp_path):  # noqa: F811
        recipe = Recipe(batch=3, given_frame=1.0)
        batches = batches_of(pipe, data, tmp_path / "cache", recipe, may_be_given=True)
        samples, names = batches.of_step(0)
        clips = {clip.path.name: batches.encoded.clip(clip)[0] for clip in batches.clips}
        for sample, name in zip(samples, names, strict=True):
            first = np.array(sample.latents[:, :1])
            is_video = sample.latents.shape[1] > 1
            assert (first == np.array(clips[name][:, :1])).all() == is_video == ("clean_frames" in sample.conditions)

    @pytest.mark.parametrize("share", [0.0, 0.5])
    def test_the_share_of_clips(self, share, pipe, data, tmp_path):  # noqa: F811
        recipe = Recipe(batch=60, given_frame=share)
        batches = batches_of(pipe, data, tmp_path / "cache", recipe, may_be_given=True)
        samples, _ = batches.of_step(0)
        videos = [sample for sample in samples if sample.latents.shape[1] > 1]
        given = sum("clean_frames" in sample.conditions for sample in videos) / len(videos)
        assert len(videos) == 20 and abs(given - share) <= 0.25


class TestBadInput:
    def test_a_validation_that_is_not_finite_ends_it(self, pipe, data, tmp_path, monkeypatch):  # noqa: F811
        training = Training(pipe, clips_of(data), RECIPE, tmp_path / "style", clips_of(data)[:1])
        with pytest.raises(TrainingError, match="the loss of a.png, held out, is not finite after step 2; no state"):
            for step in training.run():
                if step.step == 1:
                    monkeypatch.setattr("wan_mlx.training.loop.loss", lambda *a: [0.1, float("nan"), 0.1])
        assert not (tmp_path / "style" / "state").exists()

    def test_a_loss_that_is_not_finite_names_the_state_that_is_whole(self, pipe, data, tmp_path, monkeypatch):  # noqa: F811
        def wild(*given):
            losses, gradients = loss_and_gradients(*given)
            return [float("nan") for _ in losses], gradients

        training = Training(pipe, clips_of(data), RECIPE, tmp_path / "style")
        with pytest.raises(TrainingError, match=r"the loss is not finite at step 4 .*; the state of step 2 is whole"):
            for step in training.run():
                if step.step == 3:
                    monkeypatch.setattr("wan_mlx.training.loop.loss_and_gradients", wild)
        assert [path.name for path in (tmp_path / "style" / "state").iterdir()] == ["step-0000002.safetensors"]

    def test_what_a_kill_left_half_written_is_removed(self, pipe, data, tmp_path):  # noqa: F811
        trained(pipe, data, tmp_path / "style", until=2)
        left = [tmp_path / "style" / name for name in (".wan_mlx-0.json", "state/.wan_mlx-1.safetensors",
                                                        "cache/.wan_mlx-2.safetensors")]  # fmt: skip
        for path in left:
            path.write_bytes(b"half")
        trained(pipe, data, tmp_path / "style", resume=True)
        assert not [path for path in left if path.exists()]

    def test_a_run_killed_before_its_first_state_starts_over(self, pipe, data, tmp_path):  # noqa: F811
        whole, _ = trained(pipe, data, tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "style", ignore=shutil.ignore_patterns("state", "whole.*"))
        training, steps = trained(pipe, data, tmp_path / "style", resume=True)
        assert [step.step for step in steps] == [1, 2, 3, 4]
        assert arrays_of(training.path).keys() == arrays_of(whole.path).keys()
        for name, array in arrays_of(whole.path).items():
            assert (arrays_of(training.path)[name] == array).all()

    def test_a_lora_that_changed_nothing_is_refused(self, pipe, data, tmp_path, monkeypatch):  # noqa: F811
        monkeypatch.setattr("wan_mlx.training.loop.loss_and_gradients", lambda model, factors, samples, scale: (
            [0.1] * len(samples), {name: mx.zeros_like(array) for name, array in factors.items()}))  # fmt: skip
        with pytest.raises(TrainingError, match="the LoRA changes nothing: its factors are still zero"):
            trained(pipe, data, tmp_path / "style", Recipe(rank=2, steps=1, weight_decay=0.0))

    def test_a_rate_too_small_to_change_a_weight_is_refused(self, pipe, data, tmp_path):  # noqa: F811
        with pytest.raises(TrainingError, match="the LoRA changes nothing: its factors are still zero, to 1e-09"):
            trained(pipe, data, tmp_path / "style", Recipe(rank=2, steps=1, learning_rate=1e-12, warmup=0))

    def test_no_room_on_disk_is_one_line_and_what_was_kept_is_whole(self, pipe, data, tmp_path, monkeypatch):  # noqa: F811
        trained(pipe, data, tmp_path / "style", until=2)
        kept = {path: path.read_bytes() for path in (tmp_path / "style" / "state").iterdir()}

        def full(*given):
            raise OSError(28, "No space left on device")

        with (
            monkeypatch.context() as patch,
            pytest.raises(WanError, match=r"cannot be written .*No space left.* GB free"),
        ):
            patch.setattr("wan_mlx.training.states.mx.save_safetensors", full)
            trained(pipe, data, tmp_path / "style", resume=True)
        assert {path: path.read_bytes() for path in (tmp_path / "style" / "state").iterdir()} == kept
        training, _ = trained(pipe, data, tmp_path / "style", resume=True)
        assert training.path.exists()

    def test_a_video_without_frames_and_a_picture_of_one_pixel_are_told(self, data, tmp_path):  # noqa: F811
        shutil.copytree(data, tmp_path / "data")
        (tmp_path / "data" / "cut.mp4").write_bytes((b"\0\0\0\x18ftypmp42") * 3)
        Image.new("RGB", (1, 1)).save(tmp_path / "data" / "dot.png")
        found = DataSet.open(tmp_path / "data")
        clips = found.clips(WAN_2_1, 16, (32, 32), 5)
        said = "\n".join(found.notes)
        assert "left out: " in said and "cut.mp4" in said and "small: dot.png has 1x1" in said
        assert "no caption: dot.png" in said and "dot.png" in {clip.path.name for clip in clips}

    def test_a_bucket_of_one_clip_is_told(self, tmp_path):
        from wan_mlx.geometry import WAN_2_1

        for number in range(8):
            picture(tmp_path / f"{number}.png", number)
        picture(tmp_path / "wide.png", 9, size=(160, 32))
        found = DataSet.open(tmp_path)
        found.clips(WAN_2_1, 16, (32, 32), 5)
        assert any(note.startswith("alone: one clip has") for note in found.notes)


def test_a_trigger_is_a_word_that_is_known(pipe, data, tmp_path, monkeypatch):  # noqa: F811
    found = train(data, pipe, tmp_path / "zorb", size=(32, 32), frames=5, rank=2, steps=1, warmup=0, trigger="zorb")
    nano = WanPipeline.from_pretrained("nano", progress=False)
    assert "does not know zorb, blub" in nano.unknown_words(nano.request("a Zorb circle, blub".lower()))[0]
    monkeypatch.setattr(nano, "loras", [(found, 1.0)])
    assert "does not know blub" in nano.unknown_words(nano.request("a zorb circle, blub"))[0]
    assert not nano.unknown_words(nano.request("a Zorb circle"))


def test_sample_prompts_and_callback_from_python(pipe, data, tmp_path, monkeypatch):  # noqa: F811
    heard, small = [], replace(pipe.preset, size=(32, 32), num_frames=5, sampling=Sampling(2, 3.0, 1.0))
    monkeypatch.setattr(pipe, "preset", small)  # of the sample

    def callback(step):
        heard.append(step.step)
        return step.step < 2

    found = train(data, pipe, tmp_path / "style", size=(32, 32), frames=5, rank=2, steps=5, warmup=0, save_every=5,
                  sample_every=2, sample_prompts=["a square"], callback=callback)  # fmt: skip
    assert heard == [1, 2] and found.name == "style-000002.safetensors"
    assert [path.name for path in (tmp_path / "style" / "samples").iterdir()] == ["step-000002-1.mp4"]


def test_the_image_encoder_is_loaded_once_for_all_clips(data, tmp_path, monkeypatch):  # noqa: F811
    loaded, real = [], encoded.load_image_encoder
    monkeypatch.setattr(encoded, "load_image_encoder", lambda *given: loaded.append(1) or real(*given))
    pipe = WanPipeline.from_pretrained("nano-i2v", dtype="float32", progress=False, prompt_cache=False)  # noqa: F811
    made = Encoded(pipe, tmp_path / "cache")
    made.prepare(clips_of(data), [""])
    first, second = (made.clip(clip)[1] for clip in clips_of(data)[:2])
    assert loaded == [1] and (first["image_features"] != second["image_features"]).any()
