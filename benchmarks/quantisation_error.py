"""What every stored form of the weights costs in exactness: one forward of a small transformer against float32.

    python benchmarks/quantisation_error.py --json quantisation_error.json

The transformer has random weights: matrices N(0, 1/inputs), 6 layers of 256 channels, so that GGUF's rows of 256 fit.
In each form the same matrices (those of the blocks) are stored so, everything else stays float32, and the computation
is float32: what differs is the form alone. ComfyUI's forms and quanto's are written by their own code (comfy-kitchen,
optimum-quanto, which need PyTorch). Trained weights have outliers and fare worse in the coarse forms; for what
that does to pictures see ``quantised_nano.py``. GGUF's K types are rounded plainly here (``gguf_quantisers.py``).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from gguf_quantisers import quantise
from wan_mlx.files.open import open_weights
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.quantized_linear import Packing
from wan_mlx.models.transformer import Transformer
from wan_mlx.weights.component import ComponentWeights, parameter_shapes
from wan_mlx.weights.load import load_transformer
from wan_mlx.weights.quantize import QUANTIZED

import mlx.core as mx
import numpy as np

CONFIG = TransformerConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=6, text_dim=256)
GGUF_TYPES = (
    "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "Q3_K", "Q2_K",
)  # fmt: skip
MLX_MODES = (
    *(f"q{bits}-g{group}" for bits in (8, 6, 5, 4, 3) for group in (32, 64, 128)), "mxfp8", "nvfp4", "mxfp4",
)  # fmt: skip
FP8 = ("e4m3", "e5m2", "e4m3 scaled", "e4m3 scaled by row")
# By comfy-kitchen: its layout and settings; and by optimum-quanto.
KITCHEN: dict[str, tuple[str, dict]] = {
    "int8": ("TensorWiseINT8Layout", {}),
    "int8 by row": ("TensorWiseINT8Layout", {"per_channel": True}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
}
TOOLS = (*KITCHEN, "quanto int8")
E4M3_MAX, E5M2_MAX = 448.0, 57344.0

State = dict[str, np.ndarray]


def random_weights(seed: int) -> State:
    """Official names → float32, channels first."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in parameter_shapes(Transformer(CONFIG)).items():
        noise = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            noise = 0.1 * noise + (0 if name.endswith("bias") else 1)
        else:
            noise /= math.sqrt(shape[-1])
        state[name] = noise.reshape(shape[0], -1, 1, 2, 2) if name == "patch_embedding.weight" else noise
    return state


def is_matrix(name: str) -> bool:
    return bool(re.fullmatch(QUANTIZED["transformer"], name)) and "norm" not in name


def write_float32(path: Path, state: State) -> None:
    mx.save_safetensors(str(path), {name: mx.array(values) for name, values in state.items()})


def write_gguf(path: Path, state: State, dtype: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "wan")
    for name, values in state.items():
        kind = gguf.GGMLQuantizationType[dtype if is_matrix(name) else "F32"]
        writer.add_tensor(name, quantise(values, dtype) if is_matrix(name) else values, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def write_fp8(path: Path, state: State, form: str) -> None:
    """safetensors by hand: MLX saves no fp8 dtype."""
    header, pieces, at = {}, [], 0

    def add(name: str, dtype: str, values: np.ndarray) -> None:
        nonlocal at
        pieces.append(values.tobytes())
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes

    for name, values in state.items():
        if not is_matrix(name):
            add(name, "F32", values)
            continue
        if "scaled" in form:
            largest = np.abs(values).max(1, keepdims=True) if "row" in form else np.abs(values).max(keepdims=True)
            scale = (largest / E4M3_MAX).astype(np.float32)
            add(name.removesuffix("weight") + "weight_scale", "F32", scale if "row" in form else scale.reshape(()))
            values = values / scale
        if form == "e5m2":
            add(name, "F8_E5M2", to_e5m2(values))
        else:
            add(name, "F8_E4M3", np.array(mx.to_fp8(mx.array(values))))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))


