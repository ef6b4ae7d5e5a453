"""How the networks are run on this machine: when work is submitted, in how many pieces, with which kernels.

`Execution` runs a transformer by calling the same pieces of its blocks (queries, keys and values; attention; the rest,
token by token), resident or streamed from a file, with the same results: in float32 on a CPU, the same bits.
`vae_execution` does it for the VAE.

The numbers of live arrays beside the code are for `wan_mlx.planning.peak_memory`; changing the order of the code
changes them. ``benchmarks/memory_table.py`` measures them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..cuda.forward import DeferredFrees, fill_last_tile
from ..distributed import Part, Shard
from . import kernels
from .animate import FaceBlock
from .attention import Pairs, SelfAttention, split_heads
from .chips import dispatch_flop
from .configs import TextEncoderConfig
from .image_encoder import ImageEncoder
from .layers import gated_add
from .rope import RopeTable, rows_of
from .s2v import AudioInjector, Heard, S2VTransformer
from .text_encoder import EncoderBlock, checked_ids
from .transformer import Block, BlocksHook, ForwardPass, Modulation, Runs, Transformer, by_runs
from .vace import VaceBlock, VaceTransformer

# Everything after self-attention treats tokens one by one, so it runs on this many at a time: the 5.8x wider
# feed-forward arrays stay small, and matmuls are still large enough for full speed. `wan_mlx.planning.choose` lowers it
# where memory is short.
TOKENS_AT_ONCE = 32768 if mx.cuda.is_available() else 8192
# The feed-forward never takes more: it would be no faster, and its arrays are the largest of all.
FEED_FORWARD_TOKENS = 8192
# With at most this many tokens memory is so short that no work is submitted while wide arrays are in use.
FEW_TOKENS = 1024
# Bytes of deferred frees; more where all tokens are computed at once, because with a lower bound a forward took 8 %
# longer.
DEFERRED, DEFERRED_WHOLE = 200_000_000, 600_000_000

# Without a fused kernel the scores are a real array; this many are computed at a time (256 MB in float32).
UNFUSED_SCORES = 1 << 26
FUSED_HEAD_DIMS = (64, 72, 80, 96, 128)

# Where tokens are divided among machines, keys and values of so many groups of heads are gathered one after the other:
# one arrives while the one before is attended to. By NCCL fewer are faster: two H200 took 1.52, 1.49 and 1.51 s for a
# forward of the 14B in 4, 2 and 1.
HEAD_GROUPS, HEAD_GROUPS_ON_GPU = 4, 2

# (names of blocks, in order) → the blocks, each valid until the next is requested.
StreamedBlocks = Callable[[Sequence[str]], Iterator[Block]]


class Pacer:
    """Submits work piece by piece: one piece runs while the next waits, and no more.

    MLX allocates the arrays of submitted work long before the GPU reaches it, so a whole block submitted at once would
    hold all its temporaries at once. With two pieces in flight memory stays low and the GPU never idles:

        pace(a)    a submitted                          a runs
        pace(b)    b submitted, a waited for            b runs
        submit(c)  c submitted, nothing waited for      b, then c run: c is too small to wait for
        pace(d)    d submitted, b and c waited for      d runs
        finish()   d waited for                         nothing runs, nothing is held
    """

    def __init__(self, tokens_at_once: int = TOKENS_AT_ONCE, frees: DeferredFrees | None = None):
        self.tokens_at_once, self.frees = tokens_at_once, frees
        self.running: tuple[mx.array, ...] = ()

    def __call__(self, *arrays: mx.array) -> None:
        """Submit the computation of ``arrays``, and wait until the piece before it is done."""
        mx.async_eval(*arrays)
        mx.eval(*self.running)
        self.running = arrays
        if self.frees:
            self.frees.limit()

    def submit(self, *arrays: mx.array) -> None:
        """Submit a piece too small to wait for, so that the GPU does not idle before the next one."""
        mx.async_eval(*arrays)
        self.running = (*self.running, *arrays)

    def small(self, *arrays: mx.array) -> None:
        """Submit a short piece; wait for it only where memory matters more than time."""
        if self.tokens_at_once > FEED_FORWARD_TOKENS:
            self.submit(*arrays)
        else:
            self(*arrays)

    def settle(self) -> None:
        """Wait for the running piece where memory is short, so that its temporaries are freed before the next one."""
        if self.tokens_at_once <= FEW_TOKENS:
            mx.eval(*self.running)

    def finish(self) -> None:
        """Wait for all submitted work, and release its arrays."""
        mx.eval(*self.running)
        self.running = ()


# The first blocks: of the tokens, and of VACE's control tokens.
FIRST_BLOCKS = ("blocks.0", "vace_blocks.0")
Once = Callable[[Callable[[], mx.array]], mx.array]


class Shared:
    """What the passes of one step share: they differ in the text alone, which tokens first meet in the cross-attention
    of the first block, and VACE's in that of its own first one. Up to there one pass computes, and the other takes
    its tokens (B, L, D). The passes may be two threads'.
    """

    def __init__(self) -> None:
        self._kept: dict[str, mx.array] = {}
        self._computing = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def __call__(self, name: str, compute: Callable[[], mx.array]) -> mx.array:
        """The tokens of the block ``name``: the other pass's, which are kept no longer, or else what ``compute`` finds.
        """
        with self._computing:
            if name in self._kept:
                return self._kept.pop(name)
            self._kept[name] = tokens = compute()
            mx.eval(tokens)  # the other thread may be about to read it
        return tokens


class Execution:
    """Runs a transformer: called like the network, with the same result.

    The ``model`` holds no blocks if they are streamed: then ``blocks`` reads them. Fewer ``tokens_at_once``, where
    tokens are independent, take less memory; so it does if passes do not share (``shares``).
    """

    shares = True

    def __init__(
        self, model: Transformer, blocks: StreamedBlocks | None = None, tokens_at_once: int = TOKENS_AT_ONCE
    ):
        self.model, self.blocks, self.tokens_at_once = model, blocks, tokens_at_once
        self._frees = DeferredFrees(DEFERRED)

    def __call__(
        self,
        *inputs: Any,
        through: BlocksHook | None = None,
        skip_layers: Collection[int] = (),
        shared: Shared | None = None,
        among: Part | None = None,
        **named: Any,
    ) -> mx.array:
        """Same as `Transformer.__call__`; ``shared`` is of calls that differ in the context alone, ``among`` are the
        machines that share this one, each with some tokens."""
        x, this_pass = self.model.enter(*inputs, **named)
        if among is not None:
            x, this_pass = own_tokens(x, this_pass, among.shard(x.shape[1]))
        self._frees.most = DEFERRED_WHOLE if self.tokens_at_once > FEED_FORWARD_TOKENS else DEFERRED
        pace = Pacer(self.tokens_at_once, self._frees)

        def run_blocks(x: mx.array) -> mx.array:
            tokens = [x]
            del x
            self._run_blocks(tokens, this_pass, pace, skip_layers, shared if self.shares else None)
            return tokens.pop()

        tokens = [x]
        del x  # otherwise it would stay alive through all the blocks
        x = run_blocks(tokens.pop()) if through is None else through(tokens.pop(), this_pass, run_blocks)
        return self.leave(x, this_pass, pace)

    def _run_blocks(
        self,
        tokens: list[mx.array],
        this_pass: ForwardPass,
        pace: Pacer,
        skip_layers: Collection[int],
        shared: Shared | None,
    ) -> None:
        """Send the only array of ``tokens`` (B, L, D) through the blocks, in place: no caller keeps an old one."""
        control: Any = None
        if isinstance(self.model, VaceTransformer):
            (control, scale), start = self.model.control(this_pass), tokens[:]
            if isinstance(this_pass, DividedPass):
                control = this_pass.shard.take(control)
        resident, names = partial(map, self.model.block), self.model.block_order(skip_layers)

        def once(name: str) -> Once | None:
            return partial(shared, name) if shared and name in FIRST_BLOCKS else None

        for name, block in zip(names, (self.blocks or resident)(names), strict=True):
            if isinstance(block, VaceBlock):
                if "before_proj" in block and not (shared and name in shared):
                    control = in_dispatches(block.before_proj, control, pace) + start.pop()
                    pace(control)
                control = self.run_block(block, control, this_pass, pace, once(name))
                tokens.append(gated_add(tokens.pop(), in_dispatches(block.after_proj, control, pace), scale))
                pace(tokens[0])
            elif isinstance(block, AudioInjector):
                tokens.append(self.inject(block, tokens.pop(), this_pass, pace))
            elif isinstance(block, FaceBlock):
                assert this_pass.face is not None, "`enter` puts it there"
                tokens.append(look_at_face(block, tokens.pop(), this_pass.face, pace))
            else:
                tokens.append(self.run_block(block, tokens.pop(), this_pass, pace, once(name)))
            if self.blocks is not None:  # a streamed block is emptied when the next one is requested
                mx.eval(tokens if control is None else [control, *tokens])

    def run_block(
        self, block: Block, x: mx.array, this_pass: ForwardPass, pace: Pacer, once: Once | None = None
    ) -> mx.array:
        """Same as `Block.__call__`: x (B, L, D) → (B, L, D). What precedes the text is by ``once``, if it is given."""
        # In a long video, arrays as wide as x dominate memory: each is released as soon as possible, and all other work
        # waits for the token-wise pieces below.
        runs, pieces = block.runs(this_pass.modulation, this_pass.clean), [x]
        del x
        at_once = min(pace.tokens_at_once, tokens_per_dispatch(block.self_attn.o, pieces[0]))
        rest: Callable[..., mx.array] = _after_attention
        if once is None:
            pieces.append(_attended(block, pieces[0], runs, this_pass, pace))
        else:
            rest = _after_addition
            pieces[:] = [once(partial(_with_attention, block, pieces, runs, this_pass, pace, at_once))]
        pairs = block.cross_attn.keys_values(this_pass.context, this_pass.image_context)
        rests = [(tokens, partial(rest, block, m, pairs, pace)) for tokens, m in runs]
        return in_token_chunks(rests, pieces, pace, at_once)

    def inject(self, injector: AudioInjector, x: mx.array, this_pass: ForwardPass, pace: Pacer) -> mx.array:
        """Same as `AudioInjector.inject` of each latent frame: x (B, L, D) → (B, L, D)."""
        assert isinstance(self.model, S2VTransformer), "it alone has injectors"
        pieces = [x]
        del x
        frames = [(n, partial(_inject, injector, heard, pace)) for n, heard in self.model.hearing(injector, this_pass)]
        at_once = min(pace.tokens_at_once, tokens_per_dispatch(injector.o, pieces[0]))
        return in_token_chunks(frames, pieces, pace, at_once)

    def leave(self, x: mx.array, this_pass: ForwardPass, pace: Pacer) -> mx.array:
        """Same as `Transformer.leave`: tokens (B, L, D) → velocity, float32 (B, t, h, w, out_dim)."""
        x, this_pass = self.model.of_video(x, this_pass)

        def project(time: mx.array, pieces: list[mx.array]) -> mx.array:
            y = self.model.head(pieces.pop(), time)
            pace(y)
            return y

        projects = [(tokens, partial(project, time)) for tokens, time in this_pass.times]
        patches = in_token_chunks(projects, [x], pace, min(FEED_FORWARD_TOKENS, pace.tokens_at_once))
        if isinstance(this_pass, DividedPass):
            patches = this_pass.shard.whole(patches)
        return self.model.unpatchify(patches, this_pass.grid)


# Arrays as wide as the tokens (L, D) alive at once while queries, keys and values are computed: the tokens, their norm,
# and for queries and keys the projection and its rotation, since keys are submitted before queries are done.
# Queries are done, and keys nearly, when values are computed. Measured on an H200 over a streamed 14B: 6.9; where keys
# wait for queries (`Pacer.settle`): 5.9. Without the kernels one more for the norm.
TOKENS_ALIVE, TOKENS_ALIVE_SETTLED, TOKENS_ALIVE_OPERATIONS = 6.9, 5.9, 0.8


def queries_keys_values(
    layer: SelfAttention, x: mx.array, rope: RopeTable, pace: Pacer
) -> tuple[mx.array, mx.array, mx.array]:
    """Same as `SelfAttention.queries_keys_values`, one after the other, with the last tile filled on CUDA."""
    # While values are computed, queries and keys are waited for: their sources are freed before attention.
    q = rotated(layer, "q", x, rope, pace)
    fill = has_fused_kernel(q.dtype, q.shape[-1])
    pace(q)
    pace.settle()
    k = rotated(layer, "k", x, rope, pace)
    k = fill_last_tile(k) if fill else k
    pace.small(k)
    pace.settle()
    v = in_dispatches(layer.v, x, pace, lambda y, tokens: split_heads(y, layer.heads))
    v = fill_last_tile(v) if fill else v
    pace(v)
    pace.settle()
    return q, k, v


def rotated(layer: SelfAttention, name: str, x: mx.array, rope: RopeTable, pace: Pacer) -> mx.array:
    """Queries ("q") or keys ("k") of x (B, L, D): (B, L, heads, head_dim)."""
    weight = layer[f"norm_{name}"].weight

    def rotate(y: mx.array, tokens: slice) -> mx.array:
        return kernels.norm_and_rotate(y, weight, layer.heads, rows_of(rope, tokens), layer.eps)

    return in_dispatches(layer[name], x, pace, rotate)


@dataclass(frozen=True)
class DividedPass(ForwardPass):
    """A forward pass of which this machine computes a share of the tokens; positions and clean tokens are its own's."""

    shard: Shard = None  # type: ignore[assignment]  # always given: fields before it have defaults


