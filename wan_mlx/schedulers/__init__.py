"""Solvers of the flow's ODE, behind one protocol: `Scheduler`."""

from __future__ import annotations

from ..errors import closest
from .schedule import Grid, Scheduler
from .solvers import DMD, DPMSolverPP, Euler, UniPC

__all__ = ["SOLVERS", "Grid", "Scheduler", "make_scheduler"]

SOLVERS: dict[str, type[Scheduler]] = {"unipc": UniPC, "dpm++": DPMSolverPP, "euler": Euler, "dmd": DMD}


def make_scheduler(
    name: str, steps: int, shift: float, grid: Grid | None = None, seed: int = 0, begin: int = 0
) -> Scheduler:
    """The solver ``name``; the other arguments are `Scheduler`'s.

    Raises:
        ValueError: unknown name, fewer than one step, no step left, or a shift that is not above 0.
    """
    if name not in SOLVERS:
        raise ValueError(
            f"unknown solver {name!r}, expected one of {', '.join(SOLVERS)}; nearest: {closest(name, SOLVERS)}"
        )
    return SOLVERS[name](steps, shift, grid, seed, begin)
