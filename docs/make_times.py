"""``python docs/make_times.py FILE ...`` puts the runs in pasted blocks of ``doctor --share`` into times.md's table.

Without a file, the blocks are read from the standard input.
"""

import fileinput
import re
from pathlib import Path

from wan_mlx.cli.doctor import BEGIN, END, RUN

PAGE = Path(__file__).with_name("times.md")
TABLE = re.compile(r"(<!-- times -->\n\|.*\n\|.*\n)((?:\|.*\n)*)")
OF_RUN = 7  # values in a line: model, size, frames, steps, options, seconds, peak


def rows_of(text: str) -> list[list[str]]:
    """The rows in pasted text: chip, memory, the values of a run, MLX.

    Raises:
        ValueError: a run's line has not all values, or they are not numbers.
    """
    found = []
    for block in re.findall(f"{re.escape(BEGIN)}\n(.*?){re.escape(END)}", text.replace("\r\n", "\n"), re.DOTALL):
        about = dict(re.findall(r"^(chip|memory|mlx): (.*?)\s*$", block, re.MULTILINE))
        for line in re.findall(r"^run: .*$", block, re.MULTILINE):
            if line == RUN:
                continue
            values = [value.strip() for value in line.removeprefix("run:").split(",")]
            values[-1] = values[-1].removesuffix("GiB").strip()
            if len(values) != OF_RUN or not re.fullmatch(r"\d+x\d+", values[1]) or "|" in line:
                raise ValueError(f"{line!r}: expected {RUN!r}")
            for value in (*values[2:4], *values[5:]):
                float(value)
            found.append([about["chip"], about["memory"], *values, about["mlx"].split(",")[0]])
    return found


def page(text: str, rows: list[list[str]]) -> str:
    """docs/times.md with these rows: of two for the same run the later one stays."""
    head, body = TABLE.search(text).groups()
    old = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    table = {tuple(row[:7]): row for row in [*old, *rows]}
    lines = [f"| {' | '.join(row)} |\n" for _, row in sorted(table.items())]
    return TABLE.sub(lambda _: head + "".join(lines), text)


if __name__ == "__main__":
    given = "".join(fileinput.input(encoding="utf-8"))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows_of(given)), encoding="utf-8")
