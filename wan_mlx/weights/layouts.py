"""Tensor names of published Wan checkpoints, as data: a table of names for each layout → the official names.

A canonical name is the official module's own parameter name, without the prefix in some files. In the other layouts
every key must be in the table; official keys keep their names, and whoever loads the network compares them with its
own (`check_keys`). Scales of fp8 files are in no table on purpose: `fp8` applies them to their weights first, so that
a leftover scale is an error, not a wrong picture.

Shapes agree between the layouts too, except in Hugging Face's CLIP: q, k and v are three tensors to stack along axis 0,
and the class embedding (D,) and position embedding (N, D) lack leading axes of size 1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import count

from ..errors import WeightsError, some
from ..presets import MODULE

# Placeholders in the tables' names: pattern of the text that stands there.
PLACEHOLDERS = {
    "blocks": "blocks|vace_blocks",
    "n": r"\d+",
    "m": r"\d+",
    "of": "text|time",
    "q": "[qkvo]",
    "part": "[qkv]",
    "pair": "[kv]",
    "coder": "encoder|decoder",
    "attn": "self_attn|cross_attn",
    "conv": r"resample\.1|time_conv",
    "end": "weight|bias",
    "any": ".+",
}
# Placeholder → its values: tensors that are one in the official layout, in this order along axis 0.
STACKED = {"part": "qkv", "pair": "kv"}
UNUSED = ""  # in place of an official name
# A checkpoint of a whole model, as ComfyUI's nodes CheckpointSave and ImageOnlyCheckpointSave write it: network → the
# beginning of its keys.
IN_CHECKPOINT = {
    "transformer": r"model\.diffusion_model\.",
    "text_encoder": r"text_encoders\.",
    "vae": r"vae\.",
    "image_encoder": r"(?:vision_model|visual_projection)\.",
}
# An anchor → why files lack it, and what to do.
_NOT_FIXED = (
    ", as in a GGUF by ComfyUI-GGUF's convert.py on which its fix_5d_tensors.py was not run: run that with the "
    ".safetensors which convert.py wrote beside it, or take a published GGUF"
)
WITHOUT = {"patch_embedding.weight": _NOT_FIXED, "vace_patch_embedding.weight": _NOT_FIXED}


@dataclass(frozen=True)
class Layout:
    """One naming scheme for one network's tensors.

    Attributes:
        name: "official", "diffusers", "huggingface", "gguf" or "mlx-video".
        component: "transformer", "text_encoder", "vae", "image_encoder", "audio_encoder" or, of VACE's part of a
            transformer, `MODULE`.
        anchors: keys that every such file has, for any size of network, and no other layout has together.
        names: this layout's name → the official one, or `UNUSED`; no two match the same key.
        prefix: pattern of an optional prefix of each key.
        copies: key → another key; unused where that one is present.
    """

    name: str
    component: str
    anchors: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    copies: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.component}"

    def strip(self, key: str) -> str:
        """``key`` without its prefix."""
        match = re.match(self.prefix, key) if self.prefix else None
        return key[match.end() :] if match else key

    def lacks(self, stripped: Collection[str]) -> list[str]:
        """The anchors that are not among keys without this layout's prefix."""
        return [anchor for anchor in self.anchors if anchor not in stripped]

    def rename(self, key: str, keys: Collection[str]) -> tuple[str, tuple[str, ...]] | None:
        """The canonical name of ``key``, or `UNUSED`, and the keys of that tensor; None if it is in no table."""
        if self.copies.get(key) in keys:
            return UNUSED, (key,)
        for theirs, ours in self.names.items():
            if match := pattern(theirs).fullmatch(key):
                fields = match.groupdict()
                if "{flat}" in ours:
                    fields["flat"] = str(_flat(fields["n"], fields.get("m"), keys))
                if "{last}" in ours:
                    fields["last"] = str(_resnets(theirs.split(".{n}.")[0], fields["n"], keys))
                if "{next}" in ours:
                    fields["next"] = str(int(fields["n"]) + 1)
                if "{after}" in ours:
                    fields["after"] = str(1 + _number("motion_encoder.res_blocks", keys))
                several = next((name for name in STACKED if name in fields), None)
                parts = [theirs.format(**fields | {several: one}) for one in STACKED[several]] if several else [key]
                return ours.format(**fields), tuple(parts)
        return (key, (key,)) if self.name == "official" else None


