"""Predicted and measured peaks of every stage, and how well streaming keeps up, at true sizes on this machine.

    python benchmarks/memory_table.py [--folder DIR] [--json memory_table.json]
    python benchmarks/memory_table.py --against memory_table.json

Writes networks of the released models' sizes with random weights (bfloat16, 118 GB in all), and measures single
forwards, decodes and encodes, then short whole runs with ``--memory`` as a user gives it. The pictures are noise; bytes
and seconds are real, though files just written are read from the system's cache. ``--only 5B A14B`` measures, and
writes, what has one of these words. ``--tiny`` shrinks the networks.
``--against`` measures nothing: it predicts again what a GPU took that was measured before.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import wan_mlx
from wan_mlx import cuda
from wan_mlx.events import StageEnded, Stepped
from wan_mlx.geometry import Geometry
from wan_mlx.models import vae_tiling as tiling
from wan_mlx.models.configs import TextEncoderConfig, VAE22Config, VAEConfig
from wan_mlx.models.execution import Execution
from wan_mlx.models.networks import new_network, new_transformer
from wan_mlx.models.text_encoder import TextEncoder
from wan_mlx.models.vae_execution import VAEExecution
from wan_mlx.planning import peak_memory as peaks
from wan_mlx.planning.choose import TEXT_TOKENS
from wan_mlx.planning.plan import GIB
from wan_mlx.planning.sizes import Networks, sizes_of, weight_bytes
from wan_mlx.presets import BUNDLED, PRESETS, Preset
from wan_mlx.weights.component import parameter_shapes
from wan_mlx.weights.load import load_transformer, load_vae

import mlx.core as mx
import numpy as np

# Forwards: model, width, height, frames, streamed, quantised, tokens at once.
FORWARDS = [
    ("t2v-1.3B", 832, 480, 81, False, None, 32768),
    ("t2v-1.3B", 832, 480, 81, False, None, 8192),
    ("t2v-1.3B", 832, 480, 81, False, None, 2048),
    ("t2v-1.3B", 832, 480, 81, True, None, 8192),
    ("t2v-1.3B", 832, 480, 41, False, None, 8192),
    ("t2v-1.3B", 832, 480, 81, False, "q4", 8192),
    ("t2v-1.3B", 1280, 720, 81, True, None, 8192),
    ("vace-1.3B", 832, 480, 81, False, None, 8192),
    ("t2v-14B", 832, 480, 81, True, None, 8192),
    ("t2v-14B", 832, 480, 81, True, None, 2048),
    ("t2v-14B", 832, 480, 81, True, None, 1024),
    ("t2v-14B", 1280, 720, 81, True, None, 8192),
    ("ti2v-5B", 1280, 704, 121, False, None, 32768),
    ("ti2v-5B", 1280, 704, 121, False, None, 8192),
    ("ti2v-5B", 1280, 704, 121, False, "q8", 32768),
    ("ti2v-5B", 1280, 704, 121, True, None, 32768),
    ("ti2v-5B", 1280, 704, 121, True, None, 2048),
    ("t2v-A14B", 832, 480, 81, False, "q8", 32768),
    ("t2v-A14B", 832, 480, 81, True, None, 8192),
]
# VAE: decode or encode, whose, width, height, frames, tile.
VIDEOS = [
    ("decode", "t2v-1.3B", 832, 480, 81, None),
    ("decode", "t2v-1.3B", 832, 480, 81, (416, 240)),
    ("decode", "t2v-1.3B", 1280, 720, 81, (432, 360)),
    ("decode", "t2v-1.3B", 1280, 720, 81, (256, 240)),
    ("encode", "t2v-1.3B", 832, 480, 81, None),
    ("encode", "t2v-1.3B", 832, 480, 81, (416, 240)),
    ("encode", "t2v-1.3B", 1280, 720, 81, (432, 360)),
    ("decode", "ti2v-5B", 1280, 704, 25, (320, 256)),
    ("encode", "ti2v-5B", 1280, 704, 25, None),
    ("encode", "ti2v-5B", 1280, 704, 25, (432, 352)),
]
# Whole runs: model, width, height, frames, --memory, steps, guidance.
RUNS = [
    ("t2v-1.3B", 832, 480, 81, None, 2, 5.0),
    ("t2v-1.3B", 832, 480, 81, "5GB", 2, 5.0),
    ("t2v-1.3B", 832, 480, 81, "3GB", 2, 5.0),
    ("t2v-14B", 832, 480, 81, "6GiB", 1, 1.0),
    ("t2v-14B", 1280, 720, 81, "10GiB", 1, 1.0),
    ("ti2v-5B", 1280, 704, 121, "6GiB", 2, 5.0),
    ("ti2v-5B", 1280, 704, 121, None, 2, 5.0),
    ("t2v-A14B", 832, 480, 81, "6GiB", 4, (3.0, 4.0)),  # three steps of the high-noise expert, one of the other
    ("t2v-A14B", 832, 480, 81, None, 4, (3.0, 4.0)),
]
PROMPT = "a red circle moves right on a blue background"
DTYPES = {mx.bfloat16: "BF16", mx.float32: "F32"}


def tiny(preset: Preset) -> Preset:
    """The same kind of model, small enough for a CPU."""
    small = dict(dim=256, ffn_dim=512, num_heads=2, num_layers=4, text_dim=256)
    layers = {"vace_layers": (0, 2)} if preset.task == "vace" else {}
    return replace(
        preset,
        transformer=replace(preset.transformer, **small, **layers),
        text_encoder=TextEncoderConfig(256384, 256, 256, 512, 4, 3),
        vae=VAE22Config(dim=8, decoder_dim=16) if isinstance(preset.vae, VAE22Config) else VAEConfig(dim=8),
    )


def write(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: mx.Dtype, seed: int = 0, ours: bool = True
) -> Path:
    """A safetensors file of one random pattern over and over; ``ours``: as ``weights_convert.py`` names things."""
    if path.exists():
        return path
    values = mx.array(np.random.default_rng(seed).normal(size=16_000_001).astype(np.float32) * 0.02).astype(dtype)
    pattern = np.array(values.view(mx.uint16 if dtype == mx.bfloat16 else mx.uint32)).tobytes()
    header: dict[str, dict] = {"__metadata__": {"layout": "mlx"}} if ours else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.size
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_suffix(".part")
    with open(part, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(end, 0, -len(pattern)):
            piece = memoryview(pattern)[:left]
            while piece:
                piece = piece[file.write(piece) :]
    part.rename(path)
    return path


class Bench:
    def __init__(self, folder: Path, presets: dict[str, Preset]):
        self.folder, self.presets = folder, presets
        self.rows: list[dict] = []

    def file(self, part: str, model: str = "t2v-1.3B") -> Path:
        """The weights of a network."""
        preset = self.presets[model]
        if part in ("transformer", "low_noise"):
            shapes, low = parameter_shapes(new_transformer(preset.transformer)), part == "low_noise"
            return write(self.folder / f"{model}{'-low' * low}.safetensors", shapes, mx.bfloat16, seed=low)
        if part == "vae":
            name = "vae22" if isinstance(preset.vae, VAE22Config) else "vae"
            return write(self.folder / f"{name}.safetensors", parameter_shapes(new_network(preset.vae)), mx.float32)
        shapes = parameter_shapes(TextEncoder(preset.text_encoder))
        return write(self.folder / "text_encoder.safetensors", shapes, mx.bfloat16)

    def networks(self, model: str, quantize: str | None = None) -> Networks:
        preset = self.presets[model]
        nets = sizes_of(preset, "bfloat16", quantize)
        shapes = parameter_shapes(new_transformer(preset.transformer))
        stored = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
        weights = weight_bytes(preset.transformer, mx.bfloat16, nets.experts[0].packings, stored)
        parts = [replace(p, weights=weights) if p.kind == "transformer" else p for p in nets.parts]
        return replace(nets, parts=tuple(parts))

    def row(self, what: str, predicted: int, measured: int, seconds: float, **more) -> None:
        row = {"what": what, "predicted_gib": predicted / GIB, "measured_gib": measured / GIB,
               "predicted_by_measured": predicted / measured, "seconds": seconds, **more}  # fmt: skip
        self.rows.append(row)
        extra = "  ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in more.items())
        numbers = f"{predicted / GIB:>8.2f}{measured / GIB:>9.2f}{predicted / measured:>7.2f}{seconds:>9.2f} s"
        print(f"{what:<58}{numbers}  {extra}", flush=True)

    def forward(self, model, width, height, frames, stream, quantize, tokens_at_once) -> None:
        """One forward, and of a streamed one what reading and computing take alone."""
        preset = self.presets[model]
        c, shape = preset.transformer, preset.geometry.latent_shape(width, height, frames)
        loaded = load_transformer(self.file("transformer", model), quantize=quantize, stream=stream)
        transformer = loaded if stream else Execution(loaded)
        transformer.tokens_at_once = tokens_at_once
        latents = mx.random.normal((1, *shape, c.out_dim), key=mx.random.key(0))
        context = mx.random.normal((1, c.text_len, c.text_dim), key=mx.random.key(1)).astype(mx.bfloat16)
        more = {"vace_context": mx.zeros((1, *shape, c.vace_in_dim))} if c.vace_layers else {}
        mx.eval(latents, context, more)

        def run() -> None:
            mx.eval(transformer(latents, 500.0, context, **more))

        nets, alone = self.networks(model, quantize), {}
        if stream:
            alone["computing"] = self.computing(transformer, run)  # first: it warms up
            alone["reading"] = self.reading(transformer)
            alone["GB/s"] = nets.weights.stored_blocks / alone["reading"] / 1e9
        peak, seconds = measured(run, warm_up=not stream)
        if stream:
            alone["by max"] = seconds / max(alone["reading"], alone["computing"])
        name = f"{model} {width}x{height}x{frames} {'streamed' if stream else 'resident'}"
        name += f" {quantize}" * bool(quantize) + f" {tokens_at_once} tokens" * (tokens_at_once != 8192)
        predicted = peaks.denoise(nets, shape, stream, tokens_at_once)
        wide = preset.geometry.seq_len(shape) * c.dim * 2
        alone["arrays alive"] = (peak - (predicted_weights(nets, stream))) / wide
        self.row(name, predicted, peak, seconds, **alone)

    def reading(self, transformer: Execution) -> float:
        """Seconds to read all blocks, with nothing computed."""
        started = time.perf_counter()
        for _ in transformer.blocks(transformer.model.block_order()):
            pass
        return time.perf_counter() - started

    def computing(self, transformer: Execution, run: Callable[[], None]) -> float:
        """Seconds of a forward that is given one block, already read, for all."""
        blocks, model = transformer.blocks, transformer.model
        first = next(blocks(["blocks.0"]))
        kept = model.new_block(model.config, "blocks.0")
        kept.update(first.parameters())
        mx.eval(kept.parameters())
        transformer.blocks = lambda names: (kept for _ in names)
        _, seconds = measured(run, warm_up=True)
        transformer.blocks = blocks
        return seconds

    def video(self, direction, model, width, height, frames, tile) -> None:
        """One decode or encode in float32."""
        geometry = self.presets[model].geometry
        vae, shape = VAEExecution(load_vae(self.file("vae", model))), geometry.latent_shape(width, height, frames)
        config = vae.vae.config
        if direction == "decode":
            latents = mx.random.normal((1, *shape, config.z_dim), key=mx.random.key(0))
            mx.eval(latents)

            def run() -> None:
                for _ in tiling.decode(vae, latents, tile, finish=to_bytes):
                    pass
        else:

            def run() -> None:
                mx.eval(tiling.encode(vae, grey(geometry, width, height, frames), tile))

        peak, seconds = measured(run, warm_up=False)
        predicted = peaks.vae(config, shape, tile, direction == "decode")
        how = "whole" if tile is None else f"tiles of {tile[0]}x{tile[1]}"
        of_wan22 = ", ti2v-5B" * isinstance(config, VAE22Config)
        self.row(f"{direction} {width}x{height}x{frames} {how}{of_wan22}", predicted, peak, seconds)

    def run(self, model, width, height, frames, memory, steps, guidance) -> None:
        """A whole run, stage by stage as its plan has them; seconds too, predicted right before it."""
        tokenizer, preset = BUNDLED["nano"] / "tokenizer.model", PRESETS[model]
        low_noise = self.file("low_noise", model) if preset.experts == 2 else None
        pipe = wan_mlx.WanPipeline.from_pretrained(
            self.file("transformer", model), preset=model, memory=memory, progress=False, prompt_cache=False,
            text_encoder=self.file("text_encoder"), vae=self.file("vae", model), tokenizer=tokenizer,
            low_noise=low_noise,
        )  # fmt: skip
        request = pipe.request(
            PROMPT, width=width, height=height, num_frames=frames, steps=steps, guidance_scale=guidance, seed=0
        )
        plan = pipe.plan(request, measure=True)
        print(plan, flush=True)
        run = pipe.run(request)
        steps = [event.step for event in run if isinstance(event, Stepped)]
        planned = {row.stage: row for row in plan.rows}
        names = {"conditioning": "encode text", "denoise": "denoise", "decode": "decode"}
        title = f"run {model} {width}x{height}x{frames} --memory {memory or 'auto'}"
        for report in merged(run.reports):
            if report.name in names:
                row, seconds = planned[names[report.name]], report.seconds
                pieces = f", {plan.tokens_at_once} tokens at once"
                how = row.how + pieces * (report.name == "denoise" and pieces not in row.how)
                self.row(f"{title}: {row.stage}, {how}", row.peak, report.peak_bytes, seconds,
                         **foreseen(row.seconds, seconds))  # fmt: skip
        whole = max(report.peak_bytes for report in run.reports)
        seconds = sum(report.seconds for report in run.reports)
        switch = switching(pipe.switch(request), [step.seconds for step in steps], preset.sampling.steps)
        self.row(f"{title}: whole", plan.peak, whole, seconds, **foreseen(plan.seconds, seconds), **switch)


def merged(reports: list[StageEnded]) -> list[StageEnded]:
    """Each stage once: denoising with the loading of transformers, and over all experts."""
    found: dict[str, StageEnded] = {}
    for report in reports:
        name = "denoise" if report.name.startswith("load ") else report.name
        before = found.get(name, replace(report, seconds=0, peak_bytes=0))
        peak = max(before.peak_bytes, report.peak_bytes)
        found[name] = replace(report, name=name, seconds=before.seconds + report.seconds, peak_bytes=peak)
    return list(found.values())


def switching(at: int | None, seconds: list[float], steps: int) -> dict[str, float]:
    """Columns of a run of two experts: what the first step of the second one takes more than the others, and the share
    of that in a run of ``steps`` steps. The very first step, which loads the first expert, is left out."""
    if at is None:
        return {}
    each = statistics.median(seconds[1:at] + seconds[at + 1 :])
    cost = seconds[at] - each
    return {"a_step": each, "the_switch": cost, "percent_of_all": 100 * cost / (steps * each + cost)}


def foreseen(predicted: float | None, seconds: float) -> dict[str, float]:
    """Columns for seconds that were predicted, if any were."""
    return {} if predicted is None else {"predicted_seconds": predicted, "seconds_ratio": predicted / seconds}


def against(rows: list[dict], bench: Bench) -> list[dict]:
    """Rows measured before, with what is predicted now for the same thing done in the same way."""
    again: list[dict] = []
    for row in rows:
        title, how = (row["what"].split(": ")[0], row["what"].split(": ")[-1])
        if how == "whole":  # of what its stages take
            predicted = max(r["predicted_gib"] for r in again if r["what"].startswith(f"{title}: ")) * GIB
        else:
            predicted = predict(row["what"], how, bench)
        ratio = predicted / GIB / row["measured_gib"]
        again.append(row | {"predicted_gib": predicted / GIB, "predicted_by_measured": ratio})
    return again


def predict(what: str, how: str, bench: Bench) -> float:
    """Bytes of what a row's description says."""
    width, height, frames = map(int, re.search(r"(\d+)x(\d+)x(\d+)", what).groups())
    model, mode = re.search(r"\w+-\w*[.\w]*B\b", what), re.search(r" (q\d)\b", what)
    model = model[0] if model else "t2v-1.3B"
    shape = bench.presets[model].geometry.latent_shape(width, height, frames)
    if "encode text" in what:
        return peaks.encode_text(bench.networks("t2v-1.3B"), TEXT_TOKENS)
    if direction := re.match("decode|encode", how):
        tile = re.search(r"tiles of (\d+)x(\d+)", how)
        sides = tile and (int(tile[1]), int(tile[2]))
        return peaks.vae(bench.presets[model].vae, shape, sides, direction[0] == "decode")
    pieces = re.search(r"(\d+) tokens", how)
    nets = bench.networks(model, mode and mode[1])
    return peaks.denoise(nets, shape, "streamed" in how, int(pieces[1]) if pieces else 8192)


