"""``python docs/make_minutes.py`` writes the tables of minutes for each Mac anew, in the pages that have one.

A run's floating-point operations (`wan_mlx.planning`) over a share of the chip's published rate; whether it fits, by
the plan for what MLX may hold. Where times.md has measured that very run on that chip, its time stands there instead.
"""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import wan_mlx
from wan_mlx.models.chips import CHIPS
from wan_mlx.planning import peak_memory

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "README.zh-CN.md", "docs/times.md", "docs/zh/choosing-a-model.md")
# What products in 16 bits reach of the published rate of float32: another program in MLX took 86 s for three passes of
# T2V-1.3B on an M4 Max, which is 0.57 of it.
SHARE = 0.6
# Memory in GB of the smallest Mac sold with the chip.
MEMORY = {
    "M1": 8, "M1 Pro": 16, "M1 Max": 32, "M1 Ultra": 64, "M2": 8, "M2 Pro": 16, "M2 Max": 32, "M2 Ultra": 64,
    "M3": 8, "M3 Pro": 18, "M3 Max": 36, "M3 Ultra": 96, "M4": 16, "M4 Pro": 24, "M4 Max": 36,
    "M5": 16, "M5 Pro": 24, "M5 Max": 36,
}  # fmt: skip
# On the first pages.
FEW = {"M1": 8, "M4": 16, "M5": 16, "M4 Pro": 24, "M4 Max": 64, "M3 Ultra": 96}


class Run(NamedTuple):
    """Five seconds of video; ``few``: by a distilled LoRA, without guidance."""

    model: str
    size: tuple[int, int]
    steps: int
    few: bool = False
    frames: int = 81

    def title(self, chinese: bool) -> str:
        size = "x".join(map(str, self.size))
        return f"{self.model}, {size}, {self.steps} {'步' if chinese else 'steps'}"


RUNS = (
    Run("t2v-1.3B", (832, 480), 50), Run("t2v-1.3B", (832, 480), 4, few=True),
    Run("t2v-14B", (832, 480), 50), Run("t2v-14B", (832, 480), 4, few=True), Run("t2v-14B", (1280, 720), 50),
    Run("i2v-14B-480P", (832, 480), 40), Run("i2v-14B-480P", (832, 480), 4, few=True),
    Run("ti2v-5B", (1280, 704), 50, frames=121),
)  # fmt: skip
UNITS = {False: ("min", "h", "days", "no"), True: ("分钟", "小时", "天", "不行")}


def usable(memory: int) -> int:
    """Bytes that MLX may hold on a Mac of so many GB: 95 % of macOS's usual share."""
    return round(0.95 * memory * (2 / 3 if memory <= 36 else 3 / 4) * 1e9)


@cache
def work(run: Run, memory: int) -> float | None:
    """Floating-point operations; None if it does not fit into so many GB."""
    gpu = {"on_cpu": lambda: False, "on_metal": lambda: True, "has_fused_kernel": lambda *_: True}
    with patch.multiple(peak_memory, **gpu):
        options = {"guidance_scale": 1.0} if run.few else {}
        plan = wan_mlx.plan(run.model, *run.size, run.frames, run.steps, usable(memory), **options)
    return sum(row.flop for row in plan.rows) if plan.fits else None


def seconds(run: Run, chip: str, memory: int) -> float | None:
    """Computed; None if it does not fit."""
    flop = work(run, memory)
    return flop and flop / (SHARE * 1e12 * CHIPS[chip].tflops)


def measured(text: str) -> dict[tuple[str, Run], float]:
    """Seconds of the runs in times.md's table that are ours, by chip."""
    found = {}
    for line in re.findall(r"^\| (Apple .*) \|$", text, re.MULTILINE):
        chip, _, model, size, frames, steps, options, took, *_ = line.split(" | ")
        for run in RUNS:
            same = [run.model, "x".join(map(str, run.size)), str(run.frames), str(run.steps)]
            if [model, size, frames, steps] == same and ("--recipe" in options if run.few else options == "-"):
                found[chip.removeprefix("Apple "), run] = float(took)
    return found


def words(time: float, chinese: bool) -> str:
    """Two digits, with the unit that suits."""
    minutes, hours, days, _ = UNITS[chinese]
    scales = (60, minutes, 5400), (3600, hours, 172800), (86400, days, float("inf"))
    value, unit = next((time / length, unit) for length, unit, most in scales if time < most)
    return f"{value:.1f} {unit}" if value < 10 else f"{float(f'{value:.2g}'):.0f} {unit}"


def table(macs: dict[str, int], times: dict[tuple[str, Run], float], chinese: bool = False) -> str:
    """A row for each Mac, a column for each run."""
    titles = " | ".join(run.title(chinese) for run in RUNS)
    lines = [f"| Mac | {titles} |\n", "|---" * (len(RUNS) + 1) + "|\n"]
    for chip, memory in macs.items():
        cells = []
        for run in RUNS:
            computed = seconds(run, chip, memory)
            if (chip, run) in times:
                cells.append(f"**{words(times[chip, run], chinese)}**")
            else:
                cells.append(f"≈ {words(computed, chinese)}" if computed else UNITS[chinese][-1])
        lines.append(f"| {chip}, {memory} GB | {' | '.join(cells)} |\n")
    return "".join(lines)


def page(text: str, times: dict[tuple[str, Run], float]) -> str:
    """A page with each table made anew: it stands below a comment, for all Macs or a few, in English or Chinese."""

    def made(found: re.Match) -> str:
        return found[1] + table(MEMORY if found[2] == "all" else FEW, times, chinese=found[3] == " zh")

    return re.sub(r"(<!-- minutes: (all|few)( zh)? -->\n)(?:\|.*\n)*", made, text)


if __name__ == "__main__":
    known = measured((ROOT / "docs/times.md").read_text(encoding="utf-8"))
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        (ROOT / name).write_text(page(text, known), encoding="utf-8")
