"""One engine and model of `training.py`: ``training_worker.py ENGINE MODEL``, then a line for each command.

"prepare" makes a case and runs a step of it, "step" runs another; both are answered by its seconds and peak. "parts"
times its parts, "check" compares gradients with those in float32.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from wan_mlx.presets import PRESETS

RANK, SIGMA = 32, 0.6
KEPT = 12 * 2**30  # of what MLX has freed: processes of several models share the device


class Ours:
    def __init__(self, model: str):
        import mlx.core as mx

        mx.set_cache_limit(KEPT)
        self.mx, self.preset = mx, PRESETS[model]
        config = self.preset.transformer
        if layers := os.environ.get("TRAINING_LAYERS"):  # to try the script where a whole model is too much
            config = replace(config, num_layers=int(layers))
        # A step of one block compiles most kernels.
        self.config = replace(config, num_layers=1)
        self.prepare({"model": model, "size": "256x128", "frames": 1, "base": "resident"})
        self.step()
        self.config = config

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

    def step(self) -> dict[str, float]:
        from wan_mlx.training.backward import loss_and_gradients
        from wan_mlx.training.optimizer import gradient_norm, update

        losses, gradients = loss_and_gradients(self.model, self.factors, self.samples, self.recipe.scale)
        norm = gradient_norm(gradients)
        update(self.optimizer, gradients, self.factors, norm, self.recipe.clip)
        return {"loss": losses[0], "norm": norm}

    def parts(self) -> dict[str, Any]:
        """Seconds: of forward; of attention and its gradient by the ways there are; of the update; by chunk size."""
        from wan_mlx.models.execution import Pacer, attention
        from wan_mlx.training import attention_backward, block_backward
        from wan_mlx.training.backward import loss, loss_and_gradients
        from wan_mlx.training.optimizer import gradient_norm, update

        mx, found = self.mx, {}

        def timed(name, function, times=2, warm=True):
            try:
                if warm:
                    function()
                best = math.inf
                for _ in range(times):
                    mx.reset_peak_memory()
                    started = time.perf_counter()
                    function()
                    best = min(best, time.perf_counter() - started)
                found[name] = (round(best, 4), round(mx.get_peak_memory() / 2**30, 2))
            except Exception as error:
                found[name] = str(error)[:200]

        run = lambda: loss_and_gradients(self.model, self.factors, self.samples, self.recipe.scale)  # noqa: E731
        timed("forward", lambda: loss(self.model, self.factors, self.samples, self.recipe.scale))
        timed("forward and backward", lambda: mx.eval(run()[1]), warm=False)

        def updated():
            gradients = dict(self.factors)
            update(self.optimizer, gradients, self.factors, gradient_norm(gradients), 0.0)

        timed("update", updated)
        c = self.config
        q, k, v, g = (mx.random.normal((1, 32760, c.num_heads, c.head_dim)).astype(mx.bfloat16) for _ in range(4))
        g = g.flatten(2)
        mx.eval(q, k, v, g)
        timed("attention", lambda: mx.eval(attention(q, k, v, Pacer())))
        timed("attention's gradient", lambda: mx.eval(attention_backward.attention_gradients(q, k, v, g, g)))
        first = block_backward.TOKENS_AT_ONCE
        for count in (2048, 8192):
            block_backward.TOKENS_AT_ONCE = count
            timed(f"with {count} tokens at once", lambda: mx.eval(run()[1]), times=1, warm=False)
        block_backward.TOKENS_AT_ONCE = first
        return found

    def check(self) -> dict[str, Any]:
        """How far gradients in bfloat16 are from those in float32, and whether they repeat; of two blocks."""
        from wan_mlx.models import kernels
        from wan_mlx.training import attention_backward, slopes
        from wan_mlx.training.backward import loss_and_gradients

        from mlx.utils import tree_map

        mx, c = self.mx, self.config
        self.config = replace(c, num_layers=2)
        self.prepare({"name": "check", "size": "480x272", "frames": 33, "base": "resident"})
        self.config, (sample,) = c, self.samples
        sums = slopes.scaled, slopes.modulated_norm, slopes.norm_and_rotate
        found: dict[str, Any] = {one.__name__: kernels.agrees(one, mx.bfloat16, c.dim, 1, 128) for one in sums}

        def gradients():
            _, arrays = loss_and_gradients(self.model, self.factors, [sample], 1.0)
            mx.eval(arrays)
            return arrays

        ours, again = gradients(), gradients()
        found["the same bits"] = all(mx.array_equal(ours[name], again[name]).item() for name in ours)
        fused, attention_backward.has_fused_gradient = attention_backward.has_fused_gradient, lambda *given: False
        chunks = gradients()
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
        """What ``--plan`` says of the same."""
        from wan_mlx.planning.sizes import sizes_of
        from wan_mlx.training.estimate import plan_of

        preset, base = PRESETS[self.case["model"]], self.case["base"]
        nets = sizes_of(preset, "bfloat16", base if base.startswith("q") else None)
        shape = (*map(int, self.case["size"].split("x")), self.case["frames"])
        plan = plan_of(nets, [shape], self.recipe, stream=base == "streamed")
        return {"plan_gib": plan.peak / 2**30}


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

    def __init__(self, model: str):
        import torch

        self.torch, self.preset = torch, PRESETS[model]

    def prepare(self, case: dict[str, Any]) -> None:
        from diffusers import WanTransformer3DModel
        from peft import LoraConfig

        torch, preset, c = self.torch, self.preset, self.preset.transformer
        self.model = self.optimizer = self.trained = None
        torch.cuda.empty_cache()
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            model = WanTransformer3DModel(
                num_attention_heads=c.num_heads, attention_head_dim=c.head_dim, in_channels=c.in_dim,
                out_channels=c.out_dim, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim,
                num_layers=int(os.environ.get("TRAINING_LAYERS", c.num_layers)),
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
        with torch.device("cuda"):
            self.clean, self.noise = torch.randn(2, 1, c.in_dim, t, h, w)
            self.context = torch.randn(1, c.text_len, c.text_dim).bfloat16()
            self.timestep = torch.tensor([1000 * SIGMA])

    def step(self) -> dict[str, float]:
        torch = self.torch
        noisy = ((1 - SIGMA) * self.clean + SIGMA * self.noise).bfloat16()
        with torch.autocast("cuda", torch.bfloat16):
            out = self.model(noisy, self.timestep, self.context, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(out.float(), self.noise - self.clean)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.cuda.synchronize()
        return {"loss": loss.item(), "norm": norm.item()}

    def parts(self) -> dict[str, Any]:
        return {}

    def check(self) -> dict[str, Any]:
        return {}

    def plan(self) -> dict[str, float]:
        return {}

    def peak(self, reset: bool = False) -> float:
        if reset:
            self.torch.cuda.reset_peak_memory_stats()
        return self.torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    faulthandler.dump_traceback_later(75, exit=False)
    began = time.perf_counter()
    engine = {"wan_mlx": Ours, "diffusers": Diffusers}[sys.argv[1]](sys.argv[2])
    print(json.dumps({"ready": round(time.perf_counter() - began, 1)}), flush=True)
    print(f"{sys.argv[1:]} ready after {time.perf_counter() - began:.1f} s", file=sys.stderr)
    for line in sys.stdin:
        command = json.loads(line)
        faulthandler.cancel_dump_traceback_later()
        answer: dict[str, Any] = {}
        try:
            if command["do"] in ("parts", "check"):
                answer = {command["do"]: getattr(engine, command["do"])()}
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
