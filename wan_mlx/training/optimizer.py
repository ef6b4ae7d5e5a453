"""The optimiser, and its steps: a block's factors at a time, since all at once would hold another copy of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from .factors import Factors
from .recipe import Recipe


def make_optimizer(recipe: Recipe) -> optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    makers: dict[str, Callable[[], optim.Optimizer]] = {
        "adamw": lambda: optim.AdamW(rate, weight_decay=decay, bias_correction=True),
        "adam": lambda: optim.Adam(rate, bias_correction=True),
        "lion": lambda: optim.Lion(rate, weight_decay=decay),
        "adafactor": lambda: optim.Adafactor(rate, weight_decay=decay, relative_step=False, scale_parameter=False),
        "sgd": lambda: optim.SGD(rate, momentum=0.9),
    }
    return makers[recipe.optimizer]()


def gradient_norm(gradients: Factors) -> float:
    """The Euclidean norm of all numbers together."""
    squares = []
    for names in _by_block(gradients):
        squares.append(mx.stack([(gradients[name] ** 2).sum() for name in names]).sum())
        mx.eval(squares[-1])
    return float(mx.sqrt(mx.stack(squares).sum()).item())  # type: ignore[arg-type]


def update(optimizer: optim.Optimizer, gradients: Factors, factors: Factors, norm: float, clip: float) -> None:
    """Change ``factors`` in place by ``gradients``, which are emptied, of this ``norm``; above ``clip``, if that is not
    0, they are made smaller first."""
    state: Any = optimizer.state
    state["step"] = optimizer.step + 1
    share = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
    for names in _by_block(gradients):
        for name in names:
            gradient = gradients.pop(name)
            gradient = gradient if share == 1.0 else gradient * share
            factors[name] = optimizer.apply_single(gradient, factors[name], state[name])
        mx.eval([factors[name] for name in names], [state[name] for name in names])


def _by_block(names: Factors) -> Iterator[Sequence[str]]:
    for _, group in groupby(list(names), key=lambda name: name.split(".")[:2]):
        yield list(group)
