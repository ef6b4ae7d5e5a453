"""Animate's transformer and its face's encoders against the official module and Diffusers', float32, random weights.

The motion encoder's weights are drawn as wide as training begins with, since its layers scale them.
"""

import json
import warnings
from functools import partial

import mlx.core as mx
import numpy as np
import published
import pytest
import torch
from oracles import official_animate, randomize, relative_error
from safetensors.torch import save_file

from wan_mlx.events import counted, unheard
from wan_mlx.models.animate import AnimateTransformer
from wan_mlx.models.animate_face import Face
from wan_mlx.models.execution import Execution, encode_face
from wan_mlx.weights.load import load_transformer, open_network
from wan_mlx.weights.parameters import Parameters
from wan_mlx.weights.stream import load_module

BOUND = 2e-5
SIZES = dict(num_attention_heads=2, attention_head_dim=24, text_dim=24, freq_dim=32, ffn_dim=80, num_layers=6,
             image_dim=80, added_kv_proj_dim=48, motion_encoder_size=32, motion_style_dim=24, motion_dim=5,
             motion_encoder_channel_sizes={"4": 24, "8": 16, "16": 12, "32": 8}, motion_encoder_dim=40,
             face_encoder_hidden_dim=16, inject_face_latents_blocks=3)  # fmt: skip
OFFICIAL = dict(dim=64, ffn_dim=96, num_heads=2, num_layers=5, freq_dim=32, text_dim=24)


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def randomized(model, seed: int):
    randomize(model.eval().requires_grad_(False), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.motion_encoder.named_parameters():
        if weight.ndim > 1 and "bias" not in name:
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory):
    """Diffusers' class at a tiny size, and its folder."""
    from diffusers import WanAnimateTransformer3DModel

    model = randomized(WanAnimateTransformer3DModel(**SIZES), 3)
    folder = tmp_path_factory.mktemp("diffusers")
    model.save_pretrained(folder)
    return model, folder


def small(generator, size: int, **sizes):
    return generator(size=8, **sizes)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The official class, its pictures of faces 8 pixels wide instead of 512, and its folder."""
    module = official_animate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Generator", partial(small, module.Generator))
        model = randomized(module.WanAnimateModel(**OFFICIAL), 4)
    folder = tmp_path_factory.mktemp("official")
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanAnimateModel", **OFFICIAL}))
    return model, folder


def face_of(folder) -> Face:
    weights, config = open_network(folder, "transformer")
    return load_module(Face(config), Parameters(weights, mx.float32), counted(unheard, ""))


def inputs(frames: int, side: int, image_dim: int, grid=(3, 6, 10), seed: int = 1) -> dict[str, torch.Tensor]:
    """Channels first, as PyTorch takes them."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid
    shapes = dict(latents=(1, 36, t + 1, h, w), text=(1, 512, 24), image=(1, 257, image_dim), pose=(1, 16, t, h, w))
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    given["face"] = torch.rand((1, 3, frames, side, side), generator=generator) * 2 - 1
    return given


def last(array: torch.Tensor) -> mx.array:
    return mx.array(array.movedim(1, -1).numpy())


def run_ours(model, face: Face, given, **options) -> mx.array:
    """Channels last."""
    latents, pictures = last(given["latents"]), last(given["face"])[0]
    return model(latents[..., :16], 500.0, mx.array(given["text"].numpy()), latents[..., 16:],
                 mx.array(given["image"].numpy()), pose=last(given["pose"]), face=face(pictures),
                 **options)  # fmt: skip


