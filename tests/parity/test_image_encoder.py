"""CLIP's vision tower and its resize against the official class, transformers and torch: float32, tiny sizes."""

import types

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from oracles import official_clip, official_clip_model, official_features, randomize, relative_error
from transformers import CLIPVisionConfig, CLIPVisionModel

import wan_mlx
from wan_mlx.errors import WeightsError
from wan_mlx.files.base import TensorInfo
from wan_mlx.hub.names import DIFFUSERS_FILES, MLX_FILES, OFFICIAL_FILES
from wan_mlx.models.configs import ImageEncoderConfig
from wan_mlx.models.image_encoder import ImageEncoder, last_block_shapes
from wan_mlx.presets import EXPERTS
from wan_mlx.resize import resize_bicubic
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.component import ComponentWeights, check_keys, open_component, parameter_shapes
from wan_mlx.weights.configs import network_config

BOUND = 2e-5
LAYERS = 4
SIZES = dict(image_size=56, vision_dim=160, vision_heads=2, vision_layers=LAYERS, embed_dim=24)
TEXT_SIZES = dict(vocab_size=30, max_text_len=10, text_dim=16, text_heads=2, text_layers=1)


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def clip():
    return official_clip()


@pytest.fixture(scope="module")
def reference():
    return official_clip_model(1, **SIZES, **TEXT_SIZES)


@pytest.fixture(scope="module")
def official_file(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / OFFICIAL_FILES["image_encoder"][0]
    torch.save(reference.model.state_dict(), path)
    return path


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def hf_clip(**changes) -> CLIPVisionModel:
    sizes = dict(hidden_size=96, intermediate_size=384, num_attention_heads=4, num_hidden_layers=LAYERS)
    return CLIPVisionModel(
        CLIPVisionConfig(**{**sizes, "image_size": 56, "patch_size": 14, "hidden_act": "gelu", **changes})
    ).eval()


def hf_features(model: CLIPVisionModel, images: np.ndarray) -> torch.Tensor:
    """Penultimate features of images that are square and of the model's size already."""
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((torch.from_numpy(images) + 1) / 2 - mean) / std
    out = model(pixels.movedim(-1, 1).to(model.dtype), output_hidden_states=True)
    return out.hidden_states[-2].float()


@pytest.mark.parametrize(
    "source, target",
    [
        ((480, 832), (224, 224)),
        ((37, 53), (224, 224)),
        ((540, 957), (480, 832)),
        ((111, 167), (240, 416)),
        ((1500, 2001), (359, 641)),
        ((1, 5), (4, 3)),
        ((7, 9), (7, 9)),
    ],
)
def test_resize_torch(source, target):
    frames = pictures(2, *source)
    want = torch.nn.functional.interpolate(torch.from_numpy(frames).movedim(-1, 1), size=target, mode="bicubic")
    got = resize_bicubic(frames, *target)
    assert got.dtype == np.float32 and got.shape == (2, *target, 3)
    assert np.abs(got - want.movedim(1, -1).numpy()).max() <= 1e-5


def test_resize_any_leading_axes():
    frames = pictures(2, 3, 6, 5)
    got = resize_bicubic(mx.array(frames), 4, 8)
    assert got.shape == (2, 3, 4, 8, 3) and np.array_equal(got[1, 2], resize_bicubic(frames[1, 2], 4, 8))


@pytest.mark.parametrize("shape", [(1, 56, 56), (2, 45, 80), (1, 131, 60), (3, 17, 19)])
def test_official(reference, official_file, shape):
    images = pictures(*shape, seed=shape[1])
    model = wan_mlx.load_image_encoder(official_file)
    got = model(mx.array(images))
    assert got.shape == (shape[0], 17, 160) and got.dtype == mx.float32
    assert relative_error(got, official_features(reference, images)) <= BOUND


def test_official_has_257_tokens(clip, reference, tmp_path):
    visual = clip.VisionTransformer(patch_size=14, dim=80, out_dim=8, num_heads=1, num_layers=3, activation="gelu")
    randomize(visual.eval(), seed=2)
    torch.save({f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}, tmp_path / "clip.pth")
    wrapper = object.__new__(clip.CLIPModel)
    wrapper.dtype, wrapper.transforms = torch.float32, reference.transforms
    wrapper.model = types.SimpleNamespace(visual=visual, image_size=224)
    images = pictures(2, 60, 104)
    got = wan_mlx.load_image_encoder(tmp_path / "clip.pth")(images)
    assert got.shape == (2, 257, 80)
    assert relative_error(got, official_features(wrapper, images)) <= BOUND


def complete(folder, files, config: str = "{}"):
    """Give ``folder`` the other parts of a model, in name only."""
    for component, names in files.items():
        if component not in ("image_encoder", *EXPERTS):
            (folder / names[-1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / names[-1]).touch()
    (folder / "config.json").write_text(config)
    return folder


def test_transformers_from_a_diffusers_folder(tmp_path):
    theirs = hf_clip()
    randomize(theirs, seed=3)
    theirs.save_pretrained(tmp_path / "image_encoder")
    complete(tmp_path, DIFFUSERS_FILES)
    (tmp_path / "transformer/config.json").write_text('{"image_dim": 96}')
    images = pictures(2, 56, 56)
    model = wan_mlx.load_image_encoder(tmp_path)
    assert model.config == ImageEncoderConfig(image_size=56, dim=96, num_heads=4, num_layers=LAYERS)
    assert relative_error(model(images), hf_features(theirs, images)) <= BOUND


def test_float16_weights_are_computed_in_float32(tmp_path):
    theirs = hf_clip(hidden_size=160, intermediate_size=640, num_attention_heads=2)
    randomize(theirs, seed=4)
    theirs.half().save_pretrained(tmp_path)
    images = pictures(1, 56, 56)
    model = wan_mlx.load_image_encoder(tmp_path / "model.safetensors", dtype="float16")
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.float16}
    got = model(images)
    assert got.dtype == mx.float32 and relative_error(got, hf_features(theirs.float(), images)) <= BOUND


def test_bfloat16_is_refused(official_file):
    with pytest.raises(ValueError, match="bfloat16 is too coarse for CLIP; give float32 or float16"):
        wan_mlx.load_image_encoder(official_file, dtype="bfloat16")


@pytest.mark.parametrize("shape", [(56, 56, 3), (1, 1, 56, 56, 3), (1, 56, 56, 4)])
def test_wrong_shapes_are_named(official_file, shape):
    with pytest.raises(ValueError, match=r"expected \((N|...), H, W, 3\)"):
        wan_mlx.load_image_encoder(official_file)(mx.zeros(shape))


def test_last_block_must_be_there_but_is_not_read(reference, official_file, tmp_path):
    read = []

    def note(names):
        read.extend(names)
        return names

    wan_mlx.load_image_encoder(official_file, progress=note)
    used = {f"transformer.{n}" for n in range(LAYERS - 1)}
    assert {".".join(name.split(".")[:2]) for name in read if name.startswith("transformer.")} == used
    state = reference.model.state_dict()
    lost = f"visual.transformer.{LAYERS - 1}.mlp.2.bias"
    torch.save({name: tensor for name, tensor in state.items() if name != lost}, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match=f"lacks transformer.{LAYERS - 1}.mlp.2.bias$"):
        wan_mlx.load_image_encoder(tmp_path / "cut.pth")
    torch.save({**state, lost: torch.zeros(7)}, tmp_path / "wrong.pth")
    with pytest.raises(WeightsError, match=r"other shapes: transformer.3.mlp.2.bias \(7,\) instead of \(160,\)"):
        wan_mlx.load_image_encoder(tmp_path / "wrong.pth")


@pytest.mark.parametrize("layout", ["official", "huggingface"])
def test_full_size_keys_are_strict(layout, request):
    with torch.device("meta"):
        if layout == "official":
            reference = request.getfixturevalue("clip").clip_xlm_roberta_vit_h_14(device="meta")
        else:
            sizes = dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=16, num_hidden_layers=32)
            reference = hf_clip(**sizes, image_size=224)
    header = {name: TensorInfo(tuple(t.shape), "F16") for name, t in reference.state_dict().items()}
    weights = ComponentWeights(types.SimpleNamespace(path="published", metadata={}, tensors=header))
    assert network_config(weights, {}) == ImageEncoderConfig()
    norms = [module for module in reference.modules() if isinstance(module, torch.nn.LayerNorm)]
    heads = {
        module.num_heads for module in reference.modules() if hasattr(module, "to_qkv") or hasattr(module, "q_proj")
    }
    assert {norm.eps for norm in norms} == {ImageEncoderConfig.eps} and heads == {ImageEncoderConfig.num_heads}
    expected = parameter_shapes(ImageEncoder(ImageEncoderConfig())) | last_block_shapes(ImageEncoderConfig())
    assert len(expected) == len(weights.shapes) == 5 + 32 * 12
    check_keys(weights, expected)


