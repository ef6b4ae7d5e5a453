"""What each quantisation costs on the bundled nano model: PSNR against the unquantised videos, and prompts understood.

    python benchmarks/quantised_nano.py --prompts 24 --json quantised_nano.json

The same held-out prompts and seeds in every mode; frames are read as `examples/nano/evaluate.py` does. Computed in
float32 by default, which is fast on a CPU; the weights are bfloat16 as stored. Modes already in the JSON file are not
run again, if it was written for the same weights, prompts and dtype.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import wan_mlx
from wan_mlx.weights.load import load_transformer

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "nano"))

import evaluate  # noqa: E402
import world  # noqa: E402

MODES = ("none", "q8", "q6", "auto", "q5", "q4-g32", "q4", "q3", "mxfp8", "nvfp4", "mxfp4")
IDENTICAL = 100.0  # stands for the PSNR of two equal videos


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of two uint8 videos, in dB."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return IDENTICAL if error == 0 else min(IDENTICAL, 10 * np.log10(255**2 / error))


def videos(mode: str, prompts: list[str], dtype: str) -> list[np.ndarray]:
    pipe = wan_mlx.WanPipeline.from_pretrained("nano", dtype=dtype, quantize=mode, progress=False)
    with pipe.keep_loaded():
        return [pipe(prompt, seed=seed).frames for seed, prompt in enumerate(prompts)]


def run(mode: str, chosen, reference: list[np.ndarray] | None, dtype: str) -> tuple[dict, list[np.ndarray]]:
    started = time.perf_counter()
    frames = videos(mode, [prompt for prompt, _ in chosen], dtype)
    marks = [psnr(a, b) for a, b in zip(frames, reference or frames, strict=True)]
    right = evaluate.summarise(
        [evaluate.score(evaluate.measure(f), s) for f, (_, s) in zip(frames, chosen, strict=True)]
    )
    model = load_transformer(wan_mlx.WanPipeline.from_pretrained("nano").checkpoint, quantize=mode)
    nbytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    row = {"psnr": float(np.mean(marks)), "psnr_least": float(np.min(marks)), "right": right, "nbytes": nbytes}
    return {**row, "seconds": time.perf_counter() - started}, frames


def weights_hash() -> str:
    checkpoint = wan_mlx.WanPipeline.from_pretrained("nano").checkpoint
    digest = hashlib.sha256()
    for component in sorted(checkpoint.files):
        digest.update(checkpoint.files[component].read_bytes())
    return digest.hexdigest()[:16]


def markdown(rows: dict[str, dict]) -> str:
    columns = ["mode", "transformer", "PSNR mean", "least", *next(iter(rows.values()))["right"]]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for mode, row in rows.items():
        marks = ["–", "–"] if mode == "none" else [f"{row[key]:.1f} dB" for key in ("psnr", "psnr_least")]
        right = [f"{value:.0f}" for value in row["right"].values()]
        lines.append(" | ".join([f"| {mode}", f"{row['nbytes'] / 1e6:.2f} MB", *marks, *right]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    setting = {"weights": weights_hash(), "prompts": args.prompts, "dtype": args.dtype}
    rows: dict[str, dict] = {}
    if args.json.is_file():
        before = json.loads(args.json.read_text(encoding="utf-8"))
        if {key: before.get(key) for key in setting} == setting:
            rows = before["modes"]
    chosen = world.held_out_prompts(args.prompts)
    wanted = [mode for mode in args.modes if mode not in rows]
    if wanted:
        base, reference = run("none", chosen, None, args.dtype)
        rows = {"none": base, **{mode: row for mode, row in rows.items() if mode != "none"}}
    for mode in wanted:
        if mode != "none":
            rows[mode], _ = run(mode, chosen, reference, args.dtype)
        print(f"{mode}: {rows[mode]['psnr']:.1f} dB, {rows[mode]['right']}", file=sys.stderr, flush=True)
        text = json.dumps({**setting, "mlx": mx.__version__, "modes": rows}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
