"""``wan-mlx serve`` in a process of its own, over a library, to be talked to and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

SCRIPT = "import sys; from wan_mlx.generate import main; sys.exit(main())"


class Served:
    """A server, within a ``with`` block.

    Attributes:
        client: of httpx.
        seconds: until its page was there.
    """

    def __init__(self, library: Path, *flags: str):
        begun = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        words = ["serve", "--no-browser", "--port", "0", "--library", str(library), *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, self.process.communicate()[1]
        self.client = httpx.Client(base_url=self.address, timeout=60)
        assert self.client.get("/").status_code == 200
        self.seconds = time.monotonic() - begun

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: Any) -> None:
        self.end(signal.SIGINT)

    def end(self, how: int = signal.SIGKILL) -> str:
        """End it by a signal; returns what it said on standard error."""
        self.process.send_signal(how)
        self.client.close()
        return self.process.communicate()[1]

    def ask(self, **fields: Any) -> str:
        """The id of a video that is asked for."""
        answer = self.client.post("/v1/videos", json=fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def video(self, id: str) -> dict[str, Any]:
        return self.client.get(f"/v1/videos/{id}").json()

    def until(self, id: str, *states: str, seconds: float = 120) -> dict[str, Any]:
        """The video, once it is in one of these states; "step" stands for a step that is done."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            video = self.video(id)
            if video["state"] in states or ("step" in states and video["step"]):
                return video
            time.sleep(0.02)
        raise AssertionError(video)
