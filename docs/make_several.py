"""``python docs/make_several.py`` writes the table of several-macs.md and zh/several-macs.md anew, from predictions."""

import re
from pathlib import Path

from wan_mlx.planning.several import AUTO, LINKS, TYPICAL, Work, choose_mode
from wan_mlx.presets import PRESETS

PAGES = [Path(__file__).with_name("several-macs.md"), Path(__file__).parent / "zh/several-macs.md"]
VIDEOS = [("t2v-1.3B", (832, 480)), ("t2v-14B", (832, 480)), ("t2v-14B", (1280, 720))]
MACS = (2, 4, 8)
HEADS = ["model, size", "passes", "模型与尺寸", "遍数"]


def table(chinese: bool = False) -> str:
    """Times as fast, in Markdown."""
    lines = [f"| {' | '.join([*HEADS[2 * chinese :][:2], *(f'{name}: 2 / 4 / 8' for name in LINKS)])} |"]
    lines.append("|---" * (2 + len(LINKS)) + "|")
    for model, size in VIDEOS:
        preset = PRESETS[model]
        tokens = preset.geometry.seq_len(preset.geometry.latent_shape(*size, 81))
        for passes in (2, 1):
            work, cells = Work(preset.transformer, tokens, TYPICAL, passes), []
            for link in LINKS.values():
                modes = [choose_mode(AUTO, work.config, tokens, passes, count, link, TYPICAL) for count in MACS]
                gains = [work.gain(mode, count, link) for mode, count in zip(modes, MACS, strict=True)]
                cells.append(" / ".join(f"{gain:.2f}" for gain in gains))
            lines.append(f"| {model}, {size[0]}x{size[1]} | {passes} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(text: str, chinese: bool) -> str:
    """The page with its table."""
    return re.sub(r"(<!-- several -->\n)(?:\|.*\n)*", lambda found: found[1] + table(chinese), text)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8"), "zh" in path.parts), encoding="utf-8")
