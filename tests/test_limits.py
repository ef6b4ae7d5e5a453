"""Requests beyond any machine: each is answered at once, before lists are made or plans tried."""

import pytest

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.geometry import WAN_2_1
from wan_mlx.planning import choose, peak_memory

HUGE = 10**30


@pytest.fixture(scope="module")
def pipe():
    return wan_mlx.WanPipeline.from_pretrained("nano", progress=False)


@pytest.mark.parametrize("steps", [0, -1, 1001, 10**9, HUGE])
def test_steps(pipe, steps):
    """There are 1,000 timesteps."""
    for asked in (lambda: pipe.request("a", steps=steps), lambda: wan_mlx.plan("nano", steps=steps)):
        with pytest.raises(ValueError, match=f"steps is {steps}, expected 1 to 1000; nearest: (1|1000)$"):
            asked()
    assert pipe.request("a", steps=1000).steps == 1000


@pytest.mark.parametrize(
    "size, says",
    [
        ((0, 64), "width is 0, expected a positive multiple of 16; nearest: 16"),
        ((64, 0), "height is 0, expected a positive multiple of 16; nearest: 16"),
        ((10**9, 64), "width is 1000000000, expected a positive multiple of 16 up to 16384; nearest: 16384"),
        ((64, 10**400), "up to 16384; nearest: 16384"),
    ],
)
def test_sizes(pipe, size, says):
    for asked in (lambda: pipe.request("a", width=size[0], height=size[1]), lambda: wan_mlx.plan("nano", *size)):
        with pytest.raises(ValueError, match=says):
            asked()


@pytest.mark.parametrize("frames", [10**6 + 1, 4 * 10**9 + 1, pytest.param(4 * 10**400 + 1, id="400 digits")])
def test_frames(pipe, frames):
    for asked in (lambda: pipe.request("a", num_frames=frames), lambda: wan_mlx.plan("nano", num_frames=frames)):
        with pytest.raises(ValueError, match="up to 100001; nearest: 100001"):
            asked()


@pytest.mark.parametrize("count", [0, 10_001, 10**9, HUGE])
def test_images_are_counted_before_they_are_listed(pipe, count):
    with pytest.raises(ValueError, match=f"num_images is {count}, expected 1 to 10000"):
        pipe.images("a", count, seed=1)


@pytest.mark.parametrize(
    "flags",
    [f"--steps {HUGE}", "--steps 1000000000", f"--frames {HUGE}", f"--size {HUGE}x{HUGE}", "--size 0x0", "--size 64x0",
     f"--num-images {HUGE} --frames 1", "--num-images 1000000000 --frames 1", "--shift inf", f"--cfg-zero {HUGE}",
     f"--slg {HUGE}", f"--seed {HUGE}", f"--size {'9' * 5000}x16"],
    ids=lambda flags: flags[:40],
)  # fmt: skip
def test_numbers_beyond_use_are_one_line_of_usage(flags, capsys):
    assert main(["--model", "nano", "--prompt", "a", "--dry-run", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_plan_of_a_zero_size_is_none_of_another(capsys):
    assert main(["--plan", "--model", "nano", "--size", "0x64"]) == 2
    assert "width is 0" in capsys.readouterr().err


def test_a_plan_tries_few_tiles_at_any_size(monkeypatch):
    """So that the largest video is planned in a second: spans of tiles are computed once for each side and length."""
    computed, spans = [], peak_memory.stage_spans
    monkeypatch.setattr(peak_memory, "stage_spans", lambda *args: computed.append(args) or spans(*args))
    peak_memory._along.cache_clear()
    for frames in (1, 81):
        plan = wan_mlx.plan("nano", 16384, 16384, frames, memory="8GB")
        assert not plan.fits and plan.advice
    assert len(computed) < 50_000
    assert len(choose.tile_choices((1, 2048, 2048))) < 400


def test_tiles_that_are_tried_are_all_numbers_of_them_where_there_are_few():
    tiles = choose.tile_choices(WAN_2_1.latent_shape(1280, 720, 81))
    assert len(tiles) == 118 and tiles[:4] == [None, (640, 720), (432, 720), (640, 360)] and tiles[-1] == (64, 72)
