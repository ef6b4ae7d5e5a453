"""One preset per released Wan model: where it is published, its sizes, how it wants to be sampled.

Constants follow the official repository's ``wan/configs`` and the defaults of its ``generate.py``.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import nearest
from .geometry import Geometry
from .models.configs import (
    AUDIO_INJECT_LAYERS,
    TextEncoderConfig,
    TransformerConfig,
    VAE22Config,
    VAEConfig,
    geometry_of,
)

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
# Tasks for people.
TASK_NAMES = dict(t2v="text to video", i2v="image to video", flf2v="first and last frame", vace="editing (VACE)",
                  ti2v="text, image to video", inp="both ends (Fun)",
                  control="control video (Fun)",
                  s2v="speech to video", animate="animation (Animate)")  # fmt: skip
# Models that come with the package: name → folder.
BUNDLED = {name: Path(__file__).parent / "assets" / name for name in ("nano", "nano-i2v")}
# A LoRA beside a bundled model's weights, with which it is sampled by its preset's recipe.
FOUR_STEPS = "four_steps.safetensors"
# S2V's own.
NEGATIVE_SPEECH = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，"
    "畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
CAMERA_SHAKE = "镜头晃动，"
SCENE_CUT = "镜头切换，"


@dataclass(frozen=True)
class Sampling:
    """Sampling defaults of a model at one resolution class.

    ``guidance_scale``: one, or the low-noise and the high-noise expert's, in the official order.
    """

    steps: int = 50
    shift: float = 5.0
    guidance_scale: float | tuple[float, float] = 5.0


@dataclass(frozen=True)
class Preset:
    """One released model: where it is published, its sizes, and how it wants to be sampled.

    ``parameters``: of the transformer, or of each of two. ``repo`` is empty for the models that come with the package.
    ``sampling`` is the default; ``sampling_480p`` replaces it when the area is at most 832x480. ``diffusers`` is the
    same model's repository in Diffusers' layout, ``comfyui`` its transformer's file, of two experts the high-noise
    one's (a mere name is one in `COMFYUI_TRANSFORMERS`), ``gguf`` the repository of its GGUF quantisations; "" where
    none is known. ``vocabulary``: of a model that knows few words, these, in English and in Chinese; ``learned``: of
    one that knows few sizes, these. ``boundary``: of a model of two experts, the share of the 1000 timesteps from which
    on, itself included, the high-noise one serves.
    ``recipe``: the one by which it is sampled, with the LoRA `FOUR_STEPS`, unless something is said of how to sample;
    ``recipe_steps``: its number of steps.
    ``itemsize``: bytes of a value of its transformer, as published.
    ``prompt``: the one that it was trained with, where an empty one is given.
    ``cinematic``: trained on captions in a film crew's words, which can also be written out of its first frame alone.
    """

    name: str
    task: str
    repo: str
    transformer: TransformerConfig
    parameters: int
    size: tuple[int, int] = (832, 480)
    num_frames: int = 81
    fps: int = 16
    sampling: Sampling = Sampling()
    sampling_480p: Sampling | None = None
    negative_prompt: str = NEGATIVE_PROMPT
    text_encoder: TextEncoderConfig = field(default=TextEncoderConfig())
    vae: VAEConfig = field(default=VAEConfig())
    diffusers: str = ""
    comfyui: str = ""
    gguf: str = ""
    vocabulary: tuple[str, ...] = ()
    learned: tuple[tuple[int, int], ...] = ()
    boundary: float | None = None
    recipe: str = ""
    recipe_steps: int = 0
    cinematic: bool = False
    itemsize: int = 4
    prompt: str = ""

    @property
    def experts(self) -> int:
        """The number of its transformers."""
        return 1 if self.boundary is None else 2

    @property
    def comfyui_file(self) -> str:
        """ComfyUI's file of its transformer, as ``--model`` takes it."""
        return self.comfyui if ":" in self.comfyui else f"{COMFYUI_TRANSFORMERS}/{self.comfyui}"

    @property
    def geometry(self) -> Geometry:
        """The sizes of the model's latents and tokens."""
        return geometry_of(self.transformer, self.vae)

    @property
    def repositories(self) -> tuple[str, ...]:
        """Where it is published, in any layout; none if it comes with the package."""
        return tuple(name for name in (self.repo, self.diffusers, self.gguf) if name)

    def usual_steps(self, width: int, height: int) -> int:
        """The steps of a video of this size, of which nothing is said of how to sample."""
        return self.recipe_steps or self.sampling_for(width, height).steps

    def sampling_for(self, width: int, height: int) -> Sampling:
        """Defaults for an output of ``width`` x ``height`` pixels."""
        if self.sampling_480p is not None and width * height <= 832 * 480:
            return self.sampling_480p
        return self.sampling


