"""VACE: extra blocks that turn a control video into hints for the diffusion transformer's layers.

Follows the official ``wan/modules/vace_model.py``. Parameter names are the official checkpoint's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import mlx.core as mx

from .configs import TransformerConfig
from .layers import Linear, gated_add
from .transformer import Block, BlocksHook, ForwardPass, Transformer


class VaceBlock(Block):
    """A block over the control tokens, and the projection that turns them into a hint."""

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

    def __call__(  # type: ignore[override]  # other conditions than the plain transformer's
        self,
        latents: mx.array,
        timestep: float | Sequence[float],
        context: mx.array,
        vace_context: mx.array,
        vace_scale: float = 1.0,
        through: BlocksHook | None = None,
        skip_layers: Collection[int] = (),
    ) -> mx.array:
        """Predict the velocity (noise minus clean latents).

        Args:
            latents: (B, t, h, w, out_dim), h and w even; t counts the frames of reference images too.
            timestep: in [0, 1000], one for all samples or one for each.
            context: (B, text_len, text_dim), text embeddings zero-padded to ``text_len`` rows; the zero rows count.
            vace_context: (B, t, h, w, vace_in_dim), latents of the control video and its mask.
            vace_scale: strength of the hints; 0 equals the transformer without VACE.
            through: called in place of the blocks, VACE's included; may run them.
            skip_layers: numbers of the transformer's blocks to leave out, from 0; their hints stay.

        Returns:
            float32 (B, t, h, w, out_dim).

        Raises:
            ValueError: an argument has the wrong shape.
        """
        x, this_pass = self.enter(latents, timestep, context, vace_context, vace_scale)
        return self.leave(self._blocks(x, this_pass, through, skip_layers), this_pass)

    def enter(  # type: ignore[override]  # as above
        self,
        latents: mx.array,
        timestep: float | Sequence[float],
        context: mx.array,
        vace_context: mx.array,
        vace_scale: float = 1.0,
    ) -> tuple[mx.array, ForwardPass]:
        x, this_pass = super().enter(latents, timestep, context)
        expected = (*latents.shape[:-1], self.config.vace_in_dim)
        if vace_context.shape != expected:
            raise ValueError(f"vace_context has shape {vace_context.shape}, expected {expected} for these latents")
        return x, replace(this_pass, vace_context=vace_context, vace_scale=vace_scale)

    def run_blocks(self, x: mx.array, this_pass: ForwardPass, skip_layers: Collection[int] = ()) -> mx.array:
        """Tokens (B, L, D) through the blocks, each hint added after its layer."""
        hints = dict(zip(self.config.vace_layers, self.hints(x, this_pass), strict=True))
        scale = mx.array(this_pass.vace_scale, dtype=mx.float32)
        for layer, block in enumerate(self.blocks):
            if layer not in skip_layers:
                x = block(x, *this_pass.for_blocks)
            if layer in hints:
                x = gated_add(x, hints[layer], scale)
        return x

    def hints(self, x: mx.array, this_pass: ForwardPass) -> list[mx.array]:
        """The VACE blocks' hints for the tokens x: each (B, L, D)."""
        control, hints = self.control_tokens(this_pass), []
        for block in self.vace_blocks:
            if "before_proj" in block:
                control = block.before_proj(control) + x
            control = block(control, *this_pass.for_blocks)
            hints.append(block.after_proj(control))
        return hints

    def control_tokens(self, this_pass: ForwardPass) -> mx.array:
        """The control video's patches with the transformer's width (B, L, D)."""
        assert this_pass.vace_context is not None, "`enter` puts it there"
        return self.patchify(this_pass.vace_context, self.vace_patch_embedding)[0]

    def block_order(self, skip_layers: Collection[int] = ()) -> list[str]:
        # The official code computes all hints first and keeps them. Control tokens do not depend on the transformer's
        # blocks, so each hint is computed where it is added, and none is held while a block runs.
        names, hints = [], iter(range(len(self.config.vace_layers)))
        for layer in range(self.config.num_layers):
            if layer not in skip_layers:
                names.append(f"blocks.{layer}")
            if layer in self.config.vace_layers:
                names.append(f"vace_blocks.{next(hints)}")
        return names
