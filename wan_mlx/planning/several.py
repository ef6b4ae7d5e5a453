"""How fast several machines make a step together: predicted from the model, the video, the chip and the link.

The time of a forward of which each machine computes a share follows the order in which `models.sequence_parallel`
works: keys, values and queries are made, and meanwhile keys and values arrive, a group of heads after the other, each
while the one before is attended to. ``benchmarks/distributed.py`` compares the prediction with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..distributed import Group, Link
from ..errors import Unshareable, duration
from ..models.chips import likely_rate
from ..models.configs import TransformerConfig
from ..models.sequence_parallel import HEAD_GROUPS
from ..parallel import ALONE, BOTH, CFG, TOKENS
from .flops import forward_parts

AUTO = "auto"
LEAST_GAIN = 1.05  # a smaller one is not worth waiting for others
LIKE = 1.02  # of two ways that are nearly as fast, the one that moves less
# What computing takes more, of divided tokens: keys and values are copied, products are of fewer rows. On two H200 1.09
# times with the 1.3B, 1.07 with the 14B; 1.05 with both since two pieces of work wait there, unlike on Macs.
OVERHEAD = 1.08
TYPICAL = 14e12  # FLOP per second, where nothing is known: an M4 Max
VALUE = 2  # bytes of a key or value in 16 bits
VELOCITY = 4  # bytes of a number of the velocity
# Bytes that a machine receives in a second, and seconds of an exchange: 10 gigabit Ethernet as reported and measured,
# the others as reported (MLX's pull request 1985, issue 3207; docs/several-macs.md).
LINKS = {
    "10 GbE": Link(1.1e9, 0.3e-3),
    "Thunderbolt 5, ring": Link(4.5e9, 0.1e-3),
    "Thunderbolt 5, jaccl": Link(6.5e9, 0.03e-3),
}


@dataclass(frozen=True)
class Work:
    """The forwards of a step: of a transformer, over so many tokens, at FLOP per second of one machine."""

    config: TransformerConfig
    tokens: int
    rate: float
    passes: int = 2

    def alone(self) -> float:
        """Seconds of a step on one machine."""
        return self.passes * sum(forward_parts(self.config, self.tokens).values()) / self.rate

    def seconds(self, mode: str, size: int, link: Link) -> float:
        """Seconds of a step on ``size`` machines."""
        if mode == ALONE or size == 1:
            return self.alone()
        exchange = self._velocity_bytes() * 2 * (size - 1) / size / link.bytes_per_second + 2 * link.latency
        if mode == CFG:
            return self.alone() / self.passes + 3 * exchange  # of both velocities, and of the latents
        if mode == BOTH and self.passes == 2:
            return self.divided(size // 2, link) + 3 * exchange
        return self.passes * self.divided(size, link) + exchange

    def divided(self, size: int, link: Link) -> float:
        """Seconds of one forward of which ``size`` machines compute the tokens."""
        c, parts, rate = self.config, forward_parts(self.config, self.tokens), self.rate / OVERHEAD
        blocks = c.num_layers + len(c.vace_layers)
        one = parts["self linear"] / 4 / blocks / size / rate  # of the products for keys, values, queries
        attend = parts["self attention"] / blocks / size / rate / HEAD_GROUPS
        rest = sum(parts.values()) / rate / size - blocks * (3 * one + HEAD_GROUPS * attend)
        moved = VALUE * c.dim * self.tokens * (size - 1) / size / HEAD_GROUPS / link.bytes_per_second + link.latency
        there, now = one, 3 * one  # the first keys leave when they are made; attention begins after the queries
        for _ in range(HEAD_GROUPS):
            there = max(there + moved, 2 * one) + moved  # keys, then values, which leave when they are made
            now = max(now, there) + attend
        head = self._velocity_bytes() * (size - 1) / size / link.bytes_per_second + link.latency
        return blocks * now + rest + head

    def _velocity_bytes(self) -> float:
        c = self.config
        patch = c.patch_size[0] * c.patch_size[1] * c.patch_size[2]
        return VELOCITY * self.tokens * patch * c.out_dim

    def gain(self, mode: str, size: int, link: Link) -> float:
        """How many times as fast as one machine."""
        return self.alone() / self.seconds(mode, size, link)


def modes_for(size: int, passes: int) -> tuple[str, ...]:
    """The ways in which so many machines can share the passes of a step."""
    if passes == 1:
        return (TOKENS,)
    return (TOKENS,) if size % 2 else (CFG, TOKENS) if size == 2 else (BOTH, TOKENS, CFG)


def choose_mode(
    asked: str, config: TransformerConfig, tokens: int, passes: int, size: int, link: Link, rate: float | None = None
) -> str:
    """How so many machines share a run.

    Args:
        asked: `AUTO`, or a mode of `parallel.Team`.
        rate: FLOP per second of one machine; None takes what is known of this one's chip.

    Raises:
        Unshareable: so many machines cannot do it as asked.
    """
    possible = modes_for(size, passes)
    if asked == ALONE:
        return ALONE
    if asked != AUTO:
        if asked == TOKENS or asked in possible:
            return asked
        if passes == 1 and asked == BOTH:
            return TOKENS
        why = "guidance is off, so that there is one pass" if passes == 1 else f"there are {size} machines"
        raise Unshareable(f"--parallel {asked} cannot be: {why}; nearest: {possible[0]}")
    rate = rate or likely_rate()
    if rate is None:  # what it takes is not known: the way that moves least
        return possible[0]
    work = Work(config, tokens, rate, passes)
    gains = {mode: work.gain(mode, size, link) for mode in possible}
    best = next(mode for mode in possible if gains[mode] * LIKE >= max(gains.values()))
    return best if gains[best] >= LEAST_GAIN else ALONE


def describe(
    config: TransformerConfig, tokens: int, passes: int, rate: float | None, asked: str, group: Group | None = None
) -> list[str]:
    """For people: how long a step takes 2 and 4 machines, each of ``rate`` FLOP per second, over each of `LINKS`; if
    there is a ``group``, as many as it has, over its link as it was measured.

    Raises:
        Unshareable: so many machines cannot do it as asked.
    """
    if asked == ALONE:
        return []
    sizes, links = ((2, 4), LINKS) if group is None else ((group.size,), {f"{group.backend}, as measured": group.link})
    rate = rate or likely_rate()
    whose = f"of {(rate or TYPICAL) / 1e12:.3g} TFLOP/s" + " (an M4 Max)" * (rate is None)
    work = Work(config, tokens, rate or TYPICAL, passes)
    lines = [f"on several machines {whose} a step, of {duration(work.alone())} on one, is predicted to take"]
    if asked == BOTH and passes == 2 and group is None:
        sizes = (4,)
    for size in sizes:
        for name, link in links.items():
            mode = choose_mode(asked, config, tokens, passes, size, link, work.rate)
            seconds = work.seconds(mode, size, link)
            lines.append(f"  {size}, {name:<20} {duration(seconds):>12}: {work.alone() / seconds:.2f} times as fast, "
                         f"by {mode}")  # fmt: skip
    return lines
