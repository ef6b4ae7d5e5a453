"""``weights_convert.py --inspect``: what it says is what was written."""

import json
import shutil

import published
import pytest
from oracles import torch
from safetensors.torch import load_file, save_file

from wan_mlx.weights.inspect import inspect_source
from weights_convert import main


@pytest.fixture(scope="module")
def states():
    return published.states()


@pytest.fixture
def official_folder(states, tmp_path):
    return published.write_official(tmp_path / "official", states)


def inspect(capsys, *arguments) -> tuple[int, dict[str, str], str]:
    """Exit code, the lines by what they begin with, and what went to stderr."""
    code = main([*map(str, arguments), "--inspect"])
    out, error = capsys.readouterr()
    rows, name = {}, ""
    for line in out.splitlines():
        name = line[:15].strip() or name
        rows[name] = " | ".join(filter(None, [rows.get(name), line[15:]]))
    return code, rows, error


def test_official_folder(capsys, official_folder):
    code, rows, _ = inspect(capsys, official_folder)
    assert code == 0 and rows["source"] == f"{official_folder} (official)"
    assert rows["model"] == "text to video, of no released size"
    assert "2 layers of 128, 1 heads" in rows["transformer"] and "official names" in rows["transformer"]
    nbytes = sum(t.numel() for t in load_file(official_folder / "diffusion_pytorch_model.safetensors").values()) * 4
    assert f"{nbytes / 1e6:.1f} MB: F32 {nbytes / 1e6:.1f} MB" in rows["transformer"]
    assert "umT5 encoder, 2 layers of 32" in rows["text encoder"] and "16 latent channels" in rows["vae"]
    assert rows["tokenizer"].startswith("google/umt5-xxl/spiece.model, ") and rows["missing"].startswith("nothing")
    assert "quantised" not in rows["transformer"]


def test_mixed_set(capsys, states, tmp_path):
    stored, _ = published.scaled_fp8(states["transformer"], "per row")
    dit = published.comfyui_file(tmp_path / "dit.safetensors", stored, "model.diffusion_model.")
    text = published.gguf_text_encoder(states["text_encoder"])
    published.gguf_file(tmp_path / "text.gguf", text, "Q8_0", tokenizer=published.TOKENIZER)
    code, rows, _ = inspect(capsys, dit, "--text-encoder", tmp_path / "text.gguf")
    assert code == 0 and rows["missing"] == "vae"
    assert "quantised: F8_E4M3 20 tensors, one scale per row" in rows["transformer"]
    assert "gguf names" in rows["text encoder"] and "quantised: Q8_0 15 tensors" in rows["text encoder"]
    assert rows["tokenizer"].startswith(f"{tmp_path / 'text.gguf'}, ")


def test_converted_and_packed(capsys, official_folder, tmp_path):
    assert main([str(official_folder), str(tmp_path / "mlx"), "--quantize", "q8-g32", "--quiet"]) == 0
    capsys.readouterr()
    code, rows, _ = inspect(capsys, tmp_path / "mlx")
    assert code == 0 and "(mlx)" in rows["source"] and "quantised: q8-g32, 20 matrices" in rows["transformer"]
    assert "U32" in rows["transformer"] and "BF16" in rows["text encoder"]


def test_models_of_the_same_shapes_are_all_named():
    from test_full_size_keys import HeaderOnly
    from test_layouts import PRESETS, official_transformer

    from wan_mlx.weights.component import ComponentWeights
    from wan_mlx.weights.configs import network_config
    from wan_mlx.weights.inspect import WORDS, _model_of

    weights = ComponentWeights(HeaderOnly(official_transformer(PRESETS["i2v-14B-480P"].transformer)))
    config = network_config(weights, {})
    assert WORDS["transformer"].format(c=config) == "40 layers of 5120, 40 heads"
    assert "image to video, i2v-14B-480P or i2v-14B-720P" in _model_of(config, None, 1)


def test_a_damaged_network_is_reported_and_fails(capsys, states, tmp_path):
    state = {name: tensor for name, tensor in states["transformer"].items() if name != "head.head.bias"}
    code, rows, _ = inspect(capsys, published.comfyui_file(tmp_path / "x.safetensors", state))
    assert code == 1 and "cannot be loaded" in rows["transformer"] and "lacks head.head.bias" in rows["transformer"]
    assert rows["missing"] == "text encoder, vae, tokenizer"


def test_exit_codes(capsys, official_folder, tmp_path):
    assert inspect(capsys, tmp_path / "nowhere")[0] == 2
    other = tmp_path / "x.safetensors"
    save_file({"lora_unet_blocks_0_ffn_0.lora_down.weight": torch.ones(1)}, other)
    code, _, error = inspect(capsys, other)
    assert code == 1 and error.count("\n") == 1 and "a LoRA or another adapter" in error
    assert main([str(official_folder)]) == 2 and main([str(official_folder), "out", "--inspect"]) == 2
    assert not (tmp_path / "out").exists()


def test_inspection_reads_headers_only(official_folder, tmp_path):
    """Zeroed data changes nothing."""
    want = inspect_source(official_folder).lines()
    path = official_folder / "diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:length] + bytes(len(data) - length))
    assert inspect_source(official_folder).lines() == want


def test_a_tokenizer_that_is_none(capsys, official_folder):
    (official_folder / "google/umt5-xxl/spiece.model").write_bytes(b"hello")
    code, rows, _ = inspect(capsys, official_folder)
    assert code == 0 and "cannot be read" in rows["tokenizer"]


def test_inspection_downloads_nothing(capsys, monkeypatch):
    class Download:
        missing = 5

        def __str__(self):
            return "owner/name: 1 file"

    monkeypatch.setattr("wan_mlx.hub.resolve.Places.downloads", lambda self, hub: [Download()])
    assert main(["owner/name", "--inspect"]) == 0
    assert capsys.readouterr().out == "not on this machine: owner/name: 1 file\n"


def test_config_of_another_size(capsys, official_folder):
    config = json.loads((official_folder / "config.json").read_text()) | {"num_layers": 7}
    (official_folder / "config.json").write_text(json.dumps(config))
    code, rows, _ = inspect(capsys, official_folder)
    assert code == 1 and "config.json says num_layers = 7" in rows["transformer"]
    shutil.rmtree(official_folder)
