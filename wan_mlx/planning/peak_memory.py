"""The most memory each stage takes, in bytes, from sizes alone: weights, what a stage keeps, and its temporaries.

Weights and what is kept are counted. How many temporaries live at once follows from the order of the code and from
MLX, which allocates what is submitted before it runs; the numbers of them stand beside that code, in
`wan_mlx.models.execution` and `vae_execution`, and ``benchmarks/memory_table.py`` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import mlx.core as mx

from ..cuda.attention import keys_to_append
from ..geometry import Geometry
from ..models.configs import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VAEConfig, geometry_of
from ..models.execution import (
    FEED_FORWARD_TOKENS,
    FEW_TOKENS,
    PIECE_TOKENS,
    PIECE_WIDE,
    TOKENS_ALIVE,
    TOKENS_ALIVE_AT_JOIN,
    TOKENS_ALIVE_IN_PIECES,
    TOKENS_ALIVE_OPERATIONS,
    TOKENS_ALIVE_SETTLED,
    TOKENS_ALIVE_WHOLE,
    TOKENS_ALIVE_WHOLE_STREAMED,
    UNFUSED_SCORES,
    WHOLE_WIDE,
    has_fused_kernel,
)
from ..models.quantized_linear import Packing
from ..models.rope import row_order
from ..models.text_encoder import TextEncoder
from ..models.transformer import BLOCK_LISTS, Transformer
from ..models.vace import VaceTransformer
from ..models.vae import VAE
from ..models.vae_execution import (
    DECODE_FRAMES,
    DEFERRED,
    ENCODE_FRAMES,
    JOINED_FRAMES,
    UNFOLDED_FRAMES,
    VALUES_AT_ONCE,
)
from ..models.vae_tiling import decoder_spans, encoder_spans, split
from ..weights.component import parameter_shapes
from ..weights.parameters import dtype_of
from ..weights.prefetch import most_in_flight
from .flops import frames_at, stages

# Latents (L, 64) in float32 in the sampling loop: of the solver's history, both passes, and the step's.
LATENTS_ALIVE = 10
# What a GPU's backend itself allocates.
GPU_OVERHEAD = 40_000_000


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a network's weights, resident and as stored in its file.

    ``outside`` is what no block holds, ``blocks`` all blocks, ``largest`` the largest block; ``unpacked`` is the
    largest matrix of packed ones when it is unpacked, 0 if none is packed; ``in_flight`` is what reading a block takes
    beside it, for what is packed when all of it is there, or cast or put into another order on the way.
    """

    outside: int
    blocks: int
    largest: int
    stored_outside: int
    stored_blocks: int
    stored_largest: int
    unpacked: int = 0
    in_flight: int = 0

    @property
    def all(self) -> int:
        return self.outside + self.blocks


@dataclass(frozen=True)
class Networks:
    """What is known of a model before its weights are read."""

    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VAEConfig
    image_encoder: ImageEncoderConfig | None
    dtype: mx.Dtype
    weights: WeightBytes
    text_block: int  # bytes of one block of the text encoder
    text_stored: int  # bytes of the text encoder's blocks in its file
    packings: Mapping[str, Packing] = field(default_factory=dict)  # of the transformer's packed matrices

    @property
    def geometry(self) -> Geometry:
        """The sizes of its latents and tokens."""
        return geometry_of(self.transformer, self.vae)


def on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def overhead() -> int:
    return 0 if on_cpu() else GPU_OVERHEAD


def weight_bytes(
    config: TransformerConfig, dtype: mx.Dtype, packings: Mapping, stored: Mapping[str, int] | None = None
) -> WeightBytes:
    """Bytes of a transformer.

    Args:
        config: its sizes.
        dtype: of what is not packed and not kept in float32.
        packings: weight's name → `Packing`, of those that are packed.
        stored: name → bytes in the file; None takes float32, as published.
    """
    kept: dict[str, int] = {}
    in_file: dict[str, int] = {}
    packed_later: dict[str, int] = {}
    changed: dict[str, list[int]] = {}
    made_anew: dict[str, int] = {}
    unpacked = 0
    network = VaceTransformer if config.model_type == "vace" else Transformer
    for name, shape in parameter_shapes(network(config)).items():
        block = ".".join(name.split(".")[:2]) if name.split(".")[0] in BLOCK_LISTS else ""
        if name in packings:
            size = sum(math.prod(s) * d.size for s, d in packings[name].shapes(shape).values())
            unpacked = max(unpacked, math.prod(shape) * dtype.size)
        else:
            size = math.prod(shape) * dtype_of("transformer", name, dtype).size
        kept[block] = kept.get(block, 0) + size
        as_stored = stored[name] if stored else 4 * math.prod(shape)
        in_file[block] = in_file.get(block, 0) + as_stored
        if not block or as_stored == size and row_order(name, config.dim, config.head_dim) is None:
            continue
        made_anew[block] = made_anew.get(block, 0) + size
        if name in packings and as_stored != size:
            packed_later[block] = packed_later.get(block, 0) + as_stored
        else:
            changed.setdefault(block, []).append(as_stored)
    outside, stored_outside = kept.pop(""), in_file.pop("")
    in_flight = [
        most_in_flight(changed.get(b, []), packed_later.get(b, 0), in_file[b], kept[b], made_anew.get(b, 0))
        for b in kept
    ]
    return WeightBytes(
        outside, sum(kept.values()), max(kept.values()), stored_outside, sum(in_file.values()), max(in_file.values()),
        unpacked, max(in_flight),
    )  # fmt: skip


