"""The line between the machines that make one video: each hears within seconds if another is lost, silent or failed.

MLX's collectives have no time limits: whoever waits for a machine that has gone waits for ever, and cannot be
interrupted. So there is a second connection, TCP from every rank to rank 0. A thread of each process says that it
lives, and listens; if another does not, it says so in one line and ends its own process, whatever that is waiting for.
What a run keeps on disk bears that at any moment.

A process may live although its GPU, or the link, does not go on: so main threads say what they wait for (`WAITS`), and
the line tells it.

The line also carries words between main threads: what rank 0 wants done, and meeting points. Nobody burns a core while
he waits there, as they do in collectives.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any

from .errors import WanError

BEAT = 1.0  # seconds between two signs of life
SILENCE = 20.0  # seconds without any, after which a machine is taken for lost
REACH = 15.0  # seconds for reaching rank 0
PATIENCE = 2.0  # seconds, after which it is told who is waited for
FIRST_ENDS = 2.0  # seconds for which others outlive a failure of rank 0: `mlx.launch` ends all with the first to end
LAST_WORD = 5.0  # seconds for which one that failed waits, for whoever failed first to say so
HANG = 50.0  # seconds for which a GPU may be at work on what is waited for, or all machines wait for data
LONGER = 20  # or so many times as long as it has been before
Words = dict[str, Any]


class Waits:
    """What this process's main thread waits for, and since when."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._longest = 0.0  # that the GPU has been at work

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Within this block it waits for the "gpu", or for "data" of others."""
        self._since[what] = started = time.monotonic()
        try:
            yield
        finally:
            self._since.pop(what, None)
            if what == "gpu":
                self._longest = max(self._longest, time.monotonic() - started)

    def seconds(self, what: str) -> float:
        since = self._since.get(what)
        return 0.0 if since is None else time.monotonic() - since

    def gpu_hangs(self) -> bool:
        return self.seconds("gpu") > max(HANG, LONGER * self._longest)

    def begin_anew(self) -> None:
        """The process itself was asleep."""
        self._since = dict.fromkeys(self._since, time.monotonic())


WAITS = Waits()


def end_process(message: str) -> None:
    """Say a line on standard error, and end this process at once, with exit code 1."""
    with suppress(OSError):
        os.write(2, f"\nerror: {message}\n".encode(errors="backslashreplace"))
    os._exit(1)


class Heartbeat:
    """This process's end of the line.

    Args:
        rank, names: its rank, and the names of the machines, by rank.
        peers: connections that have said who they are: of rank 0 to all others, by rank; of others to rank 0.
        end: called with a line once another process is lost or has failed; does not return. `at_end` replaces it.
    """

    def __init__(self, rank: int, names: Sequence[str], peers: dict[int, socket.socket]):
        self.rank, self.names = rank, names
        self.at_end: Callable[[str], Any] = end_process
        self._peers, self._seen = peers, dict.fromkeys(peers, time.monotonic())
        self._waited = dict.fromkeys(peers, 0.0)  # seconds for which each has waited for data
        self._words: SimpleQueue[Words] = SimpleQueue()
        self._peeked: Words | None = None
        # Where each has come; None if nothing more will be heard of it.
        self._arrived: dict[int, SimpleQueue[str | None]] = {peer: SimpleQueue() for peer in peers}
        self._sending, self._ending = threading.Lock(), threading.Lock()
        self._left: set[int] = set()  # those that have said goodbye
        self._closed = False
        for peer, connection in peers.items():
            self._start(self._listen, peer, connection)
        self._start(self._beat)

    def named(self, rank: int) -> str:
        return f"{self.names[rank]} (rank {rank})"

    # Words between main threads

    def say(self, words: Words) -> None:
        """Rank 0: tell the others what is to be done."""
        for peer in self._peers:
            self._send(peer, {"do": words})

    def hear(self, keep: bool = False) -> Words:
        """Others: wait for what rank 0 wants done; ``keep`` leaves it for the next call."""
        found = self._words.get() if self._peeked is None else self._peeked
        self._peeked = found if keep else None
        return found

    def meet(self, where: str, waits: Callable[[str], Any] = lambda name: None) -> None:
        """Wait until all have come here; calls ``waits`` with the name of one that takes long.

        Raises:
            WanError: another has come elsewhere, or has ended.
        """
        for peer in self._peers:
            if self.rank:
                self._send(peer, {"at": where})
            try:
                came = self._arrived[peer].get(timeout=PATIENCE)
            except Empty:
                waits(self.named(peer))
                came = self._arrived[peer].get()
            if came is None:
                self._arrived[peer].put(None)
                raise WanError(f"{self.named(peer)} has ended")
            if came != where:
                raise WanError(f"{self.named(peer)} is at {came!r} where {self.named(self.rank)} is at {where!r}; "
                               "every machine must run the same command")  # fmt: skip
        if not self.rank:
            for peer in self._peers:
                self._send(peer, {"at": where})

    # The end

    def fail(self, message: str) -> None:
        """Tell the others that this process fails: they end, which is no news here."""
        self._closed = True
        for peer in self._peers:
            self._send(peer, {"failed": f"{self.named(self.rank)}: {message}"})

    def wait_for_cause(self) -> None:
        """A collective has failed here: have the line end this process with the reason, if it learns of one."""
        time.sleep(LAST_WORD)

    def close(self) -> None:
        """Leave in peace."""
        self._closed = True
        for peer, connection in self._peers.items():
            self._send(peer, {"bye": self.rank})
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def _end(self, message: str) -> None:
        with self._ending:
            if self._closed:
                return
            for peer in self._peers:
                self._send(peer, {"failed": message})
            self.at_end(message)
            self._closed = True  # only in tests does the process live on

    # The threads

    @staticmethod
    def _start(target: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, name="wan_mlx-heartbeat", daemon=True).start()

    def _send(self, peer: int, words: Words) -> None:
        with self._sending, suppress(OSError):  # of one that has gone the listener tells
            self._peers[peer].sendall(json.dumps(words).encode() + b"\n")

    def _listen(self, peer: int, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection.makefile("rb") as lines:
            for line in lines:
                self._seen[peer] = time.monotonic()
                words = json.loads(line)
                self._waited[peer] = words.get("waited", 0.0)
                if "do" in words:
                    self._words.put(words["do"])
                elif "at" in words:
                    self._arrived[peer].put(words["at"])
                elif "failed" in words:
                    if not peer:
                        time.sleep(FIRST_ENDS)
                    self._end(words["failed"])
                elif "bye" in words:
                    self._left.add(peer)
        if peer not in self._left:
            self._end(f"the connection to {self.named(peer)} was lost: its process or its machine has ended")
        self._arrived[peer].put(None)
        self._words.put({"end": True})  # where it is rank 0, who gives the orders

    def _beat(self) -> None:
        looked = time.monotonic()
        while not self._closed:
            time.sleep(BEAT)
            for peer in self._peers:
                self._send(peer, {"waited": WAITS.seconds("data")})
            now = time.monotonic()
            if now - looked > SILENCE / 2:  # this process itself was asleep: what it has not heard may be in the buffer
                self._seen = dict.fromkeys(self._seen, now)
                WAITS.begin_anew()
            looked = now
            for peer, seen in self._seen.items():
                if now - seen > SILENCE and peer not in self._left:
                    self._end(f"{self.named(peer)} has given no sign of life for {now - seen:.0f} s: it is stopped, "
                              "asleep or cut off")  # fmt: skip
            if WAITS.gpu_hangs():
                self._end(f"the GPU of {self.named(self.rank)} has not finished its work for "
                          f"{WAITS.seconds('gpu'):.0f} s: it hangs; restart that machine")  # fmt: skip
            there = [seconds for peer, seconds in self._waited.items() if peer not in self._left]
            if (not self.rank or self._left) and min([WAITS.seconds("data"), *there]) > HANG:  # rank 0 alone hears all
                self._end(
                    f"{self.named(min(self._left))} has ended, whose data are waited for" if self._left else
                    f"all machines have waited for each other's data for {HANG:.0f} s: the link hangs; try another "
                    "backend, cable or port"
                )  # fmt: skip


def listening() -> tuple[socket.socket, int]:
    """Rank 0's socket for the others, and its port."""
    found = socket.create_server(("", 0), backlog=64)
    return found, found.getsockname()[1]


