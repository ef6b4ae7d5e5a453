"""What our options are called in ComfyUI and Diffusers, for errors and a table of docs/flags.md; and what else users of
Diffusers write in Python: taken where it means the same, or answered by the line to write instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from . import options
from .errors import nearest
from .option import MODEL, REQUEST, Option


class Word(NamedTuple):
    """An option of ours, and its names elsewhere, with commas between them and where they stand in parentheses.

    "=" before a name: it means the same, and a keyword of that name is taken.
    """

    ours: str
    comfyui: str
    diffusers: str


WORDS = (
    Word("--steps", "steps", "=num_inference_steps"),
    Word("--guidance", "cfg", "guidance_scale"),
    Word("--shift", "shift (ModelSamplingSD3)", "=flow_shift (scheduler)"),
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
    Word("--src_ref_images", "reference_image (WanVaceToVideo)", "=reference_images"),
    Word("--context-scale", "strength (WanVaceToVideo)", "=conditioning_scale"),
    Word("--model", "ckpt_name (CheckpointLoaderSimple)", "pretrained_model_name_or_path"),
    Word("--transformer", "unet_name (UNETLoader), unet", "transformer"),
    Word("--text-encoder", "clip_name (CLIPLoader), clip", "text_encoder"),
    Word("--image-encoder", "clip_vision (CLIPVisionLoader)", "image_encoder"),
    Word("--vae", "vae_name (VAELoader)", "vae"),
    Word("--lora", "lora_name, strength_model (LoraLoaderModelOnly)", "load_lora_weights, set_adapters"),
    Word("--dtype", "weight_dtype (UNETLoader)", "=torch_dtype"),
    Word("--quantize", "", "quantization_config"),
    Word("--memory", "lowvram, reserve_vram", "enable_model_cpu_offload"),
    Word("--vae-tiling", "tile_size (VAEDecodeTiled)", "enable_tiling (vae)"),
    Word("--cache", "easycache (EasyCache)", "enable_cache"),
    Word("--boundary", "", "=boundary_ratio"),
    Word("--slg", "skip_layers (SkipLayerGuidanceDiT)", "skip_layer_config"),
    Word("--cfg-zero", "CFGZeroStar", "zero_init_steps"),
    Word("--output", "filename_prefix (SaveVideo)", "export_to_video"),
    Word("--preview", "preview_method", "callback_on_step_end"),
)
# Keywords of Diffusers' that mean the same → ours.
SAME = {word: ours.strip("-").replace("-", "_") for ours, _, names in WORDS for word in re.findall(r"=(\w+)", names)}
# Others → what to write.
LEAVE_OUT = "leave it out"
SEVERAL = "give a list of prompts, such as [prompt] * 4, for a list of videos; without seed= each has its own"
KEYWORDS = {
    "generator": "write seed=42: the noise is that of torch.Generator('cpu').manual_seed(42)",
    "guidance_scale_2": "write guidance_scale=(low, high): in Diffusers guidance_scale is the high-noise expert's, and "
    "guidance_scale_2 the low-noise one's",
    "num_videos_per_prompt": SEVERAL,
    "num_videos": SEVERAL,
    "seeds": "seed= takes one; write [pipe(prompt, seed=seed) for seed in seeds], of one load in pipe.keep_loaded()",
    "output": "write pipe(prompt).save(\"cat.mp4\"): a call returns a Video",
    "num_images_per_prompt": "write pipe.images(prompt, num_images=4)",
    "output_type": f"{LEAVE_OUT}: video.frames is a numpy array (frames, height, width, 3); video.save writes a file",
    "return_dict": f"{LEAVE_OUT}: a call returns a Video",
    "callback_on_step_end": "write callback=, a function of one Step; if it returns False, sampling ends there",
    "callback_on_step_end_tensor_inputs": f"{LEAVE_OUT}: callback= gets a Step with latents and denoised",
    "latents": "write seed=; or pipe.run(request, resume=) with the state of a step",
    "prompt_embeds": "give the prompt: encoded texts are kept on disk, so that they are encoded once",
    "negative_prompt_embeds": "give negative_prompt=: encoded texts are kept on disk, so that they are encoded once",
    "max_sequence_length": f"{LEAVE_OUT}: Wan reads 512 tokens",
    "device_map": f"{LEAVE_OUT}: MLX computes on the GPU by itself; memory=\"8GB\" limits what it holds",
    "low_cpu_mem_usage": f"{LEAVE_OUT}: weights are read when they are needed",
    "cache_dir": "set HF_HOME in the environment",
    "token": "set HF_TOKEN in the environment, or run `hf auth login`",
    "revision": "write it behind the name: \"owner/name@revision\"",
    "variant": "name the file: \"owner/name:file.safetensors\"",
    "subfolder": "give the repository's name alone, or a file of it: \"owner/name:folder/file.safetensors\"",
    "local_files_only": "set HF_HUB_OFFLINE=1 in the environment",
}
# Attributes of Diffusers' pipelines → what to write.
LOADED = "networks are loaded when their stage comes, and dropped after it; wan_mlx.{} loads one alone"
OFFLOAD = "leave it out: each network is dropped when its stage is done; memory=\"8GB\" in from_pretrained sets a limit"
LORAS = "write pipe.set_loras(\"style.safetensors:0.8\"); pipe.set_loras() takes all away"
ATTENTION = "leave it out: attention is MLX's own, in pieces where the GPU asks for it"
TILING = "write vae_tiling=\"384x256\" in from_pretrained; left out, tiles are used where memory asks for it"
ATTRIBUTES = {
    "to": "leave it out: MLX computes on the GPU by itself; the numbers are those of dtype= in from_pretrained",
    "cuda": "leave it out: MLX computes on the GPU by itself",
    "enable_model_cpu_offload": OFFLOAD,
    "enable_sequential_cpu_offload": OFFLOAD,
    "enable_group_offload": OFFLOAD,
    "enable_attention_slicing": ATTENTION,
    "enable_xformers_memory_efficient_attention": ATTENTION,
    "enable_vae_tiling": TILING,
    "enable_vae_slicing": TILING,
    "load_lora_weights": LORAS,
    "set_adapters": LORAS,
    "fuse_lora": LORAS,
    "unfuse_lora": LORAS,
    "unload_lora_weights": LORAS,
    "delete_adapters": LORAS,
    "generate": "write pipe(prompt), which returns a Video",
    "from_single_file": "write WanPipeline.from_pretrained, which takes a file, too",
    "vae": f"{LOADED.format('load_vae')}; instead of vae.enable_tiling() {TILING}",
    "transformer": LOADED.format("load_transformer"),
    "text_encoder": LOADED.format("load_text_encoder"),
    "image_encoder": LOADED.format("load_image_encoder"),
    "scheduler": "write solver=\"unipc\", \"dpm++\" or \"euler\", and shift=, in the call",
    "save_pretrained": "write `wan-mlx convert SOURCE OUT` in a terminal",
    "set_progress_bar_config": "write progress=False in from_pretrained",
}
# Names of Diffusers' that are one of ours, and others → what to write.
SAME_NAMES = {
    "WanImageToVideoPipeline": "WanPipeline",
    "WanVideoToVideoPipeline": "WanPipeline",
    "WanVACEPipeline": "WanPipeline",
}
SCHEDULER = "write solver=\"unipc\", \"dpm++\" or \"euler\", and shift=, in the call of a pipeline"
NAMES = {
    "AutoencoderKLWan": "write vae=\"file.safetensors\" in WanPipeline.from_pretrained, or wan_mlx.load_vae",
    "WanTransformer3DModel": "write transformer=\"file.safetensors\" in WanPipeline.from_pretrained, or "
    "wan_mlx.load_transformer",
    "UMT5EncoderModel": "write text_encoder=\"file.safetensors\" in WanPipeline.from_pretrained, or "
    "wan_mlx.load_text_encoder",
    "DiffusionPipeline": "write wan_mlx.WanPipeline.from_pretrained",
    "UniPCMultistepScheduler": SCHEDULER,
    "FlowMatchEulerDiscreteScheduler": SCHEDULER,
    "load_image": "image= takes a path",
    "load_video": "video= and src_video= take a path",
    "load": "write wan_mlx.WanPipeline.from_pretrained",
    "from_pretrained": "write wan_mlx.WanPipeline.from_pretrained",
    "generate": "write pipe = wan_mlx.WanPipeline.from_pretrained(\"nano\"), and then pipe(prompt)",
    "stream_generate": "write pipe.stages(pipe.request(prompt))",
    "stream": "write pipe.stages(pipe.request(prompt))",
    "convert": "write `wan-mlx convert SOURCE OUT` in a terminal",
}


def ours(face: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords under our names: those of the command line's and of Diffusers' that mean the same are renamed.

    Args:
        face: `option.REQUEST` or `option.MODEL`.
        given: values by name; None, or the default, is as if it were left out.

    Raises:
        TypeError: a keyword has no meaning here, with what to write instead or the nearest; or one is given by two
            names.
        ValueError: a size or another text of the command line's cannot be read.
    """
    known = {option.name: option for option in options.of(face)}
    spelled = _spelled(face)
    found = {name: value for name, value in given.items() if name in known}
    for name, value in given.items():
        if name in known or value is None:
            continue
        if name in KEYWORDS:
            raise TypeError(f"{name} is not known here: {KEYWORDS[name]}")
        option = known.get(SAME.get(name, "")) or spelled.get(name)
        if option is None:
            theirs = [word for word, same in SAME.items() if same in known]
            near = _elsewhere(face, name) or suggestion(name, [*known, *spelled, *theirs])
            raise TypeError(f"a {face} has no option {name!r}{near}")
        for ours, own in _values(option, value):
            if found.get(ours) not in (None, known[ours].default):
                raise TypeError(f"{name} is {ours} by another name, and both are given; leave one out")
            found[ours] = own
    if found.get("dtype") is not None:
        found["dtype"] = str(found["dtype"]).rpartition(".")[2]  # torch.bfloat16, mlx.core.bfloat16
    return found


