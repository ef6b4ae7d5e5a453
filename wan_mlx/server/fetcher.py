"""The fetcher: a process that downloads a model, and may be killed: what has arrived is kept, and the next goes on."""

from __future__ import annotations

from ..cli.terminal import Terminal, explain
from ..errors import Stopped
from ..hub.resolve import Places
from .child import follow


def main(words: list[str]) -> int:
    """Fetch the model that is named, from the hub that is named; says what ``wan-mlx --json`` says."""
    model, source = words
    say = Terminal(as_json=True)
    follow(lambda order: None)
    try:
        Places(model).fetch(source, say)
    except (Exception, Stopped) as error:
        return say.fail(*explain(error)) if isinstance(error, Exception) else 1
    return 0
