"""A whole model in one file, as ComfyUI's node CheckpointSave writes it, and the files of its node CLIPSave."""

import json
import shutil

import mlx.core as mx
import numpy as np
import published
import pytest
from oracles import torch
from safetensors.torch import load_file, save_file
from test_published import VIDEO, same, video_of

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.errors import WeightsError
from wan_mlx.files.sentencepiece import read_tokenizer
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.component import open_component
from wan_mlx.weights.inspect import inspect_source
from wan_mlx.weights.load import load_transformer

NETWORKS = ("transformer", "text_encoder", "vae")


@pytest.fixture(scope="module")
def states():
    """In the names that ComfyUI uses."""
    states = published.states()
    states["text_encoder"] = published.hf_text_encoder(states["text_encoder"])
    states["image_encoder"] = published.hf_image_encoder(states["image_encoder"])
    return states


@pytest.fixture(scope="module")
def apart(states, tmp_path_factory):
    """One file for each network."""
    folder = tmp_path_factory.mktemp("apart")
    for kind in NETWORKS:
        published.comfyui_file(folder / f"{kind}.safetensors", states[kind], tokenizer=kind == "text_encoder")
    return folder


@pytest.fixture(scope="module")
def whole(states, tmp_path_factory):
    networks = {kind: states[kind] for kind in NETWORKS}
    return published.checkpoint_save(tmp_path_factory.mktemp("whole") / "all.safetensors", networks)


@pytest.fixture(scope="module")
def want(apart):
    return video_of(apart)


def values_of(path, kind):
    weights = open_component(path, kind)
    return {name: np.array(weights.read(name).astype(mx.float32)) for name in weights.shapes}


def assert_same_weights(path, plain, kind):
    got, expected = values_of(path, kind), values_of(plain, kind)
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def refused(*arguments) -> str:
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_file_is_the_whole_model(whole, want, apart, tmp_path):
    assert same(video_of(whole), want)
    assert set(open_checkpoint(whole).files.values()) == {whole} and open_checkpoint(whole).missing() == []
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    shutil.copy(whole, folder / "some name.bin")
    assert same(video_of(tmp_path), want)  # a folder in which it lies, as ComfyUI's models


def test_each_part_is_taken_from_it(whole, apart, want):
    dit, vae = apart / "transformer.safetensors", apart / "vae.safetensors"
    assert same(video_of(dit, text_encoder=whole, vae=whole, tokenizer=whole), want)
    assert same(video_of(apart, transformer=whole, vae=whole), want)
    assert open_checkpoint(whole, {"vae": vae}).files["vae"] == vae
    assert read_tokenizer(whole) == published.TOKENIZER
    for kind, load in (("transformer", load_transformer), ("vae", wan_mlx.load_vae)):
        assert load(whole).source.weights.component == kind
    wan_mlx.load_text_encoder(whole)


def test_a_part_given_apart_wins(whole, states, apart, want, tmp_path):
    other = {name: tensor + 0.01 for name, tensor in states["vae"].items()}
    replaced = video_of(whole, vae=published.comfyui_file(tmp_path / "x.safetensors", other))
    assert np.array_equal(replaced.latents, want.latents) and not np.array_equal(replaced.frames, want.frames)


def test_it_streams_and_plans(whole, apart):
    rng = np.random.default_rng(1)
    latents = mx.array(rng.standard_normal((1, 2, 4, 4, 16), dtype=np.float32))
    context = mx.array(rng.standard_normal((1, 512, 32), dtype=np.float32))
    plain = load_transformer(apart / "transformer.safetensors", "float32")
    for stream in (False, True):
        model = load_transformer(whole, "float32", stream=stream)
        assert mx.array_equal(model(latents, mx.array([500.0]), context), plain(latents, mx.array([500.0]), context))
    pipes = [wan_mlx.WanPipeline.from_pretrained(model, progress=False) for model in (whole, apart)]
    one, several = (pipe.plan(pipe.request("a cat", **VIDEO)) for pipe in pipes)
    assert one.rows == several.rows
    weights = open_component(whole, "transformer")
    places = weights.byte_ranges(weights.sources)
    assert places is not None and {place.file.path for place in places.values()} == {whole}


def test_some_parts_only(whole, states, apart, tmp_path):
    networks = {kind: states[kind] for kind in ("transformer", "vae")}
    path = published.checkpoint_save(tmp_path / "a.safetensors", networks)
    line = refused(path)
    assert line.startswith(f"{path} holds transformer, vae; missing text_encoder, tokenizer: add --text-encoder FILE")
    assert open_checkpoint(path, {"text_encoder": apart}).missing() == []
    assert "holds transformer, vae, expected a text_encoder" in refused(apart, {"text_encoder": path})
    networks = {kind: states[kind] for kind in NETWORKS}
    path = published.checkpoint_save(tmp_path / "b.safetensors", networks, tokenizer=False)
    assert "missing tokenizer: add --tokenizer FILE" in refused(path)
    assert open_checkpoint(path, {"tokenizer": whole}).files["tokenizer"] == whole


