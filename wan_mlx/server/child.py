"""A process of the server's own that speaks JSON, an object a line, on its standard input and output.

It ends when the server does, however that ends: its standard input is then at its end, which `follow` notices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..cli.terminal import write

# A group of its own: Ctrl-C is for the server alone. Not a session: Linux shares the cores out between sessions first
# (autogroups), so that the worker's niceness would count for nothing.
START = "import os, sys; os.setpgrp(); sys.path[:] = {path!r}; from {module} import main; sys.exit(main({arguments!r}))"
LAST_WORDS = 20  # lines of its standard error
Line = dict[str, Any]


class Child:
    """A process that runs ``module``'s ``main`` with ``arguments``.

    Args:
        hear: called with each object that it says, in a thread of this child's.
        gone: called with how it ended, in words, in that thread, once it has ended.
        command: that is run instead, and says and hears the same.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        hear: Callable[[Line], Any],
        gone: Callable[[str], Any],
        command: Sequence[str] = (),
    ):
        # The packages of this process, and never those of the folder that one happens to be in.
        path = [os.path.abspath(entry) for entry in sys.path if entry]
        self._hear, self._gone = hear, gone
        self._process = subprocess.Popen(
            command or [sys.executable, "-c", START.format(path=path, module=module, arguments=arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS)
        self._sending = threading.Lock()
        self._words = threading.Thread(target=self._read_words, daemon=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._words.start()
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, line: Mapping[str, Any]) -> None:
        """Say an object to it; it is lost if the process has ended."""
        try:
            with self._sending:
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps(line).encode() + b"\n")
                self._process.stdin.flush()
        except (OSError, ValueError):  # ended; ``gone`` tells
            pass

    def kill(self) -> None:
        """End it at once: whatever it does is made to bear that."""
        self._process.kill()

    def end(self) -> None:
        """Kill it, and wait for its end."""
        self.kill()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                said = json.loads(line)
            except ValueError:  # a package that prints
                continue
            if isinstance(said, dict):
                self._hear(said)
        code = self._process.wait()
        self._words.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            try:
                assert pipe is not None
                pipe.close()
            except OSError:
                pass
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._gone(f"{how}{f': {self._last_words[-1]}' if self._last_words else ''}")

    def _read_words(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                self._last_words.append(text)
                write(text, to="stderr")


def follow(hear: Callable[[Line], Any]) -> None:
    """Have ``hear`` called with each object that comes on standard input, in a thread; at its end the process ends.

    The process's own standard input is empty from now on, for whatever else reads it.
    """
    own = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)

    def read() -> None:
        with os.fdopen(own, "rb") as lines:
            for line in lines:
                hear(json.loads(line))
        os._exit(0)  # nobody is left to work for; what is made is kept

    threading.Thread(target=read, name="wan_mlx-orders", daemon=True).start()