def of_faces(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords, under any of their names, of `from_pretrained` and of a call; unknown ones are of the call."""
    names = {option.name for option in options.of(MODEL)}
    names |= {*_spelled(MODEL), *(theirs for theirs, same in SAME.items() if same in names)}
    of_model = {name: value for name, value in given.items() if name in names}
    return of_model, {name: value for name, value in given.items() if name not in names}


def _elsewhere(face: str, name: str) -> str:
    """The end of an error about an option that belongs into the other call: of `from_pretrained`, or of a pipeline."""
    other, call = (MODEL, "WanPipeline.from_pretrained") if face == REQUEST else (REQUEST, "a pipeline's call")
    names = {own.name: own.name for own in options.of(other)}
    names |= {word: own.name for word, own in _spelled(other).items()}
    ours = next((names[word] for word in (name, _bare(meaning(name))) if word in names), "")
    return f"; {ours} is one of {call}" + f", or {LORAS}" * (ours == "loras") if ours else ""


def _bare(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _spelled(face: str) -> dict[str, Option]:
    """The command line's names of the keywords of ``face``, but for switches that turn something off."""
    of_face = [option for option in options.of(face) if not (option.is_switch and option.default is True)]
    return {key: option for option in of_face for key in option.keys if key.isidentifier()}


def _values(option: Option, value: Any) -> list[tuple[str, Any]]:
    """What a value of the command line's option sets: "832x480" both width and height."""
    if isinstance(value, str) and option.parse:
        value = option.parse(value)
    if not option.sets:
        return [(option.name, value)]
    if not isinstance(value, list | tuple) or len(value) != len(option.sets):
        raise ValueError(f"{option.label} is {value!r}, expected {' and '.join(option.sets)}")
    return list(zip(option.sets, value, strict=True))


def suggestion(given: str, known: Collection[str]) -> str:
    """The end of an error about an unknown name of an option: its name here, or the ``known`` one that is nearest."""
    flag = meaning(given)
    name = _bare(flag)
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