_T2V_1_3B = TransformerConfig()
_T2V_14B = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_I2V_14B = replace(_T2V_14B, model_type="i2v", in_dim=36)
_I2V_A14B = replace(_I2V_14B, image_dim=None)
_VACE_14B = replace(_T2V_14B, model_type="vace", vace_layers=tuple(range(0, 40, 5)))
_S2V_14B = replace(_T2V_14B, model_type="s2v", audio_inject_layers=AUDIO_INJECT_LAYERS)
_NANO = TransformerConfig(dim=256, ffn_dim=640, num_heads=2, num_layers=6, text_dim=128)
_TI2V_5B = TransformerConfig("ti2v", 3072, 14336, 24, 30, in_dim=48, out_dim=48)
_720P = (1280, 720)
# What nano was trained on (examples/nano/world.py), in English and in Chinese.
NANO_WORDS = (
    "circle, square, triangle, star, heart, ring or digit 0 to 9; red, green, blue, yellow, orange, purple, pink or "
    "cyan; moves right, left, up, down or diagonally up and left, bounces, grows, shrinks, spins or stays still; on a "
    "black, white, grey, blue, brown, dark green, purple or yellow background",
    "圆形、正方形、三角形、星星、心形、圆环、数字；红色、绿色、蓝色、黄色、橙色、紫色、粉色、青色；向右、左、上、下、左上等移动，弹跳、变大、"
    "变小、旋转、静止不动；黑色、白色、灰色、蓝色、棕色、深绿色、紫色、黄色背景",
)
# Defaults that several models share.
_OF_NANO: dict[str, Any] = dict(
    size=(128, 128), num_frames=17, sampling=Sampling(steps=12, shift=3.0, guidance_scale=3.0), negative_prompt="",
    vocabulary=NANO_WORDS, learned=((128, 128), (160, 96), (96, 160)),
)
_OF_I2V: dict[str, Any] = dict(
    sampling=Sampling(steps=40), sampling_480p=Sampling(steps=40, shift=3.0),
    negative_prompt=CAMERA_SHAKE + NEGATIVE_PROMPT,
)  # fmt: skip
_OF_VACE: dict[str, Any] = dict(sampling=Sampling(shift=16.0))
_OF_FUN: dict[str, Any] = dict(sampling=Sampling(guidance_scale=6.0), cinematic=True)
_OF_FUN_5B: dict[str, Any] = dict(size=(1280, 704), num_frames=121, fps=24, vae=VAE22Config(), **_OF_FUN)

# ComfyUI's single files, as names that ``--model`` takes: of each model a transformer, and these for all models.
_COMFYUI = "Comfy-Org/Wan_2.1_ComfyUI_repackaged:split_files"
COMFYUI_TRANSFORMERS = f"{_COMFYUI}/diffusion_models"
_COMFYUI_22 = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged:split_files"
COMFYUI_PARTS = {
    "text_encoder": f"{_COMFYUI}/text_encoders/umt5_xxl_fp16.safetensors",
    "vae": f"{_COMFYUI}/vae/wan_2.1_vae.safetensors",
    "image_encoder": f"{_COMFYUI}/clip_vision/clip_vision_h.safetensors",
    "audio_encoder": f"{_COMFYUI_22}/audio_encoders/wav2vec2_large_english_fp16.safetensors",
    "tokenizer": "Wan-AI/Wan2.1-T2V-1.3B:google/umt5-xxl/spiece.model",
}
COMFYUI_VAE_22 = f"{_COMFYUI_22}/vae/wan2.2_vae.safetensors"  # TI2V-5B's

