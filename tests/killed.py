"""A command line in a process of its own that is killed, as by kill -9, just before one of its file operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, os, signal, sys

number, folder, operations = int(sys.argv[1]), os.getcwd(), []

def watch(event, details):
    if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink",
                     "subprocess.Popen"):
        return
    place = details[-1 if event in ("os.link", "os.symlink") else 1 if event == "os.rename" else 0]
    if event == "subprocess.Popen":
        place = "a program"
    elif isinstance(place, int) or not os.path.abspath(os.fsdecode(place)).startswith(folder + os.sep):
        return
    if len(operations) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    operations.append((event.removeprefix("os."), os.path.basename(os.fsdecode(place))))

from wan_mlx.cli.main import main
from wan_mlx import generate, opened
sys.addaudithook(watch)
code = main(sys.argv[2:])
print(json.dumps(operations))
sys.exit(code)
"""


class KilledProcess:
    """The command line ``arguments`` in ``folder``, killed before operation ``number``; -1 for never."""

    def __init__(self, arguments: list[str], folder: Path, number: int = -1):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(number), *arguments], cwd=folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def finish(self) -> tuple[int, str, str]:
        """Exit code (-9 if it was killed), standard output and error."""
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err

    @classmethod
    def operations(cls, arguments: list[str], folder: Path) -> list[tuple[str, str]]:
        """All operations of an uninterrupted run: what is done, and the name of the file."""
        code, out, err = cls(arguments, folder).finish()
        assert code == 0, err
        return [tuple(operation) for operation in json.loads(out.splitlines()[-1])]
