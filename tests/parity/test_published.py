"""Every published form of the same tiny model gives the same video: exactly, or that of the values it stores."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import published
import pytest
from oracles import relative_error, torch

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.cli.summary import origins
from wan_mlx.errors import WeightsError
from wan_mlx.files.open import open_weights
from wan_mlx.presets import PRESETS, preset_for
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.component import ComponentWeights
from wan_mlx.weights.parts import Checkpoint, Part

VIDEO = dict(width=32, height=32, num_frames=5, steps=2, seed=1, shift=5, guidance_scale=5)
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")


@pytest.fixture(scope="module")
def states():
    return published.states()


@pytest.fixture(scope="module")
def official_folder(states, tmp_path_factory):
    return published.write_official(tmp_path_factory.mktemp("published") / "official", states)


@pytest.fixture(scope="module")
def comfyui(states, tmp_path_factory):
    """ComfyUI's repository: float32, its names telling nothing."""
    folder = tmp_path_factory.mktemp("published") / "split_files"
    published.comfyui_file(folder / "diffusion_models/a.safetensors", states["transformer"], PREFIXES[1])
    text = published.hf_text_encoder(states["text_encoder"])
    published.comfyui_file(folder / "text_encoders/b.safetensors", text, tokenizer=True)
    published.comfyui_file(folder / "vae/c.safetensors", states["vae"])
    return folder


@pytest.fixture(scope="module")
def want(official_folder):
    return video_of(official_folder)


def video_of(model, **parts):
    return wan_mlx.WanPipeline.from_pretrained(model, dtype="float32", progress=False, **parts)("a cat", **VIDEO)


def same(video, want) -> bool:
    return np.array_equal(video.latents, want.latents) and np.array_equal(video.frames, want.frames)


def values_of(path) -> dict[str, np.ndarray]:
    weights = ComponentWeights(open_weights(path))
    return {name: np.array(weights.read(name).astype(mx.float32)) for name in weights.shapes}


def ours(state, path):
    """The official ``state`` as ComponentWeights gives it: channels last, singleton axes as there."""
    shapes = ComponentWeights(open_weights(path)).shapes
    arrays = {name: state[name].float() for name in shapes}
    return {
        name: (tensor.movedim(1, -1) if tensor.ndim >= 4 and not name.endswith("gamma") else tensor)
        .reshape(shapes[name])
        .numpy()
        for name, tensor in arrays.items()
    }


def assert_holds(path, state):
    got, expected = values_of(path), ours(state, path)
    assert got.keys() == state.keys()
    for name, values in got.items():
        assert np.array_equal(values, expected[name]), name


# --- whole sets


def test_comfyui_folder(comfyui, want):
    assert same(video_of(comfyui), want)


def test_comfyui_root_and_flat_folder(comfyui, tmp_path, want):
    for n, file in enumerate(sorted(comfyui.rglob("*.safetensors"))):
        shutil.copy(file, tmp_path / f"{n}.bin")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "other.json").write_text("{}")
    assert same(video_of(tmp_path), want)
    assert open_checkpoint(comfyui.parent).files == open_checkpoint(comfyui).files


def test_part_by_part(comfyui, official_folder, want):
    dit = comfyui / "diffusion_models/a.safetensors"
    text, vae = comfyui / "text_encoders/b.safetensors", comfyui / "vae/c.safetensors"
    assert same(video_of(dit, text_encoder=text, vae=vae), want)
    # a folder may be given for a part, a tokenizer apart, and a .pth
    spiece = official_folder / "google/umt5-xxl/spiece.model"
    assert same(video_of(dit, text_encoder=official_folder, vae=official_folder / "Wan2.1_VAE.pth"), want)
    assert same(video_of(dit, text_encoder=text, vae=comfyui / "vae", tokenizer=spiece), want)


def test_a_part_of_a_folder_can_be_replaced(comfyui, official_folder, states, tmp_path, want):
    assert same(video_of(official_folder, transformer=comfyui / "diffusion_models"), want)
    other = {name: tensor + 0.01 for name, tensor in states["vae"].items()}
    replaced = video_of(official_folder, vae=published.comfyui_file(tmp_path / "x.safetensors", other))
    assert np.array_equal(replaced.latents, want.latents) and not np.array_equal(replaced.frames, want.frames)


def test_gguf_set(states, tmp_path, comfyui, want):
    published.gguf_file(tmp_path / "dit.gguf", states["transformer"], "F32", arch="pig")
    text = published.gguf_text_encoder(states["text_encoder"])
    published.gguf_file(tmp_path / "text.gguf", text, "F32", tokenizer=published.TOKENIZER, arch="t5encoder")
    vae = comfyui / "vae/c.safetensors"
    assert same(video_of(tmp_path / "dit.gguf", text_encoder=tmp_path / "text.gguf", vae=vae), want)
    assert same(video_of(tmp_path, vae=vae), want)


