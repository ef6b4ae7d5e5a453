"""Tensor names of published Wan2.1 checkpoints, as data: anchored patterns → the official names.

A canonical name is the official module's own parameter name, without the prefix in some files. Every key of a file is
renamed by one rule or ignored by name; any other key is an error. Scales of fp8 files have no rule on purpose: `fp8`
applies them to their weights first, so that a leftover scale is an error, not a wrong picture.

Shapes agree between the layouts too, except in Hugging Face's CLIP: q, k and v are three tensors to stack along axis 0,
and the class embedding (D,) and position embedding (N, D) lack leading axes of size 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import count

from ..errors import WeightsError, some


@dataclass(frozen=True)
class Rule:
    """A rename: a pattern for whole keys, and the new name.

    Attributes:
        pattern: matches a whole key, prefix removed.
        target: expanded from the match, by default the key itself; or a function of (match, all keys).
        parts: values of the group ``part`` if several tensors make one, in stacking order along axis 0.
    """

    pattern: str
    target: str | Callable[[re.Match[str], Collection[str]], str] = r"\g<0>"
    parts: tuple[str, ...] = ()

    def apply(self, key: str, keys: Collection[str]) -> tuple[str, tuple[str, ...]] | None:
        """The canonical name of ``key`` and the keys of that tensor; None if the rule does not match."""
        match = re.fullmatch(self.pattern, key)
        if match is None:
            return None
        name = match.expand(self.target) if isinstance(self.target, str) else self.target(match, keys)
        if not self.parts:
            return name, (key,)
        start, end = match.span("part")
        return name, tuple(key[:start] + part + key[end:] for part in self.parts)


@dataclass(frozen=True)
class Ignored:
    """Keys that the network does not need, and why; with ``copy_of``, only where that key is present."""

    pattern: str
    reason: str
    copy_of: str = ""


@dataclass(frozen=True)
class Layout:
    """One naming scheme for one network's tensors.

    Attributes:
        name: "official", "diffusers", "huggingface" or "gguf".
        component: "transformer", "text_encoder", "vae" or "image_encoder".
        anchors: keys that every such file has, for any size of network, and no other layout has together.
        rules: pairwise disjoint.
        ignored: looked up before the rules.
        prefix: pattern of an optional prefix of each key.
    """

    name: str
    component: str
    anchors: tuple[str, ...]
    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...] = ()
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.component}"

    def strip(self, key: str) -> str:
        """``key`` without its prefix."""
        match = re.match(self.prefix, key)
        return key[match.end() :] if match else key

    def ignores(self, key: str, keys: Collection[str]) -> bool:
        """Whether ``key`` is in ``ignored``."""
        return any(
            re.fullmatch(entry.pattern, key) and (not entry.copy_of or entry.copy_of in keys) for entry in self.ignored
        )


def recognise(keys: Iterable[str]) -> Layout:
    """Recognise network and layout from the keys alone.

    Raises:
        WeightsError: no layout fits, or one fits except for some keys (see `canonical_keys`); lists the keys.
    """
    keys = list(keys)
    for layout in LAYOUTS:
        if {layout.strip(key) for key in keys}.issuperset(layout.anchors):
            canonical_keys(layout, keys)
            return layout
    known = ", ".join(str(layout) for layout in LAYOUTS)
    raise WeightsError(f"{len(keys)} keys of no known network: {some(keys)}; expected one of: {known}")


def canonical_keys(layout: Layout, keys: Iterable[str]) -> dict[str, str | tuple[str, ...]]:
    """Canonical name → source key, or the source keys to stack along axis 0; in the order of ``keys``.

    Does not check whether the network is complete, because that needs its sizes.

    Raises:
        WeightsError: keys without a rule, two for one name, or a part without its siblings.
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
        if layout.ignores(short, originals):
            continue
        claim = next(filter(None, (rule.apply(short, originals) for rule in layout.rules)), None)
        if claim is None:
            unknown.append(key)
            continue
        name, parts = claim
        if found.setdefault(name, parts) != parts:
            first = ", ".join(originals.get(part, part) for part in found[name])
            raise WeightsError(f"{layout} with two keys for {name}: {first} and {key}")
        missing += [part for part in parts if part not in originals and part not in missing]
    if unknown:
        raise WeightsError(
            f"{layout} with {len(unknown)} of {len(originals)} keys that Wan2.1 does not have: {some(unknown)}"
        )
    if missing:
        raise WeightsError(f"{layout} without {some(missing)}, though it has the tensors that belong with them")
    sources = {name: tuple(originals[part] for part in parts) for name, parts in found.items()}
    return {name: parts[0] if len(parts) == 1 else parts for name, parts in sources.items()}


