"""Models that are known and not supported, as data: the marks by which their files and folders show themselves.

A file is known by its header alone: by keys, or, where a transformer has Wan's keys, by its sizes. So a model that
cannot run is named before anything large is read or fetched. Each row says where its marks were read; a row is dropped
when its model is supported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UnsupportedModel

# Kind of file → the advice in its refusal.
ADVICE = {
    "transformer": "supported are Wan2.1's T2V, I2V, FLF2V and VACE models, Wan2.2's T2V-A14B, I2V-A14B, TI2V-5B, "
    "S2V-14B and Animate-14B, and the VACE-Fun, Fun-InP and Fun-Control made from them",
    "addition": "of additions to a model only LoRAs are supported",
    "text_encoder": "Wan's is umT5-XXL, such as umt5_xxl_fp16.safetensors",
    "vae": "take Wan2.1's, wan_2.1_vae.safetensors, or for TI2V-5B Wan2.2's, wan2.2_vae.safetensors",
    "image_encoder": "Wan2.1's is CLIP ViT-H/14, such as clip_vision_h.safetensors",
}
# Where marks were read.
SOURCES = {
    "official": "Wan2.2 42bf4cf",
    "comfy": "ComfyUI 0b61ce5, `comfy/model_detection.py`",
    "kijai": "ComfyUI-WanVideoWrapper 3317577",
    "wan2gp": "Wan2GP 8681e9f, `models`",
    "diffsynth": "DiffSynth-Studio fed7b18",
    "diffusers": "Diffusers 0.42.1, the classes' own keys",
    "transformers": "transformers, the classes' own keys",
    "llama.cpp": "llama.cpp's names in gguf 0.19.0",
    "taehv": "madebyollin/taehv",
    "thedenk": "TheDenk/wan2.2-controlnet, the class WanControlnet",
}
# Prefixes of keys, by tool.
# In names of models made from Wan2.1: "fun", and what stands between it and the model's kind.
_FUN = r"(?<![a-z])(?<!2[._]2[-_])fun[-_](?:(?!5b)v?[\d.]+b?[-_])*"
_PREFIX = re.compile(r"(?:(?:model\.)?diffusion_model|model|transformer|net|vae|first_stage_model)\.")


@dataclass(frozen=True)
class OtherModel:
    """A model that is known and not supported.

    Attributes:
        name: for people.
        kind: of its file, a key of `ADVICE`.
        source: where the marks were read, keys of `SOURCES`.
        keys: for each naming scheme the keys that mark it, separated by spaces; one with "!" is absent.
        sizes: of a network with Wan's keys: field of its configuration → value.
        entries: entry of config.json or model_index.json → pattern of its value; each alone is a mark.
        lora: pattern found in the modules of a LoRA for it, their dots written as underscores.
        names: pattern found in the names of its repositories and files, for hints where nothing else tells.
    """

    name: str
    kind: str
    source: str
    keys: tuple[str, ...] = ()
    sizes: Mapping[str, Any] = field(default_factory=dict)
    entries: Mapping[str, str] = field(default_factory=dict)
    lora: str = ""
    names: str = ""

    def refusal(self, path: object) -> UnsupportedModel:
        """The error of a file or folder that is this model."""
        return UnsupportedModel(f"{path}: this is {self.name}, which is not supported; {ADVICE[self.kind]}")


def of_keys(keys: Iterable[str]) -> OtherModel | None:
    """The model that a file with these keys is of."""
    found = {*keys}
    found |= {key[match.end() :] for key in found if (match := _PREFIX.match(key))}

    def fits(scheme: str) -> bool:
        return all((mark.lstrip("!") in found) != mark.startswith("!") for mark in scheme.split())

    return _first(lambda other: any(map(fits, other.keys)))


def of_sizes(kind: str, sizes: Mapping[str, Any]) -> OtherModel | None:
    """The model that a network of a ``kind``, with Wan's keys and these sizes, is of."""
    return _first(lambda other: other.kind == kind and other.sizes and other.sizes.items() <= sizes.items())


def of_entries(config: Mapping[str, Any]) -> OtherModel | None:
    """The model that a config.json or model_index.json is of."""
    return _first(lambda other: any(re.fullmatch(of, str(config.get(name))) for name, of in other.entries.items()))


def of_lora(keys: Collection[str]) -> OtherModel | None:
    """The model that a LoRA with these keys, without prefixes, was made for."""
    text = "\n".join(keys).replace(".", "_")
    return _first(lambda other: other.lora and re.search(other.lora, text))


def of_name(name: str | Path, known: bool = False) -> OtherModel | None:
    """The model that the name of a repository or file speaks of.

    ``known``: its keys and shapes are those of a supported model, so that only one with the same can be meant.
    """
    def fits(other: OtherModel) -> bool:
        told = known and (other.keys or other.sizes)
        return bool(other.names) and not told and bool(re.search(other.names, str(name), re.IGNORECASE))

    return _first(fits)