def own_tokens(x: mx.array, this_pass: ForwardPass, shard: Shard) -> tuple[mx.array, ForwardPass]:
    """This machine's share of the tokens x (B, L, D), and what they take of the pass."""
    values = {field.name: getattr(this_pass, field.name) for field in fields(ForwardPass)}
    values["rope"] = tuple(shard.take(table, axis=0) for table in this_pass.rope)
    if (clean := this_pass.clean) is not None:
        here = shard.span(clean.tokens)
        values["clean"] = here and clean._replace(tokens=here)
        if here == slice(0, None):  # all are clean
            values |= {"time": clean.time, "modulation": clean.modulation, "clean": None}
    return shard.take(x), DividedPass(**values, shard=shard)


def attend_with_others(layer: SelfAttention, tokens: list[mx.array], this_pass: DividedPass, pace: Pacer) -> mx.array:
    """The result of self-attention of this machine's ``tokens``, the only one, normed (B, size, D), which is taken.

    Keys and values are on their way, a group of heads after the other, while queries are computed and the group before
    is attended to.
    """
    shard, rope, (x,) = this_pass.shard, this_pass.rope, tokens
    tokens.clear()
    count = min(layer.heads, HEAD_GROUPS if shard.part.group.on_host else HEAD_GROUPS_ON_GPU)
    groups = [slice(group[0], group[-1] + 1) for group in np.array_split(range(layer.heads), count)]
    k = rotated(layer, "k", x, rope, pace)
    pace(k)
    keys = [shard.begin(k[:, :, groups[0]])]
    v = in_dispatches(layer.v, x, pace, lambda y, tokens: split_heads(y, layer.heads))
    pace(v)
    values = [shard.begin(v[:, :, groups[0]])]
    for group in groups[1:]:
        keys.append(shard.begin(k[:, :, group]))
        values.append(shard.begin(v[:, :, group]))
    del k, v
    q = rotated(layer, "q", x, rope, pace)
    fill = has_fused_kernel(q.dtype, q.shape[-1])
    del x
    pace(q)
    parts = []
    for group in groups:
        k, v = (shard.whole_once_arrived(joined.pop(0)) for joined in (keys, values))
        if fill:
            k, v = fill_last_tile(k), fill_last_tile(v)
        parts.append(attention(q[:, :, group], k, v, pace))
        del k, v
        pace(parts[-1])
    return mx.concatenate(parts, axis=-1)


