"""One network in a process of its own, for `speed.py`: ``speed_worker.py ENGINE CASE``, then a line for each measuring.

Networks have their true sizes and random weights; `wan_mlx` runs on MLX's default device, `diffusers` on CUDA.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from speed import forward_flop
from wan_mlx.presets import PRESETS

STAGE = re.compile(r"^(\w[\w ]*?) +([\d.]+) s +peak +([\d.]+) GiB$")
PROMPT = "two cats fight on a stage"
FEW = 3  # latent frames, which the VAE's kernels are compiled and chosen with before it is timed


def latent_shape(case: dict) -> tuple[int, int, int]:
    return PRESETS[case["model"]].geometry.latent_shape(*sizes(case), case["frames"])


def seq_len(case: dict) -> int:
    return PRESETS[case["model"]].geometry.seq_len(latent_shape(case))


def sizes(case: dict) -> tuple[int, int]:
    width, height = (int(n) for n in case["size"].split("x"))
    return width, height


class Ours:
    """wan_mlx; every method returns a function to time and its FLOP, if they are known.

    Attributes:
        more: what else was found, for a run: its stages' seconds and peaks, and what they were predicted to be.
        warm_up: what to do before timing, in place of the function.
    """

    def __init__(self):
        self.more: dict = {}
        self.warm_up: Callable | None = None

    def matmul(self, case):
        import mlx.core as mx

        c, tokens = PRESETS[case["model"]].transformer, seq_len(case)
        x, w = (mx.random.normal(shape).astype(mx.bfloat16) for shape in ((tokens, c.dim), (c.ffn_dim, c.dim)))
        mx.eval(x, w)
        return lambda: mx.eval([x @ w.T for _ in range(10)]), 20.0 * tokens * c.dim * c.ffn_dim

    def attention(self, case):
        import mlx.core as mx

        c, tokens = PRESETS[case["model"]].transformer, seq_len(case)
        shape = (1, c.num_heads, tokens, c.head_dim)
        q, k, v = (mx.random.normal(shape).astype(mx.bfloat16) for _ in range(3))
        mx.eval(q, k, v)
        attend = mx.fast.scaled_dot_product_attention
        return lambda: mx.eval(attend(q, k, v, scale=c.head_dim**-0.5)), 4.0 * tokens**2 * c.dim

    def forward(self, case):
        import mlx.core as mx

        config = PRESETS[case["model"]].transformer
        from wan_mlx.models.execution import Execution

        model = Execution(random_transformer(config, case.get("quantize")))
        shape, channels = (1, *latent_shape(case)), config.out_dim
        latents, context = mx.random.normal((*shape, channels)), mx.random.normal((1, config.text_len, config.text_dim))
        extra = {}
        if config.in_dim > channels:
            extra["condition"] = mx.random.normal((*shape, config.in_dim - channels))
        if config.has_image_branch:
            images = 2 if config.model_type == "flf2v" else 1
            extra["image_features"] = mx.random.normal((images, 257, config.image_dim))
        if config.model_type == "vace":
            extra = {"vace_context": mx.random.normal((*shape, config.vace_in_dim))}
        mx.eval(latents, context, extra)
        flop = None if extra else forward_flop(case["model"], sizes(case), case["frames"])
        return lambda: mx.eval(model(latents, 500.0, context, **extra)), flop

    def _vae(self, case):
        from wan_mlx.models.networks import new_network
        from wan_mlx.models.vae_execution import VAEExecution

        import mlx.core as mx

        vae = new_network(PRESETS[case["model"]].vae)
        fill(vae, lambda name: {"float32": mx.float32, "bfloat16": mx.bfloat16}[case["dtype"]])
        return VAEExecution(vae)

    def decode(self, case):
        import mlx.core as mx

        vae = self._vae(case)
        latents = mx.random.normal((1, *latent_shape(case), vae.vae.config.z_dim))

        def run(some=None):
            for frames in vae.decode(latents[:, :some]):
                mx.eval(frames)

        self.warm_up = lambda: run(FEW)
        return run, None

    def encode(self, case):
        import mlx.core as mx

        vae, (width, height) = self._vae(case), sizes(case)
        video = mx.random.uniform(-1, 1, (1, case["frames"], height, width, 3))
        mx.eval(video)
        each = vae.vae.geometry.temporal
        chunks = [video[:, :1], *(video[:, i : i + each] for i in range(1, case["frames"], each))]
        self.warm_up = lambda: mx.eval(vae.encode_chunks(chunks[:FEW]))
        return lambda: mx.eval(vae.encode_chunks(chunks)), None

    def text(self, case):
        from wan_mlx.weights.load import load_text_encoder

        import mlx.core as mx

        ids = list(range(3, 53)) + [1]
        return lambda: mx.eval(load_text_encoder(case["checkpoint"])([ids, ids])), None

    def run(self, case):
        import wan_mlx

        import mlx.core as mx

        folder, (width, height) = Path(tempfile.mkdtemp()), sizes(case)
        pipe = wan_mlx.WanPipeline.from_pretrained(case["checkpoint"], preset=case["model"], progress=False)
        request = pipe.request(PROMPT, width=width, height=height, num_frames=case["frames"], steps=case["steps"])
        plan = pipe.plan(request, measure=True)
        self.more = {"predicted_seconds": plan.seconds, "predicted_gib": plan.peak / 2**30}
        mx.clear_cache()

        def run():
            command = [sys.executable, "-m", "wan_mlx.generate", "--model", case["checkpoint"], "--size", case["size"],
                       "--frames", str(case["frames"]), "--steps", str(case["steps"]), "--seed", "42", "--overwrite",
                       "--prompt", PROMPT, "--no-prompt-cache", "--task", case["model"],
                       "--output", str(folder / "run.mp4")]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode not in (0, 3):  # 3: random weights make a flat video, which is reported
                raise SystemExit(done.stderr)
            found = (STAGE.match(line) for line in done.stderr.splitlines())
            stages = {match[1]: {"seconds": float(match[2]), "peak_gib": float(match[3])} for match in found if match}
            self.more = self.more | {"stages": stages}

        return run, None

    def peak(self, reset: bool = False) -> float:
        import mlx.core as mx

        if "stages" in self.more:  # of another process
            return max(stage["peak_gib"] for stage in self.more["stages"].values())
        return mx.reset_peak_memory() if reset else mx.get_peak_memory() / 2**30


class Diffusers:
    """The same networks in PyTorch on CUDA, as its pipelines run them."""

    def __init__(self):
        self.more: dict = {}
        self.warm_up: Callable | None = None

    def forward(self, case):
        import torch
        from diffusers import WanTransformer3DModel

        c, (t, h, w) = PRESETS[case["model"]].transformer, latent_shape(case)
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            model = WanTransformer3DModel(
                num_attention_heads=c.num_heads, attention_head_dim=c.head_dim, in_channels=c.in_dim,
                out_channels=c.out_dim, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim,
                num_layers=c.num_layers,
            ).eval()  # fmt: skip
            torch.set_default_dtype(torch.float32)
            latents, context = torch.randn(1, c.in_dim, t, h, w), torch.randn(1, c.text_len, c.text_dim)
        latents, context = latents.to(torch.bfloat16), context.to(torch.bfloat16)
        for name, module in model.named_modules():  # what from_pretrained keeps in float32
            if any(part in name.split(".")[-1] for part in ("time_embedder", "norm1", "norm2", "norm3")):
                module.float()
        for name, parameter in model.named_parameters():
            if "scale_shift_table" in name:
                parameter.data = parameter.data.float()
        timestep = torch.tensor([500.0], device="cuda")

        def run():
            with torch.no_grad():
                model(latents, timestep, context, return_dict=False)
            torch.cuda.synchronize()

        return run, forward_flop(case["model"], sizes(case), case["frames"])

    def _vae(self, case):
        import torch
        from diffusers import AutoencoderKLWan

        config = PRESETS[case["model"]].vae
        sizes = dict(base_dim=config.dim, z_dim=config.z_dim, latents_mean=config.mean, latents_std=config.std)
        if config.patch > 1:  # Wan2.2's
            channels = 3 * config.patch**2
            sizes |= dict(decoder_base_dim=config.decoder_dim, is_residual=True, in_channels=channels,
                          out_channels=channels, patch_size=config.patch,
                          scale_factor_spatial=config.geometry.spatial)  # fmt: skip
        with torch.device("cuda"):
            return AutoencoderKLWan(**sizes).to(getattr(torch, case["dtype"])).eval()

    def decode(self, case):
        import torch

        vae = self._vae(case)
        latents = torch.randn(1, vae.config.z_dim, *latent_shape(case), device="cuda", dtype=vae.dtype)
        self.warm_up = self._timed(lambda: vae.decode(latents[:, :, :FEW], return_dict=False))
        return self._timed(lambda: vae.decode(latents, return_dict=False)), None

    def encode(self, case):
        import torch

        vae, (width, height) = self._vae(case), sizes(case)
        video = torch.rand(1, 3, case["frames"], height, width, device="cuda", dtype=vae.dtype) * 2 - 1
        few = PRESETS[case["model"]].geometry.num_frames(FEW)
        self.warm_up = self._timed(lambda: vae.encode(video[:, :, :few], return_dict=False))
        return self._timed(lambda: vae.encode(video, return_dict=False)), None

    def _timed(self, function):
        import torch

        def run():
            with torch.no_grad():
                function()
            torch.cuda.synchronize()

        return run

    def peak(self, reset: bool = False) -> float:
        import torch

        return torch.cuda.reset_peak_memory_stats() if reset else torch.cuda.max_memory_allocated() / 2**30


def random_transformer(config, quantize: str | None = None):
    """A transformer in bfloat16, or with packed blocks, made on the device one layer at a time."""
    from wan_mlx.models.networks import new_transformer
    from wan_mlx.models.quantized_linear import QuantizedLinear
    from wan_mlx.weights.component import parameter_shapes
    from wan_mlx.weights.parameters import dtype_of
    from wan_mlx.weights.quantize import plan_quantization

    import mlx.core as mx

    model = new_transformer(config)
    shapes = parameter_shapes(model)
    fill(model, lambda name: dtype_of("transformer", name, mx.bfloat16))
    if quantize:
        for name, packing in plan_quantization("transformer", quantize, shapes).packings.items():
            *path, last, _ = name.split(".")
            parent = model
            for part in path:
                parent = parent[int(part)] if part.isdigit() else parent[part]
            index = int(last) if last.isdigit() else last
            dense = parent[index]
            layer = QuantizedLinear(*dense.weight.shape[::-1], True, packing)
            layer.load_weights([*packing.pack(dense.weight).items(), ("bias", dense.bias)])
            mx.eval(layer.parameters())
            parent[index] = layer
        mx.clear_cache()
    return model


def fill(module, dtype_of) -> None:
    """Random values that keep activations near one: N(0, 1/fan_in) matrices, scales near 1, small biases."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    arrays = []
    for name, array in tree_flatten(module.parameters()):
        x = mx.random.normal(array.shape, dtype=mx.bfloat16 if array.size > 1 << 20 else mx.float32)
        if array.ndim == 1 or "modulation" in name:
            x = 0.1 * x + ("norm" in name and "weight" in name or name.endswith("gamma"))
        else:
            x = x * (array.size // array.shape[0]) ** -0.5
        arrays.append((name, x.astype(dtype_of(name))))
        mx.eval(arrays[-1][1])
    module.load_weights(arrays)
    mx.clear_cache()


def main() -> None:
    engine, case = {"wan_mlx": Ours, "diffusers": Diffusers}[sys.argv[1]](), json.loads(sys.argv[2])
    function, flop = getattr(engine, case["item"])(case)
    if case["item"] != "run":
        for _ in range(2):  # warm-up: kernels are compiled, then memory is asked for that is kept from then on
            (engine.warm_up or function)()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        engine.peak(reset=True)
        started = time.perf_counter()
        function()
        seconds = time.perf_counter() - started
        measured = {"seconds": seconds, "peak_gib": engine.peak(), "flop": flop, **engine.more}
        print(json.dumps({"measured": measured}), flush=True)


if __name__ == "__main__":
    main()
