"""Events on their way to those who listen: each job's, and those of all for the page, as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT_CHANNELS, KEPT_EVENTS = 200, 2_000
# Of these a channel keeps only the last: they tell how far something is.
REPLACED = ("progress", "eta", "download", "preview", "frames")
LIMIT = 1_000  # events that a slow listener may be behind before it is let go
HEARTBEAT = 15.0  # seconds
ENDS = ("result", "error")


@dataclass
class Channel:
    """The events of one job so far, numbered."""

    events: deque[tuple[int, Mapping[str, Any]]] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    count: int = 0
    is_over: bool = False


class Feed:
    """Events by channel; told from any thread, listened to in the server's loop."""

    def __init__(self):
        self._channels: dict[str, Channel] = {}
        self._listeners: dict[str, set[asyncio.Queue]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self) -> None:
        """From now on events are passed on in the running loop."""
        self._loop = asyncio.get_running_loop()

    def end(self) -> None:
        """Let all listeners go."""
        self._loop = None
        for listeners in self._listeners.values():
            for queue in listeners:
                queue.put_nowait(None)

    def tell(self, channel: str, event: Mapping[str, Any], kept: bool = True) -> None:
        """Tell an event of a channel; any thread may."""
        if (loop := self._loop) is not None:
            try:
                loop.call_soon_threadsafe(self._tell, channel, event, kept)
            except RuntimeError:  # the loop has ended
                pass

    def restart(self, channel: str) -> None:
        """Events of a job that goes on come."""
        if channel in self._channels:
            self._channels[channel].is_over = False

    def _tell(self, name: str, event: Mapping[str, Any], kept: bool) -> None:
        number = 0
        if kept:
            channel = self._channels.setdefault(name, Channel())
            channel.count += 1
            number, kind = channel.count, event.get("event")
            if kind in REPLACED:
                same = [entry for entry in channel.events if _same(entry[1], event)]
                for entry in same:
                    channel.events.remove(entry)
            channel.events.append((number, event))
            channel.is_over = kind in ENDS
            while len(self._channels) > KEPT_CHANNELS:
                del self._channels[next(iter(self._channels))]
        for queue in [*self._listeners.get(name, ())]:
            if queue.qsize() > LIMIT:
                self._listeners[name].discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait((number, event))

    async def listen(self, name: str, after: int = 0, ends: bool = True) -> AsyncIterator[bytes]:
        """A channel's events after number ``after``, those so far first, as lines of a stream; it ends with the job's
        last event, or, with ``ends`` False, only when the listener goes."""
        queue: asyncio.Queue = asyncio.Queue()
        channel = self._channels.get(name, Channel())
        before, is_over = [*channel.events], channel.is_over
        self._listeners.setdefault(name, set()).add(queue)
        try:
            yield b"retry: 2000\n\n"
            for number, event in before:
                if number > after:
                    yield _lines(number, event)
            if ends and is_over:
                return
            while True:
                try:
                    item = await asyncio.wait_for(queue.get(), HEARTBEAT)
                except asyncio.TimeoutError:
                    yield b": still here\n\n"
                    continue
                if item is None:
                    return
                yield _lines(*item)
                if ends and item[1].get("event") in ENDS:
                    return
        finally:
            self._listeners[name].discard(queue)
            if not self._listeners[name]:
                del self._listeners[name]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the other event tells of the same thing anew."""
    return one.get("event") == other.get("event") and one.get("name") == other.get("name")


def _lines(number: int, event: Mapping[str, Any]) -> bytes:
    head = f"id: {number}\n" if number else ""
    return f"{head}data: {json.dumps(event, ensure_ascii=False)}\n\n".encode("utf-8", "backslashreplace")
