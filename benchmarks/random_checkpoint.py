"""Write an official-layout folder of a released model's true sizes, with random weights. Needs torch.

    python benchmarks/random_checkpoint.py OUT [--preset t2v-1.3B] [--bfloat16] [--small-text]

The files have the names, formats and shapes that Wan-AI publishes: a transformer as safetensors, in float32 or as
Animate's in bfloat16, umT5-XXL in bfloat16, the VAE in float32 and CLIP's vision tower in float16 as .pth. The pictures
they make are noise; their time and memory are real. A small text encoder has two layers and few words.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from pathlib import Path

from wan_mlx.models.configs import ImageEncoderConfig, TextEncoderConfig
from wan_mlx.presets import Preset, find_preset
from wan_mlx.weights.configs import shapes_of

import sentencepiece
import torch
from safetensors.torch import save_file

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORDS = "two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage"


def published_shape(name: str, shape: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Our channels-last shape → the shape in the published file; ``patch``: of a patch embedding."""
    if name.endswith("patch_embedding.weight"):
        return (shape[0], shape[1] // math.prod(patch), *patch)
    if name.endswith(".gamma"):
        return (*shape, 1, 1, 1)
    is_convolution = name.endswith(".weight") and len(shape) >= 3
    return (shape[0], shape[-1], *shape[1:-1]) if is_convolution else shape


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
    patches = {preset.vae: (), clip: (clip.patch_size,) * 2, c: c.patch_size}
    states = {
        config: random_state({k: published_shape(k, s, patch) for k, s in shapes_of(config).items()}, of)
        for (config, patch), of in zip(patches.items(), (torch.float32, torch.float16, dtype), strict=True)
        if config is not clip or c.has_image_branch
    }
    torch.save(random_state(dict(shapes_of(text)), torch.bfloat16), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(states[preset.vae], folder / "Wan2.1_VAE.pth")
    if clip in states:
        named = {f"visual.{name}": array for name, array in states[clip].items()}
        torch.save(named, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    save_file(states[c], folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WanModel", "dim": c.dim, "ffn_dim": c.ffn_dim, "num_heads": c.num_heads,
              "num_layers": c.num_layers, "in_dim": c.in_dim, "out_dim": c.out_dim, "freq_dim": c.freq_dim,
              "model_type": c.model_type, "text_dim": c.text_dim, "text_len": c.text_len, "eps": c.eps}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


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