def _first(fits: Callable[[OtherModel], Any]) -> OtherModel | None:
    return next(filter(fits, OTHER_MODELS), None)


# The first row that fits counts, so that special ones come first.
OTHER_MODELS = (
    # Wan2.2.
    OtherModel(
        "Wan2.2 Animate-2", "transformer", "diffusers",
        keys=("blocks.0.self_attn.to_q.weight text_embedding.0.weight",),
        entries={"_class_name": r"WanAnimate2\w*"},
        names=r"animate[-_]2(?!\d)",
    ),
    OtherModel(
        "Ovi, a model of video and sound made from Wan2.2 TI2V-5B", "transformer", "kijai, wan2gp",
        keys=("blocks.0.cross_attn.k_fusion.weight", "video_model.blocks.0.cross_attn.k_fusion.weight",
              "audio_model.patch_embedding.0.weight", "patch_embedding.0.weight head.modulation"),
        lora="_k_fusion",
    ),
    OtherModel(
        "a camera model of Fun (Control-Camera)", "transformer", "comfy, diffsynth",
        keys=("control_adapter.conv.weight",),
        lora="control_adapter_",
        names=r"(?<![a-z])fun[-_](?:v?[\d.]+b?[-_]|a14b[-_])*(?:control[-_])?camera",
    ),
    OtherModel(
        "Wan-Dancer", "transformer", "comfy",
        keys=("patch_embedding_global.weight head.modulation",),
    ),
    OtherModel(
        "a Fun-Control model of Wan2.1", "transformer", "comfy, diffsynth",
        keys=("ref_conv.weight img_emb.proj.1.weight head.modulation",),
        names=_FUN + "control",
    ),
    OtherModel(
        "Lucy Edit, made from Wan2.2 TI2V-5B", "transformer", "wan2gp",
        sizes=dict(in_dim=96, out_dim=48),
        entries={"_class_name": r"Lucy\w*"},
    ),
    OtherModel(  # with other channels than TI2V-5B
        "a model made from Wan2.2 TI2V-5B", "transformer", "official", sizes=dict(out_dim=48)
    ),
    # Made from Wan2.1.
    OtherModel(
        "HuMo", "transformer", "comfy, kijai", keys=("audio_proj.audio_proj_glob_1.layer.weight",)
    ),
    OtherModel(
        "SCAIL", "transformer", "comfy, kijai, wan2gp",
        keys=("patch_embedding_pose.weight", "patch_embedding_mask.weight head.modulation",
              "mask_patch_embedding.weight"),
    ),
    OtherModel(
        "SteadyDancer", "transformer", "kijai, wan2gp", keys=("condition_embedding_align.cross_attn.in_proj_bias",)
    ),
    OtherModel("LongVie 2", "transformer", "kijai", keys=("blocks.0.control_blocks_dense.cross_attn.k.weight",)),
    OtherModel("One-to-All Animation", "transformer", "kijai", keys=("image_to_cond.conv_in.bias",)),
    OtherModel("BindWeave", "transformer", "kijai", keys=("text_projection.0.weight head.modulation",)),
    OtherModel("FlashVSR", "transformer", "kijai", keys=("LQ_proj_in.norm1.gamma",)),
    OtherModel("FlashPortrait", "transformer", "kijai", keys=("blocks.0.cross_attn.emo_k_proj.weight",)),
    OtherModel(
        "ReCamMaster, or another model with a camera encoder", "transformer", "kijai, wan2gp",
        keys=("blocks.0.cam_encoder.weight head.modulation",),
    ),
    OtherModel(
        "SkyReels V2 with diffusion forcing", "transformer", "kijai, diffusers",
        keys=("fps_embedding.weight patch_embedding.weight",),
        entries={"_class_name": r"SkyReelsV2DiffusionForcing\w*"},
        names=r"skyreels[-_.\w]*df",
    ),
    OtherModel(
        "SkyReels V3, whose lips follow sound", "transformer", "kijai",
        keys=("blocks.1.audio_cross_attn.kv_linear.weight audio_proj.proj1.weight patch_embedding.weight",),
    ),
    OtherModel("ShotPlan", "transformer", "wan2gp", keys=("hardcut_embedding",)),
    OtherModel(
        "MiniMax-Remover", "transformer", "kijai",
        keys=("head.modulation patch_embedding.weight time_embedding.0.weight !text_embedding.0.weight",),
    ),
    OtherModel(
        "LongCat-Video", "transformer", "kijai, wan2gp, diffsynth",
        keys=("x_embedder.proj.weight blocks.0.pre_crs_attn_norm.weight y_embedder.y_proj.0.weight",
              "blocks.0.ffn.w1.weight patch_embedding.weight"),
        entries={"_class_name": r"LongCatVideo\w*"},
    ),
    OtherModel(
        "ChronoEdit", "transformer", "diffusers", entries={"_class_name": r"ChronoEdit\w*"}, names="chrono[-_]?edit"
    ),
    OtherModel(
        "a control model of Fun (Fun-Control)", "transformer", "diffsynth",
        sizes=dict(model_type="i2v", in_dim=48, out_dim=16),
    ),
    OtherModel(
        "a camera model of Fun (Control-Camera)", "transformer", "diffsynth",
        sizes=dict(model_type="i2v", in_dim=32, out_dim=16),
    ),
    # Parts that other tools add to a model.
    OtherModel(
        "the sound module of MultiTalk or InfiniteTalk", "addition", "kijai, wan2gp",
        keys=("blocks.0.audio_cross_attn.kv_linear.weight audio_proj.proj1.weight !patch_embedding.weight",),
        lora="audio_cross_attn",
    ),
    OtherModel(
        "FantasyPortrait", "addition", "kijai",
        keys=("ip_adapter.blocks.0.cross_attn.ip_adapter_single_stream_k_proj.weight",),
    ),
    OtherModel("FantasyTalking", "addition", "kijai", keys=("proj_model.proj.weight",)),
    OtherModel(
        "Lynx", "addition", "kijai",
        keys=("blocks.0.self_attn.ref_adapter.to_k_ref.weight", "blocks.0.cross_attn.ip_adapter.registers",
              "blocks.0.cross_attn.ip_adapter.to_v_ip.weight"),
    ),
    OtherModel(
        "a ControlNet for Wan", "addition", "thedenk",
        keys=("controlnet_blocks.0.weight control_encoder.0.0.weight",),
        entries={"_class_name": r"WanControl[Nn]et\w*"},
    ),
    OtherModel(
        "a ControlNet of an image model", "addition", "diffusers",
        keys=("controlnet_cond_embedding.conv_in.weight", "controlnet_x_embedder.weight"),
        entries={"_class_name": r"(?!Wan)\w*ControlNetModel"},
    ),
    OtherModel("Uni3C, a controlnet", "addition", "kijai", keys=("controlnet_patch_embedding.weight",)),
    OtherModel(
        "Stand-In", "addition", "kijai", keys=("blocks.0.self_attn.q_loras.down.weight",), lora="self_attn_q_loras"
    ),
    OtherModel("UniAnimate", "addition", "kijai", keys=("dwpose_embedding.0.weight",), lora="dwpose_embedding"),
    OtherModel(
        "TAEHV, which --taehv takes for previews and drafts", "vae", "taehv",
        keys=("encoder.0.weight decoder.1.weight decoder.3.conv.0.weight",),
    ),
    OtherModel(
        "RIFE, which --interpolate takes", "addition", "hzwer/Practical-RIFE",
        keys=("block0.conv0.0.0.weight encode.cnn0.weight", "block0.conv0.0.conv.weight encode.cnn0.weight",
              "module.block0.conv0.0.0.weight module.encode.cnn0.weight"),
    ),
    # Other families.
    OtherModel(
        "HunyuanVideo", "transformer", "comfy, diffusers",
        keys=("txt_in.individual_token_refiner.blocks.0.norm1.weight",
              "context_embedder.token_refiner.refiner_blocks.0.norm1.weight"),
        entries={"_class_name": r"HunyuanVideo\w*"},
        lora=r"token_refiner_|double_blocks_19_|single(?:_transformer)?_blocks_39_",
    ),
    OtherModel(
        "FLUX, or one of its kind such as Chroma", "transformer", "comfy, diffusers",
        keys=("double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_attn.norm.key_norm.weight",
              "single_transformer_blocks.0.proj_mlp.weight context_embedder.weight"),
        entries={"_class_name": r"(?:Flux|Chroma)\w*"},
        lora=r"(?:double|single)_blocks_\d+_|single_transformer_blocks_\d+_",
    ),
    OtherModel(
        "Stable Diffusion 3", "transformer", "comfy, diffusers",
        keys=("joint_blocks.0.context_block.attn.qkv.weight",
              "pos_embed.proj.weight context_embedder.weight transformer_blocks.0.norm1_context.linear.weight"),
        entries={"_class_name": r"(?:StableDiffusion3|SD3)\w*"},
        lora=r"joint_blocks_\d+_",
    ),
    OtherModel(
        "Stable Diffusion or SDXL", "transformer", "comfy, diffusers",
        keys=("input_blocks.0.0.weight", "conv_in.weight down_blocks.0.resnets.0.time_emb_proj.weight"),
        entries={"_class_name": r"StableDiffusion(?!3)\w*|UNet2DConditionModel"},
        lora=r"(?:down|up|input|output)_blocks_\d+_|mid(?:dle)?_block_",
    ),
    OtherModel(
        "LTX-Video", "transformer", "comfy, diffusers",
        keys=("patchify_proj.weight adaln_single.emb.timestep_embedder.linear_1.bias",
              "time_embed.emb.timestep_embedder.linear_1.weight caption_projection.linear_1.weight",
              "time_embed.emb.timestep_embedder.linear_1.weight audio_proj_in.weight"),
        entries={"_class_name": r"LTX\w*"},
        lora=r"transformer_blocks_\d+_attn2_to_",
    ),
    OtherModel(
        "CogVideoX", "transformer", "comfy, diffusers",
        keys=("patch_embed.text_proj.weight",),
        entries={"_class_name": r"CogVideoX\w*"},
        lora=r"transformer_blocks_\d+_attn1_to_",
    ),
    OtherModel("Mochi", "transformer", "comfy, diffusers",
               keys=("t5_yproj.weight", "pos_frequencies time_embed.caption_proj.weight"),
               entries={"_class_name": r"Mochi\w*"}),
    OtherModel(
        "Qwen-Image", "transformer", "comfy, diffusers",
        keys=("txt_norm.weight img_in.weight",),
        entries={"_class_name": r"QwenImage(?!VAE)\w*"},
        lora=r"transformer_blocks_\d+_(?:img|txt)_m(?:lp|od)",
    ),
    OtherModel(
        "Z-Image or Lumina", "transformer", "comfy, diffusers",
        keys=("noise_refiner.0.attention.k_norm.weight", "noise_refiner.0.attention.norm_k.weight"),
        entries={"_class_name": r"(?:ZImage|Lumina)\w*"},
        lora=r"(?:^|_)layers_\d+_(?:attention|feed_forward)_",
    ),
    OtherModel(
        "MiniMax H3", "transformer", "comfy", keys=("video_patch_proj.weight audio_patch_proj.weight",),
        entries={"_class_name": r"MiniMaxH3\w*"},
    ),
    # Other text encoders, VAEs and image encoders.
    OtherModel(
        "T5-XXL, the text encoder of FLUX and others", "text_encoder", "diffusers, llama.cpp",
        keys=("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
              " encoder.block.1.layer.0.SelfAttention.q.weight"
              " !encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
              "enc.blk.0.attn_rel_b.weight enc.blk.1.attn_q.weight !enc.blk.1.attn_rel_b.weight"),
    ),
    OtherModel(
        "CLIP's text encoder, of Stable Diffusion and FLUX", "text_encoder", "diffusers",
        keys=("text_model.embeddings.token_embedding.weight !vision_model.embeddings.class_embedding",
              "embeddings.token_embedding.weight embeddings.position_embedding.weight"),
    ),
    OtherModel(
        "a language model", "text_encoder", "transformers",
        keys=("layers.0.self_attn.q_proj.weight embed_tokens.weight",
              "language_model.model.layers.0.self_attn.q_proj.weight"),
    ),
    OtherModel(
        "the VAE of Stable Diffusion, FLUX or another image model", "vae", "diffusers",
        keys=("encoder.down.0.block.0.norm1.weight encoder.conv_in.weight",
              "encoder.down_blocks.0.resnets.0.norm1.weight encoder.conv_in.weight"),
    ),
    OtherModel(
        "the VAE of HunyuanVideo, LTX-Video or CogVideoX", "vae", "diffusers",
        keys=("encoder.conv_in.conv.weight encoder.mid_block.resnets.0.conv1.conv.weight",
              "encoder.conv_in.conv.weight decoder.conv_in.conv.weight"),
    ),
    OtherModel(
        "SigLIP", "image_encoder", "transformers",
        keys=("vision_model.embeddings.patch_embedding.bias", "embeddings.patch_embedding.bias head.probe"),
    ),
    OtherModel("CLIP ViT-L/14", "image_encoder", "transformers", sizes=dict(dim=1024)),
    # Models with the very keys and shapes of a supported one: only names tell.
    *(
        OtherModel(name, "transformer", source, names=pattern)
        for name, source, pattern in (
            ("Phantom", "wan2gp", r"phantom[-_]wan|wan[-_.\w]*[-_]phantom"),
            ("MoCha", "wan2gp", r"wan[-_.\w]*[-_]mocha(?![a-z])"),
            ("Wan-Move", "wan2gp", r"wan[-_]?move(?![a-z])"),
            ("ATI", "kijai", r"wan[-_.\w]*[-_]ati[-_]"),
            ("Krea Realtime", "diffsynth", r"krea[-_]realtime"),
            ("Bernini", "wan2gp", "bernini"),
            ("Fun-InP of Wan2.1", "diffsynth", _FUN + "inp(?![a-z])"),
        )
    ),
)  # fmt: skip
