"""What our options are called in ComfyUI and Diffusers: for errors, and for a table in docs/flags.md."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from .errors import nearest


class Word(NamedTuple):
    """An option of ours, and its names elsewhere, with commas between them and where they stand in parentheses."""

    ours: str
    comfyui: str
    diffusers: str


WORDS = (
    Word("--steps", "steps", "num_inference_steps"),
    Word("--guidance", "cfg", "guidance_scale"),
    Word("--shift", "shift (ModelSamplingSD3)", "flow_shift (scheduler)"),
    Word("--solver", "sampler_name, sampler", "scheduler"),
    Word("--strength", "denoise (KSampler)", "strength"),
    Word("--seed", "seed, noise_seed", "generator"),
    Word("--size", "width, height, resolution", "width, height"),
    Word("--frames", "length", "num_frames"),
    Word("--num-images", "batch_size", "num_images_per_prompt, num_videos_per_prompt"),
    Word("--negative-prompt", "negative", "negative_prompt"),
    Word("--image", "start_image (WanImageToVideo)", "image"),
    Word("--last-image", "end_image (WanFirstLastFrameToVideo)", "last_image"),
    Word("--src_video", "control_video (WanVaceToVideo)", "video (WanVACEPipeline)"),
    Word("--mask", "control_masks (WanVaceToVideo)", "mask (WanVACEPipeline)"),
    Word("--src_ref_images", "reference_image (WanVaceToVideo)", "reference_images"),
    Word("--context-scale", "strength (WanVaceToVideo)", "conditioning_scale"),
    Word("--model", "ckpt_name (CheckpointLoaderSimple)", "pretrained_model_name_or_path"),
    Word("--transformer", "unet_name (UNETLoader), unet", "transformer"),
    Word("--text-encoder", "clip_name (CLIPLoader), clip", "text_encoder"),
    Word("--image-encoder", "clip_vision (CLIPVisionLoader)", "image_encoder"),
    Word("--vae", "vae_name (VAELoader)", "vae"),
    Word("--lora", "lora_name, strength_model (LoraLoaderModelOnly)", "load_lora_weights, set_adapters"),
    Word("--dtype", "weight_dtype (UNETLoader)", "torch_dtype"),
    Word("--quantize", "", "quantization_config"),
    Word("--memory", "lowvram, reserve_vram", "enable_model_cpu_offload"),
    Word("--vae-tiling", "tile_size (VAEDecodeTiled)", "enable_tiling (vae)"),
    Word("--cache", "easycache (EasyCache)", "enable_cache"),
    Word("--boundary", "", "boundary_ratio"),
    Word("--slg", "skip_layers (SkipLayerGuidanceDiT)", "skip_layer_config"),
    Word("--cfg-zero", "CFGZeroStar", "zero_init_steps"),
    Word("--output", "filename_prefix (SaveVideo)", "export_to_video"),
    Word("--preview", "preview_method", "callback_on_step_end"),
)


def suggestion(given: str, known: Collection[str]) -> str:
    """The end of an error about an unknown name of an option: its name here, or the ``known`` one that is nearest."""
    flag = meaning(given)
    name = flag.lstrip("-").replace("-", "_")
    ours = flag if given.startswith("-") else name
    if ours in known:
        return f"; here that is {ours}"
    return "" if flag and name != given else nearest(given, known)  # what is spelled nearly so means something else


def meaning(given: str) -> str:
    """The flag that a word of another program stands for; "" for any other word."""
    return _meanings().get(given.strip("-").lower().replace("-", "_"), "")


def _meanings() -> dict[str, str]:
    """Word of another program → option of ours; of two for one word the first."""
    found: dict[str, str] = {}
    for ours, *others in WORDS:
        for word in re.findall(r"\w+", re.sub(r"\(.*?\)", "", " ".join(others))):
            found.setdefault(word.lower(), ours)
    return found
