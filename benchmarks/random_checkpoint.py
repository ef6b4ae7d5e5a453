"""Write an official-layout folder of a released model's true sizes, with random weights. Needs torch.

    python benchmarks/random_checkpoint.py OUT [--preset t2v-1.3B]

The files have the names, formats, dtypes and shapes that Wan-AI publishes: a float32 transformer as safetensors,
umT5-XXL in bfloat16 and the VAE in float32 as .pth. The pictures they make are noise; their time and memory are real.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from pathlib import Path

from wan_mlx.models.configs import TextEncoderConfig
from wan_mlx.models.text_encoder import TextEncoder
from wan_mlx.models.transformer import Transformer
from wan_mlx.models.vae import VAE
from wan_mlx.presets import Preset, find_preset
from wan_mlx.weights.component import parameter_shapes

import sentencepiece
import torch
from safetensors.torch import save_file

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORDS = "two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage"


def published_shape(name: str, shape: tuple[int, ...], in_dim: int) -> tuple[int, ...]:
    """Our channels-last shape → the shape in the published file."""
    if name == "patch_embedding.weight":
        return (shape[0], in_dim, 1, 2, 2)
    if name.endswith(".gamma"):
        return (*shape, 1, 1, 1)
    return (shape[0], shape[-1], *shape[1:-1]) if len(shape) >= 4 else shape


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


def write(folder: Path, preset: Preset, text: TextEncoderConfig | None = None) -> None:
    """Write the whole folder."""
    text = text or preset.text_encoder
    (folder / "google/umt5-xxl").mkdir(parents=True)
    (folder / "google/umt5-xxl/spiece.model").write_bytes(small_tokenizer())
    text_shapes = parameter_shapes(TextEncoder(text))
    torch.save(random_state(text_shapes, torch.bfloat16), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    for module, name in ((VAE(preset.vae), "Wan2.1_VAE.pth"), (Transformer(preset.transformer), None)):
        shapes = {k: published_shape(k, s, preset.transformer.in_dim) for k, s in parameter_shapes(module).items()}
        state = random_state(shapes, torch.float32)
        if name:
            torch.save(state, folder / name)
        else:
            save_file(state, folder / "diffusion_pytorch_model.safetensors")
    c = preset.transformer
    config = {"_class_name": "WanModel", "dim": c.dim, "ffn_dim": c.ffn_dim, "num_heads": c.num_heads,
              "num_layers": c.num_layers, "in_dim": c.in_dim, "out_dim": c.out_dim, "freq_dim": c.freq_dim,
              "model_type": c.model_type, "text_len": c.text_len, "eps": c.eps}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="t2v-1.3B")
    args = parser.parse_args()
    write(args.out, find_preset(args.preset))
    for path in sorted(p for p in args.out.rglob("*") if p.is_file()):
        print(f"{path.stat().st_size / 1e9:8.2f} GB  {path.relative_to(args.out)}")
