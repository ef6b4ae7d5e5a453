"""The command line, from a tiny official folder to a file, against the official pipeline's arithmetic in PyTorch."""

import mlx.core as mx
import numpy as np
import official_checkpoints as checkpoints
import pytest
from oracles import (
    official,
    official_frames,
    official_latents,
    official_text,
    relative_error,
    torch,
    unmasked_attention,
)
from test_vae import scale

from wan_mlx.cli.main import main
from wan_mlx.models.configs import VAEConfig
from wan_mlx.presets import NEGATIVE_PROMPT

PROMPT = "a cat boxing on a stage"
STEPS, SHIFT, GUIDANCE, SEED = 6, 5.0, 5.0, 42


@pytest.fixture(scope="module")
def modules():
    return checkpoints.networks()


@pytest.fixture(scope="module")
def folder(modules, tmp_path_factory):
    return checkpoints.write_official_folder(tmp_path_factory.mktemp("official") / "Wan2.1-tiny", modules)


def official_run(modules, monkeypatch, solver: str, shape: tuple, guidance: float = GUIDANCE) -> torch.Tensor:
    """Latents of the official text to video."""
    monkeypatch.setattr(official("modules.model"), "flash_attention", unmasked_attention)
    tokenizer, seq_len = checkpoints.sentencepiece_model(), shape[1] * shape[2] * shape[3] // 4
    texts = [official_text(modules["text_encoder"], tokenizer, text) for text in (PROMPT, NEGATIVE_PROMPT)]
    return official_latents(
        lambda latents, t, text: modules["transformer"]([latents], t, [text], seq_len)[0],
        texts, shape, steps=STEPS, shift=SHIFT, guidance=guidance, seed=SEED, solver=solver,
    )  # fmt: skip


def generate(folder, output, *extra) -> int:
    return main(
        ["--model", str(folder), "--prompt", PROMPT, "--size", "48x32", "--frames", "9", "--steps", str(STEPS),
         "--seed", str(SEED), "--dtype", "float32", "--quiet", "--output", str(output), *extra]
    )  # fmt: skip


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_every_pixel_within_two_levels(modules, folder, tmp_path, monkeypatch, solver):
    want_latents = official_run(modules, monkeypatch, solver, (16, 3, 4, 6))
    want = official_frames(modules["vae"], scale(VAEConfig()), want_latents)
    assert want.shape == (9, 32, 48, 3) and want.std() > 10  # a picture, not a flat field
    unguided = official_run(modules, monkeypatch, solver, (16, 3, 4, 6), guidance=1.0)
    assert relative_error(unguided, want_latents) > 0.05  # the texts matter, so a wrong guidance would show
    assert generate(folder, tmp_path / "out.npz", "--solver", solver) == 0
    with np.load(tmp_path / "out.npz") as got:
        assert relative_error(got["latents"], want_latents) < 1e-4
        assert np.abs(got["frames"].astype(int) - want.astype(int)).max() <= 2
        assert (got["frames"] == want).mean() > 0.95  # rounded down as the official code does, not to the nearest


def test_official_command_line_gives_the_same_video(folder, tmp_path):
    assert generate(folder, tmp_path / "ours.npz", "--shift", "8", "--guidance", "6") == 0
    code = main(
        ["--task", "t2v-1.3B", "--size", "48*32", "--ckpt_dir", str(folder), "--frame_num", "9", "--sample_steps",
         str(STEPS), "--sample_shift", "8", "--sample_guide_scale", "6", "--sample_solver", "unipc", "--base_seed",
         str(SEED), "--offload_model", "True", "--t5_cpu", "--prompt", PROMPT, "--save_file",
         str(tmp_path / "official.npz"), "--dtype", "float32", "--quiet"]
    )  # fmt: skip
    assert code == 0
    with np.load(tmp_path / "ours.npz") as ours, np.load(tmp_path / "official.npz") as theirs:
        assert np.array_equal(ours["frames"], theirs["frames"])


def test_python_equals_command_line(folder, tmp_path):
    import wan_mlx

    assert generate(folder, tmp_path / "cli.npz") == 0
    seen = []
    pipe = wan_mlx.WanPipeline.from_pretrained(folder, dtype="float32", progress=False)
    video = pipe(PROMPT, width=48, height=32, num_frames=9, steps=STEPS, seed=SEED, callback=seen.append)
    with np.load(tmp_path / "cli.npz") as cli:
        assert np.array_equal(video.frames, cli["frames"]) and np.array_equal(video.latents, cli["latents"])
    assert [step.index for step in seen] == list(range(STEPS))
    assert seen[-1].total == STEPS and seen[0].latents.shape == (1, 3, 4, 6, 16)
    assert [stage.name for stage in video.stages] == ["conditioning", "load transformer", "denoise", "decode"]


def test_global_random_state_is_untouched(folder, tmp_path):
    mx.random.seed(7)
    want = np.array(mx.random.normal((4,)))
    mx.random.seed(7)
    np.random.seed(7)
    legacy = np.random.get_state()[1].copy()
    assert generate(folder, tmp_path / "a.npz", "--steps", "1") == 0
    assert np.array_equal(np.array(mx.random.normal((4,))), want)
    assert np.array_equal(np.random.get_state()[1], legacy)


def test_nan_stops_with_the_step(modules, tmp_path, capsys):
    state = modules["transformer"].state_dict()
    poisoned = {k: v.clone() for k, v in state.items()}
    poisoned["head.head.weight"][:] = float("nan")

    class Poisoned(torch.nn.Module):
        def state_dict(self):
            return poisoned

    folder = checkpoints.write_official_folder(tmp_path / "nan", {**modules, "transformer": Poisoned()})
    assert generate(folder, tmp_path / "out.mp4") == 1
    assert "after step 1 of 6" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
