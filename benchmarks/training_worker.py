"""One engine and model of `training.py`: ``training_worker.py ENGINE MODEL [checks]``, then a line for each command.

"prepare" makes a case and runs a step of it, "step" runs another; both are answered by its seconds and peak. "stages"
tells those of a step's stages, with other numbers in the package if some are given; "parts" times single operations,
"check" compares gradients with those in float32.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import logging
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from wan_mlx.presets import PRESETS

RANK, SIGMA = 32, 0.6
# To try the script where true sizes are too much: {"num_layers": 2, "dim": 256, "ffn_dim": 512, "num_heads": 2}.
SMALLER = json.loads(os.environ.get("TRAINING_SMALLER", "{}"))
KEPT = 12 * 2**30  # of what MLX has freed: processes of several models share the device


class Ours:
    def __init__(self, model: str, checks: bool):
        import mlx.core as mx

        mx.set_cache_limit(KEPT)
        self.mx, self.preset = mx, PRESETS[model]
        config = self.preset.transformer
        config = replace(config, **SMALLER)
        # A step of one block compiles most kernels.
        self.config = replace(config, num_layers=1)
        self.prepare({"model": model, "size": "256x128", "frames": 1, "base": "resident"})
        self.step()
        self.config = config
        if checks:
            self.check("256x128", 1)

    def prepare(self, case: dict[str, Any]) -> None:
        from wan_mlx.models.execution import Execution
        from wan_mlx.training.backward import Sample
        from wan_mlx.training.factors import layer_shapes, new_factors
        from wan_mlx.training.optimizer import make_optimizer
        from wan_mlx.training.recipe import Recipe

        mx, self.case, preset = self.mx, case, self.preset
        self.model = self.samples = self.factors = self.optimizer = None
        mx.clear_cache()
        self.recipe = Recipe(rank=RANK, alpha=RANK)
        base = case["base"]
        if base == "streamed":
            self.model = streamed(self.config)
        else:
            from speed_worker import random_transformer

            self.model = Execution(random_transformer(self.config, None if base == "resident" else base))
        shape = (1, *preset.geometry.latent_shape(*map(int, case["size"].split("x")), case["frames"]))
        clean, noise = mx.random.normal((2, *shape, self.config.out_dim))
        context = mx.random.normal((1, self.config.text_len, self.config.text_dim)).astype(mx.bfloat16)
        noisy = (1 - SIGMA) * clean + SIGMA * noise
        self.samples = [Sample(noisy, 1000 * SIGMA, context, noise - clean, {})]
        self.factors = new_factors(layer_shapes(self.config), RANK, seed=0)
        # As after some steps: with zeros half of all gradients are zero.
        self.factors = {
            name: 1e-3 * mx.random.normal(array.shape) if name.endswith(".up") else array
            for name, array in self.factors.items()
        }
        self.optimizer = make_optimizer(self.recipe)
        self.optimizer.init(self.factors)
        mx.eval(self.factors, self.optimizer.state, noisy, context, self.samples[0].target)
        del clean, noise

    def step(self, differentiated: Callable[[], None] = lambda: None) -> dict[str, float]:
        """``differentiated`` is called before the update."""
        from wan_mlx.training.backward import loss_and_gradients
        from wan_mlx.training.optimizer import gradient_norm, update

        losses, gradients = loss_and_gradients(self.model, self.factors, self.samples, self.recipe.scale)
        differentiated()
        norm = gradient_norm(gradients)
        update(self.optimizer, gradients, self.factors, norm, self.recipe.clip)
        return {"loss": losses[0], "norm": norm}

    def stages(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Seconds and peak of a step's stages, and the plan's seconds of a step; ``changes``: numbers of the package by
        name, "module.NAME"."""
        from wan_mlx.training import backward
        from wan_mlx.training.timing import with_seconds

        mx, before, found, real = self.mx, {}, {}, backward._loss

        def ended(stage: str) -> None:
            mx.synchronize()
            now = time.perf_counter()
            found[stage] = (round(now - self.began, 3), round(self.peak(), 3))
            self.began = now
            self.peak(reset=True)

        def loss(*given):
            if "forward" not in found:
                ended("forward")
            return real(*given)

        for name, value in changes.items():
            module, _, attribute = name.rpartition(".")
            before[name] = importlib.import_module(module), attribute
            before[name] = (*before[name], getattr(*before[name]))
            setattr(before[name][0], attribute, value)
        try:
            self.step()
            backward._loss = loss
            self.peak(reset=True)
            self.began = time.perf_counter()
            self.step(lambda: ended("backward"))
            ended("update")
        finally:
            backward._loss = real
            for module, attribute, value in before.values():
                setattr(module, attribute, value)
        if not changes and not SMALLER:
            found["planned"] = round(with_seconds(*self._plan(), self.recipe).seconds, 3)
        return found

    def parts(self) -> dict[str, Any]:
        """Of attention, and of operations on a piece of tokens: milliseconds, and MiB with the result."""
        from wan_mlx.models import kernels
        from wan_mlx.models.attention_execution import attention
        from wan_mlx.models.pieces import Pacer
        from wan_mlx.models.rope import rope_table
        from wan_mlx.training import attention_backward, block_backward, slopes

        mx, c, found = self.mx, self.config, {}
        length = math.prod(self.preset.geometry.latent_shape(832, 480, 81)[:3]) // 4 if mx.cuda.is_available() else 999
        count = min(block_backward.TOKENS_AT_ONCE, length)

        def timed(name: str, function: Callable[[], Any], times: int = 10) -> None:
            try:
                mx.eval(function())
                mx.synchronize()
                self.peak(reset=True)
                before = mx.get_active_memory()
                mx.eval(function())
                mx.synchronize()
                most = mx.get_peak_memory() - before
                started = time.perf_counter()
                mx.eval([function() for _ in range(times)])
                found[name] = (round((time.perf_counter() - started) / times * 1e3, 3), most >> 20)
            except Exception as error:
                found[name] = str(error)[:200]

        def random(*shape):
            return mx.random.normal(shape).astype(mx.bfloat16)

        q, k, v = (random(1, length, c.num_heads, c.head_dim) for _ in range(3))
        g, gate, table = random(1, length, c.dim), mx.random.normal((c.dim,)), rope_table((count, 1, 1), c.head_dim)
        x, y, wide, other, inner = (random(1, count, n) for n in (c.dim, c.dim, c.ffn_dim, c.ffn_dim, RANK))
        w, f, b, few = random(c.dim, c.dim), random(c.ffn_dim, c.dim), random(c.ffn_dim), q[:, :512]
        a, a_wide = random(RANK, c.dim), random(RANK, c.ffn_dim)
        mx.eval(q, k, v, g, x, y, wide, other, w, f, b, a, a_wide, inner, gate, table)
        gradient = attention_backward.attention_gradients
        timed("attention", lambda: attention(q, k, v, Pacer()), 3)
        timed("attention's gradient", lambda: gradient(q, k, v, g, g), 3)
        some, part = q[:, :count], g[:, :count]
        timed("cross-attention's gradient", lambda: gradient(some, few, few, part, part))
        timed("product", lambda: x @ w.T)
        timed("product, wide", lambda: mx.addmm(b, x, f.T))
        timed("product back, wide", lambda: wide @ f)
        timed("down", lambda: x @ a.T)
        timed("down, wide", lambda: wide @ a_wide.T)
        timed("up", lambda: mx.addmm(x, inner, a))
        timed("up, wide", lambda: mx.addmm(wide, inner, a_wide))
        rows, x_rows, wide_rows = (array.reshape(count, -1) for array in (inner, x, wide))
        timed("factor's gradient", lambda: rows.T @ x_rows)
        timed("factor's gradient, wide", lambda: rows.T @ wide_rows)
        timed("factor's gradient, wide, turned", lambda: wide_rows.T @ rows)
        timed("add", lambda: x + y)
        timed("norm", lambda: kernels.modulated_norm(x, gate, gate, c.eps))
        timed("gelu", lambda: kernels.gelu_tanh(wide))
        timed("slope of gelu", lambda: slopes.gelu_tanh(wide, other))
        timed("slope of norm", lambda: slopes.modulated_norm(x, y, gate, c.eps))
        timed("slope of rotation", lambda: slopes.norm_and_rotate(x, y, gate, c.num_heads, table, c.eps))
        timed("slope of rms norm", lambda: slopes.rms_norm(x, y, gate, c.eps))
        timed("times gate", lambda: slopes.scaled(x, gate))
        return found

    def check(self, size: str = "480x272", frames: int = 33) -> dict[str, Any]:
        """How far gradients in bfloat16 are from those in float32, and whether they repeat; of two blocks."""
        from wan_mlx.models import kernels
        from wan_mlx.training import attention_backward, slopes
        from wan_mlx.training.backward import loss_and_gradients

        from mlx.utils import tree_map

        mx, c = self.mx, self.config
        self.config = replace(c, num_layers=2)
        self.prepare({"name": "check", "size": size, "frames": frames, "base": "resident"})
        self.config, (sample,) = c, self.samples
        sums = slopes.scaled, slopes.modulated_norm, slopes.norm_and_rotate
        found: dict[str, Any] = {one.__name__: kernels.agrees(one, mx.bfloat16, c.dim, 1, c.head_dim) for one in sums}

        def gradients():
            _, arrays = loss_and_gradients(self.model, self.factors, [sample], 1.0)
            mx.eval(arrays)
            return arrays

        def repeated(way: str) -> dict[str, Any]:
            first, again = gradients(), gradients()
            found[f"the same bits, {way}"] = all(mx.array_equal(first[name], again[name]).item() for name in first)
            return first

        ours = repeated("fused")
        fused, attention_backward.has_fused_gradient = attention_backward.has_fused_gradient, lambda *given: False
        chunks = repeated("by chunks")
        attention_backward.has_fused_gradient = fused
        model = self.model.model
        model.update(tree_map(lambda x: x.astype(mx.float32), model.parameters()))
        with kernels.turned_off():
            want = gradients()
        for way, got in (("fused", ours), ("by chunks", chunks)):
            parts = [((got[name] - want[name]).square().sum(), want[name].square().sum()) for name in want]
            off, whole = (mx.stack(list(column)).sum() for column in zip(*parts, strict=True))
            worst = max((a / b).sqrt().item() for a, b in parts)
            found[way] = {"distance": (off / whole).sqrt().item(), "worst factor": worst}
        return found

    def peak(self, reset: bool = False) -> float:
        if reset:
            self.mx.reset_peak_memory()
        return self.mx.get_peak_memory() / 2**30

    def plan(self) -> dict[str, float]:
        """What ``--plan`` says of the same: of a file whose blocks are read as they are."""
        plan, nets = self._plan()
        return {"plan_gib": (plan.peak - nets.weights.in_flight * plan.stream) / 2**30}

    def _plan(self) -> tuple[Any, Any]:
        from wan_mlx.planning.sizes import sizes_of
        from wan_mlx.training.estimate import plan_of

        preset, base = PRESETS[self.case["model"]], self.case["base"]
        nets = sizes_of(preset, "bfloat16", base if base.startswith("q") else None)
        shape = (*map(int, self.case["size"].split("x")), self.case["frames"])
        return plan_of(nets, [shape], self.recipe, stream=base == "streamed"), nets