def write_by_tool(path: Path, state: State, form: str) -> None:
    import comfy_kitchen.tensor
    import torch
    from optimum import quanto
    from safetensors.torch import save_file

    tensors = {}
    for name, values in state.items():
        tensor = torch.from_numpy(values)
        if not is_matrix(name):
            tensors[name] = tensor
        elif form in KITCHEN:
            layout = getattr(comfy_kitchen.tensor, KITCHEN[form][0])
            parts = layout.state_dict_tensors(*layout.quantize(tensor, **KITCHEN[form][1]))
            tensors |= {name + end: part.contiguous() for end, part in parts.items()}
        else:
            scale = quanto.AbsmaxOptimizer()(tensor, quanto.qint8, axis=0)
            packed = quanto.quantize_weight(tensor, quanto.qint8, axis=0, scale=scale)
            tensors |= {f"{name}._data": packed._data, f"{name}._scale": packed._scale}
    save_file(tensors, path)


def to_e5m2(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, ties to even, by way of float16, whose first byte it is."""
    bits = np.clip(values, -E5M2_MAX, E5M2_MAX).astype(np.float16).view(np.uint16).astype(np.uint32)
    return ((bits + 0x7F + ((bits >> 8) & 1)) >> 8).astype(np.uint8)


def forward(path: Path, quantize: str | None) -> np.ndarray:
    model = load_transformer(path, "float32", quantize=quantize)
    rng = np.random.default_rng(1)
    latents, context = (mx.array(rng.standard_normal(s, np.float32)) for s in ((1, 3, 16, 16, 16), (1, 512, 256)))
    return np.array(model(latents, 500.0, context))


def errors(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """max |a-b| / max |b|, and the same of root mean squares."""
    difference = got.astype(np.float64) - want
    return float(np.abs(difference).max() / np.abs(want).max()), float(
        np.sqrt((difference**2).mean() / (want.astype(np.float64) ** 2).mean())
    )


def stored_matrices(path: Path) -> tuple[float, Callable[[str], np.ndarray]]:
    """Bits per weight of the matrices in a file, and how one reads."""
    weights = ComponentWeights(open_weights(path))
    names = [name for name in weights.shapes if is_matrix(name)]
    nbytes = sum(weights.file.nbytes(weights.sources[name][0]) for name in names)
    count = sum(math.prod(weights.shapes[name]) for name in names)
    return 8 * nbytes / count, lambda name: np.array(weights.read(name).astype(mx.float32))


def packed_matrices(mode: str, state: State) -> tuple[float, Callable[[str], np.ndarray]]:
    packing = Packing.parse(mode)
    shape = (256, 1024)
    nbytes = sum(math.prod(s) * dtype.size for s, dtype in packing.shapes(shape).values())
    return 8 * nbytes / math.prod(shape), lambda name: np.array(
        packing.unpack(packing.pack(mx.array(state[name])), mx.float32)
    )


def measure(seed: int) -> list[dict]:
    state, rows = random_weights(seed), []
    matrices = [name for name in state if is_matrix(name)]
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float32.safetensors"
        write_float32(plain, state)
        want = forward(plain, None)
        families = {"GGUF": (GGUF_TYPES, write_gguf), "fp8": (FP8, write_fp8), "tools": (TOOLS, write_by_tool)}
        for family, (forms, write) in {**families, "MLX": (MLX_MODES, None)}.items():
            for form in forms:
                path, mode = plain, form
                if write is None:
                    bits, read = packed_matrices(form, state)
                else:
                    path, mode = Path(folder) / "stored", "none"
                    write(path, state, form)
                    bits, read = stored_matrices(path)
                of_weights = np.mean([errors(read(name), state[name])[1] for name in matrices])
                largest, rms = errors(forward(path, mode), want)
                rows.append(
                    {"family": family, "form": form, "bits": round(bits, 3), "weights_rms": float(of_weights),
                     "forward_rms": rms, "forward_max": largest}
                )  # fmt: skip
                print_row(rows[-1])
                if path != plain:
                    path.unlink()
    return rows


def print_row(row: dict) -> None:
    print(
        f"{row['family']:<6}{row['form']:<20}{row['bits']:>7.2f}{row['weights_rms']:>12.5f}{row['forward_rms']:>12.5f}"
        f"{row['forward_max']:>12.5f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    args = parser.parse_args()
    print(f"{'':<6}{'form':<20}{'bits':>7}{'weights':>12}{'forward':>12}{'forward max':>12}")
    rows = measure(args.seed)
    if args.json:
        report = {"config": vars(CONFIG), "seed": args.seed, "mlx": mx.__version__, "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
