"""Which layers of a transformer suffer most from being packed: the evidence behind ``quantize="auto"``.

    python benchmarks/quantisation_sensitivity.py --model nano --mode q4 --json sensitivity.json

Samples a few prompts unquantised and keeps latents and timesteps along the way; each counts twice, with the prompt's
context and with one filled by random rows as strong, as long prompts fill it. Then packs one layer, one kind of layer
in all blocks, or one block at a time, and takes the relative error (norm of the difference over norm) of the velocity
of a forward there, averaged. "share" is what the layers hold of all packed bytes; "per share" is the squared error over
that, by which layers are ranked: errors of independent layers add up in squares. Last, whole models in every mode, with
the bits that a weight takes, scales included.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import wan_mlx
from wan_mlx.models.quantized_linear import Packing, QuantizedLinear
from wan_mlx.types import Conditioning, Step
from wan_mlx.weights.configs import shapes_of
from wan_mlx.weights.parameters import locate
from wan_mlx.weights.quantize import plan_quantization, quantizable

import mlx.core as mx

PROMPTS = (
    "a red circle moves right on a blue background",
    "a yellow star spins on a black background",
    "a green square bounces on a white background",
    "一个紫色的圆在灰色背景上变大",
)
AT_STEPS = (0, 3, 6, 10)
MODES = ("q8", "q6", "auto", "q5", "q4-g32", "q4", "q3", "mxfp8", "nvfp4", "mxfp4")


def states(pipe: wan_mlx.WanPipeline, prompts: list[str], seed: int) -> list[tuple[mx.array, float, mx.array]]:
    """Latents, timestep and context at some steps of each prompt's way from noise to video."""
    found = []
    for prompt in prompts:
        request = pipe.request(prompt, seed=seed)
        latents = context = None
        with closing(pipe.stages(request)) as events:
            for event in events:
                if isinstance(event, Conditioning):
                    latents, context = event.noise, event.context
                elif isinstance(event, Step):
                    if event.index in AT_STEPS:
                        found.append((latents, event.timestep, context))
                    latents = event.latents
                    if event.index == max(AT_STEPS):
                        break
    for index, (latents, timestep, context) in enumerate(found.copy()):
        strength = mx.std(context[:, :4])  # the rows after the prompt are zero
        rows = mx.random.normal(context.shape, key=mx.random.key(index)) * strength
        found.append((latents, timestep, rows))
    mx.eval(found)
    return found


def velocities(model, points) -> list[mx.array]:
    outputs = []
    for latents, timestep, context in points:
        outputs.append(model(latents, timestep, context))
        mx.eval(outputs[-1])
    return outputs


def error_with(model, points, want: list[mx.array], packings: Mapping[str, Packing]) -> float:
    """Mean relative error of the velocity while these layers are packed."""
    kept = {}
    for name, packing in packings.items():
        parent, index = locate(model, name)
        layer = kept[name] = parent[index]
        packed = QuantizedLinear(*reversed(layer.weight.shape), "bias" in layer, packing)
        packed.load_weights([*packing.pack(layer.weight).items(), ("bias", layer.bias)])
        parent[index] = packed
    got = velocities(model, points)
    for name, layer in kept.items():
        parent, index = locate(model, name)
        parent[index] = layer
    errors = [mx.linalg.norm((a - b).flatten()) / mx.linalg.norm(b.flatten()) for a, b in zip(got, want, strict=True)]
    return sum(error.item() for error in errors) / len(errors)


def bits_of(packing: Packing, shape: tuple[int, int]) -> int:
    """What a packed matrix takes, scales and biases included."""
    return sum(8 * dtype.size * math.prod(packed) for packed, dtype in packing.shapes(shape).values())


def measure(model, points, mode: str) -> dict[str, dict[str, dict[str, float]]]:
    """Groups of layers by what they are, their errors and shares."""
    shapes, packing = shapes_of(model.config), Packing.parse(mode)
    names = quantizable("transformer", shapes)
    total = sum(math.prod(shapes[name]) for name in names)
    groups: dict[str, dict[str, list[str]]] = {"all": {"all": names}}
    for by in ("kind", "block", "layer"):
        found = defaultdict(list)
        for name in names:
            block, kind = re.fullmatch(r"((?:vace_)?blocks\.\d+)\.(.+)\.weight", name).groups()
            found[{"kind": kind, "block": block, "layer": f"{block}.{kind}"}[by]].append(name)
        groups[by] = dict(found)
    want = velocities(model, points)
    table = {"mode": {}}
    for recipe in MODES:
        packings = plan_quantization("transformer", recipe, shapes).packings
        bits = sum(bits_of(packing, shapes[name]) for name, packing in packings.items()) / total
        table["mode"][recipe] = {"error": error_with(model, points, want, packings), "bits": bits}
    for by, members in groups.items():
        table[by] = {}
        for label, layers in members.items():
            error = error_with(model, points, want, dict.fromkeys(layers, packing))
            share = sum(math.prod(shapes[name]) for name in layers) / total
            table[by][label] = {"error": error, "share": share, "per_share": error**2 / share}
    return table


def markdown(table: dict[str, dict[str, dict[str, float]]], mode: str, most: int = 12) -> str:
    lines = [f"All layers in {mode}: relative error {table['all']['all']['error']:.4f}", ""]
    for by in ("kind", "block", "layer"):
        lines += [f"| {by} | error | share of bytes | error² / share |", "|---|---|---|---|"]
        ranked = sorted(table[by].items(), key=lambda item: -item[1]["per_share"])
        for label, row in ranked if by != "layer" else ranked[:most]:
            lines.append(f"| {label} | {row['error']:.4f} | {row['share']:.1%} | {row['per_share']:.4f} |")
        lines.append("")
    lines += ["| mode | bits per weight | error |", "|---|---|---|"]
    lines += [f"| {mode} | {row['bits']:.2f} | {row['error']:.4f} |" for mode, row in table["mode"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--mode", default="q4", help="to pack the layers in")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"how many, at most {len(PROMPTS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the whole table to")
    args = parser.parse_args()
    pipe = wan_mlx.WanPipeline.from_pretrained(args.model, dtype="float32", progress=False)
    with pipe.keep_loaded():
        points = states(pipe, list(PROMPTS[: args.prompts]), args.seed)
    model = wan_mlx.load_transformer(pipe.checkpoint, "float32")
    table = measure(model, points, args.mode)
    if args.json:
        said = {"model": args.model, "mode": args.mode, "points": len(points), "mlx": mx.__version__}
        args.json.write_text(json.dumps({**said, "table": table}, indent=1) + "\n", encoding="utf-8")
    print(markdown(table, args.mode))


if __name__ == "__main__":
    main()
