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
from .transformer import Block, ForwardPass, Transformer


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

    def enter(  # type: ignore[override]  # other conditions than the plain transformer's
        self,
        latents: mx.array,
        timestep: float | Sequence[float],
        context: mx.array,
        vace_context: mx.array,
        vace_scale: float = 1.0,
    ) -> tuple[mx.array, ForwardPass]:
        """Everything before the blocks: tokens (B, L, D), and the values of this pass.

        Args:
            latents, timestep, context: as for `Transformer.enter`; t counts the frames of reference images too.
            vace_context: (B, t, h, w, vace_in_dim), latents of the control video and its mask.
            vace_scale: strength of the hints; 0 equals the transformer without VACE.
        """
        x, this_pass = super().enter(latents, timestep, context)
        expected = (*latents.shape[:-1], self.config.vace_in_dim)
        if vace_context.shape != expected:
            raise ValueError(f"vace_context has shape {vace_context.shape}, expected {expected} for these latents")
        return x, replace(this_pass, vace_context=vace_context, vace_scale=vace_scale)

    def run_blocks(self, x: mx.array, this_pass: ForwardPass, skip_layers: Collection[int] = ()) -> mx.array:
        """Tokens (B, L, D) through the blocks, each hint added after its layer."""
        (control, scale), start = self.control(this_pass), x
        for block in map(self.block, self.block_order(skip_layers)):
            if isinstance(block, VaceBlock):
                if "before_proj" in block:
                    control = block.before_proj(control) + start
                control = block(control, *this_pass.for_blocks)
                x = gated_add(x, block.after_proj(control), scale)
            else:
                x = block(x, *this_pass.for_blocks)
        return x

    def control(self, this_pass: ForwardPass) -> tuple[mx.array, mx.array]:
        """The control video's patches with the transformer's width (B, L, D), and the strength of their hints."""
        assert this_pass.vace_context is not None, "`enter` puts it there"
        control = self.patchify(this_pass.vace_context, self.vace_patch_embedding)[0]
        return control, mx.array(this_pass.vace_scale, dtype=mx.float32)

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
