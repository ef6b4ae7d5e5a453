"""The nano model's networks: the reference classes at tiny sizes, how they start, and how they run fast in training."""

from __future__ import annotations

import math
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
)
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

PAD, EOS, UNK = 0, 1, 2
TEXT_LEN = 512  # rows the pipeline pads a caption's encoding to
SHORT_LEN = 32  # rows kept in training: the caption and one row for all the padding
SHIFT = 3.0
IMAGE_DIM = 80
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# --- VAE -------------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(base_dim=16, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=2)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5)
                module.bias.zero_()
        for module in vae.modules():
            if isinstance(module, WanResidualBlock):
                module.conv2.weight.zero_()
            elif isinstance(module, WanAttentionBlock):
                module.proj.weight.zero_()
            elif isinstance(module, WanResample) and hasattr(module, "time_conv"):
                weight = module.time_conv.weight.zero_()  # (c or 2c, c, 3, 1, 1); the last tap is the current frame
                weight[:, :, -1, 0, 0] = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
        vae.quant_conv.weight[16:] *= 0.1
        vae.quant_conv.bias[16:] = -5.0
    return vae


def one_pass(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Make ``vae.encoder`` and ``vae.decoder`` take a whole clip (4n+1 frames) at once, with the chunked result."""
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.forward = types.MethodType(_resample, module)
    return vae


def _resample(self: WanResample, x, feat_cache=None, feat_idx=None):
    if self.mode == "upsample3d" and x.shape[2] > 1:
        first, rest = x[:, :, :1], x[:, :, 1:]  # frame 0 is never doubled, and never seen by the others
        rest = self.time_conv(rest).unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([first, rest], 2)
    conv = self.resample[1]
    if self.mode.startswith("upsample"):
        x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
        return F.conv3d(x, conv.weight[:, :, None], conv.bias, padding=(0, 1, 1))
    x = F.conv3d(F.pad(x, (0, 1, 0, 1)), conv.weight[:, :, None], conv.bias, stride=(1, 2, 2))
    if self.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
    return x


def encode(vae: AutoencoderKLWan, video):
    """Mean and log-variance (B, 16, t, h, w) of the latents of a ``one_pass`` VAE, not normalised."""
    mean, logvar = vae.quant_conv(vae.encoder(video)).chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def decode(vae: AutoencoderKLWan, latents):
    """Video (B, 3, T, H, W), about [-1, 1], from latents that are not normalised."""
    return vae.decoder(vae.post_quant_conv(latents))


def latent_scale(vae: AutoencoderKLWan, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (1, 16, 1, 1, 1) that normalise the latents."""
    stats = (vae.config.latents_mean, vae.config.latents_std)
    return tuple(torch.tensor(s, device=device).view(1, -1, 1, 1, 1) for s in stats)


# --- tokenizer -------------------------------------------------------------------------------------------------


def load_tokenizer(path: Path):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def token_rows(tokenizer, captions: list[str]) -> np.ndarray:
    """(captions, SHORT_LEN) ids, each caption closed by EOS and padded; at least one place stays free."""
    rows = np.full((len(captions), SHORT_LEN), PAD, np.int16)
    for row, ids in zip(rows, tokenizer.encode(captions), strict=True):
        ids = [*ids[: SHORT_LEN - 2], EOS]
        row[: len(ids)] = ids
    return rows


# --- text encoder and transformer ------------------------------------------------------------------------------


def new_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size, d_model=128, d_kv=32, num_heads=4, num_layers=2, d_ff=256, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=PAD, eos_token_id=EOS, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def new_transformer(**changes) -> WanTransformer3DModel:
    sizes = dict(
        num_attention_heads=2, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=128, freq_dim=256,
        ffn_dim=640, num_layers=6,
    )  # fmt: skip
    model = WanTransformer3DModel(**{**sizes, **changes})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(module.weight)
                module.bias.zero_()
        torch.nn.init.xavier_uniform_(model.patch_embedding.weight.view(256, -1))
        model.patch_embedding.bias.zero_()
        model.proj_out.weight.zero_()
    return model


@torch.no_grad()
def merge_lora(model: WanTransformer3DModel, path: Path) -> None:
    """Add a LoRA, as `train_distil` writes it, to the weights."""
    from safetensors.torch import load_file

    state, weights = load_file(path), dict(model.named_parameters())
    for name in [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]:
        down, up = (state[f"{name}.lora_{part}.weight"].float() for part in "AB")
        weights[f"{name.removeprefix('transformer.')}.weight"] += up @ down


def new_i2v_transformer(start: WanTransformer3DModel) -> WanTransformer3DModel:
    """``start`` with an image branch: what it knows it begins with, the rest from scratch."""
    model = new_transformer(in_channels=36, image_dim=IMAGE_DIM, added_kv_proj_dim=256)
    source, state = start.state_dict(), model.state_dict()
    for name, value in state.items():
        if name in source and source[name].shape == value.shape:
            value.copy_(source[name])
    state["patch_embedding.weight"].zero_()[:, :16] = source["patch_embedding.weight"]
    for block in range(len(model.blocks)):  # silent at first
        state[f"blocks.{block}.attn2.add_v_proj.weight"].zero_()
    model.load_state_dict(state)
    return model


def new_image_encoder() -> CLIPVisionModel:
    """Two blocks, of which Wan uses the first: 257 tokens, heads 80 wide, as in ViT-H/14."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM, intermediate_size=4 * IMAGE_DIM, num_hidden_layers=2, num_attention_heads=1,
        image_size=224, patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    return CLIPVisionModel(config)


def encode_image(encoder: CLIPVisionModel, image: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) → features (B, 257, IMAGE_DIM), resized as wan_mlx does it."""
    mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pixels = F.interpolate(image.float() / 255, size=(224, 224), mode="bicubic", align_corners=False)
    states = encoder(pixel_values=(pixels - mean) / std, output_hidden_states=True).hidden_states
    assert len(states) == 3, f"{len(states)} hidden states, expected the embedding's and both blocks'"
    return states[-2]


def with_mask(start: torch.Tensor) -> torch.Tensor:
    """(B, 20, t, h, w): which of a latent frame's four frames are given, then the latents ``start``."""
    mask = torch.zeros_like(start[:, :4])
    mask[:, :, 0].fill_(1)
    return torch.cat([mask, start], 1)


class ShortText:
    """Cross-attention over a short context that stands for one zero-padded to 512 rows.

    All padding rows have the same key and value, so one of them with log(count) added to its score weighs as much
    as all: the same result at a sixteenth of the rows. ``bias`` (B, 1, 1, SHORT_LEN) is set before each forward.
    Rows before the last SHORT_LEN are an image's and have keys and values of their own.
    """

    bias: torch.Tensor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        image, text = encoder_hidden_states[:, :-SHORT_LEN], encoder_hidden_states[:, -SHORT_LEN:]
        q = attn.norm_q(attn.to_q(hidden_states))
        k = attn.norm_k(attn.to_k(text))
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, attn.to_v(text)))
        weights = ((q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5 + self.bias).softmax(-1)
        seen = weights.to(v.dtype) @ v
        if attn.add_k_proj is not None:
            k = attn.norm_added_k(attn.add_k_proj(image)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            v = attn.add_v_proj(image).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            seen = seen + F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype)).to(seen.dtype)
        return attn.to_out[0](seen.transpose(1, 2).flatten(2))


