"""What README.md, README.zh-CN.md and docs/ hold: blocks between fences, the commands in them, headings."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wan_mlx import options
from wan_mlx.cli.commands import COMMANDS as COMMANDS_OF_OURS
from wan_mlx.cli.commands import as_flags

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", "examples/nano/README.md",
         *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]  # fmt: skip
# They install (see test_install.py), or run the tests themselves.
NOT_RUN = ("pip install", "pytest", "ruff", "curl", "uv ", "pipx ", "python3.12 -m venv", "'~/wan-mlx/bin/pip' install",
           "WAN_MLX_TESTS_ON=gpu pytest", "python tests/")  # fmt: skip
PROGRAMS = ("wan-mlx", "mlx.", "python", "pip", "uv", "pipx", "pytest")  # a line that begins so is a command


@dataclass(frozen=True)
class Block:
    """What stands between two fences, and where."""

    page: str
    language: str
    text: str


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
            found.append(Block(page, match[2], re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE)))
    return found


def commands() -> dict[str, tuple[str, ...]]:
    """Each command once, without what only tells two alike apart → its words."""
    found: dict[str, tuple[str, ...]] = {}
    for block in blocks():
        if block.language != "sh":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            line = re.sub(r'^eval "\$\((.*)\)"$', r"\1", line.strip())
            words = shlex.split(line, comments=True)
            for command in split(words):
                text = shlex.join(command)
                if command and not text.startswith(NOT_RUN):
                    found.setdefault(re.sub(r"(--(?:prompt|output)) ('.*?'|\S+)", r"\1", text), tuple(command))
    return found


def split(words: list[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    return found


def spelled_out(words: Sequence[str]) -> list[str]:
    """A command with long flags for short ones, and for words without one; of `mlx.launch` what it starts."""
    if words[0] == "mlx.launch":
        words = ["wan-mlx", *words[words.index("wan_mlx.generate") + 1 :]]
    if "wan-mlx" not in words[:2]:
        return [*words]
    begin = words.index("wan-mlx") + 1
    is_said = words[begin] in COMMANDS_OF_OURS
    name, rest = (words[begin], words[begin + 1 :]) if is_said else ("generate", words[begin:])
    if not COMMANDS_OF_OURS[name].takes or "--help-all" in rest:
        return [*words]
    long = {flag: option.flags[0] for option in options.flags() for flag in option.short}
    taken = options.keyed(COMMANDS_OF_OURS[name].takes).flags[0]
    found = [word.split("=", 1) if word.startswith(f"{taken}=") else [long.get(word, word)]
             for word in as_flags(name, list(rest), is_said)]  # fmt: skip
    return [*words[:begin], *(word for words in found for word in words)]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
            for head in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}  # fmt: skip
