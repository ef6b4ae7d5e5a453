"""A plan: which networks are resident, streamed or tiled, and each stage's peak memory, work and time."""

from __future__ import annotations

import html
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..errors import MemoryPlanError, duration, size

log = logging.getLogger(__name__)

GIB = 2**30
# Predictions are within 10 % of measurements (benchmarks/memory.md); a budget is filled up to this share.
FILL = 0.96
HOPELESS = 2 * 86_400  # seconds


@dataclass(frozen=True)
class Row:
    """One stage of a plan.

    ``how``: resident, streamed or tiled; ``peak`` and ``reads``: bytes; ``flop``: floating-point operations, of which
    ``attention`` are self-attention; ``seconds``: None where no rate was measured.
    """

    stage: str
    how: str
    peak: int
    flop: float
    reads: int
    attention: float = 0.0
    seconds: float | None = None

    def times(self, count: float) -> Row:
        """The stage so many times."""
        seconds = None if self.seconds is None else count * self.seconds
        return replace(self, flop=count * self.flop, reads=round(count * self.reads), attention=count * self.attention,
                       seconds=seconds)  # fmt: skip


def number(value: float) -> str:
    """Three or four significant digits, never an exponent: "0.508", "264.1", "652,300"; "<0.01" below that."""
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


@dataclass(frozen=True, repr=False)
class Plan:
    """How a run keeps within its memory. Prints as a table.

    Attributes:
        title: model and video.
        budget: bytes that MLX may hold; ``chosen`` says whether the user gave it or it was detected.
        stream: whether each pass reads the transformer's blocks again, instead of keeping them resident.
        tokens_at_once: chunk size of the token-wise layers.
        decode_tile, encode_tile: the VAE's tiles (width, height) in pixels; None for whole frames.
        rows: the stages in order.
        advice: changes that would make it fit, if it does not.
        without: LoRAs that are not on this machine, which it leaves out.
        several: how fast several machines would be, in lines for people, if that was asked for.
        all_stay: whether, where networks stay loaded from one video to the next, all of several experts do.
        shares: whether a step's two passes share what precedes the text; there is no room for it otherwise.
    """

    title: str
    budget: int
    chosen: bool
    stream: bool
    tokens_at_once: int
    decode_tile: tuple[int, int] | None
    encode_tile: tuple[int, int] | None
    rows: tuple[Row, ...]
    advice: tuple[str, ...] = ()
    all_stay: bool = True
    without: tuple[str, ...] = ()
    shares: bool = False
    several: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes of the largest stage."""
        return max(row.peak for row in self.rows)

    @property
    def seconds(self) -> float | None:
        """Of the whole run; None where no rate was measured."""
        seconds = [row.seconds for row in self.rows]
        known = [s for s in seconds if s is not None]
        return sum(known) if len(known) == len(seconds) else None

    @property
    def fits(self) -> bool:
        return self.peak <= FILL * self.budget

    @property
    def cache_limit(self) -> int:
        """Bytes of freed memory that MLX may keep for reuse."""
        return max(100_000_000, self.budget - self.peak)

    @property
    def how(self) -> dict[str, Any]:
        """Choices that can change rounding, so a resumed run must keep them, and their peak; JSON values."""
        names = ("stream", "tokens_at_once", "decode_tile", "encode_tile", "peak")
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in names}

    def as_begun(self, how: Mapping[str, Any]) -> Plan:
        """This plan with the choices of the resumed run, so that it continues bit for bit, if they still fit."""
        if not how or how == self.how:
            return self
        if how["peak"] > FILL * self.budget:
            log.warning("there is less memory than when the run began: it goes on in smaller pieces, and the last bits "
                        "may differ")  # fmt: skip
            return self
        choices: dict[str, Any] = dict(how)
        choices = {name: tuple(value) if isinstance(value, list) else value for name, value in choices.items()}
        del choices["peak"]
        return replace(self, **choices, shares=False)  # which changes no bit, and needs its room

    def check(self) -> None:
        """Raise MemoryPlanError with advice if this plan does not fit."""
        if not self.fits:
            worst = max(self.rows, key=lambda row: row.peak)
            options = "; ".join(self.advice) or "no option makes it fit"
            raise MemoryPlanError(
                f"{self.title} needs about {number(self.peak / GIB)} GiB to {worst.stage}, but plans fill at most "
                f"{number(FILL * self.budget / GIB)} of the {number(self.budget / GIB)} GiB that are "
                f"{'allowed' if self.chosen else 'free'}: {options}"
            )

    def __repr__(self) -> str:
        time = f", {duration(self.seconds)}" if self.seconds else ""
        fits = "fits" if self.fits else "does not fit"
        return f"Plan({self.title}: {fits}, {size(self.peak)} of {size(self.budget)}{time})"

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(word.ljust(width) if place < 2 else word.rjust(width)
                 for place, (word, width) in enumerate(zip(row, widths, strict=True))) for row in table]  # fmt: skip
        return "\n".join([self._heading(), *lines, *self._verdict()])

    def _repr_html_(self) -> str:
        """For notebooks."""
        header, *rows = ["".join(f"<td>{html.escape(word)}</td>" for word in row) for row in self._table()]
        lines = "".join(f"<tr>{row}</tr>" for row in rows)
        verdict = "<br>".join(map(html.escape, self._verdict()))
        return (
            f"<table><caption>{html.escape(self._heading())}</caption>"
            f"<thead><tr>{header.replace('td>', 'th>')}</tr></thead><tbody>{lines}</tbody></table><p>{verdict}</p>"
        )

    def _heading(self) -> str:
        room = f"{number(self.budget / GIB)} GiB"
        asked = f"{room} ({number(self.budget / 1e9)} GB as asked)" if self.chosen else f"{room} of this machine"
        return f"{self.title}, within {asked}"

    def _table(self) -> list[list[str]]:
        """The header, a row for each stage, and one for the whole run."""
        whole = Row("whole run", "", self.peak, sum(row.flop for row in self.rows), sum(row.reads for row in self.rows),
                    seconds=self.seconds)  # fmt: skip
        timed = self.seconds is not None
        table = [["stage", "how", "peak", "TFLOP", "reads GB", *["time"] * timed]]
        for row in (*self.rows, whole):
            numbers = size(row.peak), number(row.flop / 1e12), number(row.reads / 1e9)
            table.append([row.stage, row.how, *numbers, *[duration(row.seconds or 0)] * timed])
        return table

    def _verdict(self) -> list[str]:
        without = [f"{lora} is not on this machine, so that it is not counted" for lora in self.without]
        if not self.fits:
            return [*without, f"it does not fit; what would: {'; '.join(self.advice) or 'nothing'}"]
        hopeless = self.seconds is not None and self.seconds > HOPELESS and mx.default_device() == mx.cpu
        slow = ["but a real model needs a GPU: this machine computes on its CPU"] * hopeless
        return [*without, "it fits", *slow, *self.several]


@contextmanager
def limited_memory(plan: Plan) -> Iterator[None]:
    """Within this block MLX's cache of freed memory is limited to the plan's room for it, and on Metal its memory.

    Above its memory limit MLX waits for running work instead of allocating more. On CUDA, where memory is freed late,
    that would be waited for too.
    """
    on_metal = mx.metal.is_available()
    cache = mx.set_cache_limit(plan.cache_limit)
    memory = mx.set_memory_limit(plan.budget) if on_metal else 0
    try:
        yield
    finally:
        mx.set_cache_limit(cache)
        if on_metal:
            mx.set_memory_limit(memory)
