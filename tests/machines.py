"""Several processes of this machine as if they were several machines: MLX's ring, over loopback."""

import json
import os
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

TIME = 120  # seconds that processes may take


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start(
    folder: Path, size: int, command: list[str], own: dict[int, list[str]] | None = None, **variables: str
) -> list[subprocess.Popen]:
    """The command once for each rank, as `mlx.launch --backend ring` starts it; ``own``: other commands, by rank."""
    hosts = folder / f"hosts{size}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    common = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    if size > 1:
        common["MLX_HOSTFILE"] = str(hosts)
    return [
        subprocess.Popen(
            (own or {}).get(rank, command), env={**common, "MLX_RANK": str(rank)}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        for rank in range(size)
    ]


def ended(processes: list[subprocess.Popen], seconds: float = TIME) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each, when all have ended."""
    try:
        said = [process.communicate(timeout=seconds) for process in processes]
        return [(process.returncode, *words) for process, words in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.wait()
