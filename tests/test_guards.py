"""A bad run does not pass for a good one, and a good one is not called bad."""

import shutil
from collections import namedtuple

import mlx.core as mx
import numpy as np
import pytest

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.errors import WanError, is_out_of_memory
from wan_mlx.media.checks import FrameStatistics, check_disk, latents_complaint
from wan_mlx.media.write import read_settings
from wan_mlx.models.vae_execution import VAEExecution

COMMAND = "wan-mlx resume"


def complaint(*chunks: np.ndarray) -> str | None:
    statistics = FrameStatistics()
    for frames in chunks:
        statistics.add(frames)
    return statistics.complaint()


def shape_on(background, colour) -> np.ndarray:
    """A small square of one colour on a plain background, uint8 (2, 128, 128, 3)."""
    frames = np.full((2, 128, 128, 3), background, np.uint8)
    frames[:, 50:80, 50:80] = colour
    return frames


@pytest.mark.parametrize("background", [(0, 0, 0), (255, 255, 255), (0, 0, 255), (128, 128, 128), (0, 255, 0)])
@pytest.mark.parametrize("colour", [(255, 0, 0), (255, 255, 0), (0, 128, 0)])
def test_shapes_on_plain_backgrounds_pass(background, colour):
    assert complaint(shape_on(background, colour)) is None


def test_a_dark_or_pale_picture_passes():
    ramp = np.linspace(0, 12, 64).astype(np.uint8)[None, None, :, None] * np.ones((1, 64, 1, 3), np.uint8)
    assert complaint(ramp) is None and complaint(255 - ramp) is None


