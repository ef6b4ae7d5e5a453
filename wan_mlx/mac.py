"""Questions to macOS: staying awake, the battery, free memory, notifications, files past the cache.

Elsewhere nothing is known.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

F_NOCACHE = 48  # of fcntl.h


@contextmanager
def awake(wanted: bool = True) -> Iterator[None]:
    """Within this block an idle Mac stays awake, if ``wanted``; its display may sleep. A closed lid ends that."""
    if not (wanted and can_stay_awake()):
        yield
        return
    # It ends with this process (-w), even if that is killed; in a session of its own Ctrl-C does not end it before.
    process = subprocess.Popen(
        ["caffeinate", "-i", "-w", str(os.getpid())], stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def can_stay_awake() -> bool:
    """Whether this is macOS, and has its program for that."""
    return sys.platform == "darwin" and shutil.which("caffeinate") is not None


def show_notification(title: str, text: str) -> bool:
    """Show a notification of macOS's; False where it cannot be. ``text`` is never part of a script."""
    if sys.platform != "darwin" or shutil.which("osascript") is None:
        return False
    lines = "on run argv", "display notification (item 2 of argv) with title (item 1 of argv)", "end run"
    command = ["osascript", *(word for line in lines for word in ("-e", line)), title, text]
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20).returncode == 0
    except (OSError, ValueError, subprocess.SubprocessError):
        return False


def tf32_is_on() -> bool:
    """Whether the environment has MLX round float32 to TF32 where the GPU can: read as MLX does, by C's atoi."""
    number = re.match(r"\s*[+-]?\d+", os.environ.get("MLX_ENABLE_TF32", "1"))
    return number is not None and int(number[0]) != 0


def battery() -> int | None:
    """Percent left in the battery that the Mac runs on; None on mains power, or where it is not known."""
    said = _said_by("pmset", "-g", "batt")
    left = re.search(r"(\d+)%", said)
    return int(left[1]) if left and "'Battery Power'" in said else None


def free_memory() -> int | None:
    """Bytes that macOS can give away; None where it is not known.

    Pages that are free, that can be read or made again (speculative, purgeable), and inactive ones. When macOS speaks
    of memory pressure, many of the latter are other programs' and would be swapped out: half of them count.
    """
    said = _said_by("vm_stat")
    size = re.search(r"page size of (\d+) bytes", said)
    pages = {name: int(count) for name, count in re.findall(r"^Pages (\w+): +(\d+)\.$", said, re.MULTILINE)}
    if size is None or "free" not in pages:
        return None
    pressed = _said_by("sysctl", "-n", "kern.memorystatus_vm_pressure_level").strip() not in ("", "1")  # 1 is normal
    spare = pages.get("inactive", 0) // (2 if pressed else 1)
    return int(size[1]) * (spare + sum(pages.get(name, 0) for name in ("free", "speculative", "purgeable")))


def keep_out_of_cache(file: BinaryIO) -> None:
    """Have macOS read an opened file without keeping it in the system's cache."""
    import fcntl  # not on Windows

    fcntl.fcntl(file, F_NOCACHE, 1)


def _said_by(*command: str) -> str:
    """The output of a program of macOS; none elsewhere, or where it is missing."""
    if sys.platform != "darwin" or shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except subprocess.TimeoutExpired:
        return ""