@cache
def pattern(template: str) -> re.Pattern[str]:
    """The pattern of a name in a table."""
    pieces = re.split(r"\{(\w+)\}", template)
    pieces[::2] = map(re.escape, pieces[::2])
    pieces[1::2] = (f"(?P<{name}>{PLACEHOLDERS[name]})" for name in pieces[1::2])
    return re.compile("".join(pieces))


def recognise(keys: Iterable[str]) -> Layout:
    """Recognise network and layout from the keys alone; WeightsError if none fits."""
    keys = list(keys)
    layouts = (*LAYOUTS, *MODULES)
    each = {layout.prefix: layout for layout in layouts}
    stripped = {prefix: {layout.strip(key) for key in keys} for prefix, layout in each.items()}
    lacking = ((layout, layout.lacks(stripped[layout.prefix])) for layout in layouts)
    nearest, lost = min(lacking, key=lambda found: len(found[1]) / len(found[0].anchors))
    if not lost:
        return nearest
    known = ", ".join(dict.fromkeys(map(str, LAYOUTS)))
    why = f"expected one of: {known}"
    if len(lost) < len(nearest.anchors):
        why = f"nearest is {nearest}, but {some(lost)} is missing{WITHOUT.get(lost[0], '')}"
    raise WeightsError(f"{len(keys)} keys of no known network: {some(keys)}; {why}")


def networks_in(keys: Iterable[str]) -> dict[str, list[str]]:
    """Each network in a checkpoint of a whole model → its keys; empty for a file of a single network.

    What belongs to no network is left to the first, which has no such tensor.
    """
    found: dict[str, list[str]] = {kind: [] for kind in (*IN_CHECKPOINT, "")}
    for key in keys:
        found[next((kind for kind, begin in IN_CHECKPOINT.items() if re.match(begin, key)), "")].append(key)
    others = found.pop("")
    networks = {kind: its_keys for kind, its_keys in found.items() if its_keys}
    if len(networks) < 2:
        return {}
    next(iter(networks.values())).extend(others)
    return networks


def canonical_keys(layout: Layout, keys: Iterable[str]) -> dict[str, str | tuple[str, ...]]:
    """Canonical name → source key, or the source keys to stack along axis 0; in the order of ``keys``.

    Does not check whether the network is complete, because that needs its sizes.

    Raises:
        WeightsError: keys in no table, two for one name, or a part without its siblings.
    """
    originals: dict[str, str] = {}
    for key in keys:
        short = layout.strip(key)
        if short in originals:
            raise WeightsError(f"{layout} with two keys for {short}: {originals[short]} and {key}")
        originals[short] = key
    found: dict[str, tuple[str, ...]] = {}
    unknown, missing = [], []
    for short, key in originals.items():
        claim = layout.rename(short, originals)
        if claim is None:
            unknown.append(key)
            continue
        name, parts = claim
        if name == UNUSED:
            continue
        if found.setdefault(name, parts) != parts:
            first = ", ".join(originals.get(part, part) for part in found[name])
            raise WeightsError(f"{layout} with two keys for {name}: {first} and {key}")
        missing += [part for part in parts if part not in originals and part not in missing]
    if unknown:
        raise WeightsError(
            f"{layout} with {len(unknown)} of {len(originals)} keys that Wan does not have: {some(unknown)}"
        )
    if missing:
        raise WeightsError(f"{layout} without {some(missing)}, though it has the tensors that belong with them")
    sources = {name: tuple(originals[part] for part in parts) for name, parts in found.items()}
    return {name: parts[0] if len(parts) == 1 else parts for name, parts in sources.items()}


def _flat(block: str, resnet: str | None, keys: Collection[str]) -> int:
    """Diffusers groups the decoder's layers into up blocks (resnets, then an upsampler); here they are flat."""
    resnets = _resnets("decoder.up_blocks", "0", keys)
    return int(block) * (resnets + 1) + int(resnets if resnet is None else resnet)


def _resnets(blocks: str, block: str, keys: Collection[str]) -> int:
    """The number of resnets in a block of Diffusers' VAE; what resamples has the place after them."""
    return _number(f"{blocks}.{block}.resnets", keys)


def _number(blocks: str, keys: Collection[str]) -> int:
    """The number of residual blocks in a list."""
    return next(n for n in count() if f"{blocks}.{n}.conv1.weight" not in keys)


