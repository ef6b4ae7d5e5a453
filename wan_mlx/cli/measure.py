"""doctor's measurements: rates of products and attention, seconds of the longest dispatches, kernels beside MLX's
operations, and a decode's peak beside its plan. The rates, and the kernels that do not pay, are kept for later runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from time import perf_counter

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import WanError, duration
from ..models import chips, kernels
from ..models.attention_execution import attention
from ..models.configs import VAEConfig
from ..models.layers import Linear
from ..models.pieces import FEED_FORWARD_TOKENS, Pacer, tokens_per_dispatch
from ..models.quantized_linear import Packing, QuantizedLinear
from ..models.vae import VAE
from ..models.vae_execution import VAEExecution
from ..pipeline import plan
from ..planning import peak_memory as peaks
from ..planning import speed
from ..planning.machine import available_memory
from ..planning.plan import GIB
from ..planning.sizes import sizes_of
from ..planning.speed import random_array, random_weights, worth_timing
from ..presets import PRESETS
from .selftest import Check, name_of

DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}
BIG = PRESETS["t2v-14B"].transformer
TOKENS_720P, TOKENS_480P = 75_600, 32_760  # of 81 frames
HEADS = 4  # timed at once
# Feed-forward width for each width that kernels are tried at: those of 1.3B, 5B and 14B.
WIDTHS = {1536: 8960, 3072: 14_336, 5120: 13_824}
# The order in which kernels are tried: first the dtype and the widths of most runs, then where registers run short.
TRIALS = [(mx.bfloat16, 5120), (mx.bfloat16, 1536), (mx.float16, 5120), (mx.float32, 5120), (mx.bfloat16, 3072),
          (mx.float16, 1536), (mx.float32, 1536), (mx.float16, 3072), (mx.float32, 3072)]  # fmt: skip
KERNEL_SECONDS = 10.0
ROWS, REPEATS = 4096, 8
KERNEL_MEMORY = 0.02  # of what is free, for the results of one kernel's repeats
SLOWER = 1.15  # times MLX's operations: then they are used
LONG, TOO_LONG = 0.5, 3.0  # seconds of a dispatch
MORE_THAN_PLANNED = 1.15


def all_rates(look: Callable[[Iterable[Check]], bool]) -> tuple[dict[str, float], list[str]]:
    """TFLOP/s by name, and what follows; ``look`` takes the checks that are made on the way.

    The rates, and the kernels that do not pay, are kept for later runs.
    """
    slower: list[str] = []
    found = rates()
    keep(found, slower)
    look(checks(slower))
    keep(found, slower)
    tflops = {f"{kind} {dtype}": rate for kind, of_dtype in found.items() for dtype, rate in of_dtype.items()}
    return tflops | network_rates(), [f"dispatches: {limits()}", *advice(found)]


def network_rates() -> dict[str, float]:
    """TFLOP/s of T2V-1.3B in 832x480: of its forwards in bfloat16, "denoise" without and "self-attention" alone, and of
    decoding. Parts of the networks are timed, as for a `Plan` with times; nothing if it does not fit.
    """
    size = (832, 480, 81)
    planned, nets = plan("t2v-1.3B", *size), sizes_of(PRESETS["t2v-1.3B"], "bfloat16")
    if not planned.fits:
        return {}
    found = speed.measure_rates(planned, nets, nets.geometry.latent_shape(*size), passes=2)
    parts = {"denoise": found.transformer, "self-attention": found.attention, "decode": found.decode}
    return {name: rate / 1e12 for name, rate in parts.items()}


def makes(tflops: dict[str, float]) -> list[str]:
    """What this machine can make of each released model, and in what time at these rates."""
    said = []
    for preset in PRESETS.values():
        if not preset.repo:
            continue
        planned = plan(preset.name)
        if planned.fits and "decode" in tflops:
            forward, attending, decode = (1e12 * tflops[name] for name in ("denoise", "self-attention", "decode"))
            planned = speed.with_seconds(planned, speed.Rates(forward, attending, decode, encode=decode))
        steps = preset.sampling_for(*preset.size).steps
        how = "streamed" if planned.stream else "resident"
        fitting = f"{planned.peak / GIB:.1f} GiB, {how}"
        if seconds := planned.seconds:
            fitting = f"{duration(seconds)}, {fitting}"
        wanting = f"does not fit; what would: {'; '.join(planned.advice) or 'nothing'}"
        said.append(f"makes {planned.title}, {steps} steps: {fitting if planned.fits else wanting}")
    if peaks.on_cpu():
        said.append("a real model needs a GPU: this machine computes on its CPU, which is enough for nano")
    return said


def rates() -> dict[str, dict[str, float]]:
    """TFLOP/s of "matmul" and "attention" by dtype; "q8" is a product with 8-bit weights, unpacked for it."""
    found = {"matmul": {name: product_rate(dtype) for name, dtype in DTYPES.items()}}
    found["matmul"]["q8"] = product_rate(mx.bfloat16, Packing.parse("q8"))
    found["attention"] = {name: attention_rate(dtype) for name, dtype in DTYPES.items()}
    mx.clear_cache()
    return found


def timed(run: Callable[[], mx.array | list[mx.array]]) -> float:
    """Seconds of computing what ``run`` returns."""
    started = perf_counter()
    mx.eval(run())
    return perf_counter() - started


def product_rate(dtype: mx.Dtype, packing: Packing | None = None) -> float:
    """Of tokens through a square linear layer of a 14B model."""
    linear = linear_of(BIG.dim, BIG.dim, dtype, packing)

    def multiply(tokens: int) -> float:
        x = random_array((1, tokens, BIG.dim), 1.0, dtype)
        return timed(lambda: linear(x))

    tokens, seconds, _ = worth_timing(multiply, 16, FEED_FORWARD_TOKENS)
    return 2.0 * tokens * BIG.dim**2 / seconds / 1e12


def linear_of(columns: int, rows: int, dtype: mx.Dtype, packing: Packing | None = None) -> Linear | QuantizedLinear:
    weight = random_array((rows, columns), columns**-0.5, dtype)
    layer = QuantizedLinear(columns, rows, False, packing) if packing else Linear(columns, rows, bias=False)
    layer.update(packing.pack(weight) if packing else {"weight": weight})
    mx.eval(layer.parameters())
    return layer


def attention_rate(dtype: mx.Dtype) -> float:
    """Of some heads over all tokens of a video in 832x480."""
    keys = random_array((1, TOKENS_480P, HEADS, BIG.head_dim), 1.0, dtype)

    def attend(queries: int) -> float:
        return timed(lambda: attention(keys[:, :queries], keys, keys, Pacer()))

    queries, seconds, _ = worth_timing(attend, 16, TOKENS_480P)
    return 4.0 * HEADS * queries * TOKENS_480P * BIG.head_dim / seconds / 1e12


def keep(found: dict[str, dict[str, float]], slower: list[str]) -> None:
    """For later runs: how fast this GPU is in its slowest dtype, and which kernels do not pay."""
    if peaks.on_cpu():
        return
    with suppress(OSError, WanError):  # then published rates hold
        slowest = {kind: min(of_dtype[dtype] for dtype in DTYPES) for kind, of_dtype in found.items()}
        chips.keep_measured(slowest, slower)
    kernels.agrees.cache_clear()


def advice(found: dict[str, dict[str, float]]) -> list[str]:
    """What follows from the rates, for the choice of options."""
    matmul = found["matmul"]
    more = {name: 100 * (rate / matmul["bf16"] - 1) for name, rate in matmul.items()}
    said = ["q8 costs no time here" if more["q8"] > -5 else f"q8 takes {-more['q8'] / (100 + more['q8']):.0%} longer"]
    said[0] += ", and halves the memory for weights"
    if more["f16"] > 10:
        said.append(f"--dtype float16 multiplies {more['f16']:.0f} % faster than bfloat16")
    if more["f32"] > -10:
        said.append("--dtype float32 is about as fast as bfloat16, with twice the memory for weights")
    return said


def limits() -> str:
    """The longest dispatch that runs make here, and why."""
    flop = chips.dispatch_flop()
    if flop == chips.UNLIMITED:
        return "not limited: this is not Metal"
    basis = "measured" if chips.measured()["tflops"] else f"published for {chips.device_name()}"
    x = mx.zeros((1, TOKENS_720P, BIG.dim))  # never computed
    tokens = tokens_per_dispatch(Linear(BIG.dim, BIG.dim), x)
    rate = flop / chips.DISPATCH_SECONDS / 1e12
    return (f"at most {flop / 1e12:.2g} TFLOP, {chips.DISPATCH_SECONDS:g} s at {rate:.3g} TFLOP/s, {basis}; of a 14B "
            f"model in 1280x720 {tokens} tokens at once")  # fmt: skip


def checks(slower: list[str]) -> Iterator[Check]:
    """The checks that take time; names of kernels that do not pay are added to ``slower``."""
    if not peaks.on_cpu():
        for name, run in dispatches().items():
            yield judge_dispatch(name, run())
        yield from fused_kernels(slower)
        yield decode_peak(VAEConfig(), (2, 60, 104))


def judge_dispatch(name: str, seconds: float) -> Check:
    """``seconds`` of the longest dispatch of a kind."""
    status = "ok" if seconds <= LONG else "warn" if seconds <= TOO_LONG else "fail"
    said = f"{seconds:.3f} s, {LONG:g} allowed"
    advice = ("macOS may end such work where it keeps the display waiting: close other programs, let the display "
              "sleep, and run doctor again, which measures the rate that pieces are cut by")  # fmt: skip
    return Check(f"longest dispatch: {name}", status, said, "" if status == "ok" else advice)


def dispatches() -> dict[str, Callable[[], float]]:
    """Kind → what measures the seconds of its longest dispatch in a 14B model's 1280x720, cut as runs cut it."""

    def product(columns: int, rows: int, most: int) -> float:
        linear = linear_of(columns, rows, mx.bfloat16)
        tokens = min(most, tokens_per_dispatch(linear, mx.zeros((1, TOKENS_720P, columns), mx.bfloat16)))
        x = random_array((1, tokens, columns), 1.0, mx.bfloat16)
        return second(lambda: linear(x))

    def attend() -> float:
        q, k = (random_array((1, TOKENS_720P, HEADS, BIG.head_dim), 1.0, mx.bfloat16) for _ in range(2))
        watch = Stopwatch()
        mx.eval(attention(q[:, :64], k, k, Pacer()))  # compiles
        whole = timed(lambda: attention(q, k, k, watch))
        return max(watch.seconds, default=whole)

    def convolve() -> float:
        x, w = random_array((1, 720, 1280, 96), 1.0, mx.float32), random_array((96, 3, 3, 96), 0.03, mx.float32)
        return second(lambda: mx.conv2d(x, w, padding=1))

    def norm() -> float:
        x, vector = random_array((1, TOKENS_720P, BIG.dim), 1.0, mx.bfloat16), mx.ones((BIG.dim,))
        return second(lambda: kernels.modulated_norm(x, vector, vector, 1e-6))

    return {
        "product": partial(product, BIG.dim, BIG.dim, TOKENS_720P),
        "feed-forward": partial(product, BIG.dim, BIG.ffn_dim, FEED_FORWARD_TOKENS),
        "attention": attend,
        "convolution": convolve,
        "norm": norm,
    }


