"""Weights and configurations that would give a wrong video are refused in one line, and their neighbours are not."""

import json
import shutil

import mlx.core as mx
import pytest

from wan_mlx.cli.main import main
from wan_mlx.errors import WeightsError
from wan_mlx.presets import BUNDLED
from wan_mlx.weights.convert import convert
from wan_mlx.weights.load import load_text_encoder, load_transformer, load_vae

RUN = ["--prompt", "a", "--size", "32x32", "--frames", "1", "--steps", "1", "--quiet"]


@pytest.fixture
def nano(tmp_path):
    return shutil.copytree(BUNDLED["nano"], tmp_path / "nano")


def change(folder, kind, names, rows=slice(None)):
    """Make rows of tensors zero."""
    path = folder / f"{kind}.safetensors"
    arrays, metadata = mx.load(str(path), return_metadata=True)
    for name in names:
        arrays[name][rows] = 0
    mx.eval(arrays)
    path.unlink()
    mx.save_safetensors(str(path), arrays, metadata)


def use_text(folder):
    encoder = load_text_encoder(folder, "float32")
    mx.eval(encoder([[3, 4, 5]]))


def use_streamed(folder):
    blocks = load_transformer(folder, "float32", stream=True).blocks
    return [len(block.parameters()) for block in blocks([f"blocks.{i}" for i in range(6)])]


@pytest.mark.parametrize(
    "kind, name, load",
    [
        ("transformer", "blocks.3.ffn.0.weight", load_transformer),
        ("transformer", "patch_embedding.weight", load_transformer),
        ("transformer", "blocks.5.self_attn.q.weight", use_streamed),
        ("transformer", "blocks.5.cross_attn.k.weight", lambda folder: load_transformer(folder, quantize="q4")),
        ("vae", "decoder.conv1.weight", load_vae),
        ("text_encoder", "blocks.1.ffn.fc2.weight", use_text),
        ("text_encoder", "token_embedding.weight", use_text),
    ],
)
def test_a_matrix_of_zeros_is_refused(nano, kind, name, load):
    """As a download tool leaves it that reserves the whole file first."""
    load(nano)
    change(nano, kind, [name])
    with pytest.raises(WeightsError, match=rf"{kind}.safetensors: {name} holds only zeros") as error:
        load(nano)
    assert "\n" not in str(error.value)


def test_what_may_be_zero_is_loaded(nano):
    """Biases, norms, a few rows of a matrix, and matrices that are zero before the first step of training."""
    names = ["blocks.0.ffn.0.bias", "blocks.0.norm3.weight", "head.head.weight", "blocks.0.modulation"]
    change(nano, "transformer", names)
    change(nano, "transformer", ["blocks.1.ffn.0.weight"], slice(None, None, 160))  # the rows that are looked at first
    change(nano, "vae", ["decoder.middle.1.proj.weight", "decoder.conv1.bias"])
    load_transformer(nano), use_streamed(nano), load_vae(nano)


@pytest.mark.parametrize("mode", ["q8", "mxfp8"])
def test_packed_zeros_are_refused(tmp_path, mode):
    folder = convert(BUNDLED["nano"], tmp_path / "mlx", quantize=mode)
    stem = "blocks.2.self_attn.v"
    packed = [f"{stem}.{key}" for key in ("weight", "scales", "biases") if mode == "q8" or key != "biases"]
    use_streamed(folder)
    change(folder, "transformer", packed)
    for load in (load_transformer, use_streamed):
        with pytest.raises(WeightsError, match=rf"{stem}.weight holds only zeros"):
            load(folder)


def test_a_run_with_zeros_fails_in_one_line(nano, tmp_path, capsys):
    change(nano, "transformer", [f"blocks.{i}.ffn.2.weight" for i in range(6)])
    assert main(["--model", str(nano), *RUN, "--output", str(tmp_path / "a.png")]) == 1
    size, error = capsys.readouterr().err.splitlines()
    assert "learned to draw at" in size and "blocks.0.ffn.2.weight holds only zeros" in error
    with pytest.raises(WeightsError, match="only zeros"):
        convert(nano, tmp_path / "mlx")
    assert not (tmp_path / "a.png").exists() and not (tmp_path / "mlx").exists()


@pytest.mark.parametrize("std", [[0.0] + [1.0] * 15, [1.0] * 15 + [-1]])
def test_a_std_that_is_not_above_zero_is_refused(nano, tmp_path, capsys, std):
    config = json.loads((nano / "config.json").read_text())
    config["vae"]["std"] = std
    (nano / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="std = .*, expected numbers above 0") as error:
        load_vae(nano)
    assert "\n" not in str(error.value)
    assert main(["--model", str(nano), *RUN, "--output", str(tmp_path / "a.png")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