# A model's parts, as flags and files name them.
NETWORKS = ("transformer", "text_encoder", "vae", "image_encoder", "audio_encoder")
PARTS = (*NETWORKS, "tokenizer")
OPTIONAL = ("image_encoder", "audio_encoder")  # which only models have that see, or hear
EXPERTS = ("high_noise", "low_noise")  # the transformers of a model that has two
RELIGHTING = "relighting_lora.ckpt"  # Animate's LoRA, beside its weights
MODULE = "vace_module"  # VACE's part of a transformer, in a file of its own
GIVEN_APART = (*PARTS, *EXPERTS, MODULE)

_RELEASED = (
    Preset("nano", "t2v", "", _NANO, 5_806_656, recipe="nano-4step", recipe_steps=4, **_OF_NANO),
    Preset(
        "nano-i2v", "i2v", "", replace(_NANO, model_type="i2v", num_layers=6, in_dim=36, image_dim=80), 6_646_064,
        **_OF_NANO,
    ),
    Preset(
        "t2v-1.3B", "t2v", "Wan-AI/Wan2.1-T2V-1.3B", _T2V_1_3B, 1_418_996_800,
        diffusers="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", comfyui="wan2.1_t2v_1.3B_fp16.safetensors",
        gguf="samuelchristlie/Wan2.1-T2V-1.3B-GGUF",
    ),
    Preset(
        "t2v-14B", "t2v", "Wan-AI/Wan2.1-T2V-14B", _T2V_14B, 14_288_491_584, _720P,
        diffusers="Wan-AI/Wan2.1-T2V-14B-Diffusers", comfyui="wan2.1_t2v_14B_fp16.safetensors",
        gguf="city96/Wan2.1-T2V-14B-gguf",
    ),
    Preset(
        "i2v-14B-480P", "i2v", "Wan-AI/Wan2.1-I2V-14B-480P", _I2V_14B, 16_394_878_784, **_OF_I2V,
        diffusers="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", comfyui="wan2.1_i2v_480p_14B_fp16.safetensors",
        gguf="city96/Wan2.1-I2V-14B-480P-gguf",
    ),
    Preset(
        "i2v-14B-720P", "i2v", "Wan-AI/Wan2.1-I2V-14B-720P", _I2V_14B, 16_394_878_784, _720P, **_OF_I2V,
        diffusers="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", comfyui="wan2.1_i2v_720p_14B_fp16.safetensors",
        gguf="city96/Wan2.1-I2V-14B-720P-gguf",
    ),
    Preset(
        "flf2v-14B-720P", "flf2v", "Wan-AI/Wan2.1-FLF2V-14B-720P", replace(_I2V_14B, model_type="flf2v"),
        16_395_536_704, _720P, sampling=Sampling(shift=16.0),
        negative_prompt=SCENE_CUT + CAMERA_SHAKE + NEGATIVE_PROMPT,
        diffusers="Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", comfyui="wan2.1_flf2v_720p_14B_fp16.safetensors",
        gguf="city96/Wan2.1-FLF2V-14B-720P-gguf",
    ),
    Preset(
        "vace-1.3B", "vace", "Wan-AI/Wan2.1-VACE-1.3B",
        replace(_T2V_1_3B, model_type="vace", vace_layers=tuple(range(0, 30, 2))), 2_153_972_032, **_OF_VACE,
        diffusers="Wan-AI/Wan2.1-VACE-1.3B-diffusers", comfyui="wan2.1_vace_1.3B_fp16.safetensors",
    ),
    Preset(
        "vace-14B", "vace", "Wan-AI/Wan2.1-VACE-14B",
        _VACE_14B, 17_337_592_896, _720P, **_OF_VACE,
        diffusers="Wan-AI/Wan2.1-VACE-14B-diffusers", comfyui="wan2.1_vace_14B_fp16.safetensors",
        gguf="QuantStack/Wan2.1_14B_VACE-GGUF",
    ),
    Preset(
        "t2v-A14B", "t2v", "Wan-AI/Wan2.2-T2V-A14B", _T2V_14B, 14_288_491_584, _720P,
        sampling=Sampling(steps=40, shift=12.0, guidance_scale=(3.0, 4.0)), boundary=0.875, cinematic=True,
        diffusers="Wan-AI/Wan2.2-T2V-A14B-Diffusers", gguf="QuantStack/Wan2.2-T2V-A14B-GGUF",
        comfyui=f"{_COMFYUI_22}/diffusion_models/wan2.2_t2v_high_noise_14B_fp16.safetensors",
    ),
    Preset(
        "i2v-A14B", "i2v", "Wan-AI/Wan2.2-I2V-A14B", _I2V_A14B, 14_288_901_184, _720P,
        sampling=Sampling(steps=40, shift=5.0, guidance_scale=3.5), boundary=0.9, cinematic=True,
        diffusers="Wan-AI/Wan2.2-I2V-A14B-Diffusers", gguf="QuantStack/Wan2.2-I2V-A14B-GGUF",
        comfyui=f"{_COMFYUI_22}/diffusion_models/wan2.2_i2v_high_noise_14B_fp16.safetensors",
    ),
    Preset(
        "ti2v-5B", "ti2v", "Wan-AI/Wan2.2-TI2V-5B", _TI2V_5B, 4_999_787_712, (1280, 704), 121, 24, vae=VAE22Config(),
        cinematic=True,
        diffusers="Wan-AI/Wan2.2-TI2V-5B-Diffusers", gguf="QuantStack/Wan2.2-TI2V-5B-GGUF",
        comfyui=f"{_COMFYUI_22}/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors",
    ),
    Preset(
        "s2v-14B", "s2v", "Wan-AI/Wan2.2-S2V-14B", _S2V_14B, 16_295_755_609, _720P, num_frames=77,
        sampling=Sampling(steps=40, shift=3.0, guidance_scale=4.5), negative_prompt=NEGATIVE_SPEECH,
        gguf="QuantStack/Wan2.2-S2V-14B-GGUF", itemsize=2,
        comfyui=f"{_COMFYUI_22}/diffusion_models/wan2.2_s2v_14B_bf16.safetensors",
    ),
    Preset(
        "animate-14B", "animate", "Wan-AI/Wan2.2-Animate-14B",
        replace(_I2V_14B, model_type="animate", face_layers=tuple(range(0, 40, 5))), 17_274_816_884, _720P, 77, 30,
        sampling=Sampling(steps=20, guidance_scale=1.0), prompt="视频中的人在做动作",
        diffusers="Wan-AI/Wan2.2-Animate-14B-Diffusers", gguf="QuantStack/Wan2.2-Animate-14B-GGUF",
        comfyui=f"{_COMFYUI_22}/diffusion_models/wan2.2_animate_14B_bf16.safetensors",
    ),
    # Alibaba PAI's, made from Wan2.2; constants follow the configurations and examples of its repository VideoX-Fun.
    Preset(
        "vace-fun-A14B", "vace", "alibaba-pai/Wan2.2-VACE-Fun-A14B", _VACE_14B, 17_337_592_896,
        sampling=Sampling(shift=12.0), boundary=0.875, cinematic=True,
        diffusers="linoyts/Wan2.2-VACE-Fun-14B-diffusers", gguf="QuantStack/Wan2.2-VACE-Fun-A14B-GGUF",
        comfyui=f"{_COMFYUI_22}/diffusion_models/wan2.2_fun_vace_high_noise_14B_bf16.safetensors",
    ),
    Preset(
        "fun-A14B-InP", "inp", "alibaba-pai/Wan2.2-Fun-A14B-InP", _I2V_A14B, 14_288_901_184, boundary=0.9, **_OF_FUN,
        gguf="QuantStack/Wan2.2-Fun-A14B-InP-GGUF",
        comfyui=f"{_COMFYUI_22}/diffusion_models/wan2.2_fun_inpaint_high_noise_14B_bf16.safetensors",
    ),
    Preset(
        "fun-A14B-Control", "control", "alibaba-pai/Wan2.2-Fun-A14B-Control",
        replace(_T2V_14B, model_type="control", in_dim=52, ref_dim=16), 14_289_561_664, boundary=0.9, **_OF_FUN,
        gguf="QuantStack/Wan2.2-Fun-A14B-Control-GGUF",
        comfyui=f"{_COMFYUI_22}/diffusion_models/wan2.2_fun_control_high_noise_14B_bf16.safetensors",
    ),
    Preset(
        "fun-5B-InP", "inp", "alibaba-pai/Wan2.2-Fun-5B-InP",
        replace(_TI2V_5B, model_type="i2v", in_dim=100, image_dim=None), 5_000_426_688, **_OF_FUN_5B,
        gguf="QuantStack/Wan2.2-Fun-5B-InP-GGUF",
        comfyui=f"{_COMFYUI_22}/diffusion_models/wan2.2_fun_inpaint_5B_bf16.safetensors",
    ),
    Preset(
        "fun-5B-Control", "control", "alibaba-pai/Wan2.2-Fun-5B-Control",
        replace(_TI2V_5B, model_type="control", in_dim=148, ref_dim=48), 5_001_609_408, **_OF_FUN_5B,
        gguf="QuantStack/Wan2.2-Fun-5B-Control-GGUF",
        comfyui=f"{_COMFYUI_22}/diffusion_models/wan2.2_fun_control_5B_bf16.safetensors",
    ),
)  # fmt: skip
PRESETS = {preset.name: preset for preset in _RELEASED}


