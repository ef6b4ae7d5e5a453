"""The optimiser, and its steps: a block's factors at a time, since all at once would hold another copy of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.optimizers as optim

from ..models.pieces import Pacer
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
        mx.async_eval(squares[-1])
    return float(mx.sqrt(mx.stack(squares).sum()).item())  # type: ignore[arg-type]


def update(optimizer: optim.Optimizer, gradients: Factors, factors: Factors, norm: float, clip: float) -> None:
    """Change ``factors`` in place by ``gradients``, which are emptied, of this ``norm``; above ``clip``, if that is not
    0, they are made smaller first."""
    state: Any = optimizer.state
    state["step"] = optimizer.step + 1
    numbers = {name: one for name, one in state.items() if isinstance(one, mx.array)}  # of all factors alike
    share = mx.array(min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
    change, pace = _compiled(optimizer), Pacer()
    for names in _by_block(gradients):
        own = [gradients.pop(name) for name in names], [factors[name] for name in names], [state[n] for n in names]
        changed, moments = change(numbers, share, *own)
        factors.update(zip(names, changed, strict=True))
        state.update(zip(names, moments, strict=True))
        del own
        pace(*changed, *(array for one in moments for array in one.values()))
    pace.finish()


_CHANGES: WeakKeyDictionary[optim.Optimizer, Callable] = WeakKeyDictionary()


def _compiled(optimizer: optim.Optimizer) -> Callable:
    """The change of a block's factors: compiled, since of each factor there are fifteen operations."""
    if optimizer not in _CHANGES:
        alone = copy(optimizer)  # without arrays: those that a compiled function does not get are constants in it

        def change(numbers, share, gradients, factors, moments):
            alone.state, moments = numbers, [dict(one) for one in moments]
            each = zip(gradients, factors, moments, strict=True)
            changed = [alone.apply_single(gradient * share, factor, own) for gradient, factor, own in each]
            alone.state = {}
            return changed, moments

        alone.state = {}
        _CHANGES[optimizer] = mx.compile(change)
    return _CHANGES[optimizer]


def _by_block(names: Factors) -> Iterator[Sequence[str]]:
    for _, group in groupby(list(names), key=lambda name: name.split(".")[:2]):
        yield list(group)
