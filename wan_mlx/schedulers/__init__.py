"""Solvers of the flow's ODE, behind one protocol: `Scheduler`."""

from __future__ import annotations

from .schedule import Grid, Scheduler
from .solvers import DMD, DPMSolverPP, Euler, UniPC

__all__ = ["SOLVERS", "Grid", "Scheduler"]

SOLVERS: dict[str, type[Scheduler]] = {"unipc": UniPC, "dpm++": DPMSolverPP, "euler": Euler, "dmd": DMD}