def use_short_text(model: WanTransformer3DModel) -> ShortText:
    processor = ShortText()
    for block in model.blocks:
        block.attn2.processor = processor
    return processor


def encode_text(encoder: UMT5EncoderModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Context (B, SHORT_LEN, 128), zero beyond each caption, and the ``ShortText`` bias that goes with it."""
    count = (ids != PAD).sum(1)
    rows = encoder(input_ids=ids, attention_mask=(ids != PAD).long()).last_hidden_state
    rows = rows * (torch.arange(SHORT_LEN, device=ids.device) < count[:, None])[..., None]
    return rows, padding_bias(count)


def padding_bias(count: torch.Tensor) -> torch.Tensor:
    """`ShortText`'s bias (B, 1, 1, SHORT_LEN) for captions of ``count`` (B,) tokens."""
    place, count = torch.arange(SHORT_LEN, device=count.device), count[:, None]
    bias = (TEXT_LEN - count).float().log().expand(-1, SHORT_LEN)
    return bias.masked_fill(place < count, 0.0).masked_fill(place > count, -1e4)[:, None, None]


def levels(steps: int) -> np.ndarray:
    """Noise levels (steps + 1,) from 1 to 0, evenly spaced, then shifted."""
    even = np.linspace(1, 0, steps + 1)
    return SHIFT * even / (1 + (SHIFT - 1) * even)


def guided(model, short: ShortText, encoder, ids, guidance: float = 3.0, given=None):
    """A function of latents (B, 16, t, h, w) and timestep → velocity; ``ids`` (B, SHORT_LEN).

    With guidance 1 there is no second pass. ``given``: for image to video, the condition (B, 20, t, h, w) and the
    features (B, 257, IMAGE_DIM).
    """
    empty = torch.full_like(ids, PAD)
    empty[:, 0] = EOS
    twice = guidance != 1
    context, bias = encode_text(encoder, torch.cat([ids, empty]) if twice else ids)
    condition, features = (None, None) if given is None else (torch.cat([g, g]) if twice else g for g in given)

    def velocity(x, timestep: float):
        short.bias = bias
        t = torch.full((len(context),), timestep, device=x.device)
        both = torch.cat([x, x]) if twice else x
        both = both if condition is None else torch.cat([both, condition], 1)
        v = model(both, t, context, features, return_dict=False)[0].float()
        if not twice:
            return v
        v, empty_v = v.chunk(2)
        return empty_v + guidance * (v - empty_v)

    return velocity


@torch.no_grad()
def in_four(velocity, noise):
    """Latents from ``noise`` (B, 16, t, h, w) by Euler in four steps, as the distilled transformer makes them."""
    x, sigmas = noise.float(), levels(4)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        x = x + float(following - sigma) * velocity(x, float(1000 * sigma))
    return x


@torch.no_grad()
def sample(velocity, noise, steps: int = 12):
    """Latents from ``noise`` (B, 16, t, h, w) by UniPC, as wan_mlx makes them."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, num_train_timesteps=1000
    )
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise.float()
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, float(math.floor(float(t)))), t, x, return_dict=False)[0]
    return x
