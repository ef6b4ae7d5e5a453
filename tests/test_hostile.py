"""Thousands of hostile cases, drawn from a seed: nothing lost, nothing wrong as a success, one clear line.

``python tests/test_hostile.py [AREA ...] [--share N] [--seed N]`` runs them as a script and prints what it found, and
a table; with ``--share N`` only every Nth case, with another seed others.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from itertools import islice
from pathlib import Path

import pytest
from hostile import Bench, Table
from hostile_files import media, weights
from hostile_flags import Cases, Model, batches, command_line, configs
from hostile_states import states

SEED = 17
AREAS = {
    "command line": command_line, "configs": configs, "state": states, "weights": weights, "media": media,
    "batches": batches,
}  # fmt: skip


def cases_of(area: str, model: Model, folder: Path, seed: int = SEED) -> Cases:
    return AREAS[area](model, random.Random(f"{seed} {area}"), folder)


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_nothing_is_lost_and_nothing_wrong_is_a_success(tmp_path, area):
    table = Table()
    with Bench(tmp_path / "bench") as bench:
        model = Model(tmp_path)
        table.run(area, bench, cases_of(area, model, tmp_path))
    print(f"\n{table}")
    assert not table.worst(area)


def as_script(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("areas", nargs="*", default=AREAS, metavar="AREA", help=", ".join(AREAS))
    parser.add_argument("--share", type=int, default=1)
    parser.add_argument("--seed", type=int, default=SEED)
    asked, table = parser.parse_args(arguments), Table()
    with tempfile.TemporaryDirectory() as name, Bench(Path(name) / "bench") as bench:
        model = Model(Path(name))
        for area in asked.areas:
            folder = Path(name) / area
            folder.mkdir()
            cases = islice(cases_of(area, model, folder, asked.seed), None, None, asked.share)
            table.run(area, bench, cases, lambda said: print(said, flush=True))
            print(table, flush=True)
    return 1 if any(map(table.worst, asked.areas)) else 0


if __name__ == "__main__":
    sys.exit(as_script(sys.argv[1:]))