def text_block_bytes(config: TextEncoderConfig, dtype: mx.Dtype, packings: Mapping) -> int:
    """Bytes of one block of the text encoder, resident."""
    size = 0
    for name, shape in parameter_shapes(TextEncoder(config)).items():
        if name.startswith("blocks.0."):
            packed = packings[name].shapes(shape).values() if name in packings else [(shape, dtype)]
            size += sum(math.prod(s) * d.size for s, d in packed)
    return size


def encode_text(nets: Networks, tokens: int) -> int:
    """Two blocks of the text encoder, and the scores of its attention."""
    scores = 3 * 4 * nets.text_encoder.num_heads * tokens**2
    context = 4 * nets.transformer.text_len * nets.text_encoder.dim * nets.dtype.size
    return 2 * nets.text_block + scores + context + overhead()


def encode_images(nets: Networks) -> int:
    """CLIP's vision tower, float32."""
    c = nets.image_encoder
    block = (4 + 2 * c.mlp_ratio) * c.dim**2
    return 4 * ((c.num_layers - 1) * block + 3 * c.patch_size**2 * c.dim) + overhead()


def load_transformer(nets: Networks, stream: bool) -> int:
    """All weights, or those outside the blocks."""
    return nets.weights.outside if stream else nets.weights.all


def denoise(
    nets: Networks, latent_shape: tuple[int, int, int], stream: bool, tokens_at_once: int, step_cache: bool = False
) -> int:
    """Weights, and one forward's arrays; two passes are made one after the other, on the CPU at once."""
    c, w = nets.transformer, nets.weights
    tokens = nets.geometry.seq_len(latent_shape)
    wide = tokens * c.dim * nets.dtype.size
    attending = TOKENS_ALIVE_SETTLED if tokens_at_once <= FEW_TOKENS else TOKENS_ALIVE
    attending += TOKENS_ALIVE_OPERATIONS * on_cpu()
    fills = has_fused_kernel(nets.dtype, c.head_dim) and keys_to_append(tokens) > 0
    attending += fills  # values, while they are copied
    if tokens_at_once > FEED_FORWARD_TOKENS:
        beside = TOKENS_ALIVE_WHOLE_STREAMED if stream else TOKENS_ALIVE_WHOLE
        piece = min(tokens, tokens_at_once) / tokens
        beside = TOKENS_ALIVE_AT_JOIN * (piece < 1) + beside * piece
        fed = min(tokens, FEED_FORWARD_TOKENS) * c.ffn_dim * nets.dtype.size
        alive = max(attending * wide, beside * wide + WHOLE_WIDE * fed)
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
    kept = 3 * wide if step_cache else 0  # a residual for each pass, and the tokens it is added to
    tables = tokens * c.head_dim // 2 * 3 * 4
    latents = LATENTS_ALIVE * 4 * math.prod(latent_shape) * c.out_dim
    context = 2 * c.text_len * c.text_dim * nets.dtype.size
    weights = w.outside + 2 * w.largest + w.in_flight if stream else w.all
    return weights + 2 * w.unpacked + round(passes * alive) + kept + tables + latents + context + overhead()


def _pieces(nets: Networks, tokens: int) -> float:
    """What is computed at once of so many tokens, one by one, where they are independent."""
    c = nets.transformer
    return tokens * nets.dtype.size * (PIECE_TOKENS * c.dim + PIECE_WIDE * c.ffn_dim)


def decode(config: VAEConfig, latent_shape: tuple[int, int, int], tile: tuple[int, int] | None, itemsize: int) -> int:
    """The VAE's weights, causal caches and temporaries; in tiles also the latents as the middle leaves them."""
    return _vae(config, latent_shape, tile, itemsize, decoding=True)


def encode(config: VAEConfig, latent_shape: tuple[int, int, int], tile: tuple[int, int] | None, itemsize: int) -> int:
    """The VAE's weights, causal caches and temporaries; in tiles also the video, and latents before the middle."""
    return _vae(config, latent_shape, tile, itemsize, decoding=False)


@lru_cache(maxsize=8)
def vae_weights(config: VAEConfig, itemsize: int) -> int:
    """Bytes of the VAE's weights, encoder and decoder."""
    return sum(math.prod(shape) for shape in parameter_shapes(VAE(config)).values()) * itemsize


