"""Runs from pictures and videos go on from what was encoded of them: even where the sources are gone by then."""

import numpy as np
import official_checkpoints as checkpoints
import pytest
from PIL import Image

from wan_mlx.cli.main import main
from wan_mlx.media.write import read_settings
from wan_mlx.runs.folder import RunFolder

SOURCES = {
    "i2v": ["--image", "first.png"],
    "ti2v": ["--image", "first.png", "--size", "64x32"],
    "vace": ["--src_video", "video.gif", "--src_ref_images", "a.png,b.png"],
}


def pictures(folder):
    random = np.random.default_rng(0)
    for name in ("first", "a", "b"):
        Image.fromarray(random.integers(0, 255, (32, 48, 3), np.uint8)).save(folder / f"{name}.png")
    frames = [Image.fromarray(random.integers(0, 255, (32, 48, 3), np.uint8)) for _ in range(9)]
    frames[0].save(folder / "video.gif", save_all=True, append_images=frames[1:], duration=60)


@pytest.mark.parametrize("kind", SOURCES)
def test_goes_on_without_its_sources(tmp_path, monkeypatch, capsys, kind):
    checkpoints.write_official_folder(tmp_path / "model", checkpoints.networks(3, kind), kind)
    here = tmp_path / "here"
    here.mkdir()
    pictures(here)
    monkeypatch.chdir(here)
    command = ["--model", "../model", "--prompt", "a cat", "--size", "48x32", "--frames", "9", "--steps", "2", "--seed",
               "1", "--dtype", "float32", "--quiet", *SOURCES[kind]]  # fmt: skip
    assert main([*command, "--output", "whole.npz"]) == 0
    save = RunFolder.save_step

    def failing(self, step, notes):
        if step.index == 1:
            raise RuntimeError("the machine failed")
        save(self, step, notes)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_step", failing)
        assert main([*command, "--output", "a.npz"]) == 1
    for picture in here.glob("*.[pg][ni][gf]"):
        picture.unlink()
    monkeypatch.chdir(tmp_path)  # where no relative path leads to anything
    assert main(["--resume", "here/a.npz", "--frames", "5"]) == 2
    assert "--frames is 9, 5 was given" in capsys.readouterr().err
    assert main(["--resume", "here/a.npz"]) == 0
    assert (here / "a.npz").read_bytes() == (here / "whole.npz").read_bytes()
    settings = read_settings(here / "a.npz")
    assert [settings["image"] or settings["src_video"], *settings["src_ref_images"]] == {
        "i2v": ["first.png"], "ti2v": ["first.png"], "vace": ["video.gif", "a.png", "b.png"]
    }[kind]  # fmt: skip


def test_changed_source_is_refused(tmp_path, monkeypatch, capsys):
    """Cut before it was encoded: the run cannot be the same."""
    model = checkpoints.write_official_folder(tmp_path / "model", checkpoints.networks(3, "i2v"), "i2v")
    pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_conditioning", lambda *args: 1 / 0)
        patch.setattr(RunFolder, "delete", lambda self: None)  # as kill -9 leaves it
        main(["--model", str(model), "--prompt", "a cat", "--size", "48x32", "--frames", "5", "--steps", "1", "--quiet",
              "--output", "a.npz", "--image", "first.png"])  # fmt: skip
    Image.new("RGB", (48, 32)).save("first.png")
    assert main(["--resume", "a.npz"]) == 1
    assert "first.png is not the file that the run was begun with" in capsys.readouterr().err
