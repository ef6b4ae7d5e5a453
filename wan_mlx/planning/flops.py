"""Floating-point operations of each network (a multiply-add counts as two)."""

from __future__ import annotations

from ..models.configs import AudioEncoderConfig, ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from ..models.rife import FEATURES, FLOW, MASK, STATE, RIFEConfig, padded
from ..models.taehv import TAEHVConfig

IMAGE_TOKENS = 257  # CLIP's tokens for each image


def image_tokens(config: TransformerConfig) -> int:
    """Number of CLIP tokens that cross-attention reads beside the text's."""
    return (1 + (config.model_type == "flf2v")) * IMAGE_TOKENS if config.has_image_branch else 0


def forward_parts(config: TransformerConfig, tokens: int) -> dict[str, float]:
    """FLOP of one transformer forward over ``tokens``, by kind of work."""
    d, context = config.dim, config.text_len + image_tokens(config)
    blocks = config.num_layers + len(config.vace_layers)
    return {
        "self linear": blocks * 8.0 * tokens * d**2,
        "self attention": blocks * 4.0 * tokens**2 * d,
        "cross linear": blocks * 4.0 * (tokens + context) * d**2,
        "cross attention": blocks * 4.0 * tokens * context * d,
        "feed-forward": blocks * 4.0 * tokens * d * config.ffn_dim,
        "audio": len(config.audio_inject_layers) * 4.0 * tokens * d**2,
        "face": len(config.face_layers) * 4.0 * tokens * d**2,
        "vace": (len(config.vace_layers) + bool(config.vace_layers)) * 2.0 * tokens * d**2,
    }


def shared_parts(config: TransformerConfig, tokens: int) -> dict[str, float]:
    """The same of what a step's second pass takes from the first: self-attention of the first block, and of VACE's."""
    parts, of_vace = forward_parts(config, tokens), len(config.vace_layers)
    blocks, first = config.num_layers + of_vace, 1 + bool(of_vace)
    return {
        "self linear": parts["self linear"] * first / blocks,
        "self attention": parts["self attention"] * first / blocks,
        "vace": parts["vace"] / (1 + of_vace),
    }


def text_flop(config: TextEncoderConfig, tokens: int) -> float:
    """FLOP of encoding a text of ``tokens`` tokens."""
    linear = 8.0 * config.dim * config.dim_attn + 6.0 * config.dim * config.dim_ffn
    return config.num_layers * (tokens * linear + 4.0 * tokens**2 * config.dim_attn)


def audio_flop(config: AudioEncoderConfig, frames: int) -> float:
    """FLOP of hearing a sound of so many frames, 50 a second."""
    d, rate, flop, into = config.dim, 1.0, 0.0, 1
    for stride in config.conv_stride:
        rate *= stride
    for width, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        rate /= stride
        flop, into = flop + rate * 2.0 * kernel * into * width, width
    flop += 2.0 * into * d + 2.0 * config.pos_kernel * d**2 / config.pos_groups
    return frames * (flop + config.num_layers * (8.0 * d**2 + 4.0 * d * config.ffn_dim + 4.0 * frames * d))


def face_flop(config: TransformerConfig) -> float:
    """FLOP of encoding one picture of a face; what comes after its convolutions is little."""
    flop, side = 0.0, config.face_side
    for into, out in zip(config.motion_widths, config.motion_widths[1:], strict=False):
        flop += side**2 * (18.0 * into**2 + (18.0 + 2.0) / 4 * into * out)  # the second convolution halves the sides
        side //= 2
    return flop