_END = r"(weight|bias)"

_TRANSFORMER_OFFICIAL = Layout(
    "official",
    "transformer",
    anchors=("patch_embedding.weight", "blocks.0.self_attn.q.weight", "head.modulation"),
    prefix=r"(?:model\.)?diffusion_model\.",
    rules=(
        Rule(rf"(?:vace_)?patch_embedding\.{_END}"),
        Rule(rf"(?:text|time)_embedding\.[02]\.{_END}"),
        Rule(rf"time_projection\.1\.{_END}"),
        Rule(rf"img_emb\.proj\.[0134]\.{_END}"),
        Rule(r"img_emb\.emb_pos"),
        Rule(r"(?:vace_)?blocks\.\d+\.modulation"),
        Rule(rf"(?:vace_)?blocks\.\d+\.norm3\.{_END}"),
        Rule(rf"(?:vace_)?blocks\.\d+\.(?:self|cross)_attn\.[qkvo]\.{_END}"),
        Rule(r"(?:vace_)?blocks\.\d+\.(?:self|cross)_attn\.norm_[qk]\.weight"),
        Rule(rf"(?:vace_)?blocks\.\d+\.ffn\.[02]\.{_END}"),
        Rule(rf"blocks\.\d+\.cross_attn\.[kv]_img\.{_END}"),
        Rule(r"blocks\.\d+\.cross_attn\.norm_k_img\.weight"),
        Rule(rf"vace_blocks\.0\.before_proj\.{_END}"),
        Rule(rf"vace_blocks\.\d+\.after_proj\.{_END}"),
        Rule(r"head\.modulation"),
        Rule(rf"head\.head\.{_END}"),
    ),
)

