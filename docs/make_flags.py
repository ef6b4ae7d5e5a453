"""``python docs/make_flags.py`` writes the tables of flags.md and zh/flags.md anew, from the table of options."""

import csv
import re
import zlib
from pathlib import Path

from wan_mlx import options
from wan_mlx.option import Option
from wan_mlx.other_words import WORDS

PAGE, CHINESE = Path(__file__).with_name("flags.md"), Path(__file__).parent / "zh/flags.md"
# Flag, `stamp` of the English text that was translated, and the Chinese text, with tabs between them.
TRANSLATED = Path(options.__file__).parent / "assets/flags.zh.tsv"


def translations() -> dict[str, tuple[str, str]]:
    """Flag → the stamp and the text in Chinese."""
    rows = csv.reader(TRANSLATED.read_text(encoding="utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    return {flag: (stamp, text) for flag, stamp, text in rows}


def english(option: Option) -> str:
    """What docs/flags.md says of an option."""
    text = option.described + (f". {option.more}" if option.more else "")
    text = re.sub(r"(?<!\S)\(?(--[\w-]+)", lambda found: found[0].replace(found[1], f"`{found[1]}`"), text)
    return text or option.no_effect


def stamp(option: Option) -> str:
    """Tells texts in English apart, so that one in Chinese can tell of which it is the translation."""
    return f"{zlib.crc32(english(option).encode()):08x}"


def table_of(group: str, chinese: bool = False) -> str:
    """The flags of a group as a table in Markdown."""
    texts = translations() if chinese else {}
    lines = ["| 参数 | Python | |" if chinese else "| flag | in Python | |", "|---|---|---|"]
    for option in options.flags():
        if option.group == group:
            first, *others = option.flags
            value = f"[{option.metavar}]" if option.value_is_optional else option.metavar or ""
            value = "\\|".join(option.choices) if value.startswith("{") else value
            others = [*option.short, *others]
            spelled = [f"`{first} {value}`" if value else f"`{first}`", *(f"`{flag}`" for flag in others)]
            names = () if option.of == options.COMMAND else option.sets or (option.keyword,)
            keyword = ", ".join(f"`{name}`" for name in names)
            text = texts[first][1] if chinese else english(option)
            lines.append(f"| {', '.join(spelled)} | {keyword} | {text} |")
    return "\n".join(lines) + "\n"


def words(chinese: bool) -> str:
    """Other programs' words for our flags."""
    lines = ["| 这里 | ComfyUI | Diffusers |" if chinese else "| here | ComfyUI | Diffusers |", "|---|---|---|"]
    for ours, *others in WORDS:
        cells = [re.sub(r"(\w+)(?=[^()]*(?:\(|$))", r"`\1`", text.replace("=", "")) for text in others]
        lines.append(f"| `{ours}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(text: str, chinese: bool = False) -> str:
    """A page with each table made anew: it stands below a comment that names the group."""
    text = re.sub(r"(<!-- flags: (.*?) -->\n)(?:\|.*\n)*", lambda found: found[1] + table_of(found[2], chinese), text)
    return re.sub(r"(<!-- words -->\n)(?:\|.*\n)*", lambda found: found[1] + words(chinese), text)


if __name__ == "__main__":
    for path in (PAGE, CHINESE):
        path.write_text(page(path.read_text(encoding="utf-8"), path == CHINESE), encoding="utf-8")
