"""Wrong input at the command line: one clear line each, the right exit code, and nothing of the user's lost."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import official_checkpoints as checkpoints
import pytest
from oracles import torch

from wan_mlx.cli.main import main


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return checkpoints.write_official_folder(tmp_path_factory.mktemp("cli") / "Wan2.1-tiny", checkpoints.networks(3))


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "Wan2.1-tiny")


def run(capsys, folder, *extra, prompt="a cat", output=None):
    """Exit code and standard error of a tiny run."""
    output = output or folder.parent / "out.npz"
    code = main(
        ["--model", str(folder), "--prompt", prompt, "--size", "32x32", "--frames", "5", "--steps", "2", "--seed", "1",
         "--dtype", "float32", "--output", str(output), *extra]
    )  # fmt: skip
    return code, capsys.readouterr().err


def one_line(error: str) -> str:
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--frames", "6"], ["frames is 6", "4n+1", "nearest: 5"]),
        (["--frames", "0"], ["frames is 0", "nearest: 1"]),
        (["--size", "33x32"], ["width is 33", "multiple of 16", "nearest: 32"]),
        (["--size", "32*470"], ["height is 470", "nearest: 464"]),
        (["--size", "wide"], ["'wide' is no size", "832x480"]),
        (["--solver", "unipcc"], ["unipcc", "unipc"]),
        (["--task", "t2v-1.4B"], ["t2v-1.4B", "t2v-1.3B"]),
        (["--task", "i2v-14B"], ["holds a t2v model", "needs a i2v model"]),
        (["--prompt", "  "], ["prompt is empty"]),
        (["--steps", "0"], ["steps is 0", "1 to 1000"]),
        (["--shift", "0"], ["shift is 0"]),
        (["--guidance", "nan"], ["guidance is nan"]),
        (["--dtype", "int8"], ["int8", "bfloat16"]),
        (["--output", "video.avi"], [".avi", ".mp4"]),
        (["--quantize", "q9"], ["'q9'", "q8, q6", "mxfp8", "q4-g32"]),
        (["--quantize", "q8"], ["multiple of 64", "has 48"]),
        (["--image", "cat.png"], ["image was given to a t2v model", "it is for i2v, flf2v"]),
        (["--src_ref_images", "a.png,b.png"], ["src_ref_images was given to a t2v model", "it is for control, vace"]),
        (["--sample_step", "3"], ["--sample_step"]),
        (["--frames", "many"], ["many"]),
    ],
)
def test_wrong_argument_is_usage(capsys, folder, arguments, says):
    code, error = run(capsys, folder, *arguments)
    assert code == 2
    assert all(word in one_line(error) for word in says), error
    assert not (folder.parent / "out.npz").exists()


def test_no_model_explains_the_choices(capsys):
    assert main(["--prompt", "a cat", "--task", "t2v-1.3B"]) == 2
    error = one_line(capsys.readouterr().err)
    assert "t2v-1.3B" in error and "a hub id" in error and "`wan-mlx models`" in error


def test_no_prompt(capsys, folder):
    assert main(["--model", str(folder)]) == 2
    assert "--prompt is missing" in capsys.readouterr().err


def test_missing_folder_names_the_nearest(capsys, folder):
    code, error = run(capsys, folder.parent / "Wan2.1-tinny")
    assert code == 2 and "does not exist" in one_line(error) and "Wan2.1-tiny" in one_line(error)


@pytest.mark.parametrize(
    "name",
    ["diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth",
     "google/umt5-xxl/spiece.model"],
)  # fmt: skip
class TestFiles:
    def test_missing_file_is_named(self, capsys, folder, name):
        (folder / name).unlink()
        code, error = run(capsys, folder)
        assert code == 1 and name in one_line(error)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_truncated_file_is_named(self, capsys, folder, name, share):
        os.truncate(folder / name, int((folder / name).stat().st_size * share))
        code, error = run(capsys, folder)
        assert code == 1 and name.split("/")[-1] in one_line(error)
        assert not list(folder.parent.glob("out*"))


def test_wrong_shape_is_named(capsys, folder):
    state = torch.load(folder / "Wan2.1_VAE.pth")
    state["decoder.middle.0.residual.2.weight"] = torch.zeros(32, 31, 3, 3, 3)
    torch.save(state, folder / "Wan2.1_VAE.pth")
    code, error = run(capsys, folder)
    assert code == 1
    assert all(word in one_line(error) for word in ("decoder.middle.0.residual.2.weight", "(32, 3, 3, 3, 31)"))


def test_missing_and_extra_keys_are_named(capsys, folder):
    path = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    state = torch.load(path)
    del state["blocks.1.ffn.fc2.weight"]
    torch.save(state, path)
    code, error = run(capsys, folder)
    assert code == 1 and "blocks.1.ffn.fc2.weight" in one_line(error)
    state["blocks.1.ffn.fc2.weight"] = torch.zeros(24, 40)
    state["blocks.1.ffn.fc9.weight"] = torch.zeros(1)
    torch.save(state, path)
    code, error = run(capsys, folder)
    assert code == 1 and "blocks.1.ffn.fc9.weight" in one_line(error)


def test_config_that_contradicts_the_weights(capsys, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    code, error = run(capsys, folder)
    assert code == 1 and "num_layers = 3" in one_line(error) and "2" in one_line(error)


def test_hostile_pickle_runs_nothing(capsys, folder, tmp_path):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    torch.save({"conv1.weight": Hostile()}, folder / "Wan2.1_VAE.pth")
    code, error = run(capsys, folder)
    assert code == 1 and "system" in one_line(error)
    assert not canary.exists()


def test_output_is_not_overwritten_unasked(capsys, folder):
    output = folder.parent / "mine.npz"
    output.write_bytes(b"precious")
    code, error = run(capsys, folder, output=output)
    assert code == 2 and "--overwrite" in one_line(error) and output.read_bytes() == b"precious"
    code, _ = run(capsys, folder, "--overwrite", output=output)
    assert code == 0 and np.load(output)["frames"].shape == (5, 32, 32, 3)


def test_unwritable_output(capsys, folder):
    code, error = run(capsys, folder, output=folder.parent / "nowhere" / "out.mp4")
    assert code == 2 and "nowhere" in one_line(error)


def test_dry_run_writes_nothing(capsys, folder):
    code, error = run(capsys, folder, "--dry-run")
    assert code == 0 and "32x32, 5 frames" in error and "2 steps" in error
    assert not list(folder.parent.glob("out*"))


def test_debug_shows_the_traceback(folder):
    with pytest.raises(ValueError, match="frames is 6"):
        main(["--model", str(folder), "--prompt", "a cat", "--frames", "6", "--debug"])


def test_flags_without_meaning_are_said(capsys, folder):
    code, error = run(capsys, folder, "--t5_cpu", "--ulysses_size", "1", "--dry-run")
    assert code == 0 and "--t5_cpu has no effect" in error and "--ulysses_size has no effect" in error


def test_a_process_of_its_own(folder):
    """As a user runs it: exit code, stages on standard error, the path on standard output."""
    output = folder.parent / "out.mp4"
    command = [sys.executable, "-m", "wan_mlx.generate", "--model", str(folder), "--prompt", "a cat", "--size", "32x32",
               "--frames", "5", "--steps", "2", "--output", str(output)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(output) and output.stat().st_size > 0
    for stage in ("conditioning", "load transformer", "denoise", "decode"):
        assert stage in done.stderr
    assert "peak" in done.stderr


def test_missing_backend_is_one_line():
    blocked = "import sys; sys.modules['mlx'] = None; sys.modules['mlx.core'] = None; "
    done = subprocess.run(
        [sys.executable, "-c", blocked + "from wan_mlx.generate import main; sys.exit(main(['--prompt', 'a cat']))"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "install 'mlx[cpu]'" in one_line(done.stderr)