def test_converted_and_taken_apart(comfyui, tmp_path, want):
    from weights_convert import main as convert

    assert convert([str(comfyui), str(tmp_path / "mlx"), "--dtype", "float32"]) == 0
    assert same(video_of(tmp_path / "mlx"), want)
    assert same(video_of(comfyui, transformer=tmp_path / "mlx", text_encoder=tmp_path / "mlx"), want)
    assert same(video_of(tmp_path / "mlx/transformer.safetensors", text_encoder=comfyui, vae=comfyui), want)


def test_gguf_set_converted(states, comfyui, tmp_path):
    """Every kind of file the converter takes part by part; unpacked, it is the video of the values that are stored."""
    from weights_convert import main as convert

    true = published.gguf_file(tmp_path / "dit.gguf", states["transformer"], "Q5_1")
    text = published.gguf_text_encoder(states["text_encoder"])
    published.gguf_file(tmp_path / "text.gguf", text, "F32", tokenizer=published.TOKENIZER)
    parts = ["--text-encoder", str(tmp_path / "text.gguf"), "--vae", str(comfyui), "--dtype", "float32"]
    out = str(tmp_path / "mlx")
    assert convert([str(tmp_path / "dit.gguf"), out, *parts, "--quantize", "none", "--quiet"]) == 0
    plain = published.comfyui_file(tmp_path / "plain/true.safetensors", true)
    assert same(video_of(out), video_of(plain, text_encoder=tmp_path / "text.gguf", vae=comfyui))


def test_packed_parts(comfyui, tmp_path):
    from weights_convert import main as convert

    assert convert([str(comfyui), str(tmp_path / "mlx"), "--dtype", "float32", "--quantize", "q8-g32"]) == 0
    packed = video_of(tmp_path / "mlx")
    assert same(video_of(comfyui, transformer=tmp_path / "mlx", text_encoder=tmp_path / "mlx"), packed)
    assert not np.array_equal(packed.latents, video_of(comfyui).latents)
    (tmp_path / "mlx/transformer.safetensors").rename(tmp_path / "alone.safetensors")
    assert same(video_of(tmp_path / "alone.safetensors", text_encoder=tmp_path / "mlx", vae=comfyui), packed)


# --- single forms


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_transformer_dtypes(states, tmp_path, prefix, dtype):
    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in states["transformer"].items()}
    assert_holds(published.comfyui_file(tmp_path / "x.safetensors", state, prefix), state)