# The same in the token-wise pieces: the tokens before and after, and the result of attention; when the pieces are
# joined, these and the whole.
TOKENS_ALIVE_IN_PIECES, TOKENS_ALIVE_AT_JOIN = 3.0, 3.5
# For each of the two pieces in flight: arrays as wide as tokens, and as wide as the feed-forward.
PIECE_TOKENS, PIECE_WIDE = 4.0, 0.75
# Where all tokens, or large pieces, are computed at once, and short work is not waited for: arrays as wide as tokens,
# and as wide as the feed-forward for a piece; and bytes that are freed late with resident blocks, of which the next
# begins at once. Measured on an H200, in all: 10.3 arrays for a streamed 14B, 10.9 for 5B, 11.0 for 5B resident, and
# 13.3 to 14.2 for 1.3B, whose arrays are smaller.
TOKENS_ALIVE_WHOLE, WHOLE_WIDE, WHOLE_RESIDENT = 9.1, 1.7, 230_000_000


def _before_attention(block: Block, x: mx.array, m: Modulation) -> mx.array:
    """Same as `Block.before_attention`."""
    return kernels.modulated_norm(x, m.scale_attn, m.shift_attn, block.eps)


def _attended(block: Block, x: mx.array, runs: Runs[Modulation], this_pass: ForwardPass, pace: Pacer) -> mx.array:
    """The result of self-attention, all tokens (B, L, D) at once."""
    normed = by_runs(partial(_before_attention, block), runs, x)
    pace.small(normed)
    tokens = [normed]
    del normed
    if isinstance(this_pass, DividedPass):
        attended = attend_with_others(block.self_attn, tokens, this_pass, pace)
    else:
        heads = queries_keys_values(block.self_attn, tokens.pop(), this_pass.rope, pace)
        attended = attention(*heads, pace)
        del heads
    pace(attended)
    return attended