def second(run: Callable[[], mx.array]) -> float:
    """Seconds of the second run: the first compiles kernels."""
    timed(run)
    return timed(run)


class Stopwatch(Pacer):
    """Waits for each piece, and notes its seconds."""

    def __init__(self):
        super().__init__()
        self.seconds: list[float] = []

    def __call__(self, *arrays: mx.array) -> None:
        self.seconds.append(timed(lambda: list(arrays)))


def fused_kernels(slower: list[str]) -> Iterator[Check]:
    """Whether wan_mlx's own kernels are right on this GPU, and faster than MLX's operations, at each model's width.

    Each is compiled, on CUDA for two or three seconds, and kept by MLX: after `KERNEL_SECONDS` the rest is not tried.
    """
    if kernels.off():
        yield Check("wan_mlx's kernels", "warn", "turned off", f"unset {kernels.SWITCH} to use them")
        return
    tried: dict[mx.Dtype, list[int]] = defaultdict(list)
    faults: dict[mx.Dtype, list[str]] = defaultdict(list)
    started = perf_counter()
    for dtype, width in TRIALS:
        if not tried or perf_counter() - started < KERNEL_SECONDS:
            tried[dtype].append(width)
            faults[dtype] += kernel_faults(dtype, width, slower)
    for dtype, widths in tried.items():
        said = "; ".join(faults[dtype]) or "right, and no slower than MLX's operations"
        said += f", at {' and '.join(map(str, sorted(widths)))} channels"
        advice = "MLX's operations are used instead; please report this"
        yield Check.of(f"wan_mlx's kernels in {name_of(dtype)}", not faults[dtype], said, advice, "warn")
    if left := [f"{name_of(dtype)} at {width}" for dtype, width in TRIALS if width not in tried[dtype]]:
        said = f"not tried, since compiling takes long here: {', '.join(left)}"
        yield Check("more of wan_mlx's kernels", "ok", f"{said}; another doctor goes on from there")