def predicted_weights(nets: Networks, stream: bool) -> int:
    w = nets.weights
    return w.outside + 2 * w.largest + w.in_flight if stream else w.all


def furthest_off(rows: list[dict]) -> str:
    worst = max(rows, key=lambda row: abs(row["predicted_by_measured"] - 1))
    return f"{len(rows)} rows; furthest off: {worst['what']}, {worst['predicted_by_measured']:.2f}"


def measured(run: Callable[[], None], warm_up: bool) -> tuple[int, float]:
    """Peak bytes and seconds, after one run that does not count if ``warm_up``."""
    if warm_up:
        run()
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    run()
    return mx.get_peak_memory(), time.perf_counter() - started


def to_bytes(frames: mx.array) -> np.ndarray:
    return np.array((frames * 127.5 + 127.5).astype(mx.uint8))


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    info = {key: str(value) for key, value in mx.device_info().items()}
    return {"backend": str(mx.default_device()), "system": platform.platform(), "mlx": mx.__version__} | info


def grey(geometry: Geometry, width: int, height: int, frames: int) -> Iterator[mx.array]:
    """A video in the chunks that the VAE takes."""
    for count in (1, *[geometry.temporal] * (geometry.latent_frames(frames) - 1)):
        yield mx.zeros((1, count, height, width, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to write the weights (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="cases with one of these: run, 14B ...")
    parser.add_argument("--tiny", action="store_true", help="small networks and videos, to try the script")
    parser.add_argument("--against", type=Path, metavar="JSON", help="predict again what --json wrote")
    args = parser.parse_args()
    if args.against:
        peaks.on_cpu = lambda: False
        cuda.in_use = lambda: True
        peaks.has_fused_kernel = lambda dtype, head_dim: dtype != mx.float32
        rows = against(json.loads(args.against.read_text())["rows"], Bench(Path(), dict(PRESETS)))
        for row in rows:
            numbers = f"{row['predicted_gib']:>8.2f}{row['measured_gib']:>9.2f}{row['predicted_by_measured']:>7.2f}"
            print(f"{row['what']:<70}{numbers}")
        print(furthest_off(rows))
        return
    presets = {name: tiny(preset) if args.tiny else preset for name, preset in PRESETS.items()}

    def sized(case: tuple) -> tuple:
        """Of a tiny run, 64x32 pixels and 9 frames in place of the case's."""
        at = next(i for i, value in enumerate(case) if isinstance(value, int))
        small = (*case[:at], 256, 128, 9, *case[at + 3 :])
        return tuple((64, 64) if isinstance(value, tuple) else value for value in small) if args.tiny else case

    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args.folder or Path(temporary), presets)
        bench.folder.mkdir(parents=True, exist_ok=True)
        print(f"{'':<58}{'foreseen':>8}{'measured':>9}{'ratio':>7}{'time':>11}", flush=True)
        for kind, cases in ((bench.forward, FORWARDS), (bench.video, VIDEOS), (bench.run, RUNS)):
            for case in cases:
                what = f"{kind.__name__} {' '.join(map(str, case))}"
                if any(word in what for word in args.only):
                    kind(*sized(case))
                    mx.clear_cache()
                    if args.json:  # after every case, so that what is cut short has not been for nothing
                        args.json.write_text(json.dumps({"machine": machine(), "rows": bench.rows}, indent=1))
        print(furthest_off(bench.rows))


if __name__ == "__main__":
    main()
