"""How the networks are run on this machine: when work is submitted, in how many pieces, with which kernels.

`Execution` runs a transformer by calling the same pieces of its blocks, resident or streamed from a file, with the same
results: in float32 on a CPU, the same bits. `block_execution` runs one block, `attention_execution` its self-attention,
`sequence_parallel` where several machines have the tokens; `pieces` bounds and paces all work. `vae_execution` does it
for the VAE.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..cuda.forward import DeferredFrees
from ..distributed import Part
from .animate import FaceBlock
from .animate_face import Face
from .block_execution import Once, inject, look_at_face, run_block
from .configs import TextEncoderConfig
from .image_encoder import ImageEncoder
from .layers import gated_add
from .pieces import FEED_FORWARD_TOKENS, TOKENS_AT_ONCE, Pacer, in_dispatches, in_token_chunks
from .s2v import AudioInjector, S2VTransformer
from .sequence_parallel import DividedPass, own_runs, own_tokens
from .text_encoder import EncoderBlock, checked_ids
from .transformer import Block, BlocksHook, ForwardPass, Transformer
from .vace import VaceBlock, VaceTransformer

# Bytes of deferred frees; more where all tokens are computed at once, because with a lower bound a forward took 8 %
# longer, and most among GPUs, of which each waits while another does.
DEFERRED, DEFERRED_WHOLE, DEFERRED_AMONG = 200_000_000, 600_000_000, 1_000_000_000

# (names of blocks, in order) → the blocks, each valid until the next is requested.
StreamedBlocks = Callable[[Sequence[str]], Iterator[Block]]

# The first blocks: of the tokens, and of VACE's control tokens.
FIRST_BLOCKS = ("blocks.0", "vace_blocks.0")


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
        pace = self._pacer(among)

        def run_blocks(x: mx.array) -> mx.array:
            tokens = [x]
            del x
            self._run_blocks(tokens, this_pass, pace, skip_layers, shared if self.shares else None)
            return tokens.pop()

        tokens = [x]
        del x  # otherwise it would stay alive through all the blocks
        x = run_blocks(tokens.pop()) if through is None else through(tokens.pop(), this_pass, run_blocks)
        return self.leave(x, this_pass, pace)

    def _pacer(self, among: Part | None) -> Pacer:
        """Pieces of several GPUs are so short that two wait, where memory is not."""
        whole = self.tokens_at_once > FEED_FORWARD_TOKENS
        divided = whole and among is not None and not among.group.on_host
        self._frees.most = DEFERRED_AMONG if divided else DEFERRED_WHOLE if whole else DEFERRED
        return Pacer(self.tokens_at_once, self._frees, waiting=2 if divided else 1)

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
                control = run_block(block, control, this_pass, pace, once(name))
                tokens.append(gated_add(tokens.pop(), in_dispatches(block.after_proj, control, pace), scale))
                pace(tokens[0])
            elif isinstance(block, AudioInjector):
                assert isinstance(self.model, S2VTransformer), "it alone has injectors"
                hearing = own_runs(self.model.hearing(block, this_pass), this_pass)
                tokens.append(inject(block, hearing, tokens.pop(), pace))
            elif isinstance(block, FaceBlock):
                tokens.append(look_at_face(block, tokens.pop(), this_pass, pace))
            else:
                tokens.append(run_block(block, tokens.pop(), this_pass, pace, once(name)))
            if self.blocks is not None:  # a streamed block is emptied when the next one is requested
                mx.eval(tokens if control is None else [control, *tokens])

    def leave(self, x: mx.array, this_pass: ForwardPass, pace: Pacer) -> mx.array:
        """Same as `Transformer.leave`: tokens (B, L, D) → velocity, float32 (B, t, h, w, out_dim)."""
        if not isinstance(this_pass, DividedPass):  # else what is not of the video is left out of everybody's
            x, this_pass = self.model.of_video(x, this_pass)

        def project(time: mx.array, pieces: list[mx.array]) -> mx.array:
            y = self.model.head(pieces.pop(), time)
            pace(y)
            return y

        projects = [(tokens, partial(project, time)) for tokens, time in this_pass.times]
        patches = in_token_chunks(projects, [x], pace, min(FEED_FORWARD_TOKENS, pace.tokens_at_once))
        if isinstance(this_pass, DividedPass):
            patches, _ = self.model.of_video(this_pass.shard.whole(patches), this_pass)
        return self.model.unpatchify(patches, this_pass.grid)


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


def encode_face(face: Face, pictures: Iterable[mx.array]) -> mx.array:
    """Same as `Face.__call__`, of a few pictures at a time."""
    motion = []
    for some in pictures:
        motion.append(face.motion(some))
        mx.eval(motion)
    return face.face_encoder(mx.concatenate(motion)[None])


def encode_images(encoder: ImageEncoder, images: np.ndarray | mx.array) -> mx.array:
    """Same as `ImageEncoder.__call__`, block by block."""
    x, pace = encoder.embed(images), Pacer()
    for block in encoder.transformer:
        x = block(x)
        pace(x)
    pace.finish()
    return x
