"""``python benchmarks/crowd.py ADDRESS ID CLIENTS LISTENERS``: clients of ``wan-mlx serve``, in one light process.

Each client keeps a connection and asks for the video's status once a second, each listener follows its events, until
standard input ends; then the times of the answers are printed, as JSON. A time runs from the sending of a request to
the arrival of its answer's last byte at this machine's socket, which the kernel notes (Linux), so that the server's
time is measured and not how long this process waits for a core to read it; "read" has the times until it was read.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import sys
import time
from urllib.parse import urlsplit

PERIOD = 1.0  # seconds between two questions of one client
LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
NOTES_ARRIVAL = getattr(socket, "SO_TIMESTAMPNS", 35 if sys.platform == "linux" else None)
TIMESPEC = struct.Struct("@ll")


class Crowd:
    """Clients and listeners of one video."""

    def __init__(self, address: str, id: str):
        where = urlsplit(address)
        self.host, self.port, self.id = where.hostname or "", where.port or 80, id
        self.arrived: list[float] = []
        self.read: list[float] = []
        self.events = 0

    def _connected(self) -> socket.socket:
        found = socket.create_connection((self.host, self.port))
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if NOTES_ARRIVAL is not None:
            found.setsockopt(socket.SOL_SOCKET, NOTES_ARRIVAL, 1)
        found.setblocking(False)
        return found

    def _request(self, path: str) -> bytes:
        return f"GET /v1/videos/{self.id}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n\r\n".encode()

    async def poll(self, late: float) -> None:
        """Ask once a second, at this part of the second."""
        loop, connection, request = asyncio.get_running_loop(), self._connected(), self._request("")
        next_at = loop.time() + late
        while True:
            await asyncio.sleep(max(0.0, next_at - loop.time()))
            next_at = max(next_at, loop.time()) + PERIOD
            sent = time.time_ns()
            connection.send(request)
            arrived = await self._answer(loop, connection)
            self.arrived.append((arrived - sent) / 1e9)
            self.read.append((time.time_ns() - sent) / 1e9)

    async def _answer(self, loop: asyncio.AbstractEventLoop, connection: socket.socket) -> int:
        """When the answer's last byte was there, in nanoseconds."""
        answer = b""
        while True:
            readable = loop.create_future()
            loop.add_reader(connection, readable.set_result, None)
            await readable
            loop.remove_reader(connection)
            data, notes, _, _ = connection.recvmsg(1 << 16, 256)
            at = time.time_ns()
            for _, kind, note in notes:
                if kind == NOTES_ARRIVAL:
                    seconds, rest = TIMESPEC.unpack(note[: TIMESPEC.size])
                    at = seconds * 1_000_000_000 + rest
            assert data, "the server closed the connection"
            answer += data
            head, end, body = answer.partition(b"\r\n\r\n")
            if end and len(body) >= int(LENGTH.search(head)[1]):  # type: ignore[index]
                assert head.startswith(b"HTTP/1.1 200"), head
                return at

    async def listen(self) -> None:
        """Follow the events, until the stream ends."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(self._request("/events"))
        while line := await reader.readline():
            self.events += line.startswith(b"data:")

    async def run(self, clients: int, listeners: int) -> None:
        tasks = [asyncio.create_task(self.poll(number * PERIOD / clients)) for number in range(clients)]
        tasks += [asyncio.create_task(self.listen()) for _ in range(listeners)]
        await asyncio.to_thread(sys.stdin.read)
        for task in tasks:
            if task.done():
                task.result()  # of a client that failed
            task.cancel()


def main() -> None:
    address, id, clients, listeners = sys.argv[1:]
    crowd = Crowd(address, id)
    asyncio.run(crowd.run(int(clients), int(listeners)))
    print(json.dumps({"arrived": crowd.arrived, "read": crowd.read, "events": crowd.events}))


if __name__ == "__main__":
    main()
