"""Time and memory of the real sizes, through MLX on whatever machine this is.

    python benchmarks/random_checkpoint.py FOLDER
    python benchmarks/real_size.py FOLDER --json real_size.json

Times one transformer forward and one VAE decode by themselves (best of a few, after a warm-up), then the whole command
line, and prints stage, seconds and peak memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx

from wan_mlx.weights.networks import load_transformer, load_vae

STAGE = re.compile(r"^(\w[\w ]*?) +([\d.]+) s(?: +peak +([\d.]+) GiB)?$")


def timed(function, repeats: int) -> dict[str, float]:
    """Best seconds of ``repeats`` runs after one warm-up, and the peak of MLX's memory in GiB."""
    function()
    seconds = []
    mx.reset_peak_memory()
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "peak_gib": mx.get_peak_memory() / 2**30}


def forward(folder: Path, size: tuple[int, int], frames: int, repeats: int) -> dict[str, float]:
    """One transformer forward in bfloat16."""
    model = load_transformer(folder)
    t, h, w = (frames - 1) // 4 + 1, size[1] // 8, size[0] // 8
    latents = mx.random.normal((1, t, h, w, model.config.out_dim))
    context = mx.random.normal((1, model.config.text_len, model.config.text_dim))
    return timed(lambda: mx.eval(model(latents, 500.0, context)), repeats)


def decode(folder: Path, size: tuple[int, int], frames: int, repeats: int) -> dict[str, float]:
    """One VAE decode in float32."""
    vae = load_vae(folder)
    latents = mx.random.normal((1, (frames - 1) // 4 + 1, size[1] // 8, size[0] // 8, vae.config.z_dim))

    def run():
        for chunk in vae.decode(latents):
            mx.eval(chunk)

    return timed(run, repeats)


def whole_run(folder: Path, size: tuple[int, int], frames: int, steps: int, output: Path) -> dict[str, dict]:
    """``python -m wan_mlx.generate`` in its own process; its table of stages."""
    command = [sys.executable, "-m", "wan_mlx.generate", "--task", "t2v-1.3B", "--size", f"{size[0]}*{size[1]}",
               "--ckpt_dir", str(folder), "--frame_num", str(frames), "--sample_steps", str(steps), "--base_seed", "42",
               "--prompt", "two cats in boxing gear fight on a stage", "--save_file", str(output), "--overwrite",
               "--quiet"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    rows = (STAGE.match(line) for line in done.stderr.splitlines())
    return {m[1]: {"seconds": float(m[2]), "peak_gib": float(m[3] or 0)} for m in rows if m}


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    info = mx.device_info()
    return {
        "device": str(info.get("device_name", platform.processor())),
        "backend": str(mx.default_device()),
        "system": platform.platform(),
        "mlx": mx.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--output", type=Path, default=Path("real_size.mp4"))
    args = parser.parse_args()
    size = tuple(int(n) for n in args.size.split("x"))
    shape = (size, args.frames)
    rows = {
        "one forward": forward(args.folder, *shape, args.repeats),
        "VAE decode": decode(args.folder, *shape, args.repeats),
    }
    mx.clear_cache()
    rows |= {f"run: {k}": v for k, v in whole_run(args.folder, *shape, args.steps, args.output).items()}
    print(f"{'stage':<24}{'seconds':>10}{'peak GiB':>10}")
    for name, row in rows.items():
        print(f"{name:<24}{row['seconds']:>10.2f}{row['peak_gib']:>10.2f}")
    if args.json:
        report = {"machine": machine(), "size": args.size, "frames": args.frames, "steps": args.steps, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