def find_preset(name: str) -> Preset:
    """A preset by its name, or by the name that the official ``--task`` gives it.

    Raises:
        ValueError: unknown name.
    """
    official = {"i2v-14B": "i2v-14B-720P", "flf2v-14B": "flf2v-14B-720P", "t2i-14B": "t2v-14B"}
    name = official.get(name, name)
    if name not in PRESETS:
        known = [*PRESETS, *official]
        raise ValueError(f"unknown model or task {name!r}; known: {', '.join(known)}{nearest(name, known)}")
    return PRESETS[name]


def of_same_shapes(preset: Preset) -> list[Preset]:
    """The other released models whose weights have the very shapes of this one's, so that a file cannot tell."""
    of_kind = preset.transformer, preset.experts
    return [p for p in PRESETS.values() if (p.transformer, p.experts) == of_kind and p is not preset]


def preset_for(config: TransformerConfig, experts: int = 1) -> Preset:
    """The published model of the same kind, with as many transformers, whose width is nearest; of several, the first in
    `PRESETS`."""
    same = [p for p in PRESETS.values() if p.repo and p.transformer.kind == config.kind]
    same = same or [p for p in PRESETS.values() if p.repo and p.transformer.model_type == config.model_type]
    same = [p for p in same if p.experts == experts] or same
    return min(same, key=lambda preset: abs(preset.transformer.dim - config.dim))


def model_for(tasks: Collection[str], like: Preset) -> Preset:
    """The released model for one of ``tasks`` that is most like another: bundled as it is, and of about its size."""

    def difference(preset: Preset) -> tuple[bool, float, bool, bool]:
        ratio, others = math.log(preset.parameters / like.parameters), preset.experts != like.experts
        return bool(preset.repo) != bool(like.repo), round(abs(ratio)), others, preset.size != like.size

    return min((preset for preset in PRESETS.values() if preset.task in tasks), key=difference)
