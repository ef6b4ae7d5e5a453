"""Write an official-layout folder of a released model's true sizes, with random weights. Needs torch.

    python benchmarks/random_checkpoint.py OUT [--preset t2v-1.3B] [--bfloat16] [--small-text]

The files have the names, formats and shapes that Wan-AI publishes: a transformer as safetensors, in float32 or as
S2V's and Animate's in bfloat16, umT5-XXL in bfloat16, the VAE in float32 and CLIP's vision tower in float16 as .pth,
wav2vec in a folder of its own. The pictures they make are noise; their time and memory are real. A small text encoder
has two layers and few words.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from pathlib import Path
from typing import Any

from wan_mlx.hub.names import WAV2VEC
from wan_mlx.models.configs import AudioEncoderConfig, ImageEncoderConfig, TextEncoderConfig, TransformerConfig
from wan_mlx.presets import Preset, find_preset
from wan_mlx.weights.component import KERNELS, is_convolution
from wan_mlx.weights.configs import shapes_of

import sentencepiece
import torch
from safetensors.torch import save_file

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORDS = "two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage"


def published(config: Any) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in the published file of a network of these sizes."""
    is_clip = isinstance(config, ImageEncoderConfig)
    kernels = {"patch_embedding.weight": (config.patch_size,) * 2} if is_clip else KERNELS
    return {published_name(name): published_shape(name, shape, kernels) for name, shape in shapes_of(config).items()}


def published_name(name: str) -> str:
    """Our name → the published file's: only S2V's injectors have others."""
    name = re.sub(r"^audio_injectors\.(\d+)\.adain\.", r"audio_injector.injector_adain_layers.\1.linear.", name)
    return re.sub(r"^audio_injectors\.", "audio_injector.injector.", name)


def published_shape(name: str, shape: tuple[int, ...], kernels: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Our channels-last shape → the shape in the published file; ``kernels``: of patches, by the ends of names."""
    for ending, kernel in kernels.items():
        if name.endswith(ending):
            return (shape[0], shape[1] // math.prod(kernel), *kernel)
    if name.endswith(".gamma"):
        return (*shape, 1, 1, 1)
    return (shape[0], shape[-1], *shape[1:-1]) if is_convolution(name, shape) else shape


def random_state(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Values that keep activations near one: N(0, 1/fan_in) matrices, scales near 1, small biases."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator, device=DEVICE)
        if name.endswith(("norm_q.weight", "norm_k.weight", "gamma")) or len([n for n in shape if n > 1]) < 2:
            x = 0.1 * x + (0.0 if name.endswith("bias") else 1.0)
        else:
            x *= math.prod(shape[1:]) ** -0.5
        state[name] = x.to(dtype).cpu()
    return state


def small_tokenizer() -> bytes:
    """A sentencepiece model of a few words: its ids are valid in the large vocabulary."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 9), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write(
    folder: Path, preset: Preset, text: TextEncoderConfig | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write the whole folder, the transformer in ``dtype``."""
    text = text or preset.text_encoder
    (folder / "google/umt5-xxl").mkdir(parents=True)
    (folder / "google/umt5-xxl/spiece.model").write_bytes(small_tokenizer())
    c, clip = preset.transformer, ImageEncoderConfig()
    torch.save(random_state(published(text), torch.bfloat16), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(random_state(published(preset.vae), torch.float32), folder / "Wan2.1_VAE.pth")
    if c.has_image_branch:
        tower = random_state({f"visual.{name}": shape for name, shape in published(clip).items()}, torch.float16)
        torch.save(tower, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    if c.hears:
        write_wav2vec(folder / WAV2VEC, AudioEncoderConfig())
    save_file(random_state(published(c), dtype), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(described(c)))


def write_wav2vec(folder: Path, config: AudioEncoderConfig) -> None:
    """As transformers saves it."""
    folder.mkdir()
    shapes = {f"wav2vec2.{name}": shape for name, shape in published(config).items()}
    save_file(random_state(shapes, torch.float32), folder / "model.safetensors")
    sizes = {"num_attention_heads": config.num_heads, "conv_stride": config.conv_stride, "layer_norm_eps": config.eps}
    (folder / "config.json").write_text(json.dumps({"model_type": "wav2vec2", **sizes}))


def described(c: TransformerConfig) -> dict[str, Any]:
    """The transformer's config.json."""
    kind = {"s2v": "WanModel_S2V", "animate": "WanAnimateModel"}.get(c.model_type, "WanModel")
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim", "model_type", "text_dim",
             "text_len", "eps", *["audio_inject_layers"] * c.hears)  # fmt: skip
    return {"_class_name": kind, **{name: getattr(c, name) for name in names}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="t2v-1.3B")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--small-text", action="store_true")
    args = parser.parse_args()
    small = TextEncoderConfig(vocab_size=1000, num_layers=2) if args.small_text else None
    write(args.out, find_preset(args.preset), small, torch.bfloat16 if args.bfloat16 else torch.float32)
    for path in sorted(p for p in args.out.rglob("*") if p.is_file()):
        print(f"{path.stat().st_size / 1e9:8.2f} GB  {path.relative_to(args.out)}")
