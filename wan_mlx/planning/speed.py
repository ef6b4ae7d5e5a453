"""Time of each stage of a plan on this machine: the networks' own code is timed on random weights.

One block, and the VAE over two latent frames, are timed at the video's size or, where that would take long, at a
smaller one; the rest follows from FLOP counts (`wan_mlx.planning.flops`). Timing matrix products alone would say less:
small shapes, casts, norms and unfolding for convolutions take a share of time that differs between machines.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import cuda
from ..guidance import at_once
from ..models.attention_execution import attention
from ..models.configs import TransformerConfig, VAEConfig
from ..models.execution import Execution
from ..models.networks import new_network, new_transformer
from ..models.pieces import Pacer
from ..models.quantized_linear import QuantizedLinear
from ..models.transformer import ForwardPass, Transformer
from ..models.vae_execution import VAEExecution
from ..weights.parameters import Parameters, dtype_of, locate
from ..weights.stream import load_staged
from . import flops as work
from . import peak_memory as peaks
from .plan import Plan, limited_memory
from .sizes import Networks

# Seconds of each measurement: enough for a stable result, and no GPU work so long that macOS would end it.
ENOUGH, MOST_TIMES = 0.4, 100
# Seconds; longer work is not repeated.
LONG = 2.0
# Largest growth in size when a measurement was too short.
LARGEST_LEAP = 16
# Least share of the rest of a forward, however long attention took alone.
LEAST_REST = 0.05
# Queries of one head; beyond this a further head is timed along with it.
QUERIES = 1024
# Bytes of weights that are loaded to measure reading.
READ_BYTES = 256_000_000
# Number of random values, repeated to fill all random arrays.
PATTERN = 1 << 18
# Rows of a quantised matrix that are really quantised; the others repeat them.
FEW_ROWS = 64


@dataclass(frozen=True)
class Rates:
    """FLOP per second in terms of `wan_mlx.planning.flops`, overheads included, and bytes per second.

    Attributes:
        transformer: of forwards without self-attention; of two at once where guidance runs them so.
        attention: of self-attention, likewise.
        decode, encode: of the VAE; ``encode`` is None where nothing is encoded.
        reading: of loading weights, in bytes of their file; None leaves it out.
        first: stage → extra seconds of the first run, in which kernels are chosen for new shapes.
    """

    transformer: float
    attention: float
    decode: float
    encode: float | None = None
    reading: float | None = None
    first: Mapping[str, float] = field(default_factory=dict)


class Rate(NamedTuple):
    """A measurement: FLOP per second, and the extra seconds of the first run."""

    flop: float
    first: float


def with_seconds(plan: Plan, rates: Rates) -> Plan:
    """The plan with times from these rates."""
    rows = []
    for row in plan.rows:
        if row.stage == "encode video":
            assert rates.encode is not None, "there is such a stage"
            seconds = row.flop / rates.encode
        elif row.stage in ("decode", "encode images", "encode audio", "encode face"):  # all are float32
            seconds = row.flop / rates.decode
        else:
            seconds = row.attention / rates.attention + (row.flop - row.attention) / rates.transformer
        if rates.reading:
            read = row.reads / rates.reading
            streamed = row.stage == "encode text" or plan.stream and row.stage == "denoise"
            seconds = max(seconds, read) if streamed else seconds + read
        rows.append(replace(row, seconds=seconds + rates.first.get(row.stage, 0.0)))
    return replace(plan, rows=tuple(rows))


def measure_rates(
    plan: Plan, nets: Networks, latent_shape: tuple[int, int, int], passes: int, parameters: Parameters | None = None
) -> Rates:
    """Time the parts of ``plan``; takes seconds, and no more memory than the plan.

    Args:
        plan: without times.
        nets: the plan's model.
        latent_shape: (t, h, w) of its video.
        passes: forwards of a step, 2 with guidance.
        parameters: the transformer's, if its weights are here.
    """
    at_a_time = passes if peaks.on_cpu() and not plan.stream else 1
    tokens, vae, flop, first = nets.geometry.seq_len(latent_shape), nets.vae, {}, {}
    tiles = {"decode": plan.decode_tile, "encode video": plan.encode_tile}
    with limited_memory(plan):  # as in the run: allocating anew each time is slower
        attending = attention_rate(nets, tokens, at_a_time)
        forward = transformer_rate(nets, tokens, at_a_time, plan.tokens_at_once, attending.flop)
        first["denoise"] = forward.first + attending.first
        for stage in tiles.keys() & {row.stage for row in plan.rows}:
            tile, decoding = tiles[stage], stage == "decode"
            flop[stage], more = vae_rate(vae, _corner(vae, latent_shape, tile), decoding)
            # For each kind of tile, and in it for the first frame and for later ones.
            kinds = peaks.tile_kinds(vae, latent_shape, tile, decoding) * (2 if latent_shape[0] > 1 else 1)
            first[stage] = more * kinds
        reading = reading_rate(parameters, plan.stream) if parameters else None
    mx.clear_cache()
    return Rates(forward.flop, attending.flop, flop["decode"], flop.get("encode video"), reading, first)


def transformer_rate(nets: Networks, tokens: int, at_a_time: int, tokens_at_once: int, attending: float) -> Rate:
    """Rate of a forward without self-attention, which is taken to run at ``attending`` FLOP per second."""
    whole = nets.transformer
    model = random_transformer(one_block(whole), nets)
    run = Execution(model, tokens_at_once=tokens_at_once)

    def forward(count: int, **hooks) -> float:
        # The text is shortened by the same factor as the tokens.
        model.config = replace(model.config, text_len=max(1, whole.text_len * count // tokens))
        latents, context, more = random_inputs(model.config, count, nets.dtype)
        return _seconds(lambda: mx.eval(run(latents, 500.0, context, **more, **hooks)), at_a_time)

    def without_attention(count: int, with_block: float) -> float:
        """Seconds of a whole forward, given the seconds with one block."""
        without = typical(partial(forward, count, through=_no_blocks))
        parts, one = (
            work.forward_parts(replace(c, text_len=model.config.text_len), count) for c in (whole, model.config)
        )
        block = max(with_block - without, 0.0)  # less where the machine was busy meanwhile
        seconds = without + sum(parts.values()) / sum(one.values()) * block
        return max(seconds - parts["self attention"] / attending, LEAST_REST * seconds)

    count, seconds, first = worth_timing(forward, 16, tokens)
    seconds = without_attention(count, seconds)
    if count < tokens:  # work that does not depend on the number of tokens, such as unpacking weights, counts once
        least = without_attention(1, typical(partial(forward, 1)))
        seconds += max(seconds - least, LEAST_REST * seconds) * (tokens - count) / (count - 1)
    parts = work.forward_parts(whole, tokens)
    return Rate((sum(parts.values()) - parts["self attention"]) / seconds, first)


def one_block(config: TransformerConfig) -> TransformerConfig:
    """Sizes of a network of one block of this kind. What is added to tokens for sound, or for a face, is left out."""
    plain = "t2v" if config.hears else "i2v" if config.face_layers else config.model_type
    # Tokens of a reference image are tokens like the others.
    few = replace(config, num_layers=1, vace_layers=config.vace_layers[:1], ref_dim=None, face_layers=())
    return replace(few, model_type=plain)


def attention_rate(nets: Networks, tokens: int, at_a_time: int) -> Rate:
    """Rate of self-attention: some queries of some heads, against all keys."""
    c = nets.transformer

    def shape(queries: int) -> tuple[int, int]:
        heads = min(c.num_heads, -(-queries // min(tokens, QUERIES)))
        return heads, queries // heads

    def attend(queries: int) -> float:
        heads, rows = shape(queries)
        keys, values = (random_array((1, tokens, heads, c.head_dim), 1.0, nets.dtype) for _ in range(2))
        return _seconds(lambda: mx.eval(attention(keys[:, :rows], keys, values, Pacer())), at_a_time)

    queries, seconds, first = worth_timing(attend, 16, c.num_heads * tokens)
    heads, rows = shape(queries)
    return Rate(4.0 * heads * rows * tokens * c.head_dim / seconds, first)


def vae_rate(config: VAEConfig, latent_shape: tuple[int, int, int], decoding: bool) -> Rate:
    """Rate of decoding latents (t, h, w), or encoding to them, from the second frame; all later ones are alike."""
    vae = new_network(config)
    for part in (vae.conv2, vae.decoder) if decoding else (vae.conv1, vae.encoder):
        random_weights(part)
    run = VAEExecution(vae)

    def two_frames(side: int) -> tuple[int, int, int]:
        t, h, w = latent_shape
        return min(2, t), min(side, h), min(side, w)

    def last_frame(side: int) -> float:
        """Seconds of the last frame of at most ``side`` squared."""
        count, h, w = two_frames(side)
        started: list[float] = []

        def chunks() -> Iterator[mx.array]:
            for frames in (1, vae.geometry.temporal)[:count]:
                shape = 1, frames, h * vae.geometry.spatial, w * vae.geometry.spatial, 3
                chunk = random_array(shape, 1.0, mx.float32)
                started.append(perf_counter())
                yield chunk

        if decoding:
            frames = run.decode(random_array((1, count, h, w, config.z_dim), 1.0, mx.float32))
            for _ in range(count):
                started.append(perf_counter())
                next(frames)
        else:
            mx.eval(run.encode_chunks(chunks()))
        return perf_counter() - started[-1]

    side, seconds, first = worth_timing(last_frame, 2, max(latent_shape[1:]), power=2)
    t, h, w = two_frames(side)
    flop = work.vae_flop(config, (t, h, w), decoding) - (t > 1 and work.vae_flop(config, (1, h, w), decoding))
    return Rate(flop / seconds, first)


def reading_rate(parameters: Parameters, stream: bool = False) -> float | None:
    """Bytes of a file per second: reading, casting and quantising as in the run; None if the file is too small to time.

    ``stream``: whether blocks are read while others compute.
    """
    weights = parameters.weights
    stored = {name: sum(map(weights.file.nbytes, sources)) for name, sources in weights.sources.items()}
    if sum(stored.values()) < READ_BYTES / 4:
        return None
    # From all over the file, different each time: the system caches recent reads.
    names, read = [], 0
    for name in random.sample(list(stored), len(stored)):
        if read < READ_BYTES:
            names.append(name)
            read += stored[name]
    staging = cuda.staging_buffers()
    ranges = None if staging is None else weights.byte_ranges(names)
    if staging and (stream or ranges):  # many tensors at once; a block's go into memory that is already allocated
        one_of_each = {re.sub(r"\d+", "", name): name for name in weights.shapes}.values()
        load_staged(parameters, one_of_each, staging)  # compiles kernels
        if stream and ranges:
            for _ in range(2):
                staging.next(ranges)
    started = perf_counter()
    if staging and stream:
        parameters.finish(parameters.prefetch(names, staging).result())
    elif staging and ranges:
        load_staged(parameters, names, staging)
    else:
        for name in names:
            with mx.stream(mx.cpu):
                arrays = parameters.start([name], weights.file.read_now)
            parameters.finish(arrays)
    return read / (perf_counter() - started)


def worth_timing(
    seconds_at: Callable[[int], float], smallest: int, whole: int, power: int = 1
) -> tuple[int, float, float]:
    """Find a size, up to ``whole``, that takes long enough to be timed: the size, its seconds, and extra ones at first.

    Args:
        seconds_at: runs the work at a size; returns its seconds.
        smallest, whole: sizes.
        power: of the size, with which the work grows.
    """
    size = min(smallest, whole)
    seconds_at(1)  # the first run compiles kernels
    while True:
        seconds, first = seconds_at(size), 0.0
        # Repeat: some kernels are chosen or compiled by size, and the first run also allocates memory.
        if seconds < LONG or not peaks.on_cpu():
            again = seconds_at(size)
            seconds, first = again, max(0.0, seconds - again) * (not peaks.on_cpu())
        if seconds >= ENOUGH / 2 or size == whole:
            return size, typical(partial(seconds_at, size), seconds), first
        leap = (min(LARGEST_LEAP, ENOUGH / seconds) if seconds else LARGEST_LEAP) ** (1 / power)
        size = min(whole, max(size + 1, int(size * leap)))


def typical(run: Callable[[], float], seconds: float = 0.0) -> float:
    """Mean of the faster half of the times ``run`` returns (and ``seconds``, if not 0), for `ENOUGH` seconds in all.

    The slower half is dropped: another process may take a core for longer than one run.
    """
    times = [seconds] if seconds else []
    while sum(times) < ENOUGH and len(times) < MOST_TIMES:
        times.append(run())
    return fmean(sorted(times)[: (len(times) + 1) // 2])


def random_array(shape: tuple[int, ...], scale: float, dtype: mx.Dtype) -> mx.array:
    """Normal numbers times ``scale``, a few values repeated; evaluated."""
    size = math.prod(shape)
    numbers = (mx.random.normal((PATTERN,), key=mx.random.key(0)) * scale).astype(dtype)
    array = mx.tile(numbers, -(-size // PATTERN))[:size].reshape(shape)
    mx.eval(array)
    return array


def random_weights(module: nn.Module, dtype: Callable[[str], mx.Dtype] = lambda name: mx.float32) -> None:
    """Give ``module`` random matrices that keep activations near one, of the dtypes of their names; the rest stays."""
    arrays = []
    for name, array in dict(tree_flatten(module.parameters())).items():
        if array.ndim > 1:
            array = random_array(array.shape, (array.size / len(array)) ** -0.5, dtype(name))
        arrays.append((name, array.astype(dtype(name))))
    module.load_weights(arrays)
    mx.eval(module.parameters())  # two threads may be about to read them


def random_transformer(config: TransformerConfig, nets: Networks) -> Transformer:
    """A transformer of these sizes, its matrices quantised like those of ``nets``."""
    model, packings = new_transformer(config), nets.experts[0].packings
    random_weights(model, lambda name: dtype_of("transformer", name, nets.dtype))
    for name, weight in dict(tree_flatten(model.parameters())).items():
        if name in packings:
            parent, index = locate(model, name)
            rows, columns = weight.shape
            layer = QuantizedLinear(columns, rows, False, packings[name])
            layer.bias = parent[index].bias
            for key, array in packings[name].pack(weight[:FEW_ROWS]).items():
                layer[key] = mx.tile(array, (-(-rows // len(array)), 1))[:rows]
            parent[index] = layer
    mx.eval(model.parameters())
    return model


def random_inputs(config: TransformerConfig, tokens: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array, dict[str, Any]]:
    """Latents of ``tokens`` tokens, a text, and the transformer's other inputs."""
    t, h, w = config.patch_size
    shape = (1, t, h, w * tokens)
    latents = random_array((*shape, config.out_dim), 1.0, mx.float32)
    context = random_array((1, config.text_len, config.text_dim), 1.0, dtype)
    more: dict[str, Any] = {}
    if config.in_dim > config.out_dim:
        more["condition"] = random_array((*shape, config.in_dim - config.out_dim), 1.0, mx.float32)
    if config.has_image_branch:
        images = (work.image_tokens(config) // work.IMAGE_TOKENS, work.IMAGE_TOKENS, config.image_dim or 0)
        more["image_features"] = random_array(images, 1.0, mx.float32)
    if config.model_type == "vace":
        more = {"vace_context": random_array((*shape, config.vace_in_dim), 1.0, mx.float32)}
    return latents, context, more


def _no_blocks(x: mx.array, this_pass: ForwardPass, run_blocks: Callable[[mx.array], mx.array]) -> mx.array:
    """A block hook for `Transformer` (``through``): computes the inputs of the blocks, and no block."""
    mx.eval([given for given in this_pass.for_blocks if isinstance(given, mx.array)])
    return x


def _seconds(run: Callable[[], None], at_a_time: int) -> float:
    """Seconds of one ``run``, when ``at_a_time`` run at once."""
    started = perf_counter()
    if at_a_time == 2:
        at_once(run, (), ())
    else:
        run()
    return (perf_counter() - started) / at_a_time


def _corner(
    config: VAEConfig, latent_shape: tuple[int, int, int], tile: tuple[int, int] | None
) -> tuple[int, int, int]:
    """Latents of one tile (width, height) in pixels."""
    if tile is None:
        return latent_shape
    (t, h, w), each = latent_shape, config.geometry.spatial
    return t, min(h, tile[1] // each), min(w, tile[0] // each)
