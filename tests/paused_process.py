"""A command line in a process of its own that waits at a given place: to be interrupted or killed just there."""

import os
import subprocess
import sys
import threading

SCRIPT = """
import select, signal, sys
from wan_mlx import denoise, generate, opened, storage
from wan_mlx.media import write as media

def held(function, number):
    calls = iter(range(1_000_000))
    def waiting(*args, **options):
        if next(calls) == number:
            print("holding", flush=True)
            while not select.select([sys.stdin], [], [], 0.1)[0]:
                pass  # a signal that came just before it slept is seen when it wakes
            sys.stdin.readline()
        return function(*args, **options)
    return waiting

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would have it ignored
where, number = sys.argv[1], int(sys.argv[2])
if where == "step":  # in the middle of step `number`
    denoise.guided_velocity = held(denoise.guided_velocity, number)
elif where == "saving":  # with a file half done
    storage.flush = held(storage.flush, number)
elif where == "frame":  # in the middle of decoding latent frame `number`
    opened.to_uint8 = held(opened.to_uint8, number)
elif where == "encoding":  # in the thread that writes the video
    media.VideoWriter.write = held(media.VideoWriter.write, number)
sys.exit(generate.main(sys.argv[3:]))
"""


class PausedProcess:
    """``python -m wan_mlx.generate`` with these arguments, waiting at ``where``: see `SCRIPT`.

    Attributes:
        process: its subprocess.Popen, with text pipes.
    """

    def __init__(self, where: str, number: int, *arguments: str):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, where, str(number), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.errors = ""
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        while (line := self.process.stdout.readline()) != "holding\n":
            assert line, self.finish()[1]  # it ended without

    def _read(self) -> None:
        while text := os.read(self.process.stderr.fileno(), 4096).decode("utf-8", "replace"):
            with self._said:
                self.errors += text
                self._said.notify_all()

    def wait_for(self, words: str) -> None:
        """Until standard error has said them."""
        with self._said:
            assert self._said.wait_for(lambda: words in self.errors, timeout=60), self.errors

    def go_on(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self) -> tuple[int, str]:
        """Exit code and standard error, once it has ended."""
        code = self.process.wait(timeout=60)
        self._reader.join(timeout=60)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()
        return code, self.errors


def processes_naming(text: str) -> list[str]:
    """Command lines of running processes that contain ``text``."""
    listing = subprocess.run(["ps", "-axww", "-o", "command"], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if text in line and "-axww" not in line]


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a command line that waits nowhere."""
    done = subprocess.run([sys.executable, "-m", "wan_mlx.generate", *arguments], capture_output=True, text=True)
    return done.returncode, done.stderr
