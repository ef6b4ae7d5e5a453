"""Several machines that make one video: MLX's group of processes, and what is said among them.

`mlx.launch` starts the same command on every machine and tells each its rank; `open_group` finds that. All ranks call
the same collectives in the same order, from one thread. Whatever is gathered is waited for on the host before the GPU
may need it (NCCL apart): macOS ends GPU work that waits for seconds. `heartbeat` tells of machines that are gone.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import Differing, WanError
from .heartbeat import WAITS, Heartbeat, accept_all, listening, reach

START = 50.0  # seconds within which all ranks must have come; MLX itself may wait for ever
LATE = f"not all machines came within {START:.0f} s; see that each is reachable, and its command runs"
PROBE = 4 << 20  # bytes of each rank's piece, by which the link is tried and measured
LARGE_PROBE, QUICK = 64 << 20, 5e-3  # and of another, where that takes fewer seconds than these
PIECE = 16 << 20  # bytes that are broadcast at once: over a slow link, too, sooner than one that hangs is given up
# Variable of the environment that a backend needs → its name.
BACKENDS = {"MLX_HOSTFILE": "ring", "MLX_JACCL_COORDINATOR": "jaccl", "NCCL_HOST_IP": "nccl",
            "OMPI_COMM_WORLD_SIZE": "mpi"}  # fmt: skip


def backend_given() -> str | None:
    """The backend that the environment is prepared for; None where this process was not started as one of several."""
    found = next((name for variable, name in BACKENDS.items() if os.environ.get(variable)), None)
    if found == "ring":
        hosts = os.environ["MLX_HOSTFILE"]
        if not os.environ.get("MLX_RANK") or not os.path.isfile(hosts) or os.path.getsize(hosts) < 4:
            return None  # mlx.launch -n 1 writes an empty one
    return found


def rank_given() -> int:
    """This process's rank, by its environment; 0 where it is the only one."""
    rank = os.environ.get("MLX_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
    return int(rank) if backend_given() and rank.isdecimal() else 0


def awaited(*arrays: Any) -> None:
    """Wait for data of other machines; the heartbeat tells if all do so for ever."""
    with WAITS.of("data"):
        mx.eval(*arrays)


@dataclass(frozen=True)
class Link:
    """What the probe measured: bytes that a rank receives in a second, and seconds that the smallest exchange takes."""

    bytes_per_second: float
    latency: float


class Group:
    """The processes that make one video.

    Attributes:
        rank, size, backend: of this process, and of the group.
        on_host: whether the CPU moves the data, so that it must be waited for before the GPU may use it.
        heartbeat: the line to the others.
        link: measured when the group was made.
    """

    heartbeat: Heartbeat
    link: Link

    def __init__(self, group: Any, backend: str):
        self.rank, self.size, self.backend = group.rank(), group.size(), backend
        self.on_host = backend != "nccl"
        self._group = group
        device = mx.cpu if self.on_host else mx.gpu
        # Its own stream, so that data moves while others compute; several for sending and receiving at once.
        self._streams = [mx.new_thread_local_stream(device) for _ in range(5 if self.on_host else 1)]
        self._halves: dict[int, Any] = {}
        self._pairs: list[Any] = []  # NCCL's groups with a neighbour, of which the lower rank is even, and odd
        self._sent: list[mx.array] = []  # to neighbours, perhaps not there yet

    @property
    def stream(self) -> Any:
        """That of the collectives."""
        return self._streams[0]

    # Collectives

    def begin(self, piece: mx.array, ranks: range | None = None) -> mx.array:
        """Begin to gather everybody's ``piece`` (n, ...), of ``ranks`` alone if given, this one among them.

        Returns:
            (len(ranks) * n, ...), which `arrived` waits for.
        """
        if ranks is None or len(ranks) == self.size:
            self._settle()
            joined = mx.distributed.all_gather(piece, group=self._group, stream=self._streams[0])
        elif self.backend in ("nccl", "mpi"):
            half = self._halves.get(len(ranks))
            if half is None:
                half = self._halves[len(ranks)] = self._group.split(self.rank // len(ranks))
            joined = mx.distributed.all_gather(piece, group=half, stream=self._streams[0])
        else:
            joined = self._passed_along(piece, ranks)
        mx.async_eval(joined)
        return joined

    def _passed_along(self, piece: mx.array, ranks: range) -> mx.array:
        """Gather among neighbours: each hands on to the right what came from the left, and the other way round."""
        whole, *streams = self._streams
        place = self.rank - ranks.start
        found = {place: piece}
        for step, (out, into) in ((1, streams[:2]), (-1, streams[2:])):
            behind, ahead = (place, len(ranks) - 1 - place)[::step]
            for hop in range(behind + 1):
                moving = found[place - step * hop]
                if ahead:
                    self._sent.append(mx.distributed.send(moving, self.rank + step, group=self._group, stream=out))
                    mx.async_eval(self._sent[-1])
                if hop < behind:
                    more = mx.distributed.recv_like(piece, self.rank - step, group=self._group, stream=into)
                    mx.async_eval(more)
                    found[place - step * (hop + 1)] = more
        return mx.concatenate([found[index] for index in range(len(ranks))], stream=whole)

    def _settle(self) -> None:
        """Wait for what is being sent to neighbours: a collective uses the same sockets."""
        awaited(self._sent)
        self._sent = []

    def arrived(self, joined: mx.array) -> mx.array:
        """What `begin` began to gather, once it is here."""
        if self.on_host:
            awaited(joined)
        return joined

    # From neighbour to neighbour

    def pair_up(self) -> None:
        """Before pieces are handed down; all ranks come here."""
        if self.backend == "nccl" and not self._pairs:
            several = self.size > 2
            self._pairs = [self._group.split((self.rank + odd) // 2) for odd in (0, 1)] if several else [self._group]
        self._settle()

    def hand_down(self, piece: mx.array) -> mx.array:
        """Begin to hand a piece to the rank below, which takes it; once the result is evaluated, it is there."""
        mx.async_eval(piece)  # by itself, so that on CUDA the other stream waits for it by an event
        if self.backend == "nccl":
            return self._between(self.rank - 1, piece)
        sent = mx.distributed.send(piece, self.rank - 1, group=self._group, stream=self._streams[1])
        mx.async_eval(sent)
        return sent

    def begin_taking(self, like: mx.array) -> mx.array:
        """Begin to take a piece shaped ``like`` this from the rank above, which hands it down; `arrived` waits for it.
        """
        if self.backend == "nccl":
            return self._between(self.rank, like)[len(like) :]
        taken = mx.distributed.recv_like(like, self.rank + 1, group=self._group, stream=self._streams[2])
        mx.async_eval(taken)
        return taken

    def _between(self, low: int, piece: mx.array) -> mx.array:
        """The pieces of ranks ``low`` and ``low + 1``, joined; NCCL has no sending in MLX."""
        pair = self._pairs[low % 2 if self.size > 2 else 0]
        joined = mx.distributed.all_gather(piece, group=pair, stream=self._streams[0])
        mx.async_eval(joined)
        return joined

    def gather(self, piece: mx.array, ranks: range | None = None) -> mx.array:
        """Everybody's ``piece`` (n, ...), joined; of ``ranks`` alone, if given."""
        joined = self.begin(piece, ranks)
        awaited(joined)
        return joined

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Everybody's bytes, of any length, by rank."""
        lengths = np.array(self.gather(mx.array([len(data)], dtype=mx.int32)))
        padded = np.zeros(max(4, int(lengths.max())), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        rows = np.array(self.gather(mx.array(padded[None])))
        return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]

    def gather_values(self, value: Any) -> list[Any]:
        """Everybody's value, which JSON can hold, by rank."""
        return [json.loads(data) for data in self.gather_bytes(json.dumps(value).encode())]

    def most(self, value: int) -> int:
        """The largest of everybody's values."""
        self._settle()
        found = mx.distributed.all_max(mx.array([value], dtype=mx.int32), group=self._group, stream=self._streams[0])
        awaited(found)
        return int(np.array(found)[0])

    def sum_bits(self, bits: mx.array) -> mx.array:
        """The sum of everybody's ``bits``, of which each is zero on all ranks but one: uint32."""
        self._settle()
        found = mx.distributed.all_sum(bits, group=self._group, stream=self._streams[0])
        awaited(found)
        return found

    def broadcast(self, arrays: Mapping[str, mx.array] | None, source: int = 0) -> dict[str, mx.array]:
        """The arrays that rank ``source`` has, bit for bit, on all ranks; others give None."""
        heads = None if arrays is None else [(name, str(a.dtype)[9:], a.shape) for name, a in arrays.items()]
        found = {}
        for name, dtype, shape in self.gather_values(heads if self.rank == source else None)[source]:
            given = (arrays or {}).get(name)
            kind = mx.bool_ if dtype == "bool" else getattr(mx, dtype)
            found[name] = self.broadcast_array(given, kind, tuple(shape), source)
        return found

    def broadcast_array(
        self, array: mx.array | None, dtype: mx.Dtype, shape: tuple[int, ...], source: int = 0
    ) -> mx.array:
        """Rank ``source``'s array, bit for bit, on all ranks, which know its dtype and shape."""
        # Summed as whole numbers: sums of floats would turn -0.0 into 0.0.
        kept = mx.uint8 if dtype == mx.bool_ else dtype  # NCCL has no bool
        count = int(np.prod(shape)) * kept.size
        if array is None or self.rank != source:
            octets = mx.zeros((-(-count // 4),)).view(mx.uint8)
        else:
            octets = mx.contiguous(array.astype(kept) if dtype == mx.bool_ else array).flatten().view(mx.uint8)
            octets = mx.pad(octets, (0, -count % 4)) if count % 4 else octets
        starts = range(0, octets.size, PIECE)
        pieces = [self.sum_bits(octets[at : at + PIECE].view(mx.uint32)).view(mx.uint8) for at in starts]
        whole = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces) if pieces else octets
        whole = whole[:count] if count % 4 else whole
        found = whole.view(kept).reshape(shape)
        found = found.astype(mx.bool_) if dtype == mx.bool_ else found
        mx.eval(found)
        return found

    # Agreement

    def agree(self, what: str, values: Mapping[str, Any]) -> None:
        """Have all ranks hold the same values.

        Raises:
            Differing: on every rank alike: a value of one differs from rank 0's.
        """
        first, *others = self.gather_values(values)
        for rank, other in enumerate(others, start=1):
            for name in {**first, **other}:
                if first.get(name) != other.get(name):
                    names = self.heartbeat.named
                    raise Differing(f"{what} differs: {name} is {other.get(name)} on {names(rank)}, and "
                                   f"{first.get(name)} on {names(0)}; make them the same")  # fmt: skip

    def meet(self, where: str) -> None:
        """Wait until all ranks have come here, without a collective."""
        self.heartbeat.meet(where)

    def try_link(self) -> None:
        """Gather what every rank has stamped, check it, and measure the link.

        Raises:
            WanError: other data arrived than was sent.
        """
        counted = np.arange(PROBE // 4, dtype=np.float32) % 65_521  # with the rank below 2^24, so exact
        expected = np.concatenate([counted + 65_536 * rank for rank in range(self.size)])
        own = mx.array(counted + 65_536 * self.rank) + 0  # made where it computes
        mx.eval(own)
        seconds, small = [], []
        for _ in range(3):
            started = time.perf_counter()
            found = self.gather(own)
            seconds.append(time.perf_counter() - started)
            if not np.array_equal(np.array(found), expected):
                raise WanError(f"the link between the machines ({self.backend}) delivers wrong data; try MLX's "
                               "ring, or another cable or port")  # fmt: skip
        for _ in range(5):
            started = time.perf_counter()
            self.most(0)
            small.append(time.perf_counter() - started)
        slowest, latency = self._slowest(min(seconds), min(small))
        size = PROBE
        if slowest < QUICK:
            own, size = mx.zeros((LARGE_PROBE // 4,)), LARGE_PROBE
            mx.eval(own)
            started = time.perf_counter()
            self.gather(own)
            slowest, _ = self._slowest(time.perf_counter() - started, 0.0)
        self.link = Link((self.size - 1) * size / slowest, latency)

    def _slowest(self, *seconds: float) -> list[float]:
        """Of each the most that any rank took."""
        return [max(values) for values in zip(*self.gather_values(seconds), strict=True)]


@dataclass
class Part:
    """The ranks that share one forward, each computing some of its tokens.

    Attributes:
        group, ranks: this process is one of the ranks.
        room: a number of tokens → how many more there is room for behind all of them.
        length: tokens of the forward that it divided last.
    """

    group: Group
    ranks: range
    room: Callable[[int], int] = lambda length: 0
    length: int = field(default=0, compare=False)

    @property
    def place(self) -> int:
        return self.group.rank - self.ranks.start

    def shard(self, length: int) -> Shard:
        """This rank's share of ``length`` tokens."""
        self.length = length
        return Shard(self, length)


@dataclass(frozen=True)
class Shard:
    """One rank's share of the tokens of a forward: as many as every rank's, filled up with zeros at the end."""

    part: Part
    length: int

    @property
    def size(self) -> int:
        return -(-(self.length + self.part.room(self.length)) // len(self.part.ranks))

    @property
    def start(self) -> int:
        return self.part.place * self.size

    def take(self, x: mx.array, axis: int = 1) -> mx.array:
        """This rank's tokens, of all along ``axis``."""
        index: list[slice] = [slice(None)] * axis
        own = x[(*index, slice(min(self.start, self.length), self.start + self.size))]
        if missing := self.size - own.shape[axis]:
            own = mx.pad(own, [(0, missing if place == axis else 0) for place in range(x.ndim)])
        return mx.contiguous(own)  # a slice would keep the whole alive

    def span(self, tokens: slice) -> slice | None:
        """Of a run of tokens those that are here, counted from this rank's first; None if there are none."""
        stop = self.length if tokens.stop is None else tokens.stop
        first, end = max((tokens.start or 0) - self.start, 0), min(stop - self.start, self.size)
        if end <= first:
            return None
        return slice(first, end if self.start + end < self.length and end < self.size else None)

    def begin(self, x: mx.array, finish: Callable[[mx.array, int], mx.array] | None = None) -> Coming:
        """Begin to gather everybody's tokens x (B, size, ...).

        ``finish``: (the tokens, and what fills them up; how many these are without) → what is wanted of them.
        """
        piece, group = mx.contiguous(_swapped(x)), self.part.group
        mx.async_eval(piece)  # by itself, so that on CUDA the other stream waits for it by an event
        finish = finish or (lambda joined, length: joined[:, :length])
        if group.on_host:
            return Coming(self, group.begin(piece, self.part.ranks), finish)
        with mx.stream(group.stream):
            begun = piece[:1, :1, :1] + 0
            mx.async_eval(begun)
            found = finish(_swapped(group.begin(piece, self.part.ranks)), self.length)
            mx.async_eval(found)
        return Coming(self, found, None, begun)

    def whole(self, x: mx.array) -> mx.array:
        """Everybody's tokens x (B, size, ...) → (B, length, ...), waited for."""
        mx.eval(x)
        return self.begin(x).whole()


def _swapped(x: mx.array) -> mx.array:
    """x with the first two axes in each other's place."""
    return x.swapaxes(0, 1) if min(x.shape[:2]) > 1 else x.reshape(x.shape[1], x.shape[0], *x.shape[2:])


@dataclass
class Coming:
    """Everybody's tokens on their way."""

    shard: Shard
    _joined: mx.array
    _finish: Callable[[mx.array, int], mx.array] | None  # where the host moves them, once they are here
    _begun: mx.array | None = None  # where the GPU does, what it computes just before

    def before(self, x: mx.array) -> mx.array:
        """x, but nothing is computed of it before the tokens have set out. A product takes all of a GPU, so that
        a gathering that is not the first would begin at its end."""
        return x if self._begun is None else mx.depends([x], [self._begun])[0]

    def whole(self) -> mx.array:
        """What is wanted of the tokens, once they are here."""
        if self._finish is None:
            return self._joined
        return self._finish(_swapped(self.shard.part.group.arrived(self._joined)), self.shard.length)


_group: Group | None = None
_is_open = False


def open_group() -> Group | None:
    """The group that this process is one of, the same at every call; None if it is alone.

    If the others do not come, the process ends with the line `LATE` and exit code 1.

    Raises:
        WanError: the others cannot be reached, or the link delivers wrong data.
    """
    global _group, _is_open
    if not _is_open:
        _group, _is_open = _opened(), True
    return _group


def opened_group() -> Group | None:
    """The group, if it is open."""
    return _group


def _opened() -> Group | None:
    backend = backend_given()
    if backend is None:
        return None
    try:
        with _ended_if_late():
            joined = mx.distributed.init(strict=True, backend=backend)
            if joined.size() == 1:
                return None
            group = Group(joined, backend)
            group.heartbeat = _heartbeat(group)
    except (RuntimeError, ValueError) as error:
        raise WanError(f"the machines do not find each other ({backend}: {str(error).strip()})") from error
    atexit.register(group.heartbeat.close)
    group.try_link()
    return group


@contextmanager
def _ended_if_late() -> Iterator[None]:
    """Within this block the process ends with a line when `START` is over.

    As long as MLX waits for the others, no thread of Python runs, nor a handler of signals. So a thread of C's ends the
    process, and what it says, a traceback, makes another process say the line.
    """
    say = ["/bin/sh", "-c", 'head -c 1 | grep -q . && printf "\\nerror: %s\\n" "$0" >&2', LATE]
    with subprocess.Popen(say, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as sayer:
        assert sayer.stdin is not None
        faulthandler.dump_traceback_later(START, exit=True, file=sayer.stdin.fileno())
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _heartbeat(group: Group) -> Heartbeat:
    """The line between the machines; rank 0 tells by the group where it listens."""
    name = socket.gethostname().removesuffix(".local")
    server, port = listening() if group.rank == 0 else (None, 0)
    told = {"name": name, "port": port, "token": secrets.token_hex(16), "hosts": _addresses()}
    everybody = group.gather_values(told)
    names, first = [one["name"] for one in everybody], everybody[0]
    if server is not None:
        return Heartbeat(0, names, accept_all(server, group.size, first["token"]))
    connection = reach([*_hosts_of_first(), *first["hosts"]], first["port"], first["token"], group.rank)
    return Heartbeat(group.rank, names, {0: connection})


def _hosts_of_first() -> Sequence[str]:
    """Addresses of rank 0, as the environment has them."""
    found = []
    if hosts := os.environ.get("MLX_HOSTFILE"):
        with open(hosts, encoding="utf-8") as file:
            found += [address.rpartition(":")[0].strip("[]") for address in json.load(file)[0]]
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        found.append(coordinator.rpartition(":")[0])
    if address := os.environ.get("NCCL_HOST_IP"):
        found.append(address)
    return found


def _addresses() -> list[str]:
    """Names and addresses under which this machine may be reached."""
    name = socket.gethostname()
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError:
        found = []
    return [*found, name, "127.0.0.1"]
