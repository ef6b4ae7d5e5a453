"""The base of all step caches: a state for each pass, counting, resuming. Caches nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

# The two passes of guidance. Each has its own state: on the CPU both run at once.
COND, UNCOND = 0, 1
NAMES = ("cond", "uncond")

# forward(through=...) → velocity; see `wan_mlx.models.transformer.BlocksHook`.
Forward = Callable[..., mx.array]


@dataclass
class Branch:
    """A cache's state for one pass: arrays, and numbers (float64, so that a resumed run decides alike)."""

    arrays: dict[str, mx.array] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    computed: int = 0


class StepCache:
    """Decides at which steps the transformer is skipped, and computes the velocity in its place.

    Call ``begin_step``, then ``velocity`` once for each pass of the step, in any order or at once. It starts afresh at
    step 0, and where another expert takes over, whose results are not like those before.

    Attributes:
        steps: number of sampling steps.
        switch: the step at which another expert takes over; None if none does.
        large: whether it stores arrays as large as activations; callers should not keep old copies.
    """

    large = False

    def __init__(self, steps: int, switch: int | None = None):
        self.steps, self.switch = steps, switch
        self._reset()

    def _reset(self, computed: tuple[int, ...] = (0, 0)) -> None:
        self.branches = (Branch(computed=computed[COND]), Branch(computed=computed[UNCOND]))

    def starts_at(self, index: int) -> bool:
        """Whether nothing of the steps before a step is used in it."""
        return index in (0, self.switch)

    @property
    def computed(self) -> int:
        """Number of forwards so far whose blocks were run."""
        return sum(branch.computed for branch in self.branches)

    def begin_step(self, index: int, latents: mx.array, passes: Sequence[int]) -> None:
        """Start step ``index``, which makes these passes over ``latents``."""
        if self.starts_at(index):
            self._reset(tuple(branch.computed * (index > 0) for branch in self.branches))
        self.index, self.latents = index, latents

    def planned(self, passes: int) -> int | None:
        """Number of forwards that will be computed in a run with guidance at all steps (2 passes) or none (1); None if
        the cache decides on the way."""
        return None

    def kept_bytes(self, passes: int, latents: int, tokens: int) -> int:
        """The most that it keeps from step to step, of a run that makes so many passes a step.

        ``latents``, ``tokens``: bytes of latents in float32, and of tokens in the transformer's dtype.
        """
        return 0

    def velocity(self, branch: int, forward: Forward) -> mx.array:
        """The velocity of one pass, float32 (1, t, h, w, C), by ``forward`` or without it."""
        self.branches[branch].computed += 1
        return forward()

    def holds_tokens(self, key: str) -> bool:
        """Whether an array of `state` has a row for each token, of which several machines would have each a share."""
        return False

    def state(self) -> dict[str, mx.array]:
        """All arrays that later steps need, by name. Empty if nothing is cached."""
        found: dict[str, mx.array] = {}
        for name, branch in zip(NAMES, self.branches, strict=True):
            found |= {f"{name}.array.{key}": array for key, array in branch.arrays.items()}
            for key, value in {**branch.numbers, "computed": float(branch.computed)}.items():
                # As bytes: MLX has no float64 on a GPU, and a rounded sum might change a decision.
                found[f"{name}.number.{key}"] = mx.array(np.array([value]).view(np.uint8))
        return found

    def load_state(self, state: Mapping[str, mx.array]) -> None:
        """Restore ``state``: later steps continue bit for bit.

        Raises:
            ValueError: ``state`` is not from this kind of cache.
        """
        self._reset()
        try:
            for key, array in state.items():
                name, kind, entry = key.split(".", 2)
                branch = self.branches[NAMES.index(name)]
                if kind == "array":
                    branch.arrays[entry] = array
                else:
                    branch.numbers[entry] = float(np.array(array).view(np.float64)[0])
            for branch in self.branches:
                branch.computed = int(branch.numbers.pop("computed"))
        except (KeyError, ValueError) as error:
            raise ValueError(f"the state of a {type(self).__name__} is not whole: {error!r}") from error
