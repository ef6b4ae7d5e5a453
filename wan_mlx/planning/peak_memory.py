"""Peak memory of each stage in bytes, from sizes alone: weights, stored results, and temporaries.

Weights and stored results are counted exactly. The number of temporaries alive at once follows from the order of the
code and from MLX, which allocates all submitted work before it runs. These numbers stand beside that code, in
`wan_mlx.models.block_execution`, `attention_execution` and `vae_execution`; ``benchmarks/memory_table.py`` measures
them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx

from ..caching import StepCache
from ..models.animate_face import FACES_ALIVE, FACES_ALIVE_CPU, FACES_AT_ONCE, Face
from ..models.attention_execution import (
    TOKENS_ALIVE,
    TOKENS_ALIVE_OPERATIONS,
    TOKENS_ALIVE_SETTLED,
    UNFUSED_SCORES,
    has_fused_kernel,
)
from ..models.audio_encoder import FRAMES_AT_ONCE, HOP, SCORES_AT_ONCE
from ..models.block_execution import (
    PIECE_TOKENS,
    PIECE_WIDE,
    TOKENS_ALIVE_AT_JOIN,
    TOKENS_ALIVE_IN_PIECES,
    TOKENS_ALIVE_WHOLE,
    WHOLE_RESIDENT,
    WHOLE_WIDE,
)
from ..models.configs import TransformerConfig, VAE22Config, VAEConfig
from ..models.networks import new_network
from ..models.pieces import FEED_FORWARD_TOKENS, FEW_TOKENS
from ..models.rife import CHANNELS_ALIVE, CHANNELS_ALIVE_CPU, RIFE, padded
from ..models.s2v import MOTION_FRAMES
from ..models.taehv import TAEHVConfig
from ..models.vae_execution import (
    DECODE_FRAMES,
    DEFERRED,
    ENCODE_FRAMES,
    GIVEN_FRAMES,
    JOINED_FRAMES,
    UNFOLDED_DECODE,
    UNFOLDED_ENCODE,
    VALUES_AT_ONCE,
)
from ..models.vae_tiling import split, stage_spans
from ..weights.component import parameter_shapes
from ..weights.configs import shapes_of
from .flops import frames_at, stages
from .sizes import Networks

# Latents (L, 64) in float32 alive in the sampling loop: the solver's history, both passes, and the step's own.
LATENTS_ALIVE = 10
# Allocated by the GPU backend itself.
GPU_OVERHEAD = 40_000_000
ITEMSIZE = 4  # of the VAE, which computes in float32
# TAEHV: arrays alive at once as large as a latent frame's frames in the last stage. Measured on a CPU, where MLX
# unfolds what a convolution reads; elsewhere counted, not measured.
TINY_ALIVE, TINY_ALIVE_CPU = 12, 38
TINY_WEIGHTS = 50_000_000
# wav2vec's features alive at once after its first convolution, measured on an H200, and on a CPU, where MLX unfolds
# what they read; copies of its positions' weights, while they are normed; the states of a clip, while they are mixed.
FEATURES_ALIVE, FEATURES_ALIVE_CPU, POSITIONS_ALIVE, STATES_ALIVE = 1.75, 11.8, 3, 3
BESIDE_SPEECH = 3  # latent frames beside a clip of S2V: its reference image, and what FramePack makes of those before
Shape = tuple[int, int, int]  # (t, h, w) of latents
Tile = tuple[int, int] | None  # (width, height) in pixels


def on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def on_metal() -> bool:
    return not on_cpu() and mx.metal.is_available()


def overhead() -> int:
    return 0 if on_cpu() else GPU_OVERHEAD


def encode_text(nets: Networks, tokens: int) -> int:
    """Two blocks of the text encoder, and its attention scores."""
    c, blocks = nets.text_encoder.config, nets.text_encoder.weights
    scores = 3 * 4 * c.num_heads * tokens**2
    context = 4 * nets.transformer.text_len * c.dim * nets.dtype.size
    return 2 * blocks.largest + scores + context + overhead()


def encode_images(nets: Networks) -> int:
    """CLIP's vision tower, float32."""
    c = nets.image_encoder
    block = (4 + 2 * c.mlp_ratio) * c.dim**2
    return 4 * ((c.num_layers - 1) * block + 3 * c.patch_size**2 * c.dim) + overhead()


