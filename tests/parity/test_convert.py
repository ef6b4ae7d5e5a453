"""One MLX folder from any layout that loads: the same weights, so the same video."""

import json

import numpy as np
import pytest
import tiny
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from oracles import randomize
from transformers import UMT5Config, UMT5EncoderModel

import wan_mlx
from wan_mlx.weights.convert import convert
from weights_convert import main

VIDEO = dict(width=32, height=32, num_frames=5, steps=2, seed=1, shift=5, guidance_scale=5)


@pytest.fixture(scope="module")
def official_folder(tmp_path_factory):
    return tiny.write_official_folder(tmp_path_factory.mktemp("convert") / "official", tiny.networks(9))


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory):
    """Laid out as ``WanPipeline.save_pretrained`` does, with latent statistics of its own."""
    folder = tmp_path_factory.mktemp("convert") / "diffusers"
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=24, freq_dim=32, ffn_dim=80, num_layers=2
    )
    vae = AutoencoderKLWan(
        base_dim=8, dim_mult=[1, 2, 2, 2], latents_mean=[0.1 * i for i in range(16)], latents_std=[1.5] * 16
    )
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=120, d_model=24, d_kv=8, num_heads=4, num_layers=2, d_ff=40, dropout_rate=0.0)
    )
    for name, module in (("transformer", transformer), ("vae", vae), ("text_encoder", text)):
        randomize(module, seed=len(name))
        module.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/spiece.model").write_bytes(tiny.sentencepiece_model())
    (folder / "model_index.json").write_text("{}")
    return folder


def video_of(folder, dtype="float32"):
    return wan_mlx.WanPipeline.from_pretrained(folder, dtype=dtype, progress=False)("a cat", **VIDEO)


@pytest.mark.parametrize("layout", ["official_folder", "diffusers_folder"])
def test_converted_folder_gives_the_same_video(layout, request, tmp_path):
    folder = request.getfixturevalue(layout)
    want = video_of(folder)
    got = video_of(convert(folder, tmp_path / "mlx", dtype="float32"))
    assert np.array_equal(got.latents, want.latents) and np.array_equal(got.frames, want.frames)
    assert want.frames.std() > 5


def test_bfloat16_folder_equals_casting_at_load(official_folder, tmp_path):
    converted = convert(official_folder, tmp_path / "mlx")
    assert np.array_equal(video_of(converted, "bfloat16").frames, video_of(official_folder, "bfloat16").frames)


def test_diffusers_config_is_used(diffusers_folder, tmp_path):
    config = json.loads((convert(diffusers_folder, tmp_path / "mlx") / "config.json").read_text())
    assert config["vae"]["mean"][3] == pytest.approx(0.3) and config["vae"]["std"] == [1.5] * 16
    assert config["transformer"]["num_heads"] == 2 and config["text_encoder"]["max_distance"] == 128


def test_command_line(official_folder, tmp_path, capsys):
    out = tmp_path / "mlx"
    assert main([str(official_folder), str(out), "--model", "t2v-1.3B"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert json.loads((out / "config.json").read_text())["model"] == "t2v-1.3B"
    before = sorted(p.name for p in out.iterdir())
    assert main([str(official_folder), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2
    assert sorted(p.name for p in out.iterdir()) == before and not (tmp_path / "new").exists()


def test_a_failed_conversion_leaves_no_folder(official_folder, tmp_path):
    import shutil

    broken = shutil.copytree(official_folder, tmp_path / "broken")
    (broken / "Wan2.1_VAE.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(wan_mlx.WeightsError):
        convert(broken, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()
