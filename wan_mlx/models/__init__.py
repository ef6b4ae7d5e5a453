"""The networks."""

import sys
from types import ModuleType
from typing import Any, NoReturn


class _Networks(ModuleType):
    """Answers who takes it for a function that lists models."""

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("wan_mlx.models holds the networks; list(wan_mlx.PRESETS) lists the released models, and "
                        "`wan-mlx models` in a terminal says which are here")  # fmt: skip


sys.modules[__name__].__class__ = _Networks
