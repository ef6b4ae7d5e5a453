"""The marks of other models hold for the keys of the reference classes themselves, on torch's meta device."""

from inspect import signature

import diffusers
import pytest
import transformers
from oracles import torch

from wan_mlx.other_models import of_entries, of_keys

TINY_CLIP = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
OF_DIFFUSERS = {
    "WanAnimate2Transformer3DModel": "Wan2.2 Animate-2",
    "FluxTransformer2DModel": "FLUX",
    "SD3Transformer2DModel": "Stable Diffusion 3",
    "UNet2DConditionModel": "Stable Diffusion or SDXL",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "LTXVideoTransformer3DModel": "LTX-Video",
    "LTX2VideoTransformer3DModel": "LTX-Video",
    "CogVideoXTransformer3DModel": "CogVideoX",
    "MochiTransformer3DModel": "Mochi",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "ZImageTransformer2DModel": "Z-Image",
    "AutoencoderKL": "the VAE of Stable Diffusion",
    "AutoencoderKLHunyuanVideo": "the VAE of HunyuanVideo",
    "AutoencoderKLCogVideoX": "the VAE of HunyuanVideo",
    "AutoencoderKLLTXVideo": "the VAE of HunyuanVideo",
}
SMALL = {"num_layers": 6, "num_single_layers": 1, "n_layers": 1, "num_refiner_layers": 1, "n_refiner_layers": 1}


def keys_of(build) -> set[str]:
    with torch.device("meta"):
        return {*build().state_dict()}


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_of_diffusers(name):
    """By its keys and, but for VAEs, by the class that its config.json names; few layers, which change no mark."""
    build = getattr(diffusers, name)
    sizes = {key: value for key, value in SMALL.items() if key in signature(build.__init__).parameters}
    assert of_keys(keys_of(lambda: build(**sizes))).name.startswith(OF_DIFFUSERS[name])
    if not name.startswith("Autoencoder"):
        assert of_entries({"_class_name": name}).name.startswith(OF_DIFFUSERS[name])


def test_of_transformers():
    t5 = dict(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    encoder = keys_of(lambda: transformers.T5EncoderModel(transformers.T5Config(**t5)))
    assert of_keys(encoder).name.startswith("T5-XXL")
    assert of_keys(keys_of(lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**t5)))) is None
    text = keys_of(lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TINY_CLIP)))
    for keys in (text, {f"text_model.{key.removeprefix('text_model.')}" for key in text}):
        assert of_keys(keys).name.startswith("CLIP's text encoder")
    assert of_keys(keys_of(lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY_CLIP)))) is None
    siglip = keys_of(lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY_CLIP)))
    assert of_keys(siglip).name == "SigLIP"
    llama = transformers.LlamaConfig(**TINY_CLIP, vocab_size=50, num_key_value_heads=2)
    assert of_keys(keys_of(lambda: transformers.LlamaForCausalLM(llama))).name == "a language model"


@pytest.mark.parametrize("sizes", [{}, dict(base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True)])
def test_not_of_wan_s_vaes(sizes):
    assert of_keys(keys_of(lambda: diffusers.AutoencoderKLWan(**sizes))) is None
