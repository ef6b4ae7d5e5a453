"""One MLX folder from any layout that loads: the same weights, so the same video."""

import hashlib
import json
import re
import shlex
import shutil
import types

import numpy as np
import official_checkpoints as checkpoints
import pytest
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from hub_server import serving
from oracles import randomize
from transformers import UMT5Config, UMT5EncoderModel

import wan_mlx
from wan_mlx import storage as disk
from wan_mlx.cli import main as generate
from wan_mlx.files.open import open_weights
from wan_mlx.storage import fingerprint
from wan_mlx.weights.convert import convert
from weights_convert import main

SMALL_SHARD = 20_000  # bytes
VIDEO = dict(width=32, height=32, num_frames=5, steps=2, seed=1, shift=5, guidance_scale=5)


@pytest.fixture(scope="module")
def official_folder(tmp_path_factory):
    return checkpoints.write_official_folder(tmp_path_factory.mktemp("convert") / "official", checkpoints.networks(9))


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
    (folder / "tokenizer/spiece.model").write_bytes(checkpoints.sentencepiece_model())
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


@pytest.fixture(scope="module")
def sharded(official_folder, tmp_path_factory):
    """Split as a model of many gigabytes is."""
    return convert(official_folder, tmp_path_factory.mktemp("convert") / "sharded", "float32", shard_bytes=SMALL_SHARD)