@pytest.mark.parametrize("dialect", ["marker", "weight_scale", "comfy_quant", "per row"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_scaled_fp8(states, tmp_path, dialect, dtype):
    for component, prefix in (("transformer", PREFIXES[1]), ("text_encoder", "")):
        stored, true = published.scaled_fp8(states[component], dialect, dtype)
        if component == "transformer":
            assert_holds(published.comfyui_file(tmp_path / "x.safetensors", stored, prefix), true)
        else:
            hf = published.hf_text_encoder(states[component])
            stored, true = published.scaled_fp8(
                {k.replace("encoder.block.", "blocks."): v for k, v in hf.items()}, dialect
            )
            stored = {k.replace("blocks.", "encoder.block."): v for k, v in stored.items()}
            path = published.comfyui_file(tmp_path / "y.safetensors", stored, tokenizer=True)
            true = {k.replace("blocks.", "encoder.block."): v for k, v in true.items()}
            weights = ComponentWeights(open_weights(path))
            for name, (source,) in weights.sources.items():
                assert np.array_equal(np.array(weights.read(name)), true[source].numpy()), name


def test_scaled_fp8_set_gives_the_video_of_its_true_values(states, official_folder, tmp_path):
    stored, true = published.scaled_fp8(states["transformer"], "marker")
    dit = published.comfyui_file(tmp_path / "x.safetensors", stored)
    whole = published.comfyui_file(tmp_path / "true.safetensors", true)
    got, expected = (video_of(official_folder, transformer=path) for path in (dit, whole))
    assert same(got, expected)
    assert relative_error(got.latents, video_of(official_folder).latents) < 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_vae_and_clip_dtypes(states, tmp_path, dtype):
    kept = getattr(torch, dtype)
    vae = {name: tensor.to(kept) for name, tensor in states["vae"].items()}
    assert_holds(published.comfyui_file(tmp_path / "vae.safetensors", vae), vae)
    hf = {name: tensor.to(kept) for name, tensor in published.hf_image_encoder(states["image_encoder"]).items()}
    path = published.comfyui_file(tmp_path / "clip.safetensors", hf)
    weights = ComponentWeights(open_weights(path))
    visual = {name.removeprefix("visual."): value for name, value in states["image_encoder"].items()}
    for name in weights.shapes:
        expected = visual[name].to(kept).float()
        expected = (expected.movedim(1, -1) if expected.ndim == 4 else expected).reshape(weights.shapes[name])
        assert np.array_equal(np.array(weights.read(name).astype(mx.float32)), expected.numpy()), name
    wan_mlx.load_image_encoder(path)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_gguf_types(states, tmp_path, dtype):
    for prefix in PREFIXES[:2]:
        true = published.gguf_file(tmp_path / "x.gguf", states["transformer"], dtype, prefix)
        assert_holds(tmp_path / "x.gguf", true)
    weights = ComponentWeights(open_weights(tmp_path / "x.gguf"))
    assert ("blocks.1.ffn.0.weight" in weights.nearest) == (dtype not in ("F32", "F16", "BF16"))
    assert not weights.nearest.keys() & {"patch_embedding.weight", "blocks.0.modulation"}
    text = published.gguf_text_encoder(states["text_encoder"])
    true = published.gguf_file(tmp_path / "y.gguf", text, dtype, tokenizer=published.TOKENIZER)
    weights = ComponentWeights(open_weights(tmp_path / "y.gguf"))
    embedding = true["token_embd.weight"].numpy()
    rows = weights.rows("token_embedding.weight", np.array([7, 3, 7]))
    assert np.array_equal(np.array(rows.astype(mx.float32)), embedding[[7, 3, 7]])
    wan_mlx.load_text_encoder(tmp_path / "y.gguf")


def test_gguf_of_four_axes(states, tmp_path):
    """As stable-diffusion.cpp writes the patch embedding: its outputs and inputs are one axis."""
    state = states["transformer"]
    merged = state | {"patch_embedding.weight": state["patch_embedding.weight"].flatten(0, 1)}
    published.gguf_file(tmp_path / "x.gguf", merged, "F32", PREFIXES[1], arch="")
    assert_holds(tmp_path / "x.gguf", state)


@pytest.mark.parametrize("shape", [(128, 64), (128 * 64,), (128 * 16, 4), (128, 16, 2, 2)])
def test_gguf_of_a_flattened_patch_embedding(states, tmp_path, shape):
    """All its numbers are there, and the order is PyTorch's, as always in GGUF."""
    state = states["transformer"]
    flat = state | {"patch_embedding.weight": state["patch_embedding.weight"].reshape(shape)}
    published.gguf_file(tmp_path / "x.gguf", flat, "F32")
    assert_holds(tmp_path / "x.gguf", state)
    with pytest.raises(WeightsError, match=r"patch_embedding.weight has shape \(128, .*\), expected 5 axes"):
        wan_mlx.load_transformer(published.comfyui_file(tmp_path / "x.safetensors", flat | {
            "patch_embedding.weight": state["patch_embedding.weight"].reshape(128, -1)}))


# --- what is refused


def test_gguf_without_its_patch_embedding(states, tmp_path):
    """As ComfyUI-GGUF's convert.py leaves it out."""
    state = {name: tensor for name, tensor in states["transformer"].items() if name != "patch_embedding.weight"}
    published.gguf_file(tmp_path / "x.gguf", state, "Q8_0")
    cut = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "y.gguf").write_bytes(cut[: len(cut) // 2] + bytes(len(cut) - len(cut) // 2))  # only headers are read
    for name in ("x", "y"):
        assert "patch_embedding.weight is missing, as in a GGUF by" in refused(tmp_path / f"{name}.gguf")


def refused(*arguments, error=WeightsError) -> str:
    with pytest.raises(error) as caught:
        open_checkpoint(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_parts_are_named_in_one_line(comfyui, capsys):
    dit = comfyui / "diffusion_models/a.safetensors"
    line = refused(dit)
    assert line.startswith(f"{dit} holds transformer; missing text_encoder, vae, tokenizer: add --text-encoder FILE")
    assert "missing transformer, text_encoder, tokenizer:" in refused(comfyui / "vae/c.safetensors")
    assert "missing vae: add --vae FILE" in refused(dit, {"text_encoder": comfyui / "text_encoders"})
    assert main(["--model", str(dit), "--prompt", "x", "--vae", str(comfyui / "vae")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "missing text_encoder, tokenizer: add --text-encoder FILE" in error


def test_a_text_encoder_without_its_tokenizer(states, comfyui, tmp_path):
    text = published.comfyui_file(tmp_path / "x/text.safetensors", published.hf_text_encoder(states["text_encoder"]))
    parts = {"text_encoder": text, "vae": comfyui}
    dit = comfyui / "diffusion_models"
    assert "missing tokenizer: add --tokenizer FILE" in refused(dit, parts)
    (tmp_path / "x/spiece.model").write_bytes(published.TOKENIZER)
    assert open_checkpoint(dit, parts).files["tokenizer"] == tmp_path / "x/spiece.model"


def test_models_that_read_images_need_their_encoder(states, comfyui, tmp_path):
    state = states["transformer"] | {
        f"img_emb.proj.{n}.{kind}": torch.zeros(1) for n in (0, 1, 3, 4) for kind in ("weight", "bias")
    }
    dit = published.comfyui_file(tmp_path / "i2v.safetensors", state)
    parts = {"text_encoder": comfyui, "vae": comfyui}
    assert "missing image_encoder: add --image-encoder FILE" in refused(dit, parts)
    clip = published.comfyui_file(tmp_path / "clip.safetensors", published.hf_image_encoder(states["image_encoder"]))
    assert open_checkpoint(dit, parts | {"image_encoder": clip}).files["image_encoder"] == clip


def test_a_relative_beside_a_whole_network_is_not_meant(comfyui, states, tmp_path):
    """Another model's file, with the same tensors and some more, in the same folder."""
    folder = shutil.copytree(comfyui, tmp_path / "x")
    state = states["transformer"] | {"audio_injector.q.weight": torch.zeros(1)}
    other = published.comfyui_file(folder / "a_s2v.safetensors", state)
    assert open_checkpoint(folder).files["transformer"] not in (other, None)
    with pytest.raises(WeightsError, match="unexpected audio_injector.q.weight"):
        wan_mlx.load_transformer(other)


def test_two_of_one_part(comfyui, tmp_path):
    folder = shutil.copytree(comfyui, tmp_path / "x")
    second = shutil.copy(folder / "vae/c.safetensors", folder / "d.safetensors")
    line = refused(folder)
    assert "2 files of a vae" in line and "d.safetensors" in line and "vae/c.safetensors" in line and "--vae" in line
    assert open_checkpoint(folder, {"vae": second}).files["vae"] == second


def test_a_part_that_is_another_network_is_refused(comfyui, tmp_path, official_folder):
    vae = comfyui / "vae/c.safetensors"
    assert "holds a vae, expected a text_encoder" in refused(comfyui, {"text_encoder": vae})
    assert "holds no vae, only b.safetensors" in refused(official_folder, {"vae": comfyui / "text_encoders"})
    assert "does not exist" in refused(comfyui, {"vae": tmp_path / "nowhere"}, error=ValueError)
    assert "no tokenizer" in refused(comfyui, {"tokenizer": comfyui / "vae"})
    lora = published.comfyui_file(
        tmp_path / "l/x.safetensors", {"diffusion_model.blocks.0.ffn.0.lora_down.weight": torch.ones(1)}
    )
    assert all("a LoRA or another adapter" in refused(place) for place in (lora, lora.parent))
    assert "no file of a Wan network" in refused(official_folder / "google")
    (tmp_path / "text").write_text("hello")
    assert "unknown format" in refused(tmp_path / "text")


def test_a_hostile_index_in_a_folder_is_not_followed(comfyui, tmp_path):
    folder = shutil.copytree(comfyui, tmp_path / "x")
    index = folder / "model.safetensors.index.json"
    for name in ("/etc/passwd", "../../x", 3):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert open_checkpoint(folder).files["vae"] == folder / "vae/c.safetensors"
        assert "plain file name" in refused(index)


def test_command_line_says_where_parts_come_from(comfyui, official_folder, capsys):
    vae = comfyui / "vae/c.safetensors"
    arguments = ["--model", str(official_folder), "--vae", str(vae), "--prompt", "x", "--dry-run", "--dtype", "float32"]
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert f"vae from {vae}" in error and "text encoder from" not in error


def test_command_line_says_which_defaults_a_file_leaves_open():
    preset = PRESETS["i2v-14B-480P"]
    files = {"transformer": Path("dit.gguf"), "vae": Path("x/vae.safetensors")}
    checkpoint = Checkpoint(Path("dit.gguf"), tuple(Part(kind, kind, file) for kind, file in files.items()))
    pipe = SimpleNamespace(checkpoint=checkpoint, preset=preset, guessed_preset=True)
    (vae, other) = origins(pipe)
    assert vae == "vae from x/vae.safetensors"
    assert other == "i2v-14B-720P has weights of the same shapes; --task i2v-14B-720P takes its defaults"
    assert preset_for(preset.transformer) is preset
    pipe.guessed_preset = False
    assert origins(pipe) == [vae]