def _inside(theirs: str, ours: str, names: Mapping[str, str]) -> dict[str, str]:
    """A table of ``names`` inside a module."""
    return {f"{theirs}.{inner}": f"{ours}.{name}" for inner, name in names.items()}


_TOKENIZER = {"spiece_model": UNUSED}  # the tokenizer's sentencepiece model
# Inside a residual block: Diffusers' names → the official places in its `residual` sequence.
_RESIDUAL = {
    "norm1.gamma": "residual.0.gamma",
    "conv1.{end}": "residual.2.{end}",
    "norm2.gamma": "residual.3.gamma",
    "conv2.{end}": "residual.6.{end}",
}
_RESNET = {**_RESIDUAL, "conv_shortcut.{end}": "shortcut.{end}"}  # where the width may change
_RESAMPLER = {"{conv}.{end}": "{conv}.{end}"}
_MOTION = "motion_encoder.enc.net_app.convs"
# Of Diffusers' VAE, both kinds.
_AROUND_STAGES = {
    "{coder}.conv_in.{end}": "{coder}.conv1.{end}",
    "{coder}.norm_out.gamma": "{coder}.head.0.gamma",
    "{coder}.conv_out.{end}": "{coder}.head.2.{end}",
    "quant_conv.{end}": "conv1.{end}",
    "post_quant_conv.{end}": "conv2.{end}",
    "{coder}.mid_block.attentions.0.{any}": "{coder}.middle.1.{any}",
    **_inside("{coder}.mid_block.resnets.0", "{coder}.middle.0", _RESIDUAL),
    **_inside("{coder}.mid_block.resnets.1", "{coder}.middle.2", _RESIDUAL),
}

