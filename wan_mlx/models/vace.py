"""VACE: blocks beside the diffusion transformer that turn a control video into hints for its layers.

Follows the official ``wan/modules/vace_model.py``. Parameter names are the official checkpoint's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import mlx.core as mx

from .configs import TransformerConfig
from .layers import Linear, gated_add
from .transformer import Block, Through, Transformer


class VaceBlock(Block):
    """A block over the control tokens, and the projection that makes a hint of them."""

    def __init__(self, config: TransformerConfig, first: bool):
        super().__init__(config)
        if first:
            self.before_proj = Linear(config.dim, config.dim)
        self.after_proj = Linear(config.dim, config.dim)


class VaceTransformer(Transformer):
    """The diffusion transformer with VACE blocks: block ``n`` adds its hint after layer ``vace_layers[n]``."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.vace_patch_embedding = Linear(math.prod(config.patch_size) * config.vace_in_dim, config.dim)
        self.vace_blocks = [self.new_block(config, f"vace_blocks.{n}") for n in range(len(config.vace_layers))]

    @staticmethod
    def new_block(config: TransformerConfig, name: str) -> Block:
        if name.startswith("blocks."):
            return Transformer.new_block(config, name)
        return VaceBlock(config, first=name == "vace_blocks.0")

    def __call__(
        self,
        latents: mx.array,
        timestep: float | Sequence[float],
        context: mx.array,
        vace_context: mx.array,
        vace_scale: float = 1.0,
        through: Through | None = None,
        skip_layers: Collection[int] = (),
    ) -> mx.array:
        """Predict the velocity (noise minus clean latents).

        Args:
            latents: (B, t, h, w, out_dim), h and w even; t counts the frames of reference images too.
            timestep: in [0, 1000], one for all or one per sample.
            context: (B, text_len, text_dim), text embeddings zero-padded to ``text_len`` rows; the zero rows count.
            vace_context: (B, t, h, w, vace_in_dim), latents of the control video and its mask.
            vace_scale: strength of the hints; 0 is the transformer without VACE.
            through: called in place of the blocks, VACE's included, with the means to run them.
            skip_layers: numbers of the transformer's blocks to leave out, from 0; their hints stay.

        Returns:
            float32 (B, t, h, w, out_dim).

        Raises:
            ValueError: an argument has the wrong shape.
        """
        self._check(latents, context, None, None)
        expected = (*latents.shape[:-1], self.config.vace_in_dim)
        if vace_context.shape != expected:
            raise ValueError(f"vace_context has shape {vace_context.shape}, expected {expected} for these latents")
        x, this_pass = self.enter(latents, timestep, context, None)

        def run_blocks(x):
            control, _ = self.patchify(vace_context, self.vace_patch_embedding)
            start, scale = x, mx.array(vace_scale, dtype=mx.float32)
            for name, block in self.each_block(self._order(skip_layers)):
                if name.startswith("blocks."):
                    x = self.done(block(x, *this_pass.for_blocks))
                    continue
                if "before_proj" in block:
                    control, start = block.before_proj(control) + start, None
                    this_pass.pace(control)
                # The official code makes all hints first and keeps them. Control tokens do not depend on the blocks
                # before, so a hint can be made where it is added, and no block runs while one is held.
                control = block(control, *this_pass.for_blocks)
                x = gated_add(x, block.after_proj(control), scale)
                this_pass.pace(x)
                self.done(control, x)
            return x

        tokens = [x]
        del x  # or it would be held through all the blocks
        x = run_blocks(tokens.pop()) if through is None else through(tokens.pop(), this_pass, run_blocks)
        return self.leave(x, this_pass)

    def _order(self, skip_layers: Collection[int]) -> list[str]:
        """Names of the blocks in the order they are run in."""
        names, hints = [], iter(range(len(self.config.vace_layers)))
        for layer in range(self.config.num_layers):
            if layer not in skip_layers:
                names.append(f"blocks.{layer}")
            if layer in self.config.vace_layers:
                names.append(f"vace_blocks.{next(hints)}")
        return names
