"""Folders written by the ``save_pretrained`` of Diffusers' pipelines: each network computes what theirs does."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from oracles import official, randomize, relative_error
from PIL import Image
from test_text import sentencepiece_model
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

import wan_mlx
from wan_mlx.files.sentencepiece import read_tokenizer
from wan_mlx.weights.checkpoint import open_checkpoint

KINDS = {"t2v": WanPipeline, "ti2v": WanPipeline, "i2v": WanImageToVideoPipeline, "vace": WanVACEPipeline}
SIZES = dict(
    num_attention_heads=2, attention_head_dim=24, text_dim=24, freq_dim=32, ffn_dim=80, num_layers=3,
)  # fmt: skip
VIDEO = dict(width=32, height=32, num_frames=5, steps=2, seed=1, shift=5, guidance_scale=5)
TEXT = "a cat boxing on a stage"


def make_pipeline(kind: str, tokenizer_folder):
    if kind == "vace":
        vace = dict(vace_layers=[0, 2], vace_in_channels=96)
        dit = WanVACETransformer3DModel(**SIZES, in_channels=16, out_channels=16, **vace)
    elif kind == "i2v":
        dit = WanTransformer3DModel(**SIZES, in_channels=36, out_channels=16, image_dim=64, added_kv_proj_dim=48)
    else:
        channels = 48 if kind == "ti2v" else 16
        dit = WanTransformer3DModel(**SIZES, in_channels=channels, out_channels=channels)
    parts = {
        "transformer": dit,
        "vae": AutoencoderKLWan(
            base_dim=4, decoder_base_dim=8, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
            scale_factor_spatial=16, latents_mean=[0.01 * i for i in range(48)], latents_std=[1.5] * 48,
        ) if kind == "ti2v" else AutoencoderKLWan(
            base_dim=8, dim_mult=[1, 2, 2, 2], latents_mean=[0.1 * i for i in range(16)], latents_std=[1.5] * 16
        ),
        "text_encoder": UMT5EncoderModel(
            UMT5Config(vocab_size=800, d_model=24, d_kv=8, num_heads=4, num_layers=2, d_ff=40, dropout_rate=0.0,
                       relative_attention_max_distance=64, feed_forward_proj="gated-gelu")
        ),
    }  # fmt: skip
    if kind == "i2v":
        config = CLIPVisionConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                                  image_size=224, patch_size=14, hidden_act="gelu")  # fmt: skip
        parts["image_encoder"] = CLIPVisionModel(config)
    for seed, module in enumerate(parts.values()):
        randomize(module.eval().requires_grad_(False), seed)
    encoder = parts["text_encoder"]
    encoder.encoder.embed_tokens.weight.copy_(encoder.shared.weight)
    if kind == "i2v":
        parts["image_processor"] = CLIPImageProcessor()
    (tokenizer_folder / "spiece.model").write_bytes(sentencepiece_model())
    parts["tokenizer"] = T5Tokenizer.from_pretrained(tokenizer_folder, extra_ids=300)
    more = {"expand_timesteps": True} if kind == "ti2v" else {}
    return KINDS[kind](scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), **parts, **more)


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """The pipeline, and the folder it was saved in."""
    root = tmp_path_factory.mktemp(request.param)
    pipe = make_pipeline(request.param, root)
    pipe.save_pretrained(root / "model")
    return request.param, pipe, root / "model"


def numbers(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def last(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.movedim(1, -1).numpy())


def test_parts_and_configs(saved):
    kind, _, folder = saved
    checkpoint = open_checkpoint(folder)
    assert checkpoint.layout == "diffusers" and ("image_encoder" in checkpoint.files) == (kind == "i2v")
    pipe = wan_mlx.WanPipeline.from_pretrained(folder, dtype="float32", progress=False)
    assert pipe.preset.task == kind and pipe.config.num_heads == 2 and pipe.config.num_layers == 3


@torch.no_grad()
def test_transformer(saved):
    kind, pipe, folder = saved
    model = wan_mlx.load_transformer(folder, dtype="float32")
    latents, context = numbers(1, pipe.transformer.config.in_channels, 2, 4, 6), numbers(1, 512, 24, seed=1)
    given, ours = {}, ()
    if kind == "i2v":
        given["encoder_hidden_states_image"] = numbers(1, 257, 64, seed=2)
        ours = (last(latents[:, 16:]), mx.array(given["encoder_hidden_states_image"].numpy()))
    elif kind == "vace":
        given["control_hidden_states"] = numbers(1, 96, 2, 4, 6, seed=2)
        ours = (last(given["control_hidden_states"]),)
    want = pipe.transformer(latents, torch.tensor([500.0]), context, return_dict=False, **given)[0]
    got = model(last(latents[:, : model.config.out_dim]), 500.0, mx.array(context.numpy()), *ours)
    assert relative_error(np.array(got).transpose(0, 4, 1, 2, 3), want) < 2e-5


@torch.no_grad()
def test_text_encoding(saved):
    _, pipe, folder = saved
    ours = wan_mlx.WanPipeline.from_pretrained(folder, dtype="float32", progress=False, prompt_cache=False)
    want = pipe.encode_prompt(TEXT, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    assert relative_error(ours.encode_text([TEXT])[0], want) < 2e-5


@torch.no_grad()
def test_vae_round_trip(saved):
    _, pipe, folder = saved
    vae = wan_mlx.load_vae(folder)
    video = numbers(1, 3, 5, 32, 48).clamp(-1, 1)
    config = pipe.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    latents = pipe.vae.encode(video).latent_dist.mode()
    got = vae.encode(last(video))
    assert relative_error(got, ((latents - mean) / std).movedim(1, -1)) < 5e-5
    frames = mx.concatenate(list(vae.decode(got)), axis=1)
    assert relative_error(frames, pipe.vae.decode(latents).sample.movedim(1, -1)) < 5e-5


@torch.no_grad()
def test_image_encoder(saved):
    kind, pipe, folder = saved
    if kind != "i2v":
        with pytest.raises(wan_mlx.WeightsError, match="holds no image_encoder"):
            wan_mlx.load_image_encoder(folder)
        return
    encoder = wan_mlx.load_image_encoder(folder)
    images = numbers(1, 3, 224, 224).clamp(-1, 1)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (pipe.image_processor.image_mean, pipe.image_processor.image_std)
    )
    pixels = ((images + 1) / 2 - mean) / std
    want = pipe.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
    assert relative_error(encoder(last(images)), want) < 2e-5


def test_components_folders_load_alone(saved):
    kind, _, folder = saved
    wan_mlx.load_vae(folder / "vae")
    wan_mlx.load_text_encoder(folder / "text_encoder", dtype="float32")
    assert wan_mlx.load_transformer(folder / "transformer", dtype="float32").config.num_heads == 2
    assert read_tokenizer(folder / "tokenizer") == read_tokenizer(folder)


def test_makes_a_video(saved):
    kind, _, folder = saved
    pipe = wan_mlx.WanPipeline.from_pretrained(folder, dtype="float32", progress=False, prompt_cache=False)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    given = {"image": picture}
    sources = {"i2v": given, "ti2v": given, "vace": {"src_ref_images": [picture]}, "t2v": {}}[kind]
    assert pipe("a cat", **VIDEO, **sources).frames.std() > 5


@pytest.mark.parametrize("given", [False, True])
@torch.no_grad()
def test_ti2v_by_diffusers_own_loop(tmp_path, given):
    """Their pipelines with ``expand_timesteps``, on the official sigmas, from the same noise: within 2 of 255 levels.

    Diffusers' own sigmas are others, so the official solver stands in for its own.
    """
    theirs = make_pipeline("ti2v", tmp_path)
    theirs.save_pretrained(tmp_path / "model")
    ours = wan_mlx.WanPipeline.from_pretrained(tmp_path / "model", dtype="float32", progress=False, prompt_cache=False)
    picture = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    options = VIDEO | dict(width=64, steps=3, negative_prompt="grey")
    got = ours(TEXT, **options, image=picture if given else None)
    parts = dict(theirs.components, image_encoder=None, image_processor=None)
    solver = official("utils.fm_solvers_unipc").FlowUniPCMultistepScheduler(shift=1)
    solver.set_timesteps = partial(solver.set_timesteps, shift=5.0)
    if given:
        theirs = WanImageToVideoPipeline(**{**parts, "scheduler": UniPCMultistepScheduler()}, expand_timesteps=True)
    theirs.scheduler = solver
    more = {"image": Image.fromarray(picture)} if given else {}
    noise = torch.randn((48, 2, 2, 4), generator=torch.Generator().manual_seed(1))[None]
    theirs.set_progress_bar_config(disable=True)
    want = theirs(prompt=TEXT, negative_prompt="grey", height=32, width=64, num_frames=5, num_inference_steps=3,
                  guidance_scale=5.0, latents=noise, output_type="np", **more).frames[0]  # fmt: skip
    assert want.std() > 0.05 and np.abs(np.floor(want * 255) - got.frames).max() <= 2