LAYOUTS = (
    Layout(
        "official",
        "transformer",
        anchors=("patch_embedding.weight", "blocks.0.self_attn.q.weight", "head.modulation"),
        prefix=r"(?:model\.)?diffusion_model\.",
        names={
            # S2V's injectors, which are blocks here.
            "audio_injector.injector.{n}.{any}": "audio_injectors.{n}.{any}",
            "audio_injector.injector_adain_layers.{n}.linear.{end}": "audio_injectors.{n}.adain.{end}",
            # Of Animate's blurs, which are constants.
            f"{_MOTION}.{{n}}.conv2.0.kernel": UNUSED,
            f"{_MOTION}.{{n}}.skip.0.kernel": UNUSED,
        },
    ),
    Layout(
        "diffusers",
        "transformer",
        anchors=("patch_embedding.weight", "condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight"),
        names={
            "patch_embedding.{end}": "patch_embedding.{end}",
            "vace_patch_embedding.{end}": "vace_patch_embedding.{end}",
            "condition_embedder.{of}_embedder.linear_1.{end}": "{of}_embedding.0.{end}",
            "condition_embedder.{of}_embedder.linear_2.{end}": "{of}_embedding.2.{end}",
            "condition_embedder.time_proj.{end}": "time_projection.1.{end}",
            "condition_embedder.image_embedder.norm1.{end}": "img_emb.proj.0.{end}",
            "condition_embedder.image_embedder.ff.net.0.proj.{end}": "img_emb.proj.1.{end}",
            "condition_embedder.image_embedder.ff.net.2.{end}": "img_emb.proj.3.{end}",
            "condition_embedder.image_embedder.norm2.{end}": "img_emb.proj.4.{end}",
            "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
            "{blocks}.{n}.scale_shift_table": "{blocks}.{n}.modulation",
            "{blocks}.{n}.norm2.{end}": "{blocks}.{n}.norm3.{end}",
            "{blocks}.{n}.attn1.to_{q}.{end}": "{blocks}.{n}.self_attn.{q}.{end}",
            "{blocks}.{n}.attn1.to_out.0.{end}": "{blocks}.{n}.self_attn.o.{end}",
            "{blocks}.{n}.attn1.norm_{q}.weight": "{blocks}.{n}.self_attn.norm_{q}.weight",
            "{blocks}.{n}.attn2.to_{q}.{end}": "{blocks}.{n}.cross_attn.{q}.{end}",
            "{blocks}.{n}.attn2.to_out.0.{end}": "{blocks}.{n}.cross_attn.o.{end}",
            "{blocks}.{n}.attn2.norm_{q}.weight": "{blocks}.{n}.cross_attn.norm_{q}.weight",
            "blocks.{n}.attn2.add_{q}_proj.{end}": "blocks.{n}.cross_attn.{q}_img.{end}",
            "blocks.{n}.attn2.norm_added_k.weight": "blocks.{n}.cross_attn.norm_k_img.weight",
            "blocks.{n}.attn2.norm_added_q.weight": UNUSED,  # left by a conversion; image features meet no such norm
            "{blocks}.{n}.ffn.net.0.proj.{end}": "{blocks}.{n}.ffn.0.{end}",
            "{blocks}.{n}.ffn.net.2.{end}": "{blocks}.{n}.ffn.2.{end}",
            "vace_blocks.0.proj_in.{end}": "vace_blocks.0.before_proj.{end}",
            "vace_blocks.{n}.proj_out.{end}": "vace_blocks.{n}.after_proj.{end}",
            "pose_patch_embedding.{end}": "pose_patch_embedding.{end}",
            "motion_encoder.conv_in.weight": f"{_MOTION}.0.0.weight",
            "motion_encoder.conv_in.act_fn.bias": f"{_MOTION}.0.1.bias",
            "motion_encoder.res_blocks.{n}.conv1.weight": f"{_MOTION}.{{next}}.conv1.0.weight",
            "motion_encoder.res_blocks.{n}.conv1.act_fn.bias": f"{_MOTION}.{{next}}.conv1.1.bias",
            "motion_encoder.res_blocks.{n}.conv2.weight": f"{_MOTION}.{{next}}.conv2.1.weight",
            "motion_encoder.res_blocks.{n}.conv2.act_fn.bias": f"{_MOTION}.{{next}}.conv2.2.bias",
            "motion_encoder.res_blocks.{n}.conv_skip.weight": f"{_MOTION}.{{next}}.skip.1.weight",
            "motion_encoder.conv_out.weight": f"{_MOTION}.{{after}}.weight",
            "motion_encoder.motion_network.{n}.{end}": "motion_encoder.enc.fc.{n}.{end}",
            "motion_encoder.motion_synthesis_weight": "motion_encoder.dec.direction.weight",
            "face_encoder.conv{any}.{end}": "face_encoder.conv{any}.conv.{end}",
            "face_encoder.out_proj.{end}": "face_encoder.out_proj.{end}",
            "face_encoder.padding_tokens": "face_encoder.padding_tokens",
            "face_adapter.{n}.to_q.{end}": "face_adapter.fuser_blocks.{n}.linear1_q.{end}",
            "face_adapter.{n}.to_{pair}.{end}": "face_adapter.fuser_blocks.{n}.linear1_kv.{end}",
            "face_adapter.{n}.to_out.{end}": "face_adapter.fuser_blocks.{n}.linear2.{end}",
            "face_adapter.{n}.norm_{q}.weight": "face_adapter.fuser_blocks.{n}.{q}_norm.weight",
            "scale_shift_table": "head.modulation",
            "proj_out.{end}": "head.head.{end}",
        },
    ),
    # mlx-video's; the patch embedding is a matrix in PyTorch's order.
    Layout(
        "mlx-video",
        "transformer",
        anchors=("patch_embedding_proj.weight", "blocks.0.ffn.fc1.weight", "head.modulation"),
        names={
            "patch_embedding_proj.{end}": "patch_embedding.{end}",
            "{of}_embedding_0.{end}": "{of}_embedding.0.{end}",
            "{of}_embedding_1.{end}": "{of}_embedding.2.{end}",
            "time_projection.{end}": "time_projection.1.{end}",
            "blocks.{n}.ffn.fc1.{end}": "blocks.{n}.ffn.0.{end}",
            "blocks.{n}.ffn.fc2.{end}": "blocks.{n}.ffn.2.{end}",
            "blocks.{n}.{attn}.{q}.{end}": "blocks.{n}.{attn}.{q}.{end}",
            "blocks.{n}.{attn}.norm_{q}.weight": "blocks.{n}.{attn}.norm_{q}.weight",
            "blocks.{n}.cross_attn.{q}_img.{end}": "blocks.{n}.cross_attn.{q}_img.{end}",
            "blocks.{n}.cross_attn.norm_k_img.weight": "blocks.{n}.cross_attn.norm_k_img.weight",
            "blocks.{n}.norm3.{end}": "blocks.{n}.norm3.{end}",
            "blocks.{n}.modulation": "blocks.{n}.modulation",
            "head.head.{end}": "head.head.{end}",
            "head.modulation": "head.modulation",
            "img_emb.{any}": "img_emb.{any}",
            "freqs": UNUSED,  # the table of rotations, in packed files
        },
    ),
    Layout(
        "official",
        "text_encoder",
        anchors=("token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.ffn.gate.0.weight"),
        names=_TOKENIZER,
    ),
    Layout(
        "mlx-video",
        "text_encoder",
        anchors=("token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.ffn.gate_proj.weight"),
        names={
            "token_embedding.weight": "token_embedding.weight",
            "norm.weight": "norm.weight",
            "blocks.{n}.norm{m}.weight": "blocks.{n}.norm{m}.weight",
            "blocks.{n}.attn.{q}.weight": "blocks.{n}.attn.{q}.weight",
            "blocks.{n}.ffn.gate_proj.weight": "blocks.{n}.ffn.gate.0.weight",
            "blocks.{n}.ffn.fc{m}.weight": "blocks.{n}.ffn.fc{m}.weight",
            "blocks.{n}.pos_embedding.embedding.weight": "blocks.{n}.pos_embedding.embedding.weight",
        },
    ),
    # Also ComfyUI's files, which include the tokenizer.
    Layout(
        "huggingface",
        "text_encoder",
        anchors=(
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
        ),
        prefix=r"(?:text_encoders\.)?(?:(?:um)?t5xxl\.)?(?:transformer\.)?",
        names={
            **_TOKENIZER,
            "logit_scale": UNUSED,  # CLIP's, which ComfyUI saves with every text encoder
            "shared.weight": "token_embedding.weight",
            "encoder.embed_tokens.weight": "token_embedding.weight",
            "encoder.final_layer_norm.weight": "norm.weight",
            "encoder.block.{n}.layer.0.layer_norm.weight": "blocks.{n}.norm1.weight",
            "encoder.block.{n}.layer.0.SelfAttention.{q}.weight": "blocks.{n}.attn.{q}.weight",
            "encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias.weight": (
                "blocks.{n}.pos_embedding.embedding.weight"
            ),
            "encoder.block.{n}.layer.1.layer_norm.weight": "blocks.{n}.norm2.weight",
            "encoder.block.{n}.layer.1.DenseReluDense.wi_0.weight": "blocks.{n}.ffn.gate.0.weight",
            "encoder.block.{n}.layer.1.DenseReluDense.wi_1.weight": "blocks.{n}.ffn.fc1.weight",
            "encoder.block.{n}.layer.1.DenseReluDense.wo.weight": "blocks.{n}.ffn.fc2.weight",
        },
        # Some versions of transformers store zeros in the copy, so the original is used.
        copies={"encoder.embed_tokens.weight": "shared.weight"},
    ),
    # llama.cpp's names for a T5 encoder.
    Layout(
        "gguf",
        "text_encoder",
        anchors=("token_embd.weight", "enc.blk.0.attn_q.weight", "enc.output_norm.weight"),
        names={
            "token_embd.weight": "token_embedding.weight",
            "enc.output_norm.weight": "norm.weight",
            "enc.blk.{n}.attn_norm.weight": "blocks.{n}.norm1.weight",
            "enc.blk.{n}.attn_{q}.weight": "blocks.{n}.attn.{q}.weight",
            "enc.blk.{n}.attn_rel_b.weight": "blocks.{n}.pos_embedding.embedding.weight",
            "enc.blk.{n}.ffn_norm.weight": "blocks.{n}.norm2.weight",
            "enc.blk.{n}.ffn_gate.weight": "blocks.{n}.ffn.gate.0.weight",
            "enc.blk.{n}.ffn_up.weight": "blocks.{n}.ffn.fc1.weight",
            "enc.blk.{n}.ffn_down.weight": "blocks.{n}.ffn.fc2.weight",
        },
    ),
    Layout(
        "official",
        "vae",
        anchors=("encoder.downsamples.0.residual.2.weight", "decoder.upsamples.0.residual.2.weight", "conv2.weight"),
        prefix=r"(?:model|vae|first_stage_model)\.",
    ),
    # Wan2.2's, whose stages are modules.
    Layout(
        "official",
        "vae",
        anchors=(
            "encoder.downsamples.0.downsamples.0.residual.2.weight",
            "decoder.upsamples.0.upsamples.0.residual.2.weight",
            "conv2.weight",
        ),
        prefix=r"(?:model|vae|first_stage_model)\.",
    ),
    Layout(
        "diffusers",
        "vae",
        anchors=(
            "encoder.down_blocks.0.resnets.0.conv1.weight",
            "decoder.up_blocks.0.resnets.0.conv1.weight",
            "quant_conv.weight",
        ),
        names={
            **_AROUND_STAGES,
            **_inside("encoder.down_blocks.{n}.resnets.{m}", "encoder.downsamples.{n}.downsamples.{m}", _RESNET),
            **_inside("decoder.up_blocks.{n}.resnets.{m}", "decoder.upsamples.{n}.upsamples.{m}", _RESNET),
            **_inside("encoder.down_blocks.{n}.downsampler", "encoder.downsamples.{n}.downsamples.{last}", _RESAMPLER),
            **_inside("decoder.up_blocks.{n}.upsampler", "decoder.upsamples.{n}.upsamples.{last}", _RESAMPLER),
        },
    ),
    Layout(
        "diffusers",
        "vae",
        anchors=(
            "encoder.down_blocks.0.conv1.weight",
            "decoder.up_blocks.0.resnets.0.conv1.weight",
            "quant_conv.weight",
        ),
        names={
            **_AROUND_STAGES,
            **_inside("encoder.down_blocks.{n}", "encoder.downsamples.{n}", {**_RESNET, **_RESAMPLER}),
            **_inside("decoder.up_blocks.{n}.resnets.{m}", "decoder.upsamples.{flat}", _RESNET),
            **_inside("decoder.up_blocks.{n}.upsamplers.0", "decoder.upsamples.{flat}", _RESAMPLER),
        },
    ),
    Layout(
        "official",
        "image_encoder",
        anchors=("cls_embedding", "pos_embedding", "transformer.0.attn.to_qkv.weight"),
        prefix=r"visual\.",
        names={
            "textual.{any}": UNUSED,  # the text tower; Wan reads the image alone
            "log_scale": UNUSED,  # the contrastive loss's temperature
            "head": UNUSED,  # after the last block; Wan takes the features before it
            "post_norm.{end}": UNUSED,
        },
    ),
    Layout(
        "huggingface",
        "image_encoder",
        anchors=("embeddings.class_embedding", "embeddings.patch_embedding.weight", "encoder.layers.0.mlp.fc1.weight"),
        prefix=r"vision_model\.",
        names={
            "embeddings.position_ids": UNUSED,  # 0, 1, 2, … kept by old versions of transformers
            "visual_projection.weight": UNUSED,  # after the last block; Wan takes the features before it
            "post_layernorm.{end}": UNUSED,
            "embeddings.patch_embedding.weight": "patch_embedding.weight",
            "embeddings.class_embedding": "cls_embedding",
            "embeddings.position_embedding.weight": "pos_embedding",
            "pre_layrnorm.{end}": "pre_norm.{end}",
            "encoder.layers.{n}.layer_norm{m}.{end}": "transformer.{n}.norm{m}.{end}",
            "encoder.layers.{n}.self_attn.{part}_proj.{end}": "transformer.{n}.attn.to_qkv.{end}",
            "encoder.layers.{n}.self_attn.out_proj.{end}": "transformer.{n}.attn.proj.{end}",
            "encoder.layers.{n}.mlp.fc1.{end}": "transformer.{n}.mlp.0.{end}",
            "encoder.layers.{n}.mlp.fc2.{end}": "transformer.{n}.mlp.2.{end}",
        },
    ),
    # wav2vec 2.0's, which the official code reads, too.
    Layout(
        "official",
        "audio_encoder",
        anchors=("feature_projection.projection.weight", "encoder.layers.0.attention.q_proj.weight"),
        prefix=r"wav2vec2\.",
        names={
            "lm_head.{end}": UNUSED,  # writes letters
            "masked_spec_embed": UNUSED,  # of training
            # What newer versions of PyTorch call them.
            "encoder.pos_conv_embed.conv.parametrizations.weight.original0": "encoder.pos_conv_embed.conv.weight_g",
            "encoder.pos_conv_embed.conv.parametrizations.weight.original1": "encoder.pos_conv_embed.conv.weight_v",
        },
    ),
)
# Of a part of a network: the whole network's files have these keys, too.
MODULES = (
    Layout(
        "official",
        MODULE,
        anchors=("vace_patch_embedding.weight", "vace_blocks.0.self_attn.q.weight", "vace_blocks.0.before_proj.weight"),
        prefix=r"(?:model\.)?diffusion_model\.",
    ),
)