def test_a_part_that_is_not_known_matters_only_where_it_is_used(states, apart, tmp_path):
    """Another model's text encoder, and keys of no network."""
    other = {"transformer": states["transformer"], "text_encoder": {"model.embed.weight": torch.ones(2)}}
    path = published.checkpoint_save(tmp_path / "a.safetensors", other, tokenizer=False)
    with pytest.raises(WeightsError, match="keys of no known network: text_encoders.umt5xxl.logit_scale, text"):
        wan_mlx.load_text_encoder(path)
    assert open_checkpoint(path, {"text_encoder": apart, "vae": apart}).missing() == []
    odd = {kind: states[kind] for kind in NETWORKS} | {"image_encoder": {"audio.weight": torch.ones(2)}}
    path = published.checkpoint_save(tmp_path / "b.safetensors", odd)
    with pytest.raises(WeightsError, match="as a transformer it holds unexpected audio.weight"):
        load_transformer(path)


def test_images_and_their_encoder(states, tmp_path):
    """As the node ImageOnlyCheckpointSave writes it: CLIP's vision tower without a prefix."""
    networks = {kind: states[kind] for kind in ("transformer", "vae", "image_encoder")}
    networks["image_encoder"] = networks["image_encoder"] | {"visual_projection.weight": torch.ones(2, 80)}
    path = published.checkpoint_save(tmp_path / "a.safetensors", networks)
    plain = published.comfyui_file(tmp_path / "b.safetensors", states["image_encoder"])
    assert_same_weights(path, plain, "image_encoder")


@pytest.mark.parametrize("scaled", ["transformer", "text_encoder"])
@pytest.mark.parametrize("dialect", ["marker", "comfy_quant", "metadata"])
def test_fp8_of_one_network_is_not_held_against_another(states, apart, tmp_path, scaled, dialect):
    """One network is scaled fp8, the others plain fp8, half precision and float32."""
    networks = {kind: dict(states[kind]) for kind in NETWORKS}
    plain = "text_encoder" if scaled == "transformer" else "transformer"
    networks[plain] = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in networks[plain].items()}
    networks["vae"] = {name: tensor.half() for name, tensor in networks["vae"].items()}
    state = {name.replace("encoder.block.", "blocks."): tensor for name, tensor in networks[scaled].items()}
    stored, _ = published.scaled_fp8(state, "comfy_quant" if dialect == "metadata" else dialect)
    networks[scaled] = {
        name.replace("blocks.", "encoder.block.") if scaled == "text_encoder" else name: tensor
        for name, tensor in stored.items()
    }
    path = published.checkpoint_save(tmp_path / "all.safetensors", networks)
    if dialect == "metadata":
        whole = load_file(path)
        layers = {key.removesuffix(".comfy_quant") for key in whole if key.endswith(".comfy_quant")}
        about = {layer: {"format": "float8_e4m3fn"} for layer in layers}
        about["vae.encoder.conv1"] = {"format": "a format of tomorrow"}
        whole = {key: tensor for key, tensor in whole.items() if not key.endswith(".comfy_quant")}
        save_file(whole, path, {"_quantization_metadata": json.dumps({"layers": about})})
    for kind in NETWORKS:
        alone = published.comfyui_file(tmp_path / f"{kind}.safetensors", networks[kind])
        assert_same_weights(path, alone, kind)


def test_inspected_and_converted(whole, want, tmp_path, capsys):
    found = inspect_source(whole)
    rows = dict(row for row in found.rows if row[0])
    assert found.is_sound and rows["missing"] == "nothing: a whole model"
    assert all(kind.replace("_", " ") in rows for kind in (*NETWORKS, "tokenizer"))
    assert main(["convert", str(whole), str(tmp_path / "mlx"), "--dtype", "float32", "--quiet"]) == 0
    assert same(video_of(tmp_path / "mlx"), want)


# --- the files of the node CLIPSave


def test_a_text_encoder_and_its_tokenizer_in_two_files(states, apart, want, tmp_path):
    text = states["text_encoder"] | {"logit_scale": torch.tensor(4.6055)}
    path = published.comfyui_file(tmp_path / "ComfyUI_umt5xxl_00001_.safetensors", text)
    parts = {"text_encoder": path, "vae": apart}
    assert "missing tokenizer" in refused(apart / "transformer.safetensors", parts)
    pieces = torch.frombuffer(bytearray(published.TOKENIZER), dtype=torch.uint8)
    save_file({"spiece_model": pieces}, tmp_path / "ComfyUI_00001_.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08" + bytes(7) + b"{")
    dit = apart / "transformer.safetensors"
    assert open_checkpoint(dit, parts).files["tokenizer"].name == "ComfyUI_00001_.safetensors"
    assert same(video_of(dit, text_encoder=tmp_path, vae=apart), want)
