"""``python docs/make_formats.py`` writes the tables of formats.md anew, from the tables that the readers work by."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from wan_mlx.files.base import BLOCKS
from wan_mlx.files.gguf import PLAIN, TYPES
from wan_mlx.files.scaled_names import FORMATS, REFUSED, ROLES
from wan_mlx.other_models import OTHER_MODELS, SOURCES, OtherModel
from wan_mlx.presets import EXPERTS, PARTS
from wan_mlx.weights.checkpoint import FOLDERS
from wan_mlx.weights.gguf_blocks import EXACT, NEARLY_EXACT, PACKINGS
from wan_mlx.weights.layouts import LAYOUTS, UNUSED
from wan_mlx.weights.lora import ENDINGS
from wan_mlx.weights.lora_config import CHANGES_BASE, VARIANTS
from wan_mlx.weights.lora_config import REFUSED as REFUSED_ADAPTERS

PAGE = Path(__file__).with_name("formats.md")
Rows = Iterable[tuple[str, ...]]
ROLES_OF_ADAPTERS = {
    "down": "LoRA's first factor", "up": "LoRA's second factor", "up_bias": "LoRA of a bias", "alpha": "alpha",
    r"\2": "a factor of LoHa or LoKr", "dora_scale": "LyCORIS' DoRA", "magnitude": "PEFT's and Diffusers' DoRA",
    "diff": "a difference", "whole": "a whole tensor in place",
}  # fmt: skip


def folders() -> Rows:
    """The files of each part in a folder, by its layout."""
    yield "part", *FOLDERS
    for part in (*PARTS[:1], *EXPERTS, *PARTS[1:]):
        yield words(part), *(" or ".join(map(code, files.get(part, ()))) for files in FOLDERS.values())


def networks() -> Rows:
    """The names of tensors in a file."""
    yield "network", "names", "known by the keys", "left out"
    for layout in LAYOUTS:
        unused = codes(name for name, ours in layout.names.items() if ours == UNUSED)
        yield words(layout.component), layout.name, codes(layout.anchors), unused


def scaled() -> Rows:
    """The tensors of weights with scales."""
    yield "for a weight", "ends of names"
    told = {"data": "its numbers", "scale": "its scale", "second": "its second scale", "zero": "its zero point"}
    for role in dict.fromkeys(ROLES.values()):
        yield told.get(role, role), codes(end for end, its_role in ROLES.items() if its_role == role)
    yield "declared formats", codes(FORMATS)
    for kind in dict.fromkeys(REFUSED.values()):
        yield f"refused: {kind}", codes(end for end, its_kind in REFUSED.items() if its_kind == kind)


def gguf() -> Rows:
    """GGUF's types."""
    others = [name for name in PACKINGS if name not in (*EXACT, *NEARLY_EXACT)]
    unpacked = "unpacked to bfloat16; with `--quantize nearest` packed"
    yield "types", "in memory"
    yield ", ".join(EXACT), "stay packed, exactly the same numbers"
    yield ", ".join(NEARLY_EXACT), f"{unpacked}, scales rounded to float16"
    yield ", ".join(others), f"{unpacked} in the form that comes nearest"
    yield ", ".join(PLAIN), "as they are"
    yield ", ".join(name for name in TYPES.values() if name not in (*BLOCKS, *PLAIN)), "refused by name"


def adapters() -> Rows:
    """The keys of LoRAs."""
    yield "ends of keys", "change"
    for ending, (role, *_) in ENDINGS.items():
        yield code(ending), ROLES_OF_ADAPTERS[role]
    for pattern, kind in REFUSED_ADAPTERS.items():
        yield code(pattern), f"refused: {kind}"
    for entry, kind in VARIANTS.items():
        yield f"{code(entry)} in PEFT's configuration", f"refused: {kind}"
    yield f"`init_lora_weights` {codes(CHANGES_BASE)}", f"refused: {', '.join(CHANGES_BASE.values())}"


def others(kind: str) -> Rows:
    """Models that are named and not supported; ``kind``: of their files."""
    yield "model", "known by", "read in"
    for other in OTHER_MODELS:
        if other.kind == kind:
            yield other.name, "; or ".join(marks(other)), other.source


def marks(other: OtherModel) -> Iterator[str]:
    """How a model's files and folders show themselves, in words."""
    for scheme in other.keys:
        marks = scheme.split()
        lacks = codes(mark[1:] for mark in marks if mark.startswith("!"))
        yield codes(mark for mark in marks if not mark.startswith("!")) + (f" without {lacks}" if lacks else "")
    if other.sizes:
        yield codes(f"{name} = {value}" for name, value in other.sizes.items())
    for name, pattern in other.entries.items():
        yield codes([f"{name}: {pattern}"])
    if other.names and not (other.keys or other.sizes or other.entries):
        yield f"a name with {code(other.names)} alone"


def sources() -> Rows:
    """Where the marks were read."""
    yield "name", "code"
    yield from SOURCES.items()


def words(name: str) -> str:
    return name.replace("_", " ")


def code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def codes(names: Iterable[str]) -> str:
    return ", ".join(map(code, names))


TABLES = {make.__name__: make for make in (folders, networks, scaled, gguf, adapters, others, sources)}


def table(name: str) -> str:
    """A table in Markdown; ``name``: of `TABLES`, and its argument."""
    make, *argument = name.split()
    first, *rest = TABLES[make](*argument)
    lines = [f"| {' | '.join(cells)} |\n" for cells in (first, *rest)]
    return "".join([lines[0], "|---" * len(first) + "|\n", *lines[1:]])


def page(text: str) -> str:
    """docs/formats.md with each table made anew: it stands below a comment that names it."""
    return re.sub(r"(<!-- table: (.*?) -->\n)(?:\|.*\n)*", lambda found: found[1] + table(found[2]), text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