@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
@pytest.mark.parametrize(
    "files, config",
    [
        (OFFICIAL_FILES, '{{"model_type": "{}"}}'),
        (MLX_FILES, '{{"format": "wan_mlx", "transformer": {{"model_type": "{}"}}}}'),
    ],
)
def test_image_models_need_the_encoder_and_others_do_not(tmp_path, files, config, kind):
    complete(tmp_path, files, config.format(kind))
    with pytest.raises(WeightsError, match=rf"missing {' or '.join(files['image_encoder'])} \(image_encoder\);"):
        open_checkpoint(tmp_path)
    (tmp_path / files["image_encoder"][0]).touch()
    assert open_checkpoint(tmp_path).files["image_encoder"] == tmp_path / files["image_encoder"][0]
    (tmp_path / files["image_encoder"][0]).unlink()
    complete(tmp_path, files, config.format("t2v"))
    assert "image_encoder" not in open_checkpoint(tmp_path).files
    only = "holds no image_encoder, only transformer, text_encoder, vae, (audio_encoder, )?tokenizer"
    with pytest.raises(WeightsError, match=only):
        wan_mlx.load_image_encoder(tmp_path)


def test_diffusers_image_models_need_the_encoder(tmp_path):
    complete(tmp_path, DIFFUSERS_FILES)
    (tmp_path / "transformer/config.json").write_text('{"image_dim": null}')
    assert "image_encoder" not in open_checkpoint(tmp_path).files
    (tmp_path / "transformer/config.json").write_text('{"image_dim": 1280}')
    with pytest.raises(WeightsError, match=r"missing image_encoder/model.safetensors \(image_encoder\);"):
        open_checkpoint(tmp_path)


def test_mlx_file_gives_the_same(official_file, tmp_path):
    weights = open_component(official_file, "image_encoder")
    arrays = {name: weights.read(name) for name in weights.shapes}
    mx.save_safetensors(str(tmp_path / "image_encoder.safetensors"), arrays, metadata={"layout": "mlx"})
    images = pictures(1, 30, 40)
    got, want = (wan_mlx.load_image_encoder(p)(images) for p in (tmp_path / "image_encoder.safetensors", official_file))
    assert np.array_equal(got, want)
