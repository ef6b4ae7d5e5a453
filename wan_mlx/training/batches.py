"""The clips of a step as the model gets them: noise at a drawn level, a caption, and what the model should answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from .backward import Sample
from .dataset import TrainingClip, with_word
from .encoded import Encoded
from .recipe import GIVEN, NOISE, Recipe

VALIDATION_SIGMAS = (0.2, 0.5, 0.8)  # shares of the way through the levels that the model serves
VALIDATION = 2**31  # in the place of a step, for the noise of held-out clips


class Batches:
    """Makes the samples of any step; all chance is the recipe's.

    Args:
        clips: what is trained, each as often as it comes.
        held_out: clips for the validation.
        trigger: the word that `Recipe.preserve` leaves out of captions, or puts another in the place of.
        levels: from which noise level to which the model is trained: of an expert those that it serves.
        may_be_given: whether the model can be given a clip's first frame (`Recipe.given_frame`).
    """

    def __init__(
        self,
        encoded: Encoded,
        recipe: Recipe,
        clips: Sequence[TrainingClip],
        held_out: Sequence[TrainingClip],
        trigger: str,
        levels: tuple[float, float] = (0.0, 1.0),
        may_be_given: bool = False,
    ):
        self.encoded, self.recipe, self.clips, self.held_out = encoded, recipe, clips, held_out
        self.trigger, self.levels, self.may_be_given = trigger, levels, may_be_given

    def captions(self) -> list[str]:
        """All texts that samples may have."""
        captions = [clip.caption for clip in (*self.clips, *self.held_out)]
        words = self.recipe.words() if self.recipe.preserve else []
        return ["", *captions, *(with_word(caption, self.trigger, word) for caption in captions for word in words)]

    def of_step(self, step: int, rank: int = 0, ranks: int = 1) -> tuple[list[Sample], list[str]]:
        """The samples of a step, of several processes those of one, and the names of their files."""
        recipe = self.recipe
        order, sigmas = recipe.order(step, len(self.clips)), recipe.sigmas(step, *self.levels)
        bare, preserved = recipe.without_caption(step), recipe.preserved(step)
        samples, names = [], []
        for number in range(rank, recipe.clips, ranks):
            clip = self.clips[order[number]]
            caption = clip.caption
            if preserved[number]:
                caption = with_word(caption, self.trigger, recipe.word(step, number))
            caption = "" if bare[number] else caption
            sample = self._sample(clip, sigmas[number], caption, (step, number))
            stays = preserved[number] or (bare[number] and recipe.preserve)
            samples.append(replace(sample, target=None) if stays else sample)
            names.append(clip.path.name)
        return samples, names

    def of_validation(self) -> Iterator[list[Sample]]:
        """The samples of each held-out clip, at fixed noise and levels."""
        low, high = self.levels
        for place, clip in enumerate(self.held_out):
            yield [
                self._sample(clip, low + share * (high - low), clip.caption, (VALIDATION, place, number))
                for number, share in enumerate(VALIDATION_SIGMAS)
            ]

    def _sample(self, clip: TrainingClip, sigma: float, caption: str, place: tuple[int, ...]) -> Sample:
        latents, conditions = self.encoded.clip(clip)
        noise = mx.array(self.recipe.chance(NOISE, *place).standard_normal(latents.shape, np.float32))
        noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
        if self.may_be_given and latents.shape[1] > 1:
            if self.recipe.chance(GIVEN, *place).uniform() < self.recipe.given_frame:
                noisy = mx.concatenate([latents[:, :1], noisy[:, 1:]], axis=1)
                conditions = {**conditions, "clean_frames": 1}
        return Sample(noisy, 1000 * sigma, self.encoded.text(caption), target, conditions)


def levels_of(timesteps: tuple[float, float]) -> tuple[float, float]:
    """The noise levels that a transformer for timesteps a <= t < b serves."""
    first, end = timesteps
    return first / 1000, 1.0 if math.isinf(end) else end / 1000
