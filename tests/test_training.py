"""A LoRA in training: data sets, chance, states, the file, and the command line."""

import json
import shutil
import signal
from contextlib import ExitStack

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from wan_mlx import WanPipeline, opened
from wan_mlx.cli.main import main
from wan_mlx.cli.train import _Stoppable
from wan_mlx.errors import UsageError
from wan_mlx.geometry import WAN_2_1
from wan_mlx.models.execution import Execution
from wan_mlx.presets import PRESETS
from wan_mlx.storage import locked
from wan_mlx.training import clips_of as training_clips
from wan_mlx.training import timing
from wan_mlx.training.backward import Sample, loss
from wan_mlx.training.dataset import DataSet
from wan_mlx.training.factors import of_block, placed
from wan_mlx.training.loop import Training, TrainingError
from wan_mlx.training.recipe import Recipe
from wan_mlx.weights.load import load_transformer

RECIPE = Recipe(rank=2, steps=4, learning_rate=1e-2, warmup=0, batch=2, save_every=2, caption_dropout=0.3, dropout=0.2)
SIZE, FRAMES = (32, 32), 5


def picture(path, colour, size=(40, 32), frames=1):
    images = [Image.new("RGB", size, (min(255, colour + 9 * i), 30, 200)) for i in range(frames)]
    images[0].save(path, save_all=frames > 1, append_images=images[1:], duration=62, loop=0)
    path.with_suffix(".txt").write_text(f"a square of {colour}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two pictures and a video of nine frames, each with a caption."""
    folder = tmp_path_factory.mktemp("data")
    picture(folder / "a.png", 10)
    picture(folder / "b.png", 90, (32, 48))
    picture(folder / "c.webp", 170, frames=9)
    return folder


@pytest.fixture(scope="module")
def pipe(pico):
    return WanPipeline.from_pretrained(pico, dtype="float32", progress=False, prompt_cache=False)


def clips_of(folder, **options):
    return DataSet.open(folder).clips(WAN_2_1, 16, SIZE, FRAMES, **options)


def trained(pipe, data, folder, recipe=RECIPE, resume=False, until=None):
    training = Training(pipe, clips_of(data), recipe, folder, clips_of(data)[:1])
    steps = []
    for step in training.run(resume):
        steps.append(step)
        if step.step == until:
            training.stop()
    return training, steps


@pytest.fixture(scope="module")
def straight(pipe, data, tmp_path_factory):
    """A run that nothing interrupted."""
    return trained(pipe, data, tmp_path_factory.mktemp("straight") / "style")


class TestDataSet:
    def test_clips_keep_proportions_in_whole_tokens_and_have_allowed_lengths(self, data):
        sizes = [(clip.path.name, clip.width, clip.height, len(clip.frames)) for clip in clips_of(data)]
        assert sizes == [("a.png", 32, 32, 1), ("b.png", 32, 32, 1), ("c.webp", 32, 32, 5)]
        assert [frame.shape for frame in clips_of(data)[2].read()] == [(32, 32, 3)] * 5

    def test_a_trigger_is_put_in_front_of_captions_that_lack_it(self, data):
        assert clips_of(data, trigger="zorb")[0].caption == "zorb, a square of 10"
        assert clips_of(data, trigger="square")[0].caption == "a square of 10"

    def test_what_is_poor_is_told(self, data, tmp_path):
        shutil.copy(data / "a.png", tmp_path)
        (tmp_path / "bad.png").write_bytes(b"none")
        found = DataSet.open(tmp_path)
        found.clips(WAN_2_1, 16, (320, 320), FRAMES)
        said = "\n".join(found.notes)
        for words in ("no caption: a.png", "left out: ", "bad.png", "small: a.png has 40x32", "few: 1 clip"):
            assert words in said

    def test_a_toml_has_musubis_terms(self, data, tmp_path):
        (tmp_path / "set.toml").write_text(
            f'[general]\nresolution = [32, 32]\nnum_repeats = 3\n[[datasets]]\nvideo_directory = "{data}"\n'
            'target_frames = [1, 5]\nframe_extraction = "uniform"\nframe_sample = 2\nbatch_size = 2\n'
        )
        (shutil.copy(data / "c.webp", tmp_path / "c.gif"), shutil.copy(data / "c.txt", tmp_path))
        text = (tmp_path / "set.toml").read_text().replace(str(data), ".")
        (tmp_path / "set.toml").write_text(text)
        found = DataSet.open(tmp_path / "set.toml")
        clips = found.clips(WAN_2_1, 16, (64, 64), 81)
        assert [(clip.frames[0], len(clip.frames), clip.repeats) for clip in clips] == [
            (0, 1, 3),
            (8, 1, 3),
            (0, 5, 3),
            (4, 5, 3),
        ]
        assert any("batch_size" in note for note in found.notes)

    @pytest.mark.parametrize(
        "line, words",
        [
            ('image_dir = "."', "image_dir is no key that is read; nearest: image_directory"),
            (
                'image_directory = "."\nvideo_directory = "."',
                "names image_directory and video_directory, expected one of",
            ),
            ('image_directory = "gone"', "gone: no such folder"),
            ('video_directory = "."\nframe_extraction = "heads"', "frame_extraction is 'heads', expected one of head"),
            ('image_directory = "."\nresolution = "big"', "resolution is 'big', expected [width, height]"),
            ('video_directory = "."\ntarget_frames = 33', "target_frames is 33, expected lengths such as [1, 33]"),
            ('image_directory = "."\nnum_repeats = 0', "num_repeats is 0, expected a whole number from 1 on"),
            ('image_directory = "."\nsource_fps = "16"', "source_fps is '16', expected frames per second"),
            ('image_directory = "."\ncaption_extension = "txt"', "caption_extension is 'txt', expected one such as"),
            ('image_jsonl_file = "set.jsonl"', "line 2: expected an object with image_path or video_path, and caption"),
        ],
    )
    def test_a_wrong_line_is_named(self, line, words, tmp_path):
        (tmp_path / "set.toml").write_text(f"[[datasets]]\n{line}\n")
        (tmp_path / "set.jsonl").write_text('{"image_path": "a.png", "caption": "a\u2028b"}\n{"image_path": 3}\n')
        with pytest.raises(UsageError) as refused:
            DataSet.open(tmp_path / "set.toml")
        assert words in str(refused.value)


    def test_a_resolution_without_buckets_is_one_of_the_model(self, data, tmp_path):
        (tmp_path / "set.toml").write_text(f'[[datasets]]\nimage_directory = "{data}"\nresolution = [40, 32]\n')
        with pytest.raises(ValueError, match="width is 40, expected a positive multiple of 16"):
            clips_of(tmp_path / "set.toml")

    def test_stills_have_no_first_and_last_frame(self, data):
        preset = PRESETS["flf2v-14B-720P"]
        found = DataSet.open(data)
        clips, _ = training_clips(found, RECIPE, preset, WAN_2_1, SIZE, FRAMES)
        assert [clip.path.name for clip in clips] == ["c.webp"]
        assert "left out: a.png has no last frame beside the first" in found.notes


class TestRecipe:
    def test_every_clip_comes_once_before_one_comes_again(self):
        recipe = Recipe(batch=2, seed=3)
        for first in (0, 5):
            numbers = sum((recipe.order(step, 5) for step in range(first, first + 5)), [])
            assert sorted(numbers[:5]) == sorted(numbers[5:]) == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize("name", ["uniform", "sigmoid", "shift", "uniform-shift"])
    def test_noise_levels_of_a_step_are_spread_evenly(self, name):
        recipe = Recipe(accumulate=64, timesteps=name)
        u = np.sort(recipe.sigmas(1))
        normal = np.random.default_rng(0).standard_normal(200_000)
        drawn = {"uniform": np.linspace(0, 1, 200_000), "sigmoid": 1 / (1 + np.exp(-normal))}
        base = drawn["uniform" if "uniform" in name else "sigmoid"]
        want = 3 * base / (1 + 2 * base) if "shift" in name else base
        assert np.abs(u - np.quantile(want, (np.arange(64) + 0.5) / 64)).max() < 0.03

    def test_the_rate_rises_and_falls(self):
        recipe = Recipe(steps=110, warmup=10, schedule="cosine", learning_rate=1e-3)
        assert recipe.rate(0) == pytest.approx(1e-4) and recipe.rate(9) == pytest.approx(1e-3)
        assert recipe.rate(60) == pytest.approx(5e-4) and recipe.rate(109) < 1e-6

    @pytest.mark.parametrize(
        "given, words",
        [
            (dict(rank=0), "rank is 0, expected a whole number, 1 to 1024"),
            (dict(alpha=0), "alpha is 0, expected a number above 0"),
            (dict(alpha="1"), "alpha is '1', expected a number"),
            (dict(learning_rate=0), "learning rate is 0, expected above 0 and up to 1"),
            (dict(preserve_words="red"), "preserve words is 'red', but preserve is 0"),
            (dict(preserve=0.3, preserve_words=["red"]), "preserve words is ['red'], expected text"),
            (
                dict(timesteps="shifted"),
                "timesteps is 'shifted', expected one of uniform, sigmoid, shift, uniform-shift; nearest: shift",
            ),
        ],
    )
    def test_a_wrong_value_is_named(self, given, words):
        with pytest.raises(ValueError) as refused:
            Recipe(**given)
        assert words in str(refused.value)


class TestTraining:
    def test_the_folder_has_what_the_page_says(self, straight):
        training, steps = straight
        assert [step.step for step in steps] == [1, 2, 3, 4] and steps[-1].kept == training.path
        assert [step.validation is None for step in steps] == [True, False, True, False]
        there = {path.name for path in training.folder.iterdir()}
        assert there == {"style.safetensors", "checkpoints", "state", "cache", "log.jsonl", "losses.png", "recipe.json"}
        rows = [json.loads(line) for line in (training.folder / "log.jsonl").read_text().splitlines()]
        assert rows[0].keys() == {"step", "validation"}  # before the first step
        assert [row["loss"] for row in rows[1:]] == [pytest.approx(step.loss, abs=1e-6) for step in steps]
        with Image.open(training.folder / "losses.png") as picture:
            assert picture.size == (960, 480)

    @pytest.mark.parametrize("until", [2, 3])
    def test_resumed_is_uninterrupted(self, until, straight, pipe, data, tmp_path):
        trained(pipe, data, tmp_path / "style", until=until)
        assert not (tmp_path / "style" / "style.safetensors").exists()
        training, steps = trained(pipe, data, tmp_path / "style", resume=True)
        assert [step.step for step in steps] == list(range(until + 1, 5))
        assert training.path.read_bytes() == straight[0].path.read_bytes()
        log = (training.folder / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == [0, 1, 2, 3, 4]

    def test_a_damaged_state_gives_way_to_the_one_before(self, straight, pipe, data, tmp_path):
        shutil.copytree(straight[0].folder, tmp_path / "style")
        (tmp_path / "style" / "style.safetensors").unlink()
        newest = max((tmp_path / "style" / "state").iterdir())
        newest.write_bytes(newest.read_bytes()[:-9])
        training, steps = trained(pipe, data, tmp_path / "style", resume=True)
        assert steps[0].step == 3 and training.path.read_bytes() == straight[0].path.read_bytes()

    def test_a_run_that_did_all_its_steps_writes_its_file_again(self, straight, pipe, data, tmp_path):
        shutil.copytree(straight[0].folder, tmp_path / "style")
        (tmp_path / "style" / "style.safetensors").unlink()
        training, steps = trained(pipe, data, tmp_path / "style", resume=True)
        assert not steps and training.path.read_bytes() == straight[0].path.read_bytes()
        with pytest.raises(UsageError, match=r"steps is 3, but .* has 4 already; nearest: 4"):
            trained(pipe, data, tmp_path / "style", Recipe(**{**RECIPE.as_json(), "steps": 3}), resume=True)

    def test_what_a_state_stands_for_is_written_before_it(self, pipe, data, tmp_path, monkeypatch):
        """A kill in between: the log has each step once, and no file of the LoRA is missing."""

        def killed(*state):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("wan_mlx.training.loop.save_state", killed)
            trained(pipe, data, tmp_path / "style", Recipe(**{**RECIPE.as_json(), "steps": 2}))
        assert (tmp_path / "style" / "style.safetensors").exists()
        assert len((tmp_path / "style" / "log.jsonl").read_text().splitlines()) == 3

    def test_the_file_gives_the_model_that_was_trained(self, straight, pipe):
        training, _ = straight
        shape = (1, 2, 4, 4, 16)
        step = [Sample(mx.ones(shape), 500.0, pipe.encode_text(["a square"])[0], mx.zeros(shape), {})]
        live = loss(Execution(load_transformer(pipe.checkpoint, "float32")), training.factors, step, RECIPE.scale)
        for merge in (True, False):
            loaded = load_transformer(pipe.checkpoint, "float32", loras=[training.path], merge=merge)
            assert loss(Execution(loaded), {}, step, 1.0) == pytest.approx(live, rel=2e-5)
        plain = loss(Execution(load_transformer(pipe.checkpoint, "float32")), {}, step, 1.0)
        assert abs(plain[0] - live[0]) > 1e-3 * live[0]

    def test_the_file_gives_the_video_of_the_model_that_was_trained(self, straight, pipe):
        """By ``--lora``, and by the factors as the trainer holds them: within 2 of 255 levels."""
        training, _ = straight
        asked = {"prompt": "a square", "width": 32, "height": 32, "num_frames": 5, "steps": 2, "seed": 1}
        model = load_transformer(pipe.checkpoint, "float32")
        with ExitStack() as held:
            for place in model.block_order():
                own = of_block(training.factors, place)
                held.enter_context(placed(model.block(place), own, RECIPE.scale, mx.float32))
            mx.eval(model.parameters())  # here: a video is made in another thread
            with pipe.keeping(training.part, Execution(model)):
                live = pipe(**asked).frames.astype(int)
        plain = pipe(**asked).frames
        pipe.set_loras([training.path])
        try:
            again = pipe(**asked).frames
        finally:
            pipe.set_loras([])
        assert np.abs(again - live).max() <= 2 < np.abs(plain - live).max()

    def test_streamed_is_resident(self, straight, pipe, data, tmp_path):
        training = Training(pipe, clips_of(data), RECIPE, tmp_path / "style", clips_of(data)[:1])
        training.stream = True
        list(training.run())
        assert training.path.read_bytes() == straight[0].path.read_bytes()

    def test_another_recipe_does_not_go_on(self, straight, pipe, data):
        other = Recipe(**{**RECIPE.as_json(), "learning_rate": 1e-3, "steps": 9})
        with pytest.raises(UsageError, match="learning_rate is 0.001, it was started with 0.01"):
            next(Training(pipe, clips_of(data), other, straight[0].folder, clips_of(data)[:1]).run(resume=True))
        with pytest.raises(UsageError, match="holds a training run; --resume goes on"):
            next(Training(pipe, clips_of(data), RECIPE, straight[0].folder).run())

    def test_a_run_of_an_older_version_goes_on(self, straight, pipe, data, tmp_path):
        """What its recipe lacks had its default."""
        shutil.copytree(straight[0].folder, tmp_path / "style")
        path = tmp_path / "style" / "recipe.json"
        told = json.loads(path.read_text())
        for name in ("preserve", "preserve_words", "given_frame", "clip"):
            del told["recipe"][name]
        path.write_text(json.dumps(told))
        other = Recipe(**{**RECIPE.as_json(), "clip": 2.0})
        with pytest.raises(UsageError, match=r"otherwise: clip is 2.0, it was started with 1.0$"):
            trained(pipe, data, tmp_path / "style", other, resume=True)
        training, steps = trained(pipe, data, tmp_path / "style", resume=True)
        assert not steps and training.path.read_bytes() == straight[0].path.read_bytes()

    def test_the_data_may_go_and_a_damaged_cache_is_made_anew(self, straight, pipe, data, tmp_path, monkeypatch):
        shutil.copytree(data, tmp_path / "data")
        shutil.copytree(straight[0].folder / "cache", tmp_path / "style" / "cache")
        for path in (tmp_path / "style" / "cache").iterdir():
            path.write_bytes(path.read_bytes()[:-9])
        loaded, real = [], opened.load_vae
        monkeypatch.setattr(opened, "load_vae", lambda *a, **b: loaded.append(1) or real(*a, **b))
        clips = clips_of(tmp_path / "data")
        training = Training(pipe, clips, RECIPE, tmp_path / "style", clips[:1])
        for _ in training.run():
            shutil.rmtree(tmp_path / "data", ignore_errors=True)
        assert training.path.read_bytes() == straight[0].path.read_bytes() and loaded == [1]

    def test_another_base_does_not_go_on(self, straight, pipe, data, monkeypatch):
        monkeypatch.setattr(pipe, "quantize", "q4")
        with pytest.raises(UsageError, match="was begun otherwise: quantize is 'q4', it was started with None"):
            next(Training(pipe, clips_of(data), RECIPE, straight[0].folder, clips_of(data)[:1]).run(resume=True))

    def test_one_process_trains_in_a_folder(self, straight, pipe, data):
        with locked(straight[0].folder) as alone:
            assert alone
            with pytest.raises(UsageError, match="another process trains in"):
                next(Training(pipe, clips_of(data), RECIPE, straight[0].folder).run(resume=True))

    def test_a_loss_that_is_not_finite_ends_it(self, pipe, data, tmp_path):
        wild = Recipe(rank=2, steps=9, learning_rate=1.0, clip=0, optimizer="sgd", warmup=0, save_every=1)
        training = Training(pipe, clips_of(data), wild, tmp_path / "wild")
        with pytest.raises(TrainingError, match=r"not finite at step \d \(clip [abc]\.\w+, sigma 0\.\d+\)"):
            for _ in training.run():
                training.factors = {name: array * 1e18 for name, array in training.factors.items()}

    def test_a_sample_is_made_by_the_model_in_training(self, pipe, data, tmp_path, monkeypatch):
        recipe = Recipe(rank=2, steps=1, learning_rate=1e-2, warmup=0)
        training = Training(pipe, clips_of(data), recipe, tmp_path / "style")
        training.sample_prompts = ["a square"]
        asked = {}

        class Made:
            def save(self, path):
                asked["path"] = path

        def call(self, prompt, **how):
            asked.update(prompt=prompt, kept=list(self._kept), loras=self.loras, how=how)
            return Made()

        monkeypatch.setattr(WanPipeline, "__call__", call)
        monkeypatch.setattr(pipe, "preset", PRESETS["nano"])
        list(training.run())
        assert asked["prompt"] == "a square" and "transformer" in asked["kept"]
        assert asked["path"] == tmp_path / "style" / "samples" / "step-000001-1.mp4"
        assert asked["loras"] == [(training.path, 1.0)] and not pipe.loras
        assert asked["how"] == {"seed": 0, "steps": 12}  # not nano's form of four steps, which shows less of a LoRA

    def test_samples_need_a_model_of_prompts_alone(self, pipe, data, tmp_path, monkeypatch):
        training = Training(pipe, clips_of(data), RECIPE, tmp_path / "style")
        training.sample_prompts = ["a square"]
        monkeypatch.setattr(pipe, "preset", PRESETS["i2v-14B-480P"])
        with pytest.raises(UsageError, match="i2v-14B-480P makes no video of a prompt alone"):
            next(training.run())

    def test_processes_share_the_clips_of_a_step_evenly(self, pipe, data, tmp_path, monkeypatch):
        training = Training(pipe, clips_of(data), RECIPE, tmp_path / "style")
        monkeypatch.setattr(training.ranks, "size", 3)
        with pytest.raises(UsageError, match="2 clips .* which 3 processes cannot share evenly; nearest: 3"):
            training._begin(False)


class TestCommand:
    def run(self, *words):
        return main(["train", *map(str, words)])

    def test_a_plan_of_a_released_model_reads_and_downloads_nothing(self, data, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(timing, "_step", lambda *given: 1.0)  # of a real block takes seconds
        code = self.run(
            data, "-m", "t2v-1.3B", "-o", tmp_path / "x", "--size", "480p", "--frames", 5, "--plan", "--memory", "24GB"
        )
        said = capsys.readouterr().out
        assert code == 0 and "3 clips to train, 0 held out" in said and "million numbers trained; about" in said
        assert not (tmp_path / "x").exists()

    def test_what_does_not_fit_is_told(self, data, tmp_path, capsys):
        assert self.run(data, "-m", "t2v-14B", "-o", tmp_path / "x", "--plan", "--memory", "1GB") == 1
        assert "more than the 954 MiB" in capsys.readouterr().out

    def test_from_data_to_a_file_that_video_runs_take(self, pico, data, tmp_path, capsys):
        words = [data, "-m", pico, "-o", tmp_path / "z", "--size", "32x32", "--frames", 5, "--steps", 2, "--rank", 2,
                 "--dtype", "float32", "--validate", "40%"]  # fmt: skip
        assert self.run(*words, "--resume") == 0  # nothing is kept yet: it begins
        said = capsys.readouterr()
        assert "step 2 of 2, loss" in said.out and "z.safetensors: use it with --lora" in said.out
        assert self.run(*words) == 2 and "holds a training run of" in capsys.readouterr().err
        assert main(["info", str(tmp_path / "z" / "z.safetensors")]) == 0

    def test_ctrl_c_ends_before_the_first_step_at_once_and_later_after_a_step(self, pico, data, tmp_path, capsys):
        seen = []

        def stop(training, resume=False):
            stoppable = _Stoppable(training)
            seen.append(stoppable.stops_soon)
            for step in run(training, resume):
                seen.append(stoppable.stops_soon)
                signal.raise_signal(signal.SIGINT)
                yield step

        run = Training.run
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, "run", stop)
            code = self.run(data, "-m", pico, "-o", tmp_path / "z", "--size", "32x32", "--frames", 5, "--steps", 3,
                            "--rank", 2, "--dtype", "float32")  # fmt: skip
        assert (code, seen) == (130, [False, True])
        newest = tmp_path / "z" / "checkpoints" / "z-000001.safetensors"
        assert f"The LoRA as it is: {newest}" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "words, said",
        [
            (["gone", "-o", "x"], "gone: no such file or folder; expected a folder of pictures"),
            ([".", "-o", "x", "--validate", "2"], "'2' is no share; expected 10%, or 0.1"),
            ([".", "-o", "x", "--rank", "0"], "rank is 0, expected"),
            ([".", "-o", "x", "--resume"], "holds no picture"),
        ],
    )
    def test_bad_input_is_one_line(self, words, said, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert self.run(*words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
