"""The sigma grid, and the base of all solvers: history, resuming, the estimate of the clean sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..models.configs import NUM_TRAIN_TIMESTEPS


def _shift(sigma, shift: float):
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class Grid:
    """Noise levels, and the model's input at each; a distilled model samples at the few levels of its training.

    ``sigmas``: float32 (steps + 1,), falling to exactly 0. ``timesteps``: (steps,) in [0, 1000], int64 of an even grid,
    float64 of others.
    """

    sigmas: np.ndarray
    timesteps: np.ndarray

    @classmethod
    def even(cls, steps: int, shift: float, sigma_max: float) -> Grid:
        """Evenly spaced from ``sigma_max`` towards 0, then shifted.

        Follows the official ``FlowUniPCMultistepScheduler.set_timesteps`` and ``get_sampling_sigmas``.

        Raises:
            ValueError: fewer than one step, or a shift that is not above 0.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}, expected at least 1")
        if not 0 < shift < math.inf:
            raise ValueError(f"shift is {shift}, expected a finite number above 0, such as 5")
        sigmas = _shift(np.linspace(sigma_max, 0.0, steps + 1)[:-1], shift)
        # Truncated in float64, as in the official code: in float32 a timestep would sometimes differ by one.
        timesteps = (sigmas * NUM_TRAIN_TIMESTEPS).astype(np.int64)
        return cls(np.append(sigmas, 0.0).astype(np.float32), timesteps)

    @classmethod
    def of(cls, sigmas: Sequence[float], timesteps: Sequence[float]) -> Grid:
        """From the sigma before each step."""
        return cls(np.array([*sigmas, 0.0], dtype=np.float32), np.array(timesteps, dtype=np.float64))

    @classmethod
    def shifted(cls, places: Sequence[float], shift: float) -> Grid:
        """``places``: positions on 1000 even levels before the shift; timesteps are the shifted levels, not rounded."""
        sigmas = _shift(np.array(places) / NUM_TRAIN_TIMESTEPS, shift)
        return cls.of(sigmas, sigmas * NUM_TRAIN_TIMESTEPS)

    @classmethod
    def warped(cls, places: Sequence[int], shift: float) -> Grid:
        """``places``: positions on 1000 levels that go evenly from 1 to the last of the shifted ones, and are shifted
        then, as Diffusers' ``FlowMatchEulerDiscreteScheduler.set_timesteps(1000)`` makes them."""
        last = _shift(1 / NUM_TRAIN_TIMESTEPS, shift)
        levels = _shift(np.linspace(1.0, last, NUM_TRAIN_TIMESTEPS), shift)
        sigmas = levels[NUM_TRAIN_TIMESTEPS - np.array(places)]
        return cls.of(sigmas, sigmas * NUM_TRAIN_TIMESTEPS)

    @classmethod
    def nearest(cls, timesteps: Sequence[int], shift: float) -> Grid:
        """Given ``timesteps``; each sigma is the nearest of the 1000 shifted levels."""
        levels = _shift(np.arange(NUM_TRAIN_TIMESTEPS, 0, -1) / NUM_TRAIN_TIMESTEPS, shift)
        return cls.of([levels[np.abs(levels * NUM_TRAIN_TIMESTEPS - t).argmin()] for t in timesteps], timesteps)

    @classmethod
    def trigonometric(cls, angles: Sequence[float]) -> Grid:
        """From TrigFlow's angles, where a sample is cos * clean + sin * noise: sin / (sin + cos)."""
        sigmas = [math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles]
        return cls.of(sigmas, [sigma * NUM_TRAIN_TIMESTEPS for sigma in sigmas])


def log_snr(sigma: np.float32) -> np.float32:
    """``log((1 - sigma) / sigma)``, float32; both ends are set explicitly, to avoid the logarithm of 0."""
    if sigma == 0:
        return np.float32(np.inf)
    if sigma == 1:
        return np.float32(-np.inf)
    return np.log(np.float32(1) - sigma) - np.log(sigma)


class Scheduler:
    """A solver from noise to a clean sample; elementwise, so any layout works.

    Call ``step`` with index 0, 1, ... in order.

    Args:
        steps, shift: of the grid.
        grid: another grid, with its own steps and shift; the arguments ``steps`` and ``shift`` are then ignored.
        seed: for solvers that draw noise in each step.
        noise_size: (h, w) of a larger video, of whose noise the drawn one is the coarse part; for a draft.
        begin: number of first steps to skip, for a sample that is already less noisy. Index 0 is then the grid's step
            ``begin``, taken at first order like every start.

    Attributes:
        begin: as given.
        sigmas, timesteps: of the grid from ``begin`` on: before each step, and the last sigma.
        denoised: float32, the latest step's estimate of the clean sample; unset before the first.
    """

    sigma_max = 1.0
    # name of each array that later steps need → the first step that needs it
    history_from: Mapping[str, int] = {}

    def __init__(
        self,
        steps: int,
        shift: float,
        grid: Grid | None = None,
        seed: int = 0,
        begin: int = 0,
        noise_size: tuple[int, int] | None = None,
    ):
        grid = grid or Grid.even(steps, shift, self.sigma_max)
        if not 0 <= begin < len(grid.timesteps):
            raise ValueError(f"sampling begins at step {begin} of {steps}, expected 0 to {steps - 1}")
        self.sigmas, self.timesteps = grid.sigmas[begin:], grid.timesteps[begin:]
        self.seed, self.begin, self.noise_size = seed, begin, noise_size
        self.denoised: mx.array
        self.history: dict[str, mx.array] = {}

    def start(self, noise: mx.array, source: mx.array | None = None) -> mx.array:
        """The first sample, from noise and, for video to video, the clean sample."""
        if source is None:
            return noise
        return float(self.sigmas[0]) * noise + float(1 - self.sigmas[0]) * source

    def step(self, index: int, velocity: mx.array, sample: mx.array) -> mx.array:
        """Go from ``sigmas[index]`` to ``sigmas[index + 1]``.

        Args:
            index: from 0 to the last step, in order.
            velocity: float32, the model's output for ``sample``; same shape.
            sample: float32, the previous step's result.

        Returns:
            float32, the sample at ``sigmas[index + 1]``; not yet evaluated.
        """
        self.denoised = sample - float(self.sigmas[index]) * velocity
        return self._advance(index, velocity, sample, self.denoised)

    def _advance(self, index: int, velocity: mx.array, sample: mx.array, x0: mx.array) -> mx.array:
        """The next sample; ``x0`` is the clean estimate."""
        raise NotImplementedError

    def state(self) -> dict[str, mx.array]:
        """The arrays that `load_state` needs to continue bit for bit."""
        return dict(self.history)

    def load_state(self, index: int, state: Mapping[str, mx.array]) -> None:
        """Prepare step ``index``, as if the steps before it had just been made.

        Raises:
            ValueError: no such step, or ``state`` does not hold exactly the arrays that it needs.
        """
        if not 0 <= index <= len(self.timesteps):
            raise ValueError(f"cannot resume at step {index}, expected 0 to {len(self.timesteps)}")
        expected = {name for name, first in self.history_from.items() if index >= first}
        if set(state) != expected:
            raise ValueError(
                f"the state for step {index} holds {sorted(state)}, expected {sorted(expected)} "
                f"for {type(self).__name__}"
            )
        self.history = dict(state)
