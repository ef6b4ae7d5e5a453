"""Video to video with a mask: its white is made anew, elsewhere the latents stay the source's."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from arrays import random_array, randomized
from PIL import Image
from sampling import GRID, SCALE, SHIFT, SIZES, always, conditioning

import wan_mlx
from wan_mlx.caching.easycache import EasyCache
from wan_mlx.cli.main import main
from wan_mlx.denoise import denoise
from wan_mlx.guidance import Guidance
from wan_mlx.media.write import read_settings
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.execution import Execution
from wan_mlx.models.transformer import Transformer
from wan_mlx.runs.folder import RunFolder
from wan_mlx.schedulers import SOLVERS
from wan_mlx.tasks import TASKS
from wan_mlx.tasks.canvas import white_squares
from wan_mlx.types import Conditioning, Request, Step

STEPS = 4
SOURCE = random_array(9, *GRID)
PART = np.zeros(GRID[2:4], bool)
PART[1:, :2] = True


@pytest.fixture(scope="module")
def model():
    return randomized(Transformer(TransformerConfig(**SIZES, num_layers=2)))


def masked(white: np.ndarray) -> Conditioning:
    """`SOURCE` with a mask, bool (h, w)."""
    return replace(conditioning(), source_latents=SOURCE, remade=mx.array(white[None, None, ..., None]))


def walk(model, given: Conditioning, solver: str = "unipc", begin: int = 1, **options) -> list[Step]:
    scheduler = SOLVERS[solver](STEPS, SHIFT, begin=begin)
    return list(denoise(always(model, Guidance(SCALE)), given, scheduler, **options))


@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("solver", SOLVERS)
class TestEverySolver:
    """From the video under noise, and from noise alone."""

    def test_black_mask_is_the_source(self, model, solver, begin):
        last = walk(model, masked(~PART & PART), solver, begin)[-1]
        assert mx.array_equal(last.latents, SOURCE) and mx.array_equal(last.denoised, SOURCE)

    def test_white_mask_is_plain(self, model, solver, begin):
        plain = replace(conditioning(), source_latents=SOURCE) if begin else conditioning()
        for want, got in zip(
            walk(model, plain, solver, begin), walk(model, masked(PART | ~PART), solver, begin), strict=True
        ):
            assert mx.array_equal(got.latents, want.latents) and mx.array_equal(got.denoised, want.denoised)

    def test_a_part_locks_the_rest(self, model, solver, begin):
        """Before each step at its noise level, after it at the next one's; in each estimate, too."""
        given, seen = masked(PART), []

        def watched(latents, *rest, **hooks):
            seen.append(latents)
            return Execution(model)(latents, *rest, **hooks)

        steps = walk(watched, given, solver, begin)
        levels = np.array([*(step.sigma for step in steps), 0.0], np.float32)
        on_the_way = [*seen[::2], steps[-1].latents]
        for sigma, latents in zip(levels, on_the_way, strict=True):
            want = float(sigma) * given.noise + float(1 - sigma) * SOURCE
            np.testing.assert_allclose(np.array(latents)[..., ~PART, :], np.array(want)[..., ~PART, :], atol=1e-6)
        for step in steps:
            assert np.array_equal(np.array(step.denoised)[..., ~PART, :], np.array(SOURCE)[..., ~PART, :])
            assert (np.array(step.denoised)[..., PART, :] != np.array(SOURCE)[..., PART, :]).any(axis=-1).all()
        if not begin:  # where UniPC's level is 0.999, the part to be made is noise alone
            assert np.array_equal(np.array(seen[0])[..., PART, :], np.array(given.noise)[..., PART, :])

    def test_resumed_is_uninterrupted(self, model, solver, begin):
        whole = walk(model, masked(PART), solver, begin)
        for first in range(1, len(whole)):
            rest = walk(model, masked(PART), solver, begin, first=first, state=whole[first - 1].state)
            assert len(rest) == len(whole) - first and mx.array_equal(rest[-1].latents, whole[-1].latents)


