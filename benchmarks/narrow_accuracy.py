"""How far narrow forwards are from float32 at true sizes: ours beside Diffusers', the same weights and inputs.

    python benchmarks/narrow_accuracy.py [--dtypes bfloat16,float16] [--preset t2v-1.3B] [--size 832x480] [--frames 81]
                                         [--json FILE]

Needs torch and diffusers, and CUDA for anything but tiny sizes. The float32 forward is Diffusers', without TF32. Prints
the root mean square of the difference over that of the float32 result, and the largest one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from wan_mlx.models.execution import Execution
from wan_mlx.presets import PRESETS
from wan_mlx.weights.load import load_transformer

import mlx.core as mx
import numpy as np
import torch
from diffusers import WanTransformer3DModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write_random(folder: Path, preset: str) -> None:
    """A Diffusers folder of the preset's sizes whose weights are exact in bfloat16."""
    c = PRESETS[preset].transformer
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = WanTransformer3DModel(
            num_attention_heads=c.num_heads, attention_head_dim=c.head_dim, in_channels=c.in_dim, out_channels=16,
            text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, num_layers=c.num_layers,
        )  # fmt: skip
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim > 1 and "scale_shift" not in name:
                    p.normal_(0, p[0].numel() ** -0.5)
                else:
                    p.normal_(0, 0.1).add_(float("norm" in name and name.endswith("weight")))
    model.to(torch.bfloat16).save_pretrained(folder)


def theirs(folder: Path, dtype: torch.dtype, inputs: list[np.ndarray]) -> np.ndarray:
    latents, context = (torch.from_numpy(a).to(DEVICE, dtype) for a in inputs)
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).to(DEVICE).eval()
    timestep = torch.tensor([500.0], device=DEVICE)
    with torch.no_grad():
        result = model(latents.movedim(-1, 1), timestep, context, return_dict=False)[0]
    return result.float().movedim(1, -1).cpu().numpy()


def ours(folder: Path, dtype: str, inputs: list[np.ndarray]) -> np.ndarray:
    model = Execution(load_transformer(folder / "diffusion_pytorch_model.safetensors", dtype))
    latents, context = (mx.array(a) for a in inputs)
    return np.array(model(latents, 500.0, context))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bfloat16,float16")
    parser.add_argument("--preset", default="t2v-1.3B", choices=list(PRESETS))
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    width, height = (int(n) for n in args.size.split("x"))
    rng, preset = np.random.default_rng(0), PRESETS[args.preset]
    c, latent_shape = preset.transformer, preset.geometry.latent_shape(width, height, args.frames)
    shapes = ((1, *latent_shape, c.out_dim), (1, c.text_len, c.text_dim))
    # Exact in bfloat16 too, and but for the smallest in float16, so that only the arithmetic differs.
    inputs = [torch.from_numpy(rng.standard_normal(s, np.float32)).bfloat16().float().numpy() for s in shapes]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_random(folder, args.preset)
        exact = theirs(folder, torch.float32, inputs)
        results = {}
        for dtype in args.dtypes.split(","):
            results[f"diffusers {dtype}"] = theirs(folder, getattr(torch, dtype), inputs)
            torch.cuda.empty_cache()
            results[f"wan_mlx {dtype}"] = ours(folder, dtype, inputs)
            mx.clear_cache()
    scale = np.sqrt(np.mean(exact.astype(np.float64) ** 2))
    rows = {}
    for name, result in results.items():
        error = (result - exact) / scale
        row = rows[name] = {"rms": float(np.sqrt(np.mean(error**2))), "max": float(np.abs(error).max())}
        print(f"{name:<20} rms {row['rms']:.3e}   largest {row['max']:.3e}")
    if args.json:
        args.json.write_text(json.dumps({"preset": args.preset, "size": args.size, "frames": args.frames, **rows}))


if __name__ == "__main__":
    main()
