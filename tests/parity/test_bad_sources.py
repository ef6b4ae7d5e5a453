"""Pictures and videos that cannot be used, at the command line: one clear line, exit code 2, before any work."""

import numpy as np
import pytest
from PIL import Image
from test_sources import write_video
from test_tasks import noise_image, noise_video

from wan_mlx.cli.main import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    Image.fromarray(noise_image(32, 48)).save(folder / "fine.png")
    whole = (folder / "fine.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not a picture")
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.png").touch()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "float.tiff")
    Image.fromarray(np.zeros((2, 9000, 3), np.uint8)).save(folder / "narrow.png")
    write_video(folder / "nine.mkv", noise_video(9, 32, 48))
    write_video(folder / "eight.mkv", noise_video(8, 32, 48))
    write_video(folder / "small.mkv", noise_video(9, 8, 48))
    return folder


@pytest.mark.parametrize(
    "kind, sources, says",
    [
        # an image that is not one
        ("i2v", "--image text.png", "text.png cannot be read as an image"),
        ("i2v", "--image empty.png", "empty.png cannot be read as an image"),
        ("i2v", "--image cut.png", "cut.png cannot be read as an image"),
        ("i2v", "--image nine.mkv", "nine.mkv cannot be read as an image"),
        ("i2v", "--image float.tiff", "float.tiff holds floating-point pixels"),
        ("i2v", "--image nowhere.png", "image nowhere.png does not exist"),
        ("i2v", "--image .", "is a folder, expected a file"),
        ("i2v", "--image narrow.png", "9000x2 is too narrow"),
        ("flf2v", "--first_frame fine.png --last_frame text.png", "text.png cannot be read as an image"),
        ("vace", "--src_ref_images fine.png,text.png", "text.png cannot be read as an image"),
        ("vace", "--src_ref_images fine.png,", "image . is a folder"),
        ("vace", "--src_video text.mp4", "text.mp4 cannot be read as a video"),
        ("vace", "--src_video nine.mkv --src_mask text.mp4", "text.mp4 cannot be read as a video"),
        ("vace", "--src_mask text.mp4", "text.mp4 cannot be read as a video"),
        ("vace", "--src_video small.mkv", "48x8 pixels is too small or too narrow"),
        ("t2v", "--video text.mp4", "text.mp4 cannot be read as a video"),
        # a mask of another length than its video
        ("vace", "--src_video nine.mkv --src_mask eight.mkv", "mask eight.mkv has 8 frames, expected 9 as its video"),
        # missing
        ("i2v", "", "image to video needs an image: give it with --image FILE"),
        ("flf2v", "--first_frame fine.png", "needs both images: give the other with --last-image FILE"),
        ("flf2v", "--last_frame fine.png", "needs both images: give the other with --image FILE"),
        ("vace", "", "VACE needs a source video, a mask or reference images, none was given"),
        # for another model
        ("t2v", "--image fine.png", "image was given to a t2v model, which takes video, src_mask; it is for i2v"),
        ("t2v", "--src_video nine.mkv", "src_video was given to a t2v model, which takes video, src_mask; it"),
        ("i2v", "--image fine.png --last_frame fine.png", "last_image was given to a i2v model"),
        ("i2v", "--image fine.png --video nine.mkv", "video was given to a i2v model, which takes image; it"),
        ("vace", "--image fine.png", "image was given to a vace model"),
        ("flf2v", "--first_frame fine.png --last_frame fine.png --frames 1", "frames is 1, expected room"),
    ],
)  # fmt: skip
def test_one_line_and_nothing_begun(models, files, monkeypatch, capsys, tmp_path, kind, sources, says):
    _, folder = models(kind)
    capsys.readouterr()  # while these are made, Diffusers may log that torchao is here
    monkeypatch.chdir(files)
    command = f"--model {folder} --size 48x32 --frames 9 --steps 1 --output {tmp_path / 'a.npz'} {sources}"
    for extra in ([], ["--dry-run"]):
        assert main([*command.split(), "--prompt", "a cat", "--quiet", *extra]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.splitlines()) == 1 and says in error, error
    assert not list(tmp_path.iterdir())
