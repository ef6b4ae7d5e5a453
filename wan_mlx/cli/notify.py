"""The end of a long run: told by a notification on a Mac, elsewhere by the terminal's bell."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import Stopped, duration
from ..mac import show_notification

LONG = 180.0  # seconds


@contextmanager
def end_told(args: argparse.Namespace) -> Iterator[None]:
    """Within this block a run that ends after minutes is told, however it ends but by Ctrl-C."""
    begun, how = time.monotonic(), "is done"
    try:
        yield
    except BaseException as error:
        by_hand = isinstance(error, KeyboardInterrupt) and getattr(error, "why", "interrupted") == "interrupted"
        how = "" if by_hand else "was stopped" if isinstance(error, Stopped) else "failed"
        raise
    finally:
        took = time.monotonic() - begun
        if how and args.notify and took >= LONG:
            what = Path(args.output or args.resume or args.prompts or "").name or args.prompt or "the run"
            tell(f"{what[:80]} {how} after {duration(took)}")


def tell(text: str) -> None:
    """Show a notification, or else ring the terminal's bell, if there is a terminal."""
    if not show_notification("wan_mlx", text):
        with suppress(OSError, ValueError, AttributeError):  # closed
            if sys.stderr.isatty():
                sys.stderr.write("\a")
                sys.stderr.flush()