def test_official(official):
    """With the released widths where pictures are small; an odd grid."""
    model, folder = official
    given = inputs(5, 8, 1280, (2, 6, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.cuda.amp.autocast, and checkpoints without gradients
        motion = model.motion_encoder.get_motion(given["face"][0].movedim(1, 0))
        (want,) = model(given["latents"], torch.tensor([500.0]), given["image"], given["text"], 45,
                        pose_latents=given["pose"], face_pixel_values=given["face"])  # fmt: skip
        (blank,) = model(given["latents"], torch.tensor([500.0]), given["image"], given["text"], 45,
                         pose_latents=given["pose"], face_pixel_values=given["face"] * 0 - 1)  # fmt: skip
    face, ours = face_of(folder), load_transformer(folder, "float32")
    assert relative_error(face.motion_encoder(last(given["face"])[0]), motion) < BOUND
    pictures = last(given["face"])[0]
    assert relative_error(face(pictures), model.face_encoder(motion[None])) < BOUND
    assert relative_error(encode_face(face, mx.split(pictures, len(pictures))), face(pictures)) < 1e-6
    assert relative_error(np.moveaxis(np.array(run_ours(ours, face, given))[0], -1, 0), want) < BOUND
    assert relative_error(blank, want) > 1e-3  # what a face shows is seen


@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 6, 10)])
def test_diffusers(diffusers, grid):
    """From the other names; whole, in pieces of a frame or of several, and streamed: the same bits."""
    model, folder = diffusers
    given = inputs(4 * grid[0] - 3, 32, 80, grid)
    want = model(given["latents"], torch.tensor([500.0]), given["text"], given["image"], given["pose"], given["face"],
                 return_dict=False)[0]  # fmt: skip
    face, ours = face_of(folder), load_transformer(folder, "float32")
    assert isinstance(ours, AnimateTransformer) and ours.config.face_layers == (0, 3)
    motion = model.motion_encoder(given["face"][0].movedim(1, 0))
    assert relative_error(face.motion_encoder(last(given["face"])[0]), motion) < BOUND
    got = run_ours(ours, face, given)
    assert relative_error(np.moveaxis(np.array(got), -1, 1), want) < BOUND
    for tokens in (7, 40):
        assert mx.array_equal(run_ours(Execution(ours, tokens_at_once=tokens), face, given), got)
    assert mx.array_equal(run_ours(load_transformer(folder, "float32", stream=True), face, given), got)


def test_narrow_no_further_from_float32_than_diffusers(diffusers):
    from diffusers import WanAnimateTransformer3DModel

    model, folder = diffusers
    given = inputs(9, 32, 80)
    half = WanAnimateTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()

    def theirs(model) -> np.ndarray:
        kind = model.patch_embedding.weight.dtype
        given_so = {name: array.to(kind) for name, array in given.items()}
        out = model(given_so["latents"], torch.tensor([500.0]), given_so["text"], given_so["image"], given_so["pose"],
                    given_so["face"], return_dict=False)[0]  # fmt: skip
        return out.float().movedim(1, -1).numpy()

    exact, ours = theirs(model), load_transformer(folder, "bfloat16")
    off = [np.sqrt(np.mean((np.array(got) - exact) ** 2)) for got in (run_ours(ours, face_of(folder), given),
                                                                      theirs(half))]  # fmt: skip
    assert off[0] <= off[1]
    assert {ours.pose_patch_embedding.weight.dtype, ours.face_adapter["fuser_blocks"][0].q_norm.weight.dtype} == {
        mx.float32
    }


def test_every_published_form_is_the_same_network(official, tmp_path):
    """ComfyUI's file, a GGUF, and our own folder give the bits of the official file; fp8, Q8_0 and our q8 come near."""
    model, folder = official
    given, config = inputs(5, 8, 1280, (2, 4, 6)), json.dumps({"num_heads": 2})
    state = {name: tensor for name, tensor in model.state_dict().items()}
    for place in ("comfy", "gguf", "fp8", "q8"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text(config)
    published.comfyui_file(tmp_path / "comfy/x.safetensors", state, "model.diffusion_model.")
    published.gguf_file(tmp_path / "gguf/x.gguf", state, "F32")
    published.comfyui_file(tmp_path / "fp8/x.safetensors", published.scaled_fp8(state, "marker")[0])
    published.gguf_file(tmp_path / "q8/x.gguf", state, "Q8_0")

    def made(file, **options):
        return run_ours(load_transformer(file, "float32", **options), face_of(file), given)

    want = made(folder)
    for form in ("comfy/x.safetensors", "gguf/x.gguf"):
        assert mx.array_equal(made(tmp_path / form), want), form
    for place, options in ((folder, dict(quantize="q8-g32")), (tmp_path / "fp8/x.safetensors", {}),
                           (tmp_path / "q8/x.gguf", {})):  # fmt: skip
        assert 1e-5 < relative_error(made(place, **options), want) < 0.2, place


def test_wrong_shapes_are_named(diffusers):
    _, folder = diffusers
    given, ours, face = inputs(9, 32, 80), load_transformer(folder, "float32"), face_of(folder)
    for name, wrong, words in (
        ("pose", given["pose"][:, :, 1:], r"pose has shape \(1, 2, 6, 10, 16\), expected \(1, 3, 6, 10, 16\)"),
        ("face", given["face"][:, :, 4:], r"face has shape \(1, 2, 5, 48\), expected \(1, 3, 5, 48\)"),
        ("face", given["face"][..., 1:], r"the face has shape \(9, 32, 31, 3\), expected \(n, 32, 32, 3\)"),
    ):
        with pytest.raises(ValueError, match=words):
            run_ours(ours, face, {**given, name: wrong})