def test_with_a_step_cache(model):
    """A step whose forward is left out is locked, too."""
    cache = EasyCache(STEPS, 100.0, 1)
    last = walk(model, masked(PART), begin=0, cache=cache)[-1]
    assert cache.computed < 2 * STEPS
    assert np.array_equal(np.array(last.latents)[..., ~PART, :], np.array(SOURCE)[..., ~PART, :])


class Encoders:
    """Latents of the right shape; the texts' embeddings are not looked at."""

    latent_channels, reads_images = 16, True

    def encode_text(self, texts):
        return [mx.zeros((1, 512, 4)) for _ in texts]

    def encode_videos(self, videos):
        return [mx.zeros((1, len(list(video)), 4, 6, 16)) for video in videos]


FRAMES, HEIGHT, WIDTH = 9, 32, 48


def source(frames: int = FRAMES) -> np.ndarray:
    squares = np.random.default_rng(0).integers(0, 255, (frames, HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    return squares.repeat(8, axis=1).repeat(8, axis=2)


def some() -> np.ndarray:
    """bool (H, W), white in two by three of the four by six squares."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[8:24, 24:] = True
    return mask


def remade(mask: np.ndarray) -> np.ndarray:
    asked = replace(request_(WIDTH, HEIGHT), num_frames=FRAMES, video=source(), src_mask=mask)
    return np.array(TASKS["t2v"].condition(asked, Encoders()).remade)[0, ..., 0]


def test_a_video_as_mask():
    """A latent frame of four frames is made anew if one of them is white; the first stands for itself."""
    mask = np.zeros((FRAMES, HEIGHT, WIDTH), np.uint8)
    mask[3, 10, 10] = 200
    assert np.argwhere(remade(mask)).tolist() == [[1, 1, 1]]
    mask[0, 31, 0], mask[8, 0, 47] = 128, 127
    assert np.argwhere(remade(mask)).tolist() == [[0, 3, 0], [1, 1, 1]]


def test_a_picture_is_a_mask_for_each_frame():
    assert np.array_equal(remade(some()), some()[None, ::8, ::8])
    assert np.array_equal(remade(some()[None].repeat(FRAMES, axis=0)), some()[None, ::8, ::8].repeat(3, axis=0))


def request_(width: int, height: int, fit: str = "official") -> Request:
    return Request("a", "", width, height, 1, 1, 1.0, 1.0, "euler", 0, fit=fit)


class TestSquares:
    """A square of latents is made anew if any of its pixels is."""

    def test_each_pixel(self):
        for y, x in np.ndindex(16, 24):
            mask = np.zeros((16, 24), bool)
            mask[y, x] = True
            assert np.argwhere(white_squares(mask, request_(24, 16))).tolist() == [[y // 8, x // 8]]

    @pytest.mark.parametrize("scale", [2, 3, 7])
    def test_a_larger_mask(self, scale):
        mask = np.zeros((16 * scale, 32 * scale), bool)
        mask[8 * scale, 16 * scale - 1] = True  # the last pixel of one square and the first of another
        assert np.argwhere(white_squares(mask, request_(32, 16))).tolist() == [[1, 1]]

    def test_a_smaller_mask(self):
        mask = np.array([[False, True, False, True]])
        assert white_squares(mask, request_(64, 16)).tolist() == [[False, False, True, True] * 2] * 2

    def test_a_cropped_mask(self):
        mask = np.zeros((16, 48), bool)
        mask[:, :16] = True  # left of the middle 16 columns
        assert not white_squares(mask, request_(16, 16)).any()
        mask[:, 16] = True
        assert white_squares(mask, request_(16, 16)).tolist() == [[True, False]] * 2

    def test_a_padded_mask_goes_on_as_its_edge(self):
        mask = np.zeros((16, 16), bool)
        mask[:, 0] = True
        assert white_squares(mask, request_(48, 16, "pad")).tolist() == [[True] * 3 + [False] * 3] * 2
        assert white_squares(~mask * False, request_(48, 16, "pad")).sum() == 0


@pytest.fixture(scope="module")
def pipe(pico):
    return wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=False)


def make(pipe, **options):
    small = dict(width=WIDTH, height=HEIGHT, num_frames=5, steps=3, seed=3, guidance_scale=1.0, video=source())
    return pipe("a red circle", **{**small, **options})


def test_black_mask_is_the_source_through_the_vae(pipe):
    got = make(pipe, src_mask=~some() & some(), strength=1.0, steps=1)
    chunks = (mx.array(source()[numbers])[None] / 127.5 - 1 for numbers in (slice(1), slice(1, 5)))
    (latents,) = pipe.encode_videos([chunks])
    np.testing.assert_allclose(got.latents, np.moveaxis(np.array(latents)[0], -1, 0), atol=1e-5)
    frames = np.concatenate(list(pipe.decode(latents)))
    assert np.abs(got.frames.astype(int) - frames).max() <= 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"video": None, "src_mask": some()}, "a mask says what to make anew in a video, but no video was given"),
        ({"src_mask": np.zeros((5, HEIGHT, WIDTH), np.uint8)}, "mask the array has 5 frames, expected 9 as its video"),
        ({"src_mask": np.zeros((32, 32), np.uint8)}, "mask the array is of 32x32 pixels, expected 48x32 as its video"),
        ({"src_mask": "nowhere.png"}, "video nowhere.png does not exist"),
    ],
)
def test_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(pipe, **options)
    assert "\n" not in str(error.value)


def test_refused_where_it_has_no_meaning():
    pipe = wan_mlx.WanPipeline.from_pretrained("nano-i2v", progress=False)
    with pytest.raises(ValueError, match="src_mask was given to a i2v model, .* it is for t2v, ti2v, vace"):
        pipe.request("a", image=source()[0], src_mask=some())


def test_command_line(pipe, pico, tmp_path, monkeypatch, capsys):
    """The mask is named and its hash kept; another one is another run; its file may go once it is encoded."""
    monkeypatch.chdir(tmp_path)
    frames = [Image.fromarray(frame) for frame in source()]
    frames[0].save("a.webp", save_all=True, append_images=frames[1:], duration=63, lossless=True)
    for name, white in (("mask.png", some()), ("other.png", ~some())):
        Image.fromarray(white.astype(np.uint8) * 255).save(name)
    flags = ["--model", str(pico), "--prompt", "a red circle", "--size", "48x32", "--frames", "5", "--steps", "3",
             "--seed", "3", "--guidance", "1", "--dtype", "float32", "--video", "a.webp", "--mask", "mask.png"]
    assert main([*flags, "--output", "whole.npz"]) in (0, 3)
    assert "mask      mask.png: what is black in it stays" in capsys.readouterr().err
    settings = read_settings(tmp_path / "whole.npz")
    assert settings["src_mask"] == "mask.png" and len(settings["source_sha256"]) == 2
    with np.load("whole.npz") as got:
        assert np.array_equal(got["latents"], make(pipe, src_mask=some()).latents)
    save = RunFolder.save_step

    def failing(self, step, notes):
        if step.index == 1:
            raise RuntimeError("power cut")
        save(self, step, notes)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_step", failing)
        assert main([*flags, "--output", "cut.npz"]) == 1
    capsys.readouterr()
    assert main(["--resume", "cut.npz", "--mask", "other.png"]) == 2
    assert f"--mask is {tmp_path / 'mask.png'}, {tmp_path / 'other.png'} was given" in capsys.readouterr().err
    for path in (tmp_path / "mask.png", tmp_path / "a.webp"):
        path.unlink()
    assert main(["--resume", "cut.npz"]) in (0, 3)
    assert (tmp_path / "cut.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
