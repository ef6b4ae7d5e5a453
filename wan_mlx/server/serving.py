"""The server's process: from the address to the app, until it is told to end."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from ..errors import UsageError, WanError
from .app import make_app
from .fields import is_name
from .guard import is_loopback, names_of
from .library import default_library
from .machines import Machine
from .studio import Studio

PATIENCE = 3  # seconds for open connections, once it is told to end
TOKEN = "WAN_MLX_TOKEN"  # of the environment
LEAST_TOKEN = 16  # characters
ANY = ("0.0.0.0", "::", "")


class Serving:
    """A server that listens, and begins to answer with `run`.

    Attributes:
        address: of its page, with the token if it needs one, which it does beyond loopback.

    Raises:
        UsageError: an argument is wrong.
        WanError: the port is taken, or the address is not this machine's.
    """

    def __init__(
        self, host: str, port: int, library: Path | None, model: str, machines: Sequence[Machine] = ()
    ):
        if not 0 <= port < 65_536:
            raise UsageError(f"--port is {port}, expected 0 to 65535; nearest: {min(max(port, 0), 65_535)}")
        if not is_name(model):
            raise UsageError(f"--model is {model!r}, expected one that `wan-mlx models` lists, or owner/name on a hub")
        self.token = None if is_loopback(host) else os.environ.get(TOKEN) or secrets.token_urlsafe(24)
        if self.token is not None and len(self.token) < LEAST_TOKEN:
            raise UsageError(f"{TOKEN} has {len(self.token)} characters, expected at least {LEAST_TOKEN}")
        self.machines = machines
        self.host, self.library, self.model = host, (library or default_library()).expanduser(), model
        self._socket = listen(host, port)
        name = "127.0.0.1" if host in ANY else f"[{host}]" if ":" in host else host
        query = f"?token={self.token}" if self.token else ""
        self.address = f"http://{name}:{self._socket.getsockname()[1]}/{query}"

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()

    def run(self, opens_browser: bool = False) -> int:
        """Serve until a signal comes; returns the exit code."""
        app = make_app(Studio(self.library, self.model, machines=self.machines), names_of(self.host), self.token)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=PATIENCE, server_header=False,
            ws="none",
        )  # fmt: skip
        server = uvicorn.Server(config)
        if opens_browser:
            threading.Timer(0.3, webbrowser.open, [self.address]).start()
        server.run(sockets=[self._socket])
        return 0 if server.started else 1


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; whoever connects before the app is there waits.

    Raises:
        WanError: the port is taken, or the address is not this machine's.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)
    except OSError as error:
        found.close()
        reason = error.strerror or str(error)
        raise WanError(f"{host} port {port} cannot be listened at ({reason}); another: --port 0") from error
    return found