def _with_attention(
    block: Block, pieces: list[mx.array], runs: Runs[Modulation], this_pass: ForwardPass, pace: Pacer, at_once: int
) -> mx.array:
    """x, the only one of ``pieces``, with the result of self-attention added."""
    pieces.append(_attended(block, pieces[0], runs, this_pass, pace))

    def add(m: Modulation, pieces: list[mx.array]) -> mx.array:
        x = _add_attention(block, m, *pieces)[0]
        pace(x)
        return x

    return in_token_chunks([(tokens, partial(add, m)) for tokens, m in runs], pieces, pace, at_once)


def _add_attention(block: Block, m: Modulation, x: mx.array, attended: mx.array) -> tuple[mx.array, mx.array]:
    """x with the result of attention added, and that normed for cross-attention."""
    norm3 = block.norm3
    return kernels.add_and_norm(
        x, block.self_attn.o(attended), m.gate_attn, norm3.weight, norm3.bias, block.eps
    )


def _after_attention(block: Block, m: Modulation, pairs: Pairs, pace: Pacer, pieces: list[mx.array]) -> mx.array:
    """`Block.after_attention` for some tokens; ``pieces`` are x and the result of attention, and are emptied."""
    pieces[:] = _add_attention(block, m, *pieces)
    return _after_norm(block, m, pairs, pace, pieces)