_TRANSFORMER_DIFFUSERS = Layout(
    "diffusers",
    "transformer",
    anchors=("patch_embedding.weight", "condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight"),
    ignored=(
        Ignored(r"blocks\.\d+\.attn2\.norm_added_q\.weight", "left by a conversion; image features meet no such norm"),
    ),
    rules=(
        Rule(rf"(?:vace_)?patch_embedding\.{_END}"),
        Rule(rf"condition_embedder\.(text|time)_embedder\.linear_1\.{_END}", r"\1_embedding.0.\2"),
        Rule(rf"condition_embedder\.(text|time)_embedder\.linear_2\.{_END}", r"\1_embedding.2.\2"),
        Rule(rf"condition_embedder\.time_proj\.{_END}", r"time_projection.1.\1"),
        Rule(rf"condition_embedder\.image_embedder\.norm1\.{_END}", r"img_emb.proj.0.\1"),
        Rule(rf"condition_embedder\.image_embedder\.ff\.net\.0\.proj\.{_END}", r"img_emb.proj.1.\1"),
        Rule(rf"condition_embedder\.image_embedder\.ff\.net\.2\.{_END}", r"img_emb.proj.3.\1"),
        Rule(rf"condition_embedder\.image_embedder\.norm2\.{_END}", r"img_emb.proj.4.\1"),
        Rule(r"condition_embedder\.image_embedder\.pos_embed", r"img_emb.emb_pos"),
        Rule(r"((?:vace_)?blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
        Rule(rf"((?:vace_)?blocks\.\d+)\.norm2\.{_END}", r"\1.norm3.\2"),
        Rule(rf"((?:vace_)?blocks\.\d+)\.attn1\.to_([qkv])\.{_END}", r"\1.self_attn.\2.\3"),
        Rule(rf"((?:vace_)?blocks\.\d+)\.attn1\.to_out\.0\.{_END}", r"\1.self_attn.o.\2"),
        Rule(r"((?:vace_)?blocks\.\d+)\.attn1\.norm_([qk])\.weight", r"\1.self_attn.norm_\2.weight"),
        Rule(rf"((?:vace_)?blocks\.\d+)\.attn2\.to_([qkv])\.{_END}", r"\1.cross_attn.\2.\3"),
        Rule(rf"((?:vace_)?blocks\.\d+)\.attn2\.to_out\.0\.{_END}", r"\1.cross_attn.o.\2"),
        Rule(r"((?:vace_)?blocks\.\d+)\.attn2\.norm_([qk])\.weight", r"\1.cross_attn.norm_\2.weight"),
        Rule(rf"(blocks\.\d+)\.attn2\.add_([kv])_proj\.{_END}", r"\1.cross_attn.\2_img.\3"),
        Rule(r"(blocks\.\d+)\.attn2\.norm_added_k\.weight", r"\1.cross_attn.norm_k_img.weight"),
        Rule(rf"((?:vace_)?blocks\.\d+)\.ffn\.net\.0\.proj\.{_END}", r"\1.ffn.0.\2"),
        Rule(rf"((?:vace_)?blocks\.\d+)\.ffn\.net\.2\.{_END}", r"\1.ffn.2.\2"),
        Rule(rf"vace_blocks\.0\.proj_in\.{_END}", r"vace_blocks.0.before_proj.\1"),
        Rule(rf"(vace_blocks\.\d+)\.proj_out\.{_END}", r"\1.after_proj.\2"),
        Rule(r"scale_shift_table", r"head.modulation"),
        Rule(rf"proj_out\.{_END}", r"head.head.\1"),
    ),
)

_TOKENIZER = Ignored(r"spiece_model", "the tokenizer's sentencepiece model")

_TEXT_OFFICIAL = Layout(
    "official",
    "text_encoder",
    anchors=("token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.ffn.gate.0.weight"),
    ignored=(_TOKENIZER,),
    rules=(
        Rule(r"token_embedding\.weight"),
        Rule(r"blocks\.\d+\.norm[12]\.weight"),
        Rule(r"blocks\.\d+\.attn\.[qkvo]\.weight"),
        Rule(r"blocks\.\d+\.ffn\.(?:gate\.0|fc1|fc2)\.weight"),
        Rule(r"blocks\.\d+\.pos_embedding\.embedding\.weight"),
        Rule(r"norm\.weight"),
    ),
)

# Also ComfyUI's files, which include the tokenizer.
_TEXT_HUGGINGFACE = Layout(
    "huggingface",
    "text_encoder",
    anchors=(
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
    ),
    ignored=(
        _TOKENIZER,
        # Some versions of transformers store zeros here, so the original is used.
        Ignored(r"encoder\.embed_tokens\.weight", "tied to shared.weight", copy_of="shared.weight"),
    ),
    rules=(
        Rule(r"(?:shared|encoder\.embed_tokens)\.weight", r"token_embedding.weight"),
        Rule(r"encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight", r"blocks.\1.norm1.weight"),
        Rule(r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight", r"blocks.\1.attn.\2.weight"),
        Rule(
            r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
            r"blocks.\1.pos_embedding.embedding.weight",
        ),
        Rule(r"encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight", r"blocks.\1.norm2.weight"),
        Rule(r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.weight", r"blocks.\1.ffn.gate.0.weight"),
        Rule(r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.weight", r"blocks.\1.ffn.fc1.weight"),
        Rule(r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.weight", r"blocks.\1.ffn.fc2.weight"),
        Rule(r"encoder\.final_layer_norm\.weight", r"norm.weight"),
    ),
)

# llama.cpp's names for a T5 encoder.
_TEXT_GGUF = Layout(
    "gguf",
    "text_encoder",
    anchors=("token_embd.weight", "enc.blk.0.attn_q.weight", "enc.output_norm.weight"),
    rules=(
        Rule(r"token_embd\.weight", r"token_embedding.weight"),
        Rule(r"enc\.blk\.(\d+)\.attn_norm\.weight", r"blocks.\1.norm1.weight"),
        Rule(r"enc\.blk\.(\d+)\.attn_([qkvo])\.weight", r"blocks.\1.attn.\2.weight"),
        Rule(r"enc\.blk\.(\d+)\.attn_rel_b\.weight", r"blocks.\1.pos_embedding.embedding.weight"),
        Rule(r"enc\.blk\.(\d+)\.ffn_norm\.weight", r"blocks.\1.norm2.weight"),
        Rule(r"enc\.blk\.(\d+)\.ffn_gate\.weight", r"blocks.\1.ffn.gate.0.weight"),
        Rule(r"enc\.blk\.(\d+)\.ffn_up\.weight", r"blocks.\1.ffn.fc1.weight"),
        Rule(r"enc\.blk\.(\d+)\.ffn_down\.weight", r"blocks.\1.ffn.fc2.weight"),
        Rule(r"enc\.output_norm\.weight", r"norm.weight"),
    ),
)

_VAE_OFFICIAL = Layout(
    "official",
    "vae",
    anchors=(
        "encoder.downsamples.0.residual.2.weight",
        "decoder.upsamples.0.residual.2.weight",
        "conv2.weight",
    ),
    prefix=r"(?:model|vae|first_stage_model)\.",
    rules=(
        Rule(rf"(?:(?:en|de)coder\.)?conv1\.{_END}"),
        Rule(rf"conv2\.{_END}"),
        Rule(r"(?:encoder\.downsamples|decoder\.upsamples)\.\d+\.residual\.[03]\.gamma"),
        Rule(rf"(?:encoder\.downsamples|decoder\.upsamples)\.\d+\.(?:residual\.[26]|shortcut)\.{_END}"),
        Rule(rf"(?:encoder\.downsamples|decoder\.upsamples)\.\d+\.(?:resample\.1|time_conv)\.{_END}"),
        Rule(r"(?:en|de)coder\.middle\.[02]\.residual\.[03]\.gamma"),
        Rule(rf"(?:en|de)coder\.middle\.[02]\.residual\.[26]\.{_END}"),
        Rule(r"(?:en|de)coder\.middle\.1\.norm\.gamma"),
        Rule(rf"(?:en|de)coder\.middle\.1\.(?:to_qkv|proj)\.{_END}"),
        Rule(r"(?:en|de)coder\.head\.0\.gamma"),
        Rule(rf"(?:en|de)coder\.head\.2\.{_END}"),
    ),
)

# Inside a residual block: Diffusers' names → the official places in its `residual` sequence.
_RESIDUAL = (
    (r"norm1\.(?P<kind>gamma)", r"residual.0.\g<kind>"),
    (r"conv1\.(?P<kind>weight|bias)", r"residual.2.\g<kind>"),
    (r"norm2\.(?P<kind>gamma)", r"residual.3.\g<kind>"),
    (r"conv2\.(?P<kind>weight|bias)", r"residual.6.\g<kind>"),
)
_RESNET = (*_RESIDUAL, (r"conv_shortcut\.(?P<kind>weight|bias)", r"shortcut.\g<kind>"))  # where the width may change


def _upsample(tail: str, match: re.Match[str], keys: Collection[str]) -> str:
    """Diffusers groups the decoder's layers into up blocks (resnets, then an upsampler); here they are flat."""
    resnets = next(n for n in count() if f"decoder.up_blocks.0.resnets.{n}.conv1.weight" not in keys)
    layer = int(match["block"]) * (resnets + 1) + int(match.groupdict().get("resnet", resnets))
    return f"decoder.upsamples.{layer}.{match.expand(tail)}"


_VAE_DIFFUSERS = Layout(
    "diffusers",
    "vae",
    anchors=("encoder.down_blocks.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight", "quant_conv.weight"),
    rules=(
        Rule(rf"((?:en|de)coder)\.conv_in\.{_END}", r"\1.conv1.\2"),
        Rule(r"((?:en|de)coder)\.norm_out\.gamma", r"\1.head.0.gamma"),
        Rule(rf"((?:en|de)coder)\.conv_out\.{_END}", r"\1.head.2.\2"),
        Rule(rf"quant_conv\.{_END}", r"conv1.\1"),
        Rule(rf"post_quant_conv\.{_END}", r"conv2.\1"),
        Rule(r"((?:en|de)coder)\.mid_block\.attentions\.0\.norm\.gamma", r"\1.middle.1.norm.gamma"),
        Rule(rf"((?:en|de)coder)\.mid_block\.attentions\.0\.(to_qkv|proj)\.{_END}", r"\1.middle.1.\2.\3"),
        *(Rule(rf"((?:en|de)coder)\.mid_block\.resnets\.0\.{k}", rf"\1.middle.0.{v}") for k, v in _RESIDUAL),
        *(Rule(rf"((?:en|de)coder)\.mid_block\.resnets\.1\.{k}", rf"\1.middle.2.{v}") for k, v in _RESIDUAL),
        *(Rule(rf"encoder\.down_blocks\.(\d+)\.{k}", rf"encoder.downsamples.\1.{v}") for k, v in _RESNET),
        Rule(rf"encoder\.down_blocks\.(\d+)\.(resample\.1|time_conv)\.{_END}", r"encoder.downsamples.\1.\2.\3"),
        *(
            Rule(rf"decoder\.up_blocks\.(?P<block>\d+)\.resnets\.(?P<resnet>\d+)\.{k}", partial(_upsample, v))
            for k, v in _RESNET
        ),
        Rule(
            rf"decoder\.up_blocks\.(?P<block>\d+)\.upsamplers\.0\.(?P<layer>resample\.1|time_conv)\.(?P<kind>{_END})",
            partial(_upsample, r"\g<layer>.\g<kind>"),
        ),
    ),
)

_IMAGE_OFFICIAL = Layout(
    "official",
    "image_encoder",
    anchors=("cls_embedding", "pos_embedding", "transformer.0.attn.to_qkv.weight"),
    prefix=r"visual\.",
    ignored=(
        Ignored(r"textual\..+", "the text tower; Wan reads the image alone"),
        Ignored(r"log_scale", "the contrastive loss's temperature"),
        Ignored(rf"head|post_norm\.{_END}", "after the last block; Wan takes the features before it"),
    ),
    rules=(
        Rule(r"patch_embedding\.weight"),
        Rule(r"(?:cls|pos)_embedding"),
        Rule(rf"pre_norm\.{_END}"),
        Rule(rf"transformer\.\d+\.norm[12]\.{_END}"),
        Rule(rf"transformer\.\d+\.attn\.(?:to_qkv|proj)\.{_END}"),
        Rule(rf"transformer\.\d+\.mlp\.[02]\.{_END}"),
    ),
)

_IMAGE_HUGGINGFACE = Layout(
    "huggingface",
    "image_encoder",
    anchors=("embeddings.class_embedding", "embeddings.patch_embedding.weight", "encoder.layers.0.mlp.fc1.weight"),
    prefix=r"vision_model\.",
    ignored=(
        Ignored(r"embeddings\.position_ids", "0, 1, 2, … kept by old versions of transformers"),
        Ignored(
            rf"visual_projection\.weight|post_layernorm\.{_END}", "after the last block; Wan takes what is before it"
        ),
    ),
    rules=(
        Rule(r"embeddings\.patch_embedding\.weight", r"patch_embedding.weight"),
        Rule(r"embeddings\.class_embedding", r"cls_embedding"),
        Rule(r"embeddings\.position_embedding\.weight", r"pos_embedding"),
        Rule(rf"pre_layrnorm\.{_END}", r"pre_norm.\1"),
        Rule(rf"encoder\.layers\.(\d+)\.layer_norm([12])\.{_END}", r"transformer.\1.norm\2.\3"),
        Rule(
            r"encoder\.layers\.(\d+)\.self_attn\.(?P<part>[qkv])_proj\.(weight|bias)",
            r"transformer.\1.attn.to_qkv.\3",
            parts=("q", "k", "v"),
        ),
        Rule(rf"encoder\.layers\.(\d+)\.self_attn\.out_proj\.{_END}", r"transformer.\1.attn.proj.\2"),
        Rule(rf"encoder\.layers\.(\d+)\.mlp\.fc1\.{_END}", r"transformer.\1.mlp.0.\2"),
        Rule(rf"encoder\.layers\.(\d+)\.mlp\.fc2\.{_END}", r"transformer.\1.mlp.2.\2"),
    ),
)

LAYOUTS = (
    _TRANSFORMER_OFFICIAL,
    _TRANSFORMER_DIFFUSERS,
    _TEXT_OFFICIAL,
    _TEXT_HUGGINGFACE,
    _TEXT_GGUF,
    _VAE_OFFICIAL,
    _VAE_DIFFUSERS,
    _IMAGE_OFFICIAL,
    _IMAGE_HUGGINGFACE,
)
