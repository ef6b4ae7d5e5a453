"""``python docs/make_minutes.py`` writes the tables of computed minutes anew: in times.md, both READMEs and docs/zh.

A run's floating-point operations, by `wan_mlx.planning`, over a share of the chip's published rate. Where the table of
times.md has a row of that chip, model, size, length and number of steps, its time stands there instead.
"""

import re
from collections.abc import Callable
from pathlib import Path

import wan_mlx
from wan_mlx.models.chips import CHIPS
from wan_mlx.planning import peak_memory
from wan_mlx.presets import PRESETS

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "README.zh-CN.md", "docs/times.md", "docs/zh/choosing-a-model.md")
# Products in 16 bits reach about this share of a published rate of float32: what another program in MLX
# took on an M4 Max, 86 s for three passes of T2V-1.3B, was 0.57 of it.
SHARE = 0.6
# Memory of the smallest Mac with each chip, in GB, and what MLX may hold of it, as in choosing-a-model.md.
MEMORY = {
    "M1": 8, "M1 Pro": 16, "M1 Max": 32, "M1 Ultra": 64, "M2": 8, "M2 Pro": 16, "M2 Max": 32, "M2 Ultra": 64,
    "M3": 8, "M3 Pro": 18, "M3 Max": 36, "M3 Ultra": 96, "M4": 16, "M4 Pro": 24, "M4 Max": 36,
    "M5": 16, "M5 Pro": 24, "M5 Max": 36,
}  # fmt: skip
SHORT = ("M1", "M2", "M4", "M4 Pro", "M4 Max", "M3 Ultra", "M5")  # of the first page
# Model, width, height, frames, steps, whether with guidance.
RUNS = (
    ("t2v-1.3B", 832, 480, 81, 50, True),
    ("t2v-14B", 832, 480, 81, 50, True),
    ("t2v-14B", 1280, 720, 81, 50, True),
    ("i2v-14B-480P", 832, 480, 81, 40, True),
)
FEW = (("t2v-1.3B", 832, 480, 81, 8, False), ("t2v-14B", 832, 480, 81, 4, False), ("i2v-14B-480P", 832, 480, 81, 4, False))
