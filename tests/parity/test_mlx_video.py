"""Folders of mlx-video: written here as its converter does, since it is on no package index."""

import json
import re

import mlx.core as mx
import numpy as np
import published
import pytest
from test_published import same, video_of

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.errors import WeightsError
from wan_mlx.weights.checkpoint import find_part, open_checkpoint
from wan_mlx.weights.inspect import inspect_source
from wan_mlx.weights.load import load_transformer, open_network

PACKED = re.compile(r"blocks\.\d+\.(?:(?:self|cross)_attn\.[qkvo]|ffn\.fc[12])\.weight")


def write(folder, states, packing: tuple[int, int] | None = None, dtype=mx.float32):
    """As its ``convert.py`` of wan_2: names, the VAE's turned convolutions, config.json; packed by MLX."""
    folder.mkdir()

    def save(name, arrays):
        mx.save_safetensors(str(folder / name), arrays)

    def array(tensor):
        return mx.array(tensor.float().numpy())

    transformer = {}
    for name, tensor in states["transformer"].items():
        name = re.sub(r"^(t\w+_embedding)\.(0|2)\.", lambda m: f"{m[1]}_{int(m[2]) // 2}.", name)
        name = re.sub(r"^patch_embedding\.", "patch_embedding_proj.", name)
        name = name.replace("time_projection.1.", "time_projection.")
        name = re.sub(r"\.ffn\.(0|2)\.", lambda m: f".ffn.fc{int(m[1]) // 2 + 1}.", name)
        transformer[name] = array(tensor.flatten(1) if tensor.ndim == 5 else tensor).astype(dtype)
    if packing:
        transformer["freqs"] = mx.zeros((1024, 64, 2))
        for name in [*filter(PACKED.fullmatch, transformer)]:
            arrays = mx.quantize(transformer[name], group_size=packing[1], bits=packing[0])
            places = (name, name.replace(".weight", ".scales"), name.replace(".weight", ".biases"))
            transformer |= zip(places, arrays, strict=True)
    save("model.safetensors", transformer)
    text = {n.replace(".gate.0.", ".gate_proj."): array(t).astype(dtype) for n, t in states["text_encoder"].items()}
    save("t5_encoder.safetensors", text)
    save("vae.safetensors", {
        name: array(tensor.movedim(1, -1) if "weight" in name and tensor.ndim >= 4 else tensor)
        for name, tensor in states["vae"].items()
    })  # fmt: skip
    config = dict(
        model_type="t2v", model_version="2.1", patch_size=[1, 2, 2], text_len=512, in_dim=16, out_dim=16, dim=128,
        ffn_dim=96, freq_dim=32, text_dim=32, num_heads=1, num_layers=2, window_size=[-1, -1], qk_norm=True,
        cross_attn_norm=True, eps=1e-6, vae_stride=[4, 8, 8], vae_z_dim=16, dual_model=False, boundary=0.0,
        sample_shift=5.0, sample_steps=50, sample_guide_scale=5.0, num_train_timesteps=1000, sample_fps=16,
        frame_num=81, t5_vocab_size=256384, t5_dim=4096, t5_num_layers=24, t5_num_buckets=32,
    )  # fmt: skip
    if packing:
        config["quantization"] = {"group_size": packing[1], "bits": packing[0]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def states():
    return published.states()


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    path.write_bytes(published.TOKENIZER)
    return path


@pytest.fixture(scope="module")
def folder(states, tmp_path_factory):
    return write(tmp_path_factory.mktemp("mlx-video") / "folder", states)


@pytest.fixture(scope="module")
def official(states, tmp_path_factory):
    return published.write_official(tmp_path_factory.mktemp("official") / "x", states)


def test_the_folder_and_each_file(folder, official, spiece, tmp_path):
    want = video_of(official)
    assert same(video_of(folder, tokenizer=spiece), want)
    for kind, name in {"transformer": "model", "text_encoder": "t5_encoder", "vae": "vae"}.items():
        plain, config = open_network(official, kind)
        for place in (folder, folder / f"{name}.safetensors"):
            weights, sizes = open_network(place, kind)
            assert sizes == config and weights.shapes == plain.shapes
            assert all(mx.array_equal(weights.read(key), plain.read(key)) for key in plain.shapes)
    assert main(["convert", str(folder), str(tmp_path / "mlx"), "--tokenizer", str(spiece), "--dtype", "float32",
                 "--quiet"]) == 0  # fmt: skip
    assert open_checkpoint(tmp_path / "mlx").missing() == []
    found = inspect_source(folder)
    assert found.is_sound and ("missing", "tokenizer") in found.rows
    with pytest.raises(WeightsError, match="missing tokenizer: add --tokenizer FILE .published: Wan-AI/"):
        open_checkpoint(folder)


@pytest.mark.parametrize("packing, dtype", [((4, 32), mx.bfloat16), ((8, 32), mx.float16), ((8, 32), mx.float32)])
def test_packed(states, spiece, tmp_path, packing, dtype):
    folder = write(tmp_path / "x", states, packing, dtype)
    weights, _ = open_network(folder, "transformer")
    stored = mx.load(str(folder / "model.safetensors"))
    assert len(weights.packings) == 20
    assert open_network(folder / "model.safetensors", "transformer")[0].packings == weights.packings
    for name in weights.packings:
        key = weights.sources[name][0].removesuffix("weight")
        arrays = [stored[key + end].astype(mx.float32) for end in ("scales", "biases")]
        want = mx.dequantize(stored[key + "weight"], *arrays, group_size=packing[1], bits=packing[0])
        assert mx.array_equal(weights.read(name), want)
    rng = np.random.default_rng(1)
    latents, context = (mx.array(rng.standard_normal(shape, dtype=np.float32)) for shape in
                        ((1, 2, 4, 4, 16), (1, 512, 32)))  # fmt: skip
    whole, packed, streamed = (
        load_transformer(folder, "float32", quantize=quantize, stream=stream)(latents, mx.array([500.0]), context)
        for quantize, stream in (("none", False), (None, False), (None, True))
    )
    assert mx.array_equal(packed, streamed)
    assert np.abs(np.array(packed) - np.array(whole)).max() < 5e-6 * np.abs(np.array(whole)).max()
    for mode in (None, "none"):
        pipe = wan_mlx.WanPipeline.from_pretrained(folder, tokenizer=spiece, quantize=mode, progress=False)
        assert pipe.quantized == ({} if mode else {"transformer": f"q{packing[0]}-g32"})


def test_what_is_refused(states, folder, tmp_path):
    """Without its config.json nothing tells that the VAE's axes were turned, and nothing is guessed."""
    for name in ("vae", "model"):
        (tmp_path / f"{name}.safetensors").write_bytes((folder / f"{name}.safetensors").read_bytes())
    with pytest.raises(WeightsError, match="channels last under the official names, .* says so; give") as error:
        wan_mlx.load_vae(tmp_path / "vae.safetensors")
    assert "\n" not in str(error.value)
    load_transformer(tmp_path / "model.safetensors")
    packed = write(tmp_path / "packed", states, (4, 32))
    config = json.loads((packed / "config.json").read_text())
    for entry in (3, {"bits": 9, "group_size": 32}, {"bits": 4}):
        (packed / "config.json").write_text(json.dumps(config | {"quantization": entry}))
        with pytest.raises(WeightsError, match="mlx-video's config.json says quantization"):
            find_part(packed, "transformer")
    (packed / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 8, "group_size": 32}}))
    with pytest.raises(WeightsError, match=r"q.scales is .*; q8-g32 of .* needs"):
        load_transformer(packed)
    del config["quantization"]
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="40 of 110 keys that Wan does not have: blocks.0.cross_attn.k.biases"):
        load_transformer(packed)