def tile_work(
    config: VAEConfig, latent_shape: tuple[int, int, int], tile: tuple[int, int] | None, decoding: bool
) -> float:
    """How many times the work of whole frames tiles are: margins are computed twice."""
    if tile is None:
        return 1.0
    t, h, w = latent_shape
    factor, whole, tiled = config.spatial_factor, 0.0, 0.0
    spans_of = decoder_spans if decoding else encoder_spans
    sums = []
    for length, side in zip((h, w), tile[::-1], strict=True):
        spans = [
            spans_of(part, convolutions(config, decoding), length) for part in split(length, max(1, side // factor))
        ]
        sums.append([sum(s[stage][0][1] - s[stage][0][0] for s in spans) for stage in range(len(config.dim_mult))])
    for stage, (into, width, scale) in enumerate(stages(config, decoding)):
        each = frames_at(config, t, stage, decoding) * (into + 4 * width) * width
        whole += each * h * w * scale**2
        tiled += each * sums[0][stage] * sums[1][stage]
    return tiled / whole


def tile_kinds(
    config: VAEConfig, latent_shape: tuple[int, int, int], tile: tuple[int, int] | None, decoding: bool
) -> int:
    """How many different shapes tiles have with their margins."""
    if tile is None:
        return 1
    kinds, factor = 1, config.spatial_factor
    spans_of = decoder_spans if decoding else encoder_spans
    for length, side in zip(latent_shape[1:], tile[::-1], strict=True):
        parts = split(length, max(1, side // factor))
        spans = [spans_of(part, convolutions(config, decoding), length) for part in parts]
        kinds *= len({tuple(end - start for (start, end), _ in stages) for stages in spans})
    return kinds


def convolutions(config: VAEConfig, decoding: bool) -> list[int]:
    """3x3 convolutions at each resolution, as `wan_mlx.models.vae_tiling` counts them."""
    counts = [2 * (config.num_res_blocks + decoding)] * len(config.dim_mult)
    counts[-1 if decoding else 0] += 1
    return counts


def _vae(config, latent_shape, tile, itemsize, decoding) -> int:
    t, h, w = latent_shape
    factor, widest = config.spatial_factor, config.dim * config.dim_mult[-1]
    weights = vae_weights(config, itemsize)
    spans_of = decoder_spans if decoding else encoder_spans
    given, right = [], []  # pixels of the largest tile at each stage: before, and what is passed on
    for length, side in zip((h, w), tile[::-1] if tile else (h * factor, w * factor), strict=True):
        parts = split(length, max(1, side // factor))
        spans = [spans_of(part, convolutions(config, decoding), length) for part in parts]
        given.append([max(s[i][0][1] - s[i][0][0] for s in spans) for i in range(len(config.dim_mult))])
        right.append([max(s[i][1][1] - s[i][1][0] for s in spans) for i in range(len(config.dim_mult))])
    given, right = ([a * b for a, b in zip(*axes, strict=True)] for axes in (given, right))
    caches, peak, held = 0, 0, 0
    blocks = config.num_res_blocks + decoding
    each = (DECODE_FRAMES if decoding else ENCODE_FRAMES) + UNFOLDED_FRAMES * on_cpu()
    temporal = config.temporal_downsample[::-1] if decoding else config.temporal_downsample
    frames = 1 if t == 1 or decoding else 2 ** sum(temporal)
    for stage, (into, width, _) in enumerate(stages(config, decoding)):
        last = stage == len(given) - 1
        caches += 2 * given[stage] * (into + (2 * blocks - 1) * width)
        frame = given[stage] * width * itemsize
        count = max(1, min(frames, VALUES_AT_ONCE // (given[stage] * width)))
        late = DEFERRED if decoding and not on_cpu() else 0
        peak = max(peak, (each * count + (JOINED_FRAMES if count > 1 else 0)) * frame + late + held)
        if last and decoding:
            caches += 2 * given[stage] * width
        if last:
            break
        caches += 2 * right[stage] * width * temporal[stage] // (1 if decoding else 4)
        if decoding:
            given_on = frames * 2 ** (temporal[stage] and t > 1)
            # What waits to be passed on and, if that is twice as many, what it was made from.
            held += (given_on + frames * (given_on > frames)) * right[stage] * width * itemsize
            frames = given_on
        else:
            frames = max(1, count // 2 ** temporal[stage])  # pieces are not put together again
    middle = 2 * h * w * (4 * widest + (config.z_dim if decoding else widest))
    whole_video = 0
    if tile:
        middle = 0
        whole_video = t * h * w * widest * itemsize
        if not decoding:
            whole_video += ((t - 1) * config.temporal_factor + 1) * h * w * factor**2 * 3 * 4
    return round(weights + (caches + middle) * itemsize + peak + whole_video + overhead())