def _after_addition(block: Block, m: Modulation, pairs: Pairs, pace: Pacer, pieces: list[mx.array]) -> mx.array:
    """The same where the result of attention is in x, the only one of ``pieces``."""
    x, norm3 = pieces[0], block.norm3
    # Adding nothing: the kernel is the one that would have normed x, so the bits are the same.
    pieces[:] = kernels.add_and_norm(x, x, mx.zeros_like(m.gate_attn), norm3.weight, norm3.bias, block.eps)
    del x
    return _after_norm(block, m, pairs, pace, pieces)


def _after_norm(block: Block, m: Modulation, pairs: Pairs, pace: Pacer, pieces: list[mx.array]) -> mx.array:
    """What follows for some tokens; ``pieces`` are x, and x normed for cross-attention, and are emptied."""
    x, y = pieces
    pieces.clear()
    pace.small(x, y)
    attended = block.cross_attn.attend(y, pairs, partial(attention, pace=pace))
    pace(attended)
    cross = block.cross_attn.o(attended)
    del attended
    x, y = kernels.add_and_norm(x, cross, mx.ones_like(m.gate_ffn), m.scale_ffn, m.shift_ffn, block.eps)
    del cross
    pace(x, y)  # the widest arrays come next: all earlier ones are freed first
    pieces.append(y)
    del y

    def feed_forward(pieces: list[mx.array]) -> mx.array:
        up, _, down = block.ffn
        y = down(kernels.gelu_tanh(up(pieces.pop())))
        pace(y)
        return y

    at_once = min(FEED_FORWARD_TOKENS, pace.tokens_at_once, tokens_per_dispatch(block.ffn[0], pieces[0]))
    parts = token_parts(feed_forward, pieces, at_once)
    x = kernels.gated_add(x, parts, m.gate_ffn)
    pace.submit(x)
    return x