def image_flop(config: ImageEncoderConfig) -> float:
    """FLOP of encoding one image; the last block is not run."""
    tokens, d = (config.image_size // config.patch_size) ** 2 + 1, config.dim
    linear = (8.0 + 4.0 * config.mlp_ratio) * d**2
    patches = 2.0 * tokens * 3 * config.patch_size**2 * d
    return patches + (config.num_layers - 1) * (tokens * linear + 4.0 * tokens**2 * d)


def rife_flop(width: int, height: int, config: RIFEConfig = RIFEConfig()) -> float:  # noqa: B008 - frozen
    """FLOP of one frame between two, of their size as RIFE pads it."""
    pixels, head = padded(height) * padded(width), config.head
    flop = 2 * (2 * 9 * (3 * head + 2 * head**2) / 4 + 2 * 16 * head * FEATURES / 4)
    for block, (dim, scale) in enumerate(zip(config.widths, config.scales, strict=True)):
        convolutions = 9 * (config.inputs(block) * dim / 2 / 4 + dim**2 / 2 / 16 + config.depth * dim**2 / 16)
        flop += 2 * (convolutions + 16 * dim * 4 * (FLOW + MASK + STATE) / 16) / scale**2
    return pixels * flop


def stages(config: VAEConfig, decoding: bool) -> list[tuple[int, int, int]]:
    """Each resolution in order of computation: (input width, width, factor of the latents' resolution).

    The input width is that of the first residual block: in a decoder of Wan2.1, resampling has halved the width before.
    """
    widths = [(config.decoder_dim if decoding else config.dim) * m for m in config.dim_mult]
    last = len(widths) - 1
    if not decoding:
        before = [config.dim, *widths[:-1]]
        return [(before[i], widths[i], 2 ** (last - i)) for i in range(last + 1)]
    widths = widths[::-1]
    before = [widths[0], *(w // config.narrowing for w in widths[:-1])]
    return [(before[i], widths[i], 2**i) for i in range(last + 1)]


def frames_at(config: VAEConfig, latent_frames: int, stage: int, decoding: bool) -> int:
    """Number of video frames that a stage computes."""
    doublings = config.temporal_downsample[::-1][:stage] if decoding else config.temporal_downsample[stage:]
    return (latent_frames - 1) * 2 ** sum(doublings) + 1


def tiny_flop(config: TAEHVConfig, latent_shape: tuple[int, int, int]) -> float:
    """FLOP of decoding latents (t, h, w) by TAEHV."""
    t, h, w = latent_shape
    frames, pixels = t, h * w
    flop = t * pixels * 18.0 * config.z_dim * config.widths[0]
    for width, after, grow in zip(config.widths, config.widths[1:], config.grows, strict=False):
        flop += frames * pixels * 3 * 72.0 * width**2  # three blocks of three convolutions, the first of two frames
        pixels *= 4
        flop += frames * pixels * 2.0 * grow * width**2
        frames *= grow
        flop += frames * pixels * 18.0 * width * after
    return flop + frames * pixels * 18.0 * config.widths[-1] * 3 * config.patch**2


def vae_flop(config: VAEConfig, latent_shape: tuple[int, int, int], decoding: bool) -> float:
    """FLOP of decoding latents (t, h, w), or of encoding a video to them."""
    t, h, w = latent_shape
    found, last = stages(config, decoding), len(config.dim_mult) - 1
    blocks = config.num_res_blocks + decoding
    temporal = config.temporal_downsample[::-1] if decoding else config.temporal_downsample
    widest = (config.decoder_dim if decoding else config.dim) * config.dim_mult[-1]
    # The middle: two residual blocks, attention with one head, and the convolution from or to latents.
    z = config.z_dim if decoding else 2 * config.z_dim
    flop = t * h * w * (4 * 54.0 * widest**2 + 8.0 * widest**2 + 4.0 * h * w * widest + 54.0 * widest * z)
    areas = [h * w * scale**2 for _, _, scale in found]
    pixels = [area * frames_at(config, t, stage, decoding) for stage, area in enumerate(areas)]
    for stage, (into, width, _) in enumerate(found):
        flop += pixels[stage] * (54.0 * into * width + (2 * blocks - 1) * 54.0 * width**2)  # 3x3x3, two in each block
        if into != width:
            flop += pixels[stage] * 2.0 * into * width
        if stage == (last if decoding else 0):
            flop += pixels[stage] * 54.0 * 3 * config.patch**2 * width
        if stage < last and decoding:
            flop += pixels[stage + 1] * 18.0 * width**2 / config.narrowing  # 3x3 at twice the resolution
            flop += temporal[stage] * (pixels[stage] - areas[stage]) * 12.0 * width**2  # not for the first frame
        elif stage < last:
            flop += pixels[stage] / areas[stage] * areas[stage + 1] * 18.0 * width**2
            flop += temporal[stage] * (pixels[stage + 1] - areas[stage + 1]) * 6.0 * width**2
    return flop