def test_bad_videos_are_recognised():
    random = np.random.default_rng(0)
    assert "black" in complaint(np.zeros((3, 32, 32, 3), np.uint8), random.integers(0, 4, (2, 32, 32, 3), np.uint8))
    assert "flat" in complaint(random.integers(127, 130, (3, 32, 32, 3), np.uint8))
    blown_up = np.clip(random.normal(127, 5000, (3, 32, 32, 3)), 0, 255).astype(np.uint8)
    assert "saturated" in complaint(blown_up)
    assert complaint(np.zeros((3, 32, 32, 3), np.uint8), shape_on(0, 255)[:, :32, :32] + 0, blown_up[:1] // 2) is None


def test_latents_out_of_proportion():
    latents = np.random.default_rng(0).standard_normal((16, 2, 4, 4), np.float32)
    assert latents_complaint(latents) is None and latents_complaint(2.5 * latents) is None
    assert "grew out of proportion" in latents_complaint(20 * latents)
    assert "collapsed" in latents_complaint(0.01 * latents + 1)


def test_a_bad_video_is_kept_and_reported(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setattr("wan_mlx.opened.to_uint8", lambda frames, rounding: np.zeros(frames.shape, np.uint8))
    assert main([*flags, "--output", str(tmp_path / "a.npz")]) == 3
    said = capsys.readouterr()
    assert "the video is black" in said.err and "doctor" in said.err and said.out.strip() == str(tmp_path / "a.npz")
    assert not np.load(tmp_path / "a.npz")["frames"].any() and not (tmp_path / "a.npz.wan").exists()


def test_not_finite_keeps_the_last_good_state(tmp_path, monkeypatch, capsys, flags):
    from wan_mlx import denoise

    velocity = denoise.guided_velocity

    def poisoned(*args):
        return velocity(*args) * (np.nan if args[5] == 1 else 1)

    output = str(tmp_path / "a.npz")
    with monkeypatch.context() as patch:
        patch.setattr(denoise, "guided_velocity", poisoned)
        assert main([*flags, "--dtype", "bfloat16", "--output", output]) == 1
    error = capsys.readouterr().err
    assert "after step 2 of 3" in error and f"1 steps are kept; go on with: {COMMAND} {output} --dtype float32" in error
    assert (tmp_path / "a.npz.wan/step-0001.safetensors").is_file() and not (tmp_path / "a.npz").exists()
    # In float32 from there, as it was told; nothing else may change.
    assert main(["--resume", output, "--dtype", "float32", "--steps", "4"]) == 2
    assert "--steps is 3, 4 was given" in capsys.readouterr().err
    assert main(["--resume", output, "--dtype", "float32", "--quiet"]) == 0
    settings = read_settings(tmp_path / "a.npz")
    assert settings["dtype"] == "bfloat16, float32 from step 2" and settings["steps"] == 3


def test_frames_that_are_not_finite_point_at_the_vae(tmp_path, monkeypatch, capsys, flags):
    """It computes in float32 already, so another dtype of the transformer is no way out."""
    decoded = VAEExecution.decode_frames

    def poisoned(*args):
        return (mx.full(frames.shape, mx.nan) for frames in decoded(*args))

    monkeypatch.setattr(VAEExecution, "decode_frames", poisoned)
    output = str(tmp_path / "a.npz")
    assert main([*flags, "--output", output]) == 1
    error = capsys.readouterr().err
    assert "the decoded frames hold NaN" in error and "look at the VAE's weights: wan-mlx inspect" in error
    assert "steps are kept; go on with" in error and "--dtype" not in error


def test_low_disk_is_seen_before_the_run(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1 << 20))
    monkeypatch.setattr(wan_mlx.Run, "__iter__", lambda run: pytest.fail("it ran"))
    assert main([*flags, "--output", str(tmp_path / "a.npz")]) == 1
    assert "0.00 GB free, the run needs about" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(WanError, match="2000.07 GB"):
        check_disk(tmp_path, 2 * 10**12)


@pytest.mark.parametrize(
    "text, is_one",
    [
        ("[malloc] Unable to allocate 12345 bytes.", True),
        ("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size", True),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", True),
        ("[METAL] Command buffer execution failed: Insufficient Memory (kIOGPUCommandBufferCallbackErrorOutOfMemory)",
         True),
        ("[conv] Invalid input array with 3 dimensions.", False),
    ],
)  # fmt: skip
def test_out_of_memory_is_recognised(text, is_one):
    assert is_out_of_memory(RuntimeError(text)) is is_one
    assert not is_out_of_memory(ValueError(text))


class TestDecodeOutOfMemory:
    """As on a machine with too little memory for whole frames, or for all but the smallest tiles."""

    @pytest.fixture
    def pipe(self, pico):
        return wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=False)

    @pytest.fixture
    def latents(self):
        return mx.random.normal((1, 2, 2, 22, 16), key=mx.random.key(0))  # 176x16 pixels

    def test_tiles_go_on_where_whole_frames_failed(self, pipe, latents, monkeypatch, caplog):
        want = list(pipe.decode(latents))
        decode = VAEExecution.decode

        def one_frame_only(self, latents):
            yield next(decode(self, latents))
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")

        monkeypatch.setattr(VAEExecution, "decode", one_frame_only)
        got = list(pipe.decode(latents))
        assert "again in tiles of 128x128" in caplog.text
        assert [frames.shape[0] for frames in got] == [1, 4]
        differences = [np.abs(a.astype(int) - b).max() for a, b in zip(got, want, strict=True)]
        assert max(differences) <= 1

    def test_smaller_and_smaller(self, pipe, latents, monkeypatch):
        tried = []

        def decode(vae, latents, tile, *rest):
            tried.append(tile)
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")

        monkeypatch.setattr("wan_mlx.models.vae_tiling.decode", decode)
        with pytest.raises(RuntimeError, match="Unable to allocate"):
            list(pipe.decode(latents))
        assert tried == [None, (128, 128), (64, 64)]
        pipe.vae_tiling = "off"
        with pytest.raises(RuntimeError, match="Unable to allocate"):
            list(pipe.decode(latents))
        assert tried[3:] == [None]

    def test_another_error_is_not_tried_again(self, pipe, latents, monkeypatch):
        monkeypatch.setattr("wan_mlx.models.vae_tiling.decode", lambda *rest: (_ for _ in [1 / 0]))
        with pytest.raises(ZeroDivisionError):
            list(pipe.decode(latents))


def test_out_of_memory_gives_advice(tmp_path, monkeypatch, capsys, flags):
    def fail(self, *args):
        raise RuntimeError("[malloc] Unable to allocate 123 bytes.")

    monkeypatch.setattr("wan_mlx.denoise.guided_velocity", fail)
    assert main([*flags, "--output", str(tmp_path / "a.npz")]) == 1
    error = capsys.readouterr().err
    assert "out of memory" in error and "--quantize" in error and "--debug" not in error