def _inject(injector: AudioInjector, heard: Heard | None, pace: Pacer, pieces: list[mx.array]) -> mx.array:
    """`AudioInjector.inject` for some tokens of one latent frame; ``pieces`` are these, and are emptied."""
    x = pieces.pop()
    pieces.clear()
    if heard is not None:
        x = x + injector.o(injector.attend(injector.normed(x, heard), heard[2], partial(attention, pace=pace)))
        pace(x)
    return x


def look_at_face(block: FaceBlock, x: mx.array, face: mx.array, pace: Pacer) -> mx.array:
    """Same as `FaceBlock.__call__`, some frames at a time, or a part of one."""
    ((keys, values),) = block.keys_values(face)
    batch, frames = face.shape[:2]
    each, dispatch = x.shape[1] // frames, tokens_per_dispatch(block.linear1_q, x)
    at_once = max(1, min(pace.tokens_at_once, dispatch))
    several, parts = max(1, at_once // each), list[mx.array]()
    for first in range(0, frames, several):
        count = min(several, frames - first)
        k, v = (a.reshape(batch, frames, *a.shape[1:])[:, first : first + count].flatten(0, 1) for a in (keys, values))

        def look(pieces: list[mx.array], pairs: Pairs = [(k, v)], count: int = count) -> mx.array:  # noqa: B006
            y = block.look(pieces.pop(), pairs, count)
            pace(y)
            return y

        some = x[:, first * each : (first + count) * each]
        parts += token_parts(look, [some], max(at_once, several * each) if several > 1 else at_once)
    whole = kernels.joined(parts)
    if len(parts) > 1:
        pace.submit(whole)
    return whole


def has_fused_kernel(dtype: mx.Dtype, head_dim: int) -> bool:
    """Whether MLX computes attention without storing the scores, on the default device."""
    if mx.default_device().type != mx.DeviceType.gpu or head_dim not in FUSED_HEAD_DIMS:
        return False
    return mx.metal.is_available() or dtype in (mx.float16, mx.bfloat16)


def attention(q: mx.array, k: mx.array, v: mx.array, pace: Callable[..., None]) -> mx.array:
    """Same as `attention.attention`, in dispatches of bounded size; ``pace`` is called after each, if several."""
    batch, rows, heads, head_dim = q.shape
    work_per_row = batch * k.shape[1]
    if fused := has_fused_kernel(q.dtype, head_dim):
        limit, work_per_row = dispatch_flop(), 4.0 * work_per_row * head_dim
    else:
        limit = UNFUSED_SCORES
    heads_at_once = max(1, min(heads, int(limit / (work_per_row * rows))))
    rows_at_once = max(1, min(rows, int(limit / (work_per_row * heads_at_once))))
    if fused:  # as many dispatches, all alike
        rows_at_once = math.ceil(rows / math.ceil(rows / rows_at_once))
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    groups = []
    for head in range(0, heads, heads_at_once):
        group = slice(head, head + heads_at_once)
        parts = []
        for row in range(0, rows, rows_at_once):
            part = mx.fast.scaled_dot_product_attention(
                q[:, group, row : row + rows_at_once], k[:, group], v[:, group], scale=head_dim**-0.5
            )
            parts.append(part.transpose(0, 2, 1, 3))
            if heads_at_once < heads or rows_at_once < rows:
                pace(parts[-1])
        groups.append(mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0])
    return (mx.concatenate(groups, axis=2) if len(groups) > 1 else groups[0]).flatten(2)