def encode_audio(nets: Networks, frames: int) -> int:
    """wav2vec, float32: its weights, and the arrays of a few features, or of the positions, or all states of so many
    ``frames`` and beside them a layer's arrays, or the states joined."""
    c, alive = nets.audio_encoder, FEATURES_ALIVE_CPU if on_cpu() else FEATURES_ALIVE
    features = alive * min(frames, FRAMES_AT_ONCE) * HOP // c.conv_stride[0] * c.conv_dim[0]
    positions = POSITIONS_ALIVE * c.dim**2 // c.pos_groups * c.pos_kernel + 6 * frames * c.dim
    states, layer = frames * (c.num_layers + 1) * c.dim, frames * (6 * c.dim + 2 * c.ffn_dim)
    if not has_fused_kernel(mx.float32, c.dim // c.num_heads):
        layer += min(SCORES_AT_ONCE, c.num_heads * frames**2)
    at_work = max(features, positions, states + max(states, layer))
    return audio_weights(nets) + round(ITEMSIZE * at_work) + overhead()


def audio_weights(nets: Networks) -> int:
    """Bytes of wav2vec's weights."""
    return ITEMSIZE * sum(math.prod(shape) for shape in shapes_of(nets.audio_encoder).values())


def heard(config: TransformerConfig, frames: int, clip_frames: int) -> int:
    """What S2V hears in so many ``frames``, and what becomes of those of a clip and of the ones before it."""
    states = config.audio_layers * config.audio_dim
    return ITEMSIZE * (frames * states + STATES_ALIVE * (MOTION_FRAMES + clip_frames) * states)


def encode_face(nets: Networks) -> int:
    """The encoders of a face, and the arrays of a few pictures at their first resolution, float32."""
    c = nets.transformer
    weights = sum(math.prod(shape) for shape in parameter_shapes(Face(c)).values())
    alive = FACES_ALIVE_CPU if on_cpu() else FACES_ALIVE
    return ITEMSIZE * round(weights + alive * FACES_AT_ONCE * c.face_side**2 * c.motion_widths[0]) + overhead()


def denoise(
    nets: Networks,
    latent_shape: tuple[int, int, int],
    stream: bool,
    tokens_at_once: int,
    cache: StepCache | None = None,
    guided: bool = True,
    shares: bool = False,
) -> int:
    """Weights, and the arrays of one forward; two passes run one after the other, on the CPU at once.

    ``shares``: as of a `Plan`.
    """
    c, w = nets.transformer, nets.weights
    tokens = nets.geometry.seq_len(latent_shape)
    wide = tokens * c.dim * nets.dtype.size
    attending = TOKENS_ALIVE_SETTLED if tokens_at_once <= FEW_TOKENS else TOKENS_ALIVE
    attending += TOKENS_ALIVE_OPERATIONS * on_cpu()
    if tokens_at_once > FEED_FORWARD_TOKENS:
        # S2V's tokens of the video come first, at once if these are few enough: little waits to be joined with them.
        first = nets.geometry.seq_len((latent_shape[0] - BESIDE_SPEECH, *latent_shape[1:])) if c.hears else tokens
        piece = min(first, tokens_at_once) / tokens
        joined = 1 - piece if first <= tokens_at_once else 1.0
        beside = TOKENS_ALIVE_AT_JOIN * joined + TOKENS_ALIVE_WHOLE * piece
        fed = min(tokens, FEED_FORWARD_TOKENS) * c.ffn_dim * nets.dtype.size
        alive = max(attending * wide, beside * wide + WHOLE_WIDE * fed) + WHOLE_RESIDENT * (not stream)
    else:
        last_two = min(tokens, (tokens % tokens_at_once or tokens_at_once) + tokens_at_once)
        alive = max(
            attending * wide,
            TOKENS_ALIVE_IN_PIECES * wide + _pieces(nets, 2 * tokens_at_once),
            TOKENS_ALIVE_AT_JOIN * wide + _pieces(nets, last_two),
        )
    if c.vace_layers:
        alive += wide
    if not has_fused_kernel(nets.dtype, c.head_dim):
        alive += 3 * 4 * min(UNFUSED_SCORES, c.num_heads * tokens**2)
    passes = 2 if on_cpu() and not stream else 1
    each = 4 * math.prod(latent_shape) * c.out_dim
    kept = cache.kept_bytes(1 + guided, each, wide) if cache else 0
    if shares and passes == 1:  # two at once both work on it
        kept += (1 + bool(c.vace_layers)) * wide
    tables = tokens * c.head_dim // 2 * 3 * 4
    latents = LATENTS_ALIVE * each
    context = 2 * c.text_len * c.text_dim * nets.dtype.size
    weights = w.outside + 2 * w.largest + w.in_flight if stream else w.all
    return weights + passes * w.unpacked + round(passes * alive) + kept + tables + latents + context + overhead()


def _pieces(nets: Networks, tokens: int) -> float:
    """Temporaries of one piece of ``tokens`` in the token-wise layers."""
    c = nets.transformer
    return tokens * nets.dtype.size * (PIECE_TOKENS * c.dim + PIECE_WIDE * c.ffn_dim)


@lru_cache(maxsize=8)
def vae_weights(config: VAEConfig) -> int:
    """Bytes of the VAE's weights, encoder and decoder."""
    return ITEMSIZE * sum(math.prod(shape) for shape in parameter_shapes(new_network(config)).values())


def tile_work(config: VAEConfig, latent_shape: Shape, tile: Tile, decoding: bool) -> float:
    """Work of the tiles, relative to whole frames: margins are computed twice."""
    if tile is None:
        return 1.0
    whole, tiled = 0.0, 0.0
    heights, widths = _sides(config, latent_shape, tile, decoding)
    for stage, (into, width, scale) in enumerate(stages(config, decoding)):
        each = frames_at(config, latent_shape[0], stage, decoding) * (into + 4 * width) * width
        whole += each * math.prod(latent_shape[1:]) * scale**2
        tiled += each * sum(heights[stage]) * sum(widths[stage])
    return tiled / whole


def tile_kinds(config: VAEConfig, latent_shape: Shape, tile: Tile, decoding: bool) -> int:
    """Number of different tile shapes, margins included."""
    axes = _sides(config, latent_shape, tile, decoding)
    return math.prod(len(set(zip(*axis, strict=True))) for axis in axes)


def convolutions(config: VAEConfig, decoding: bool) -> list[int]:
    """Number of 3x3 convolutions at each resolution, as `wan_mlx.models.vae_tiling` counts them."""
    counts = [2 * (config.num_res_blocks + decoding)] * len(config.dim_mult)
    counts[-1 if decoding else 0] += 1
    return counts


def _sides(
    config: VAEConfig, latent_shape: Shape, tile: Tile, decoding: bool, output: bool = False
) -> list[list[list[int]]]:
    """Heights, and widths: for each stage those of each tile's input, or of the valid part of its output, in pixels."""
    sides = [max(1, side // config.geometry.spatial) for side in tile[::-1]] if tile else latent_shape[1:]
    return [_along(config, *axis, decoding)[output] for axis in zip(latent_shape[1:], sides, strict=True)]


@lru_cache(maxsize=1024)
def _along(config: VAEConfig, length: int, largest: int, decoding: bool) -> tuple[list[list[int]], list[list[int]]]:
    """The same along one axis of ``length`` latents, in tiles of at most ``largest``: of inputs, and of outputs."""
    tiles = [stage_spans(part, convolutions(config, decoding), length, decoding) for part in split(length, largest)]
    inputs, outputs = (
        [[spans[which][1] - spans[which][0] for spans in stage] for stage in zip(*tiles, strict=True)]
        for which in (0, 1)
    )
    return inputs, outputs


def rife(width: int, height: int) -> int:
    """RIFE's weights, and the arrays of one frame between two."""
    weights = sum(math.prod(shape) for shape in parameter_shapes(RIFE()).values())
    channels = CHANNELS_ALIVE_CPU if on_cpu() else CHANNELS_ALIVE
    return ITEMSIZE * (weights + channels * padded(width) * padded(height))


def winograd_scratch(frames: int, height: int, width: int, into: int, out: int) -> int:
    """Bytes that Metal takes for a causal convolution beside its input and output, as MLX's conv.cpp does it.

    For each of the three 3x3 convolutions that are submitted at once: the input, padded; it and the output in 8x8
    values for every 6x6 pixels; and so the weights. None where Metal takes another kernel.
    """
    if into % 32 or out % 32 or into + out < 256 or frames * height * width < 4096:
        return 0
    rows, columns = math.ceil(height / 6), math.ceil(width / 6)
    padded = frames * (6 * rows + 2) * (6 * columns + 2) * into
    return 3 * ITEMSIZE * (padded + 64 * (frames * rows * columns * (into + out) + into * out))


def tiny(config: TAEHVConfig, latent_shape: Shape) -> int:
    """TAEHV's weights, and the arrays of one latent frame that it decodes."""
    pixels = math.prod(latent_shape[1:]) * 4 ** (len(config.widths) - 1) * math.prod(config.grows)
    return TINY_WEIGHTS + (TINY_ALIVE_CPU if on_cpu() else TINY_ALIVE) * pixels * config.widths[-1] * 4 + overhead()


def vae(config: VAEConfig, latent_shape: Shape, tile: Tile, decoding: bool) -> int:
    """The VAE's weights, causal caches and temporaries, of decoding or encoding.

    With tiles also the latents beside the middle block and, of encoding, the video.
    """
    t, h, w = latent_shape
    kept = 2 - (t == 1 and not decoding)  # frames, of which a picture has one
    # Pixels of the largest tile at each stage: input and output.
    sizes, right_sizes = (
        [(max(heights), max(widths)) for heights, widths in zip(*axes, strict=True)]
        for axes in (_sides(config, latent_shape, tile, decoding, output) for output in (False, True))
    )
    given, right = [math.prod(size) for size in sizes], [math.prod(size) for size in right_sizes]
    caches, peak, held = 0, 0, 0
    blocks = config.num_res_blocks + decoding
    each, unfolded = (DECODE_FRAMES, UNFOLDED_DECODE) if decoding else (ENCODE_FRAMES, UNFOLDED_ENCODE)
    cpu, metal = on_cpu(), on_metal()
    late = DEFERRED if decoding and not cpu else 0
    temporal = config.temporal_downsample[::-1] if decoding else config.temporal_downsample
    frames = 1 if t == 1 or decoding else 2 ** sum(temporal)
    for stage, (into, width, _) in enumerate(stages(config, decoding)):
        caches += kept * given[stage] * (into + (2 * blocks - 1) * width)
        wide = max(into, width)
        frame = given[stage] * wide * ITEMSIZE
        count = max(1, min(frames, VALUES_AT_ONCE // (given[stage] * wide)))
        alive = (each - GIVEN_FRAMES) * width / wide + GIVEN_FRAMES + unfolded * cpu
        scratch = max(winograd_scratch(count, *sizes[stage], c, width) for c in (into, width)) if metal else 0
        peak = max(peak, (alive * count + (JOINED_FRAMES if count > 1 else 0)) * frame + scratch + late + held)
        if stage == len(given) - 1:
            caches += 2 * given[stage] * width * decoding
            break
        caches += 2 * right[stage] * width * temporal[stage] // (1 if decoding else 4)
        if decoding:
            given_on = frames * 2 ** (temporal[stage] and t > 1)
            # Frames that wait for the next stage and, if they are twice as many, the frames they were made from.
            held += (given_on + frames * (given_on > frames)) * right[stage] * width * ITEMSIZE
            if isinstance(config, VAE22Config):  # the shortcut's source
                held += frames * given[stage] * into * ITEMSIZE
            frames = given_on
        else:
            frames = max(1, count // 2 ** temporal[stage])  # pieces stay separate
    widest = (config.decoder_dim if decoding else config.dim) * config.dim_mult[-1]
    middle, whole_video = 2 * h * w * (4 * widest + (config.z_dim if decoding else widest)), 0
    if tile:
        middle, whole_video = 0, t * h * w * widest * ITEMSIZE
        if not decoding:
            whole_video += config.geometry.num_frames(t) * h * w * config.geometry.spatial**2 * 3 * 4
    return round(vae_weights(config) + (caches + middle) * ITEMSIZE + peak + whole_video + overhead())
