"""The bundled trained weights in PyTorch and here: the same prompt, noise and steps, the same video."""

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from oracles import (
    official,
    official_clip_model,
    official_features,
    official_frames,
    official_latents,
    official_text,
    relative_error,
    torch,
    unmasked_attention,
)
from PIL import Image
from test_tasks import official_image, official_y

import wan_mlx
from wan_mlx.presets import BUNDLED
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.layouts import canonical_keys, recognise
from wan_mlx.weights.parts import Checkpoint

PROMPT, OTHER = "a red circle moves right on a blue background", "the yellow star moves up"
IMAGE = Path(__file__).parents[2] / "examples/first_frame.png"
SAMPLING = dict(steps=4, shift=3.0, seed=5)
GUIDANCE = 3.0


@pytest.fixture(autouse=True)
def official_attention(monkeypatch):
    monkeypatch.setattr(official("modules.model"), "flash_attention", unmasked_attention)
    with torch.no_grad():
        yield


def state_of(path, patch=(1, 2, 2)) -> dict[str, torch.Tensor]:
    """An MLX file's tensors, float32, in PyTorch's layout."""
    arrays, state = mx.load(str(path)), {}
    for layer in [name.removesuffix(".scales") for name in arrays if name.endswith(".scales")]:  # packed in eight bits
        packed, *of_groups = (arrays.pop(f"{layer}.{part}") for part in ("weight", "scales", "biases"))
        of_groups = [part.astype(mx.float32) for part in of_groups]
        arrays[f"{layer}.weight"] = mx.dequantize(packed, *of_groups, group_size=64, bits=8)
    for name, array in arrays.items():
        tensor = torch.from_numpy(np.array(array.astype(mx.float32)))
        if name == "patch_embedding.weight":
            tensor = tensor.view(tensor.shape[0], *patch, -1)
        state[name] = tensor.movedim(-1, 1) if tensor.ndim >= 4 else tensor
    return state


def load(module: torch.nn.Module, path) -> torch.nn.Module:
    wanted = module.state_dict()
    keys = canonical_keys(recognise(wanted), wanted)  # our name → the module's, whether official or Diffusers'
    state = {keys[name]: tensor.reshape(wanted[keys[name]].shape) for name, tensor in state_of(path).items()}
    module.load_state_dict(state, strict=True)
    return module.eval().requires_grad_(False)


def networks(checkpoint: Checkpoint) -> SimpleNamespace:
    """The reference classes at the model's sizes, with its weights; ``scale`` goes with the VAE."""
    c, t, v = (checkpoint.part(kind).config for kind in ("transformer", "text_encoder", "vae"))
    text = official("modules.t5").T5Encoder(
        vocab=t["vocab_size"], shared_pos=False, dropout=0.0,
        **{k: t[k] for k in ("dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "num_buckets")},
    )  # fmt: skip
    vae = official("modules.vae2_1").WanVAE_(
        dim=v["dim"], z_dim=v["z_dim"], dim_mult=v["dim_mult"], num_res_blocks=v["num_res_blocks"],
        temperal_downsample=v["temporal_downsample"],
    )  # fmt: skip
    load(text, checkpoint.files["text_encoder"])
    load(vae, checkpoint.files["vae"])
    scale = [torch.tensor(v["mean"]), 1 / torch.tensor(v["std"])]
    dit = official_dit(c) if c["model_type"] == "t2v" else diffusers_dit(c)
    return SimpleNamespace(text=text, dit=load(dit, checkpoint.files["transformer"]), vae=vae, scale=scale)


def official_dit(config: dict) -> torch.nn.Module:
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "in_dim", "out_dim")
    return official("modules.model").WanModel(model_type="t2v", **{name: config[name] for name in names})


def diffusers_dit(config: dict) -> torch.nn.Module:
    """Diffusers' class, since the official one that is installed has no image branch any more."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=config["num_heads"], attention_head_dim=config["dim"] // config["num_heads"],
        in_channels=config["in_dim"], out_channels=config["out_dim"], added_kv_proj_dim=config["dim"],
        **{name: config[name] for name in ("text_dim", "freq_dim", "ffn_dim", "num_layers", "image_dim")},
    )  # fmt: skip


def clip(checkpoint: Checkpoint):
    """The official CLIP with the model's weights; the last block, which Wan leaves out, stays random."""
    c = checkpoint.part("image_encoder").config
    wrapper = official_clip_model(
        0, image_size=c["image_size"], vision_dim=c["dim"], vision_heads=c["num_heads"],
        vision_layers=c["num_layers"], embed_dim=24, vocab_size=30, max_text_len=10, text_dim=16, text_heads=2,
        text_layers=1,
    )  # fmt: skip
    visual, state = wrapper.model.visual, state_of(checkpoint.files["image_encoder"], (c["patch_size"],) * 2)
    wanted = visual.state_dict()
    state = {name: tensor.reshape(wanted[name].shape) for name, tensor in state.items()}
    missing = visual.load_state_dict(state, strict=False).missing_keys
    last = f"transformer.{c['num_layers'] - 1}."
    assert all(name.startswith((last, "post_norm", "head")) for name in missing), missing
    return wrapper


def check(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape and want.std() > 5
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 2


def texts_of(modules, checkpoint: Checkpoint, prompt: str) -> list[torch.Tensor]:
    tokenizer = checkpoint.files["tokenizer"].read_bytes()
    return [official_text(modules.text, tokenizer, text) for text in (prompt, "")]


def test_same_video_within_two_levels():
    checkpoint = open_checkpoint(BUNDLED["nano"])
    modules = networks(checkpoint)

    def velocity(latents, t, text):
        return modules.dit([latents], t, [text], 128)[0]

    texts = texts_of(modules, checkpoint, PROMPT)
    latents = official_latents(velocity, texts, (16, 2, 16, 16), guidance=GUIDANCE, **SAMPLING)
    pipe = wan_mlx.WanPipeline.from_pretrained("nano", dtype="float32", progress=False)
    got = pipe(PROMPT, num_frames=5, guidance_scale=GUIDANCE, **SAMPLING)
    check(got.frames, official_frames(modules.vae, modules.scale, latents))


def test_nano_i2v_makes_the_same_video_within_two_levels():
    checkpoint = open_checkpoint(BUNDLED["nano-i2v"])
    modules, image = networks(checkpoint), np.asarray(Image.open(IMAGE).convert("RGB"))
    encoders = SimpleNamespace(official=lambda video: modules.vae.encode(video[None], modules.scale)[0])
    condition = official_y(encoders, [image], (64, 64), 5)
    floats = official_image(image).movedim(0, -1).numpy()
    features = official_features(clip(checkpoint), [floats])
    got = wan_mlx.load_image_encoder(checkpoint)(mx.array(floats)[None])
    assert relative_error(got, features) <= 2e-5

    def velocity(latents, t, text):
        text = torch.nn.functional.pad(text, (0, 0, 0, 512 - len(text)))[None]
        return modules.dit(torch.cat([latents, condition])[None], t, text, features, return_dict=False)[0][0]

    texts = texts_of(modules, checkpoint, OTHER)
    latents = official_latents(velocity, texts, (16, 2, 8, 8), guidance=GUIDANCE, **SAMPLING)
    pipe = wan_mlx.WanPipeline.from_pretrained("nano-i2v", dtype="float32", progress=False)
    video = pipe(OTHER, image=IMAGE, width=64, height=64, num_frames=5, guidance_scale=GUIDANCE, **SAMPLING)
    assert relative_error(video.latents, latents) <= 1e-4
    check(video.frames, official_frames(modules.vae, modules.scale, latents))
