"""A picture or video of other proportions: stretched, cropped or padded as asked, and said with numbers."""

import json

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.media.read import contain, cover
from wan_mlx.media.write import read_settings
from wan_mlx.presets import PRESETS
from wan_mlx.runs.record import seed_of_made
from wan_mlx.tasks import TASKS, fit_sources, notes
from wan_mlx.types import Request


class Watching:
    """Encoders that keep the pixels they are given, in [-1, 1]."""

    latent_channels, reads_images = 16, True

    def __init__(self):
        self.images, self.videos = None, []

    def encode_text(self, texts):
        return [mx.zeros((1, 512, 4)) for _ in texts]

    def encode_images(self, images):
        self.images = np.array(images)
        return mx.zeros((len(images), 257, 8))

    def encode_videos(self, videos):
        self.videos = [np.concatenate([np.array(chunk)[0] for chunk in video]) for video in videos]
        shapes = [(1, (len(v) - 1) // 4 + 1, v.shape[1] // 8, v.shape[2] // 8, 16) for v in self.videos]
        return [mx.zeros(shape) for shape in shapes]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*shape, 3), np.uint8)


def floats(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def conditioned(task: str, size: tuple[int, int], num_frames: int = 5, **options) -> tuple[Request, Watching]:
    """The fitted request, and what the encoders got."""
    encoders = Watching()
    asked = Request("a", "", *size, num_frames, 2, 1.0, 1.0, "euler", 0, task=task, **options)
    request = fit_sources(asked, PRESETS["nano"])
    TASKS[task].condition(request, encoders)
    return request, encoders


WIDE, TALL, FILM = noise(32, 96), noise(96, 32), noise(5, 32, 96)


@pytest.mark.parametrize("image, crop", [(WIDE, np.s_[:, 24:72]), (TALL, np.s_[40:56, :])])
def test_crop_is_the_middle_in_the_asked_size(image, crop):
    size = (48, 32) if image is WIDE else (32, 16)
    request, seen = conditioned("i2v", size, image=image, fit="crop")
    assert (request.width, request.height) == size
    assert np.array_equal(seen.videos[0][0], floats(image[crop]))
    assert np.array_equal(seen.images[0], floats(image[crop]))  # CLIP sees what the first frame shows


def test_pad_is_the_whole_between_black_bars_in_the_asked_size():
    request, seen = conditioned("i2v", (96, 96), image=WIDE, fit="pad")
    frame = seen.videos[0][0]
    assert (request.width, request.height) == (96, 96) and frame.shape == (96, 96, 3)
    assert np.array_equal(frame[32:64], floats(WIDE))
    assert (frame[:32] == -1).all() and (frame[64:] == -1).all()
    assert np.array_equal(seen.images[0], frame)


@pytest.mark.parametrize("shape, size", [((50, 61), (48, 32)), ((7, 300), (32, 48)), ((500, 3), (64, 16))])
def test_padded_and_resized(shape, size):
    got = contain(np.full((*shape, 3), 255, np.uint8), size[1], size[0])
    assert got.shape == (size[1], size[0], 3)
    rows, columns = np.nonzero(got[..., 0])
    inner = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    assert inner[0] == size[1] or inner[1] == size[0]
    assert abs(inner[0] / inner[1] * shape[1] / shape[0] - 1) < 0.5 or 1 in inner
    for least, most, side in ((rows.min(), rows.max(), size[1]), (columns.min(), columns.max(), size[0])):
        assert abs(least - (side - 1 - most)) <= 1  # in the middle


def test_first_and_last_picture():
    """Each comes to the asked size by itself."""
    for fit, want in (("crop", cover), ("pad", contain)):
        request, seen = conditioned("flf2v", (48, 48), image=WIDE, last_image=TALL, fit=fit)
        assert (request.width, request.height) == (48, 48)
        for place, image in ((0, WIDE), (4, TALL)):
            assert np.array_equal(seen.videos[0][place], floats(want(image, 48, 48)))


@pytest.mark.parametrize("fit, want", [("official", cover), ("crop", cover), ("pad", contain)])
def test_video_to_video(fit, want):
    request, seen = conditioned("t2v", (48, 48), video=FILM, strength=0.5, fit=fit)
    assert (request.width, request.height) == (48, 48)
    assert np.array_equal(seen.videos[0], np.stack([floats(want(frame, 48, 48)) for frame in FILM]))


@pytest.mark.parametrize("fit, want", [("crop", cover), ("pad", contain)])
def test_vace(fit, want):
    """A shorter source still makes a shorter video; the mask comes along, over the bars as its edge is."""
    video, mask = noise(7, 32, 96), np.zeros((32, 96), np.uint8)
    mask[16:] = 255
    request, seen = conditioned("vace", (48, 48), 9, src_video=video, src_mask=mask, fit=fit)
    assert (request.width, request.height, request.num_frames) == (48, 48, 5)
    stays, changes = seen.videos
    frame = floats(want(video[0], 48, 48))
    assert np.array_equal(stays[0][:23], frame[:23]) and not stays[0][25:].any()
    assert np.array_equal(changes[0][25:], frame[25:]) and not changes[0][:23].any()
    assert (frame[-1] == -1).all() == (fit == "pad")


def test_official_is_the_default_and_changes_the_size():
    request, seen = conditioned("i2v", (48, 48), image=WIDE)
    assert request.fit == "official" and (request.width, request.height) == (80, 16)
    assert seen.images[0].shape == (32, 96, 3)
    assert conditioned("vace", (48, 48), src_video=FILM)[0].width == 64


@pytest.mark.parametrize(
    "task, options, said",
    [
        ("i2v", dict(image=WIDE), "image of 96x32 is stretched to 80x16: 67% wider than it is; fit crop or pad"),
        ("i2v", dict(image=TALL), "image of 32x96 is stretched to 16x80: 40% narrower than it is"),
        ("i2v", dict(image=WIDE, fit="crop"), "image of 96x32 is cropped to 48x48: 67% of it is left out; fit pad"),
        ("i2v", dict(image=WIDE, fit="pad"), "image of 96x32 is padded to 48x48: bars are 67% of it"),
        ("t2v", dict(video=FILM, strength=0.5), "video of 96x32 is cropped to 48x48: 67% of it is left out"),
        ("t2v", dict(video=FILM, strength=0.5, fit="pad"), "video of 96x32 is padded to 48x48: bars are 67%"),
        ("vace", dict(src_video=FILM, fit="crop"), "src video of 96x32 is cropped to 48x48: 67% of it"),
        ("i2v", dict(image=noise(96, 96)), None),
        ("t2v", dict(video=noise(5, 48, 49), strength=0.5, fit="pad"), None),
    ],
)
def test_said_with_numbers(task, options, said):
    lines = notes(conditioned(task, (48, 48), **options)[0])
    assert len(lines) == (said is not None) and (said is None or f"the {said}" in lines[0])


def test_the_last_picture_is_cropped_to_the_first():
    request, _ = conditioned("flf2v", (48, 48), image=noise(64, 64), last_image=WIDE)
    assert notes(request) == [
        "the last image of 96x32 is cropped to 48x48: 67% of it is left out; fit pad shows all of it"
    ]


@pytest.mark.parametrize("options", [dict(), dict(src_ref_images=(WIDE,))])
def test_refused_where_nothing_is_fitted(options):
    task = "vace" if options else "t2v"
    with pytest.raises(ValueError, match="fit is pad, but there is no picture or video to fit; give one"):
        conditioned(task, (48, 48), fit="pad", **options)


def test_unknown_names_the_nearest():
    with pytest.raises(ValueError, match="unknown fit 'cropp', expected one of official, crop, pad; nearest: crop"):
        wan_mlx.WanPipeline.from_pretrained("nano-i2v", progress=False).request("a", image=WIDE, fit="cropp")


def test_command_line(tmp_path, monkeypatch, capsys):
    """The size is the one asked for, the settings hold the policy, a run with another is another."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(WIDE).save("a.png")
    flags = ["--model", "nano-i2v", "--prompt", "a red circle", "--size", "32x32", "--frames", "5", "--steps", "1",
             "--seed", "3", "--image", "a.png", "--json"]  # fmt: skip
    said = {"event": "note", "text": "the image of 96x32 is padded to 32x32: bars are 67% of it"}
    for extra in (["--dry-run"], []):
        assert main([*flags, "--fit", "pad", "--output", "a.npz", *extra]) in (0, 3)
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()].count(said) == 1
    assert read_settings(tmp_path / "a.npz")["fit"] == "pad"
    with np.load("a.npz") as got:
        assert got["frames"].shape == (5, 32, 32, 3)
    assert main(["--config", "a.npz", "--output", "b.npz", "--seed", "4"]) in (0, 3)
    assert read_settings(tmp_path / "b.npz")["fit"] == "pad"


def test_a_video_of_before_is_official(pico, tmp_path):
    """Its settings do not tell how it was fitted."""
    pipe = wan_mlx.WanPipeline.from_pretrained(pico, progress=False)
    request = pipe.request("a", width=16, height=16, num_frames=1, steps=1, seed=3)
    video = pipe.run(request).video()
    assert video.settings.pop("fit") == "official"
    assert seed_of_made(pipe, request, video.save(tmp_path / "a.npz")) == 3