def accept_all(server: socket.socket, size: int, token: str) -> dict[int, socket.socket]:
    """Connections to the ranks from 1 to ``size - 1``, which know the ``token``.

    Raises:
        WanError: one did not come.
    """
    found: dict[int, socket.socket] = {}
    until = time.monotonic() + REACH
    with server:
        while len(found) < size - 1:
            server.settimeout(max(0.1, until - time.monotonic()))
            try:
                connection, _ = server.accept()
                connection.settimeout(REACH)
                said, _, rank = connection.makefile("r").readline().strip().partition(" ")
            except OSError:
                missing = [str(rank) for rank in range(1, size) if rank not in found]
                raise WanError(f"rank {', '.join(missing)} did not reach this machine's port in "
                               f"{REACH:.0f} s; is there a firewall?") from None  # fmt: skip
            if said == token and rank.isdecimal() and 0 < int(rank) < size:
                connection.settimeout(None)
                found[int(rank)] = connection
            else:
                connection.close()
    return found


def reach(hosts: Sequence[str], port: int, token: str, rank: int) -> socket.socket:
    """A connection to rank 0, which is at one of these addresses.

    Raises:
        WanError: at none of them.
    """
    for host in dict.fromkeys(hosts):
        with suppress(OSError):
            connection = socket.create_connection((host, port), timeout=REACH / 3)
            connection.settimeout(None)
            connection.sendall(f"{token} {rank}\n".encode())
            return connection
    raise WanError(f"rank {rank} does not reach rank 0 at {', '.join(hosts)} port {port}; is there a firewall?")