def streamed(config):
    """An execution over a file of one block's random weights, which are those of every block."""
    from dataclasses import replace

    from speed_worker import random_transformer
    from wan_mlx.files.safetensors import save_arrays
    from wan_mlx.models.networks import new_transformer
    from wan_mlx.weights.component import open_component
    from wan_mlx.weights.load import no_progress, transformer_parameters
    from wan_mlx.weights.stream import load_streamed

    import mlx.core as mx
    from mlx.utils import tree_flatten

    path = Path(tempfile.mkdtemp()) / "transformer.safetensors"
    save_arrays(path, dict(tree_flatten(random_transformer(replace(config, num_layers=1)).parameters())),
                {"layout": "mlx"})  # fmt: skip
    mx.clear_cache()
    weights = open_component(path, "transformer")
    for table in (weights.sources, weights.shapes, weights._torch_shapes):
        for name in [name for name in table if name.startswith("blocks.0.")]:
            for place in range(1, config.num_layers):
                table[name.replace("blocks.0.", f"blocks.{place}.")] = table[name]
    return load_streamed(new_transformer(config), transformer_parameters(weights, config, mx.bfloat16), no_progress)


class Diffusers:
    """The same in PyTorch: Diffusers' transformer in bfloat16, PEFT's layers, gradient checkpointing, autocast."""

    def __init__(self, model: str, checks: bool):
        import torch

        self.torch, self.preset = torch, PRESETS[model]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def prepare(self, case: dict[str, Any]) -> None:
        from diffusers import WanTransformer3DModel
        from peft import LoraConfig

        torch, preset, c = self.torch, self.preset, replace(self.preset.transformer, **SMALLER)
        self.model = self.optimizer = self.trained = None
        if self.device == "cuda":
            torch.cuda.empty_cache()
        with torch.device(self.device):
            torch.set_default_dtype(torch.bfloat16)
            model = WanTransformer3DModel(
                num_attention_heads=c.num_heads, attention_head_dim=c.head_dim, in_channels=c.in_dim,
                out_channels=c.out_dim, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim,
                num_layers=c.num_layers,
            )  # fmt: skip
            torch.set_default_dtype(torch.float32)
        model.requires_grad_(False)
        layers = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers))
        self.trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        model.enable_gradient_checkpointing()
        model.train()
        self.model, self.optimizer = model, torch.optim.AdamW(self.trained, lr=1e-4)
        t, h, w = preset.geometry.latent_shape(*map(int, case["size"].split("x")), case["frames"])
        with torch.device(self.device):
            self.clean, self.noise = torch.randn(2, 1, c.in_dim, t, h, w)
            self.context = torch.randn(1, c.text_len, c.text_dim).bfloat16()
            self.timestep = torch.tensor([1000 * SIGMA])

    def step(self) -> dict[str, float]:
        torch = self.torch
        noisy = ((1 - SIGMA) * self.clean + SIGMA * self.noise).bfloat16()
        with torch.autocast(self.device, torch.bfloat16):
            out = self.model(noisy, self.timestep, self.context, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(out.float(), self.noise - self.clean)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return {"loss": loss.item(), "norm": norm.item()}

    def plan(self) -> dict[str, float]:
        return {}

    def peak(self, reset: bool = False) -> float:
        if self.device == "cpu":
            return math.nan
        if reset:
            self.torch.cuda.reset_peak_memory_stats()
        return self.torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    faulthandler.dump_traceback_later(75, exit=False)
    began = time.perf_counter()
    name, model, *more = sys.argv[1:]
    engine = {"wan_mlx": Ours, "diffusers": Diffusers}[name](model, checks="checks" in more)
    print(json.dumps({"ready": round(time.perf_counter() - began, 1)}), flush=True)
    print(f"{sys.argv[1:]} ready after {time.perf_counter() - began:.1f} s", file=sys.stderr)
    for line in sys.stdin:
        command = json.loads(line)
        faulthandler.cancel_dump_traceback_later()
        answer: dict[str, Any] = {}
        try:
            if command["do"] in ("parts", "check", "stages"):
                answer = getattr(engine, command["do"])(**command.get("given", {}))
            else:
                if command["do"] == "prepare":  # its step chooses kernels for these sizes, and takes memory
                    engine.prepare(command["case"])
                engine.peak(reset=True)
                started = time.perf_counter()
                told = engine.step()
                answer = {"seconds": time.perf_counter() - started, "peak_gib": engine.peak(), **told, **engine.plan()}
        except Exception:
            traceback.print_exc()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
