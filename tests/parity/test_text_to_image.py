"""Stills: one or several of a prompt, each the same as if it had been made alone, the model loaded once."""

import json

import numpy as np
import pytest
from PIL import Image

import wan_mlx.opened
from wan_mlx import WanPipeline
from wan_mlx.cli.main import main
from wan_mlx.media.write import read_settings

SEEDS = (7, 8, 9)


@pytest.fixture(scope="module")
def folder(models):
    return models("t2v")[1]


@pytest.fixture(scope="module")
def pipe(folder):
    return WanPipeline.from_pretrained(folder, dtype="float32", progress=False)


def run(folder, output, *extra) -> int:
    return main(
        ["--model", str(folder), "--prompt", "a cat boxing", "--size", "48x32", "--steps", "2", "--seed", "7",
         "--dtype", "float32", "--output", str(output), *extra]
    )  # fmt: skip


def counted(monkeypatch, *names) -> dict[str, int]:
    """How often the pipeline loads each network."""
    counts = dict.fromkeys(names, 0)

    def count(name, load):
        def loading(*args, **kwargs):
            counts[name] += 1
            return load(*args, **kwargs)

        return loading

    for name in names:
        monkeypatch.setattr(wan_mlx.opened, name, count(name, getattr(wan_mlx.opened, name)))
    return counts


def test_several_from_the_command_line(folder, tmp_path, capsys, monkeypatch):
    counts = counted(monkeypatch, "load_transformer", "load_text_encoder", "load_vae")
    monkeypatch.setenv("WAN_MLX_CACHE", str(tmp_path / "cache"))  # no prompt is known from an earlier test
    assert run(folder, tmp_path / "cat.png", "--num-images", "3") == 0
    assert counts == {"load_transformer": 1, "load_text_encoder": 1, "load_vae": 1}
    said = capsys.readouterr()
    paths = [tmp_path / f"cat_seed{seed}.png" for seed in SEEDS]
    assert said.out.split() == [str(path) for path in paths]
    assert "48x32, 1 frames" in said.err and all(str(path) in said.err for path in paths)
    assert sorted(tmp_path.glob("*.png*")) == paths
    for seed, path in zip(SEEDS, paths, strict=True):
        with Image.open(path) as image:
            assert (image.format, image.size, image.n_frames) == ("PNG", (48, 32), 1)
            settings = json.loads(image.text["settings"])
        assert settings["seed"] == seed and settings["prompt"] == "a cat boxing" and settings["num_frames"] == 1
        assert run(folder, tmp_path / "alone.png", "--frames", "1", "--seed", str(seed), "--overwrite") == 0
        assert (tmp_path / "alone.png").read_bytes() == path.read_bytes()
    assert len({path.read_bytes() for path in paths}) == 3


def test_none_is_lost_and_none_is_begun_if_one_exists(folder, tmp_path, capsys):
    (tmp_path / "cat_seed8.png").write_bytes(b"precious")
    assert run(folder, tmp_path / "cat.png", "--num-images", "3") == 2
    assert "cat_seed8.png exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cat_seed8.png"]
    (tmp_path / "cat.png").write_bytes(b"another")  # not one of them
    assert run(folder, tmp_path / "cat.png", "--num-images", "3", "--overwrite", "--dry-run") == 0
    assert (tmp_path / "cat.png").read_bytes() == b"another"


def test_several_in_python(pipe, monkeypatch):
    counts = counted(monkeypatch, "load_transformer", "load_vae")
    common = dict(width=48, height=32, steps=2)
    steps = []
    images = pipe.images("a dog", num_images=3, seed=7, callback=steps.append, **common)
    assert counts == {"load_transformer": 1, "load_vae": 1} and len(steps) == 6
    for seed, image in zip(SEEDS, images, strict=True):
        alone = pipe("a dog", num_frames=1, seed=seed, **common)
        assert image.frames.shape == (1, 32, 48, 3) and np.array_equal(image.frames, alone.frames)
        assert np.array_equal(image.latents, alone.latents) and image.settings == alone.settings
    html = images[0]._repr_html_()
    assert "<img " in html and 'src="data:image/png;base64,' in html and "a dog" in html


@pytest.mark.parametrize("ending", ["png", "webp", "npz"])
def test_one_still_in_every_format(pipe, tmp_path, ending):
    (image,) = pipe.images("a dog", width=32, height=32, steps=1, seed=2**64 - 1)
    assert read_settings(image.save(tmp_path / f"a.{ending}"))["seed"] == 2**64 - 1


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--num-images", "0"], "num_images is 0, expected 1 to 10000"),
        (["--num-images", "2", "--frames", "5"], "num_images is 2, but 5 frames are a video; nearest: 1 frame"),
        (["--num-images", "2", "--seed", str(2**64 - 1)], f"nearest: {2**64 - 2}"),
        (["--seed", str(2**64), "--frames", "1"], f"nearest: {2**64 - 1}"),
        (["--task", "t2i-14B", "--frames", "5"], "--task t2i-14B makes stills, but --frames is 5; nearest: 1"),
        (["--num-images", "two"], "two"),
    ],
)
def test_refused_in_one_line(folder, tmp_path, capsys, arguments, says):
    assert run(folder, tmp_path / "cat.png", *arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and says in said[0]
    assert not list(tmp_path.iterdir())