def block_of(key: str) -> int:
    match = re.match(r"blocks\.(\d+)\.", key)
    return int(match[1]) if match else -1


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_blocks_lie_in_order_and_no_file_ends_within_one(sharded, component):
    files = sorted(sharded.glob(f"{component}-*.safetensors"))
    assert len(files) > 1 and files[0].name == f"{component}-00001-of-{len(files):05d}.safetensors"
    blocks = [[block_of(key) for key in json.loads(header_of(file))] for file in files]
    order = [number for file in blocks for number in file]
    assert order == sorted(order) and set(order) == {-1, 0, 1}, "each block once, in one piece"
    assert not any(set(a) & set(b) - {-1} for a, b in zip(blocks, blocks[1:], strict=False))
    sizes = [sum(info.nbytes for info in open_weights(file).tensors.values()) for file in files]
    for size, file in zip(sizes, files, strict=True):
        units = {block_of(key) if block_of(key) >= 0 else key for key in open_weights(file).tensors}
        assert size <= SMALL_SHARD or len(units) == 1
    index = json.loads((sharded / f"{component}.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)


def header_of(file) -> bytes:
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    del header["__metadata__"]
    return json.dumps({k: header[k] for k in sorted(header, key=lambda k: header[k]["data_offsets"])}).encode()


def test_a_sharded_folder_gives_the_same_video(official_folder, sharded):
    want, got = video_of(official_folder), video_of(sharded)
    assert np.array_equal(got.latents, want.latents) and np.array_equal(got.frames, want.frames)


def test_parts_of_a_folder_load_alone(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "parts")
    assert wan_mlx.load_transformer(folder, "float32").config.num_layers == checkpoints.DIT["num_layers"]
    assert wan_mlx.load_vae(folder).config.dim == checkpoints.VAE["dim"]
    assert wan_mlx.load_text_encoder(folder, "float32").config.dim == checkpoints.TEXT["dim"]


def test_the_folder_is_recognised_by_its_config(official_folder, sharded):
    config = json.loads((sharded / "config.json").read_text())
    assert config["wan_mlx"] == wan_mlx.__version__ and config["dtypes"]["transformer"].keys() == {"F32"}
    assert config["source"]["name"] == "official" and config["source"]["layouts"]["vae"] == "official"
    vae = official_folder / "Wan2.1_VAE.pth"
    assert config["source"]["fingerprints"]["vae"] == fingerprint(vae)["sha256"]
    written = {file.name for file in sharded.iterdir()} - {"config.json", "README.md"}
    assert set(config["files"]) == {name for name in written if not name.endswith(".index.json")}
    for name, digest in config["files"].items():
        assert hashlib.sha256((sharded / name).read_bytes()).hexdigest() == digest


def test_the_card_says_how_to_run_it(sharded, monkeypatch, capsys):
    card = (sharded / "README.md").read_text()
    (command,) = re.findall(r"wan-mlx (.*)", card)
    monkeypatch.chdir(sharded.parent)
    assert generate.main([*shlex.split(command), "--dry-run"]) == 0
    assert "sharded" in capsys.readouterr().err
    assert "base_model: Wan-AI" not in card and "pipeline_tag: text-to-video" in card


def interrupted(names):
    """A progress bar at whose middle Ctrl-C is pressed."""
    for count, name in enumerate(names):
        if count == len(names) // 2:
            raise KeyboardInterrupt
        yield name


def test_ctrl_c_leaves_nothing(official_folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert(official_folder, tmp_path / "mlx", progress=interrupted)
    assert not list(tmp_path.iterdir())


def test_overwrite_replaces_a_whole_folder_by_a_whole_one(official_folder, tmp_path):
    out = convert(official_folder, tmp_path / "mlx")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ValueError, match="exists already"):
        convert(official_folder, out, dtype="float32")
    with pytest.raises(KeyboardInterrupt):
        convert(official_folder, out, dtype="float32", progress=interrupted, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert convert(official_folder, out, dtype="float32", overwrite=True) == out
    assert (out / "transformer.safetensors").stat().st_size > len(before["transformer.safetensors"])
    assert list(tmp_path.iterdir()) == [out]
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="photos is no MLX folder, so it is not replaced"):
        convert(official_folder, tmp_path / "photos", overwrite=True)


def test_a_full_disk_is_reported_before_writing(official_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(wan_mlx.WeightsError, match=r"mlx needs \d.* and its disk has 1.0 KB free"):
        convert(official_folder, tmp_path / "mlx")
    assert not list(tmp_path.iterdir())


def test_a_hub_id_converts_and_keeps_its_preset(official_folder, tmp_path, monkeypatch, capsys):
    """Sizes are nearest to 1.3B; the repository's name says 14B."""
    files = {
        f.relative_to(official_folder).as_posix(): f.read_bytes() for f in official_folder.rglob("*") if f.is_file()
    }
    with serving({"Wan-AI/Wan2.1-T2V-14B": files}, monkeypatch, tmp_path):
        assert main(["Wan-AI/Wan2.1-T2V-14B", str(tmp_path / "mlx"), "--dtype", "float32", "--quiet"]) == 0
        assert "download  Wan-AI/Wan2.1-T2V-14B: 5 files" in capsys.readouterr().err
        pipe = wan_mlx.WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-14B", progress=False)
    config = json.loads((tmp_path / "mlx/config.json").read_text())
    assert config["model"] == "t2v-14B" and config["source"]["name"] == "Wan-AI/Wan2.1-T2V-14B"
    assert pipe.preset.name == "t2v-14B"
    assert np.array_equal(video_of(tmp_path / "mlx").frames, video_of(official_folder).frames)


def test_parts_given_apart(official_folder, tmp_path):
    """A transformer's own file and the rest from elsewhere become one folder."""
    source = official_folder / "diffusion_pytorch_model.safetensors"
    given = {"text_encoder": official_folder, "vae": official_folder / "Wan2.1_VAE.pth", "tokenizer": official_folder}
    flags = [word for part, place in given.items() for word in (f"--{part.replace('_', '-')}", str(place))]
    assert main([str(source), str(tmp_path / "mlx"), *flags, "--dtype", "float32", "--quiet"]) == 0
    files = json.loads((tmp_path / "mlx/config.json").read_text())["files"]
    whole = json.loads((convert(official_folder, tmp_path / "whole", "float32") / "config.json").read_text())["files"]
    assert files == whole


def test_a_failed_conversion_leaves_no_folder(official_folder, tmp_path):
    broken = shutil.copytree(official_folder, tmp_path / "broken")
    (broken / "Wan2.1_VAE.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(wan_mlx.WeightsError):
        convert(broken, tmp_path / "mlx")
    assert list(tmp_path.iterdir()) == [broken]
