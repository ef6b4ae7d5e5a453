"""How several machines share the forwards of a step: a pass each, or each some tokens of a pass, or both.

Every velocity is made whole by somebody and then told to all, bit for bit, so that every machine goes on with the same
latents, and with the same ones as a single machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx

from .caching import COND, UNCOND, StepCache
from .caching.protocol import NAMES
from .cuda.forward import keys_to_append
from .distributed import Group, Part

ALONE, CFG, TOKENS, BOTH = "off", "cfg", "tokens", "cfg+tokens"


class Team:
    """The machines that make a run together.

    Attributes:
        group: their group.
        mode: how forwards are shared: `CFG` gives each pass of guidance to one machine, `TOKENS` each machine some
            tokens of every pass, `BOTH` a pass to each half of them; in mode `ALONE` rank 0 computes all.
    """

    def __init__(self, group: Group, mode: str):
        self.group, self.mode = group, mode
        self._parts: dict[range, Part] = {}

    def part(self, ranks: range) -> Part | None:
        """Those ranks, if they share a forward; this one is among them."""
        return self._parts.setdefault(ranks, Part(self.group, ranks, keys_to_append)) if len(ranks) > 1 else None

    def _owners(self) -> dict[int, range]:
        """The ranks that compute each pass of two, and hold what a large step cache keeps of it."""
        size, half, divides = self.group.size, self.group.size // 2, self.mode in (TOKENS, BOTH)
        if self.mode in (CFG, BOTH):
            count = half if divides else 1
            return {COND: range(count), UNCOND: range(half, half + count)}
        return dict.fromkeys((COND, UNCOND), range(size if divides else 1))

    def _shares(self, passes: Sequence[int], cache: StepCache) -> dict[int, range]:
        """The ranks that compute each of a step's passes."""
        if len(passes) == 1 and self.mode == BOTH and not cache.large:  # whose tokens do not move to other machines
            return {passes[0]: range(self.group.size)}
        owners = self._owners()
        return {branch: owners[branch] for branch in passes}

    def velocities(
        self, passes: Sequence[int], cache: StepCache, compute: Callable[[int, Part | None], mx.array], like: mx.array
    ) -> list[mx.array]:
        """The velocity of each pass, on every rank.

        Args:
            passes: of this step.
            cache: which of the forwards are skipped.
            compute: (pass, who shares its forward) → its velocity, evaluated; shaped as ``like``, float32.
        """
        shares, found = self._shares(passes, cache), {}
        for branch, ranks in shares.items():
            if self.group.rank in ranks:
                found[branch] = compute(branch, self.part(ranks))
        for branch, ranks in shares.items():
            if len(ranks) < self.group.size:
                told = self.group.broadcast_array(found.get(branch), mx.float32, like.shape, ranks.start)
                if branch not in found:
                    found[branch] = told if cache.large else cache.velocity(branch, lambda told=told, **hooks: told)
                if cache.large:
                    own = cache.branches[branch]
                    own.computed = self.group.most(own.computed)
        return [found[branch] for branch in passes]

    def same(self, latents: mx.array) -> mx.array:
        """Rank 0's latents, on all: other chips may round otherwise."""
        return self.group.broadcast_array(latents, latents.dtype, latents.shape, 0)

    # What step caches keep

    def whole_state(self, cache: StepCache) -> dict[str, mx.array]:
        """The cache's state on rank 0, as one machine would have it; other ranks return none."""
        state = cache.state()
        if cache.large:
            for branch, ranks in self._owners().items():
                state |= self._whole_branch(cache, branch, ranks, state)
        return state if self.group.rank == 0 else {}

    def _whole_branch(
        self, cache: StepCache, branch: int, ranks: range, state: Mapping[str, mx.array]
    ) -> dict[str, mx.array]:
        own = {key: array for key, array in state.items() if key.startswith(f"{NAMES[branch]}.")}
        if self.group.rank in ranks and (part := self.part(ranks)):
            for key in own:
                if cache.holds_tokens(key):
                    own[key] = part.shard(part.length).whole(own[key])
        if ranks.start:
            return self.group.broadcast(own if self.group.rank == ranks.start else None, ranks.start)
        return own

    def load_state(self, cache: StepCache, state: Mapping[str, mx.array]) -> None:
        """Restore a whole state, which every rank has: each keeps its share."""
        cache.load_state(state)
        if cache.large:
            for branch, ranks in self._owners().items():
                arrays, here = cache.branches[branch].arrays, self.group.rank in ranks
                if not here:
                    arrays.clear()
                elif part := self.part(ranks):
                    for name in arrays:
                        if cache.holds_tokens(f"{NAMES[branch]}.array.{name}"):
                            arrays[name] = part.shard(arrays[name].shape[1]).take(arrays[name])
                            mx.eval(arrays[name])
