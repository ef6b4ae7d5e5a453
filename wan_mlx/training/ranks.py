"""The processes of one training, started by ``mlx.launch``: the first writes, all take a share of each step's clips.
One process alone is a group of one.

They wait for each other in `Ranks.meeting`, so that all end when one fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from ..errors import WanError
from .factors import Factors

T = TypeVar("T")


class Ranks:
    """This process among all: its number ``rank``, of ``size``."""

    def __init__(self) -> None:
        group = mx.distributed.init()
        self.rank, self.size = group.rank(), group.size()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Ends when this block has ended in every process.

        Raises:
            WanError: it failed in another one.
        """
        try:
            yield
        except BaseException:
            self._count(failed=True)
            raise
        if self._count()[1]:
            raise WanError("another process of this training failed; it says why")

    def first_does(self, work: Callable[[], T]) -> T | None:
        """What ``work`` returns, in the first process; the others wait for it."""
        with self.meeting():
            return work() if self.is_first else None

    def any_asks(self, stop: bool) -> bool:
        """Whether ``stop`` is true in any process."""
        return bool(self._count(stop)[0])

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        return value if self.size == 1 else float(_sum(mx.array(value)).item()) / self.size  # type: ignore[arg-type]

    def mean_gradients(self, gradients: Factors) -> Factors:
        """Their mean over all processes, which have them in the same order."""
        if self.size == 1:
            return gradients
        # A list, since MLX takes dots in names for levels.
        return dict(zip(gradients, nn.average_gradients(list(gradients.values())), strict=True))

    def of_first(self, tree: Any) -> Any:
        """A tree of arrays by name as the first process has it; the others have one of the same names and shapes."""
        if self.size == 1:
            return tree
        if isinstance(tree, dict):  # in one order: a file's is not that of new arrays
            return {name: self.of_first(tree[name]) for name in sorted(tree)}
        own = tree.astype(mx.float32)  # a count of steps is uint64, which rings do not add
        return _sum(own if self.is_first else mx.zeros_like(own)).astype(tree.dtype)

    def _count(self, stop: bool = False, failed: bool = False) -> list[int]:
        """In how many processes each is true."""
        own = [int(stop), int(failed)]
        return own if self.size == 1 else _sum(mx.array(own, mx.int32)).tolist()  # type: ignore[return-value]


def _sum(array: mx.array) -> mx.array:
    found = mx.distributed.all_sum(array)
    mx.eval(found)
    return found