def kernel_faults(dtype: mx.Dtype, width: int, slower: list[str]) -> Iterator[str]:
    """Of each kernel that is not right here, or does not pay: the latter's names are added to ``slower``."""
    for fused in kernels.KERNELS:
        channels = WIDTHS[width] if fused is kernels.gelu_tanh else width
        label = kernels.label(fused, dtype, channels)
        if not kernels.agrees(fused, dtype, channels, parts=1):
            yield f"{label} is not right here"
        elif (share := kernel_seconds(fused, dtype, channels)) > SLOWER:
            slower.append(label)
            yield f"{label} takes {share:.2g} times as long"


def kernel_seconds(fused: kernels.Fused, dtype: mx.Dtype, channels: int) -> float:
    """Of a kernel, as a share of MLX's operations."""
    arguments = kernels.trial(fused, dtype, channels, ROWS, parts=1)
    mx.eval([given for given in arguments if isinstance(given, mx.array)])
    repeats = max(1, min(REPEATS, int(KERNEL_MEMORY * available_memory() / (ROWS * channels * dtype.size))))

    def seconds(function: Callable) -> float:
        def run() -> float:
            return timed(lambda: [part for _ in range(repeats) for part in kernels.listed(function(*arguments))])

        run()
        return min(run() for _ in range(5))

    return seconds(fused.kernel) / seconds(fused.plain)


def decode_peak(config: VAEConfig, shape: tuple[int, int, int]) -> Check:
    """The memory that decoding latents (t, h, w) takes, beside its plan."""
    planned = peaks.vae(config, shape, None, decoding=True)
    vae = VAE(config)
    for part in (vae.conv2, vae.decoder):
        random_weights(part)
    latents = random_array((1, *shape, config.z_dim), 1.0, mx.float32)
    mx.clear_cache()
    weights = sum(array.nbytes for array in dict(tree_flatten(vae.parameters())).values())
    before = mx.get_active_memory() - weights
    mx.reset_peak_memory()
    for frames in VAEExecution(vae).decode(latents):
        mx.eval(frames)
    share = (mx.get_peak_memory() - before) / planned
    said = f"{share * planned / 2**30:.2f} GiB for {shape[0]} latent frames, {planned / 2**30:.2f} planned"
    advice = "plans say too little here: take --memory a fifth lower, and please report this"
    return Check.of("peak of a decode", share <= MORE_THAN_PLANNED, said, advice, "warn")