def tokens_per_dispatch(linear: nn.Module, x: mx.array) -> int:
    """Tokens of x (B, L, D) that one dispatch may multiply by the weights of ``linear``, all dispatches alike."""
    work = 2.0 * x.size * len(linear.weight)
    return math.ceil(x.shape[1] / max(1, math.ceil(work / dispatch_flop())))


def in_dispatches(
    linear: nn.Module, x: mx.array, pace: Pacer, finish: Callable[[mx.array, slice], mx.array] = lambda y, tokens: y
) -> mx.array:
    """``finish(linear(x), all tokens)`` of x (B, L, D), in dispatches of bounded size; ``pace`` is called if several.

    ``finish`` treats tokens independently; it gets the product of some, and which they are.
    """
    length, at_once = x.shape[1], tokens_per_dispatch(linear, x)
    if length <= at_once:
        return finish(linear(x), slice(None))
    parts = []
    for start in range(0, length, at_once):
        tokens = slice(start, start + at_once)
        parts.append(finish(linear(x[:, tokens]), tokens))
        pace(parts[-1])
    return kernels.joined(parts)


def in_token_chunks(
    functions: Runs[Callable[[list[mx.array]], mx.array]], arrays: list[mx.array], pace: Pacer, at_once: int
) -> mx.array:
    """``function(arrays)`` of each run of tokens (B, L, D), which it treats independently, ``at_once`` at a time.

    A function may empty its list of arrays, to release them early, and calls ``pace`` with its result.
    """
    parts: list[mx.array] = []
    for tokens, function in functions:
        of_run = arrays if len(functions) == 1 else [array[:, tokens] for array in arrays]
        parts += token_parts(function, of_run, at_once)
    whole = kernels.joined(parts)
    if len(parts) > 1:
        pace.submit(whole)  # otherwise the parts would live until the next array is computed
    return whole


def token_parts(
    function: Callable[[list[mx.array]], mx.array], arrays: list[mx.array], at_once: int
) -> list[mx.array]:
    """The same, not joined: ``at_once`` tokens in each part but the last."""
    length = arrays[0].shape[1]
    if length <= at_once:
        return [function(arrays)]
    return [function([x[:, start : start + at_once] for x in arrays]) for start in range(0, length, at_once)]


@dataclass(frozen=True)
class StreamedTextEncoder:
    """The umT5 encoder over weights that pass through memory block by block; called like `TextEncoder`."""

    config: TextEncoderConfig
    embed: Callable[[np.ndarray], mx.array]  # ids, int32 (L,) → their rows of ``token_embedding.weight``, (L, dim)
    blocks: Callable[[], Iterable[EncoderBlock]]  # in order; all work with one is done when the next is requested
    norm_weight: mx.array  # (dim,)

    def __call__(self, ids: Sequence[Sequence[int]]) -> list[mx.array]:
        """Encode several prompts in one pass over the weights; arguments, result and errors as for `TextEncoder`."""
        states = [self.embed(checked_ids(prompt, self.config.vocab_size))[None] for prompt in ids]
        for block in self.blocks():
            states = [block(x) for x in states]
            mx.eval(states)
        return [mx.fast.rms_norm(x, self.norm_weight, self.config.eps)[0] for x in states]


def encode_images(encoder: ImageEncoder, images: np.ndarray | mx.array) -> mx.array:
    """Same as `ImageEncoder.__call__`, block by block."""
    x, pace = encoder.embed(images), Pacer()
    for block in encoder.transformer:
        x = block(x)
        pace(x)
    pace.finish()
    return x
