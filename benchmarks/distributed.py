"""How much faster several GPUs of this machine make a step together, against one of them in the same processes.

    python benchmarks/distributed.py --ranks 2 --json distributed.json          # NVIDIA GPUs, by NCCL
    python benchmarks/distributed.py --backend ring --models tiny --size 416x240 --frames 33   # on the CPU, by loopback

On Linux, as root, loopback is made as slow as a link, for the command alone: `unshare -n sh -c 'ip link set lo up; tc
qdisc add dev lo root tbf rate 40mbit burst 70kb limit 64mb; python benchmarks/distributed.py …'`.

Transformers have their true sizes and random weights in bfloat16, the VAE float32; nothing is downloaded. Each case is
a whole step's forwards as `guided_velocity` makes them, and as much told to all as the step's latents are, or a decode,
best of ``--rounds``; the result is compared with one rank's. ``predicted`` is what `planning.several` says of the same
case, from one rank's rate in one pass and the measured link.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from wan_mlx import heartbeat
from wan_mlx.caching import StepCache
from wan_mlx.distributed import Group, open_group
from wan_mlx.guidance import Guidance, guided_velocity
from wan_mlx.media.write import to_uint8
from wan_mlx.models import sequence_parallel
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.execution import Execution
from wan_mlx.models.networks import new_network, new_transformer
from wan_mlx.models.vae_execution import VAEExecution
from wan_mlx.models.vae_tiling import decode
from wan_mlx.parallel import BOTH, CFG, TOKENS, Team
from wan_mlx.planning import several
from wan_mlx.planning.several import Work
from wan_mlx.planning.speed import random_array, random_weights
from wan_mlx.presets import PRESETS
from wan_mlx.types import Conditioning
from wan_mlx.weights.parameters import dtype_of

import mlx.core as mx
import numpy as np

WORKER = "WAN_MLX_BENCHMARK_WORKER"
GROUPS = (1, 2, 4)  # of heads
TINY = {"dim": 256, "num_heads": 4, "num_layers": 2, "ffn_dim": 512, "text_dim": 32, "freq_dim": 32}


def config_of(model: str) -> TransformerConfig:
    if model == "tiny":
        return replace(PRESETS["t2v-1.3B"].transformer, **TINY)
    return PRESETS[f"t2v-{model}"].transformer


class Bench:
    """One rank's share of the measurements; rank 0 prints and writes them."""

    def __init__(self, group: Group, args: argparse.Namespace):
        self.group, self.args = group, args
        self.found: dict = {"ranks": group.size, "backend": group.backend, "size": args.size, "frames": args.frames,
                            "link": vars(group.link) | {}, "rows": []}  # fmt: skip
        self.alone: dict[str, tuple[float, np.ndarray, float]] = {}

    def seconds(self, run: Callable[[], object], is_warm: bool = False) -> tuple[float, float]:
        """Best seconds and the highest peak in GiB, of the slowest rank."""
        if not is_warm:
            run()  # compiles, and chooses kernels
        best = float("inf")
        mx.clear_cache()
        mx.synchronize()
        mx.reset_peak_memory()
        for _ in range(self.args.rounds):
            self.group.most(0)  # all begin at once
            started = time.perf_counter()
            run()
            mx.synchronize()
            best = min(best, time.perf_counter() - started)
        everybody = self.group.gather_values([best, mx.get_peak_memory() / 2**30])
        seconds, peak = (max(values) for values in zip(*everybody, strict=True))
        return seconds, peak

    def case(
        self, name: str, run: Callable[[], mx.array | np.ndarray], baseline: str = "", predicted: float | None = None,
        is_warm: bool = False,
    ) -> None:  # fmt: skip
        """Measure a case, of which ``baseline`` is the same on one rank."""
        last: list[mx.array | np.ndarray] = []

        def keep() -> None:
            last[:] = [run()]
            if isinstance(last[0], mx.array):
                mx.eval(last)

        seconds, peak = self.seconds(keep, is_warm)
        result = np.array(last[0]).astype(np.float32)
        row = {"case": name, "seconds": seconds, "peak_gib": peak}
        if baseline:
            alone, expected, alone_peak = self.alone[baseline]
            row |= {"speed_up": alone / seconds, "alone": alone, "alone_peak_gib": alone_peak}
            if result.size:  # of a decode the other ranks have none
                difference, whole = (float(np.sqrt(np.square(x).mean())) for x in (result - expected, expected))
                row |= {"rms": difference, "relative_rms": difference / max(whole, 1e-30),
                        "equal": float((result == expected).mean())}  # fmt: skip
            if predicted is not None:
                row["predicted"] = predicted
        else:
            self.alone[name] = seconds, result, peak
        self.tell(row)

    def tell(self, row: dict) -> None:
        self.found["rows"].append(row)
        if self.group.rank == 0:
            print(" ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                           for key, value in row.items()), flush=True)  # fmt: skip
            if self.args.json:
                Path(self.args.json).write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def gathers(self, sizes: dict[str, int]) -> None:
        """Gathers of keys as one group of heads has them."""
        for name, count in sizes.items():
            piece = random_array((count,), 1.0, mx.bfloat16)
            seconds, _ = self.seconds(lambda piece=piece: mx.eval(self.group.gather(piece)))
            received = 2 * count * (self.group.size - 1)
            self.tell({"case": f"gather {name}", "bytes_received": received, "seconds": seconds,
                       "gb_per_second": received / seconds / 1e9})  # fmt: skip

    def transformer(self, model: str) -> None:
        config, size = config_of(model), self.group.size
        network = new_transformer(config)
        random_weights(network, lambda name: dtype_of("transformer", name, mx.bfloat16))
        run, tokens = Execution(network), self.tokens
        latents = random_array((1, *self.latents, config.out_dim), 1.0, mx.float32)
        cond, uncond = (random_array((1, config.text_len, config.text_dim), scale, mx.bfloat16) for scale in (1.0, 0.5))

        def step(passes: int, mode: str | None = None) -> mx.array:
            conditioning = Conditioning(latents, cond, uncond if passes == 2 else None)
            guidance = Guidance(scale=5.0 if passes == 2 else 1.0)
            team = None if mode is None else Team(self.group, mode)
            found = guided_velocity(run, latents, 500.0, conditioning, guidance, 0, 1, StepCache(1), team)
            return found if team is None else team.same(found)

        def shared(passes: int, mode: str, note: str = "") -> None:
            alone = f"{model}, {passes} {'pass' if passes == 1 else 'passes'}, alone"
            rate = Work(config, tokens, 1.0, 1).alone() / self.alone[f"{model}, 1 pass, alone"][0]
            predicted = Work(config, tokens, rate, passes).seconds(mode, size, self.group.link)
            self.case(alone.replace("alone", mode + note), partial(step, passes, mode), alone, predicted, passes == 2)

        shard = -(-tokens // size) * config.dim
        self.gathers({f"{model} keys of 1/{count} of the heads": shard // count for count in GROUPS})
        self.case(f"{model}, 1 pass, alone", partial(step, 1))
        for count in GROUPS:
            set_groups(count)
            shared(1, TOKENS, f" in {count} groups of heads")
        set_groups(self.args.groups)
        self.case(f"{model}, 2 passes, alone", partial(step, 2), is_warm=True)
        if size % 2 == 0:
            shared(2, CFG if size == 2 else BOTH)
        if self.args.all:
            shared(2, TOKENS)
        self.alone.clear()
        mx.clear_cache()

    @property
    def latents(self) -> tuple[int, int, int]:
        width, height = map(int, self.args.size.split("x"))
        return PRESETS["t2v-1.3B"].geometry.latent_shape(width, height, self.args.frames)

    @property
    def tokens(self) -> int:
        return PRESETS["t2v-1.3B"].geometry.seq_len(self.latents)

    def vae(self) -> None:
        vae = new_network(PRESETS["t2v-1.3B"].vae)
        for part in (vae.conv2, vae.decoder):
            random_weights(part)
        run = VAEExecution(vae)
        latents = random_array((1, *self.latents, vae.config.z_dim), 1.0, mx.float32)

        def decoded(group: Group | None = None, relayed: bool | None = None, finish=to_uint8) -> np.ndarray:
            pieces = [piece[0] for piece in decode(run, latents, None, finish, group=group, relayed=relayed)]
            return np.concatenate(pieces or [np.zeros(0)])  # they come out at rank 0

        ways = {f"in a relay of {self.group.size}": True, f"in {self.group.size} columns": False}
        for finish, note in ((to_uint8, ""), (np.array, ", before rounding")):
            alone = f"VAE decode{note}, alone"
            self.case(alone, partial(decoded, finish=finish), is_warm=bool(note))
            for way, relayed in ways.items():
                run_it = partial(decoded, self.group, relayed, finish)
                self.case(alone.replace("alone", way), run_it, alone, is_warm=bool(note))


def set_groups(count: int) -> None:
    """Of heads, in which keys and values are gathered, as is predicted."""
    sequence_parallel.HEAD_GROUPS = sequence_parallel.HEAD_GROUPS_ON_GPU = several.HEAD_GROUPS = count


def work(args: argparse.Namespace) -> None:
    """On one rank."""
    heartbeat.SILENCE = 300.0  # kernels may be compiled first
    group = open_group()
    assert group is not None, "it was started as one of several"
    bench = Bench(group, args)
    for name, measure in [(model, partial(bench.transformer, model)) for model in args.models] + [("VAE", bench.vae)]:
        if name == "VAE" and args.no_vae:
            continue
        try:
            measure()
        except (RuntimeError, ValueError) as error:
            bench.tell({"case": name, "failed": str(error)})
            raise


def start(args: argparse.Namespace) -> list[subprocess.Popen]:
    """This script on every rank, each with a GPU of its own."""
    cards = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
    cards = cards or [str(rank) for rank in range(args.ranks)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {**os.environ, WORKER: "1", "MLX_WORLD_SIZE": str(args.ranks)}
    if args.backend == "nccl":
        # NVLink's multicast is not available in every container.
        common |= {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(port), "NCCL_NVLS_ENABLE": "0"}
    else:
        hosts = Path(tempfile.mkdtemp()) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(args.ranks)]), encoding="utf-8")
        common |= {"MLX_HOSTFILE": str(hosts), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", __file__, *sys.argv[1:]]
    own = [{"MLX_RANK": str(rank), "CUDA_VISIBLE_DEVICES": cards[rank % len(cards)]} for rank in range(args.ranks)]
    return [subprocess.Popen(command, env={**common, **mine}) for mine in own]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backend", choices=("nccl", "ring"), default="nccl")
    parser.add_argument("--models", nargs="*", default=["1.3B", "14B"], help="1.3B, 14B or tiny")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--groups", type=int, help="of heads, for two passes; default: as a run has")
    parser.add_argument("--all", action="store_true", help="also both passes with divided tokens")
    parser.add_argument("--no-vae", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    nccl = args.backend == "nccl"
    args.groups = args.groups or (sequence_parallel.HEAD_GROUPS_ON_GPU if nccl else sequence_parallel.HEAD_GROUPS)
    if os.environ.get(WORKER):
        work(args)
        return 0
    processes = start(args)
    try:
        return max(process.wait() for process in processes)
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
