"""Solvers of the flow's ODE, behind one protocol: `Scheduler`."""

from __future__ import annotations

from ..errors import closest
from .dmd import DMD
from .dpmpp import DPMSolverPP
from .euler import Euler
from .schedule import Grid, Scheduler, sigma_schedule
from .unipc import UniPC

__all__ = ["DMD", "SOLVERS", "DPMSolverPP", "Euler", "Grid", "Scheduler", "UniPC", "make_scheduler", "sigma_schedule"]

SOLVERS: dict[str, type[Scheduler]] = {"unipc": UniPC, "dpm++": DPMSolverPP, "euler": Euler, "dmd": DMD}


def make_scheduler(
    name: str, steps: int, shift: float, grid: Grid | None = None, seed: int = 0, begin: int = 0
) -> Scheduler:
    """The solver ``name`` over ``steps`` steps of a grid shifted by ``shift``, or over ``grid``.

    The first ``begin`` steps are skipped.

    Raises:
        ValueError: unknown name, fewer than one step, no step left, or a shift that is not above 0.
    """
    if name not in SOLVERS:
        raise ValueError(
            f"unknown solver {name!r}, expected one of {', '.join(SOLVERS)}; nearest: {closest(name, SOLVERS)}"
        )
    return SOLVERS[name](steps, shift, grid, seed, begin)
