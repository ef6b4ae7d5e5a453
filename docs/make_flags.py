"""``python docs/make_flags.py`` writes the tables of flags.md anew, from the table of options."""

import re
from pathlib import Path

from wan_mlx import options

PAGE = Path(__file__).with_name("flags.md")


def table_of(group: str) -> str:
    """The flags of a group as a table in Markdown."""
    lines = ["| flag | in Python | |", "|---|---|---|"]
    for option in options.flags():
        if option.group == group:
            first, *others = option.flags
            value = f"[{option.metavar}]" if option.value_is_optional else option.metavar or ""
            value = "\\|".join(option.choices) if value.startswith("{") else value
            spelled = [f"`{first} {value}`" if value else f"`{first}`", *(f"`{flag}`" for flag in others)]
            names = () if option.of == options.COMMAND else option.sets or (option.keyword,)
            keyword = ", ".join(f"`{name}`" for name in names)
            text = option.described + (f". {option.more}" if option.more else "")
            text = re.sub(r"(?<!\S)\(?(--[\w-]+)", lambda found: found[0].replace(found[1], f"`{found[1]}`"), text)
            lines.append(f"| {', '.join(spelled)} | {keyword} | {text} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """docs/flags.md with each table made anew: it stands below a comment that names the group."""
    return re.sub(r"(<!-- flags: (.*?) -->\n)(?:\|.*\n)*", lambda found: found[1] + table_of(found[2]), text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
