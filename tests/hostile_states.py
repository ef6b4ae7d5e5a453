"""State folders of a run that was killed: edited, swapped, cut, linked, and another run's."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hostile import Case
from hostile_flags import ODD, Cases, Model
from killed import KilledProcess


class States:
    """Folders of one run as it was killed at several places, of others beside it, and the bytes that it should make."""

    def __init__(self, model: Model, folder: Path):
        self.flags = ["--model", str(model.path), "--frames", "9", "--steps", "3", "--dtype", "float32", "--quiet"]
        self.command = [
            *self.flags,
            "--prompt",
            "a red circle",
            "--size",
            "16x16",
            "--seed",
            "3",
            "--output",
            "out.npz",
        ]
        whole = folder / "whole"
        whole.mkdir()
        self.operations = KilledProcess.operations(self.command, whole)
        self.whole = (whole / "out.npz").read_bytes()
        self.at = [self._killed(folder, f"{number}", number) for number in self._stages()]
        others = {
            "seed": ["--seed", "4"], "prompt": ["--prompt", "a blue square"], "size": ["--size", "32x32"],
            "steps": ["--steps", "4"], "guidance": ["--guidance", "2"],
        }  # fmt: skip
        self.others = {name: self._killed(folder, name, self._stages()[-1], more) for name, more in others.items()}

    def _stages(self) -> list[int]:
        """Numbers of operations that come right after each kind of file was written."""
        seen: dict[str, int] = {}
        for number, (verb, name) in enumerate(self.operations):
            if verb == "rename" and not name.startswith("out"):
                seen[name] = number + 1
        frames = [number for number, (_, name) in enumerate(self.operations) if name == "frames.index"]
        return [*seen.values(), *frames[2::4]]

    def _killed(self, folder: Path, name: str, number: int, more: Sequence[str] = ()) -> Path:
        place = folder / name
        place.mkdir()
        KilledProcess([*self.command, *more], place, number).finish()
        return place / "out.npz.wan"


def states(model: Model, chance: random.Random, folder: Path) -> Cases:
    bank = States(model, folder)
    for number, of in enumerate(bank.at):
        found = [*changes(of, bank, chance)]
        for name, change in [*found[:2], *chance.sample(found[2:], min(EACH, len(found) - 2))]:
            yield case(bank, f"{name}, stage {number}", of, change, RESUME)
        for name, change in chance.sample(found, ANEW):
            yield case(bank, f"{name}, stage {number}, anew", of, change, [*bank.command, "--overwrite"])
    links = {"the user's model": "../user/model", "nothing": "../user/none", "itself": "out.npz.wan"}
    for name, target in links.items():
        yield Case(f"the folder is a link to {name}", RESUME,
                   lambda work, target=target: (work / "out.npz.wan").symlink_to(target), refused=True)  # fmt: skip


EACH, ANEW = 60, 6  # changes of a stage that are tried to go on with, and to start anew over
RESUME = ["--resume", "out.npz", "--quiet"]
Change = tuple[str, Callable[[Path], object]]  # what is done to a state folder


def case(bank: States, name: str, of: Path, change: Callable[[Path], object], arguments: list[str]) -> Case:
    """To go on with a changed folder, or to start anew: refused, or the very bytes of the uninterrupted run."""

    def prepare(work: Path) -> None:
        shutil.copytree(of, work / "out.npz.wan", symlinks=True)
        change(work / "out.npz.wan")

    return Case(name, arguments, prepare, ("out.npz", "out.npz.wan"), ("*mine.txt",), makes={"out.npz": bank.whole})


def changes(of: Path, bank: States, chance: random.Random) -> Iterator[Change]:
    yield "as it is", lambda folder: None
    yield "with a user's file", lambda folder: (folder / "mine.txt").write_text("mine")
    for name in sorted(path.name for path in of.iterdir() if path.name != "lock"):
        for other, its in bank.others.items():
            if (its / name).exists():
                yield f"{name} of another {other}", partial(put, name, its / name)
        yield f"{name} is gone", lambda folder, name=name: (folder / name).unlink()
        yield f"{name} is empty", lambda folder, name=name: (folder / name).write_bytes(b"")
        yield f"{name} is {{}}", lambda folder, name=name: (folder / name).write_text("{}")
        yield f"{name} is a folder", lambda folder, name=name: as_folder(folder / name)
        yield f"{name} is a link", lambda folder, name=name: as_link(folder / name)
        for _ in range(4):
            yield damage(name, (of / name).read_bytes(), chance)
        if name.startswith("step-"):
            for other in ("step-0001", "step-0002", "step-0003", "step-0099", "step-abc", "step-00001", "step--001"):
                if not name.startswith(f"{other}."):
                    yield f"{name} copied to {other}", partial(rename, name, f"{other}.safetensors", shutil.copyfile)
                    yield f"{name} moved to {other}", partial(rename, name, f"{other}.safetensors", os.rename)
    for other, its in bank.others.items():  # all but the record
        yield f"all of another {other}", partial(put_all, its)
    for place, value in edits(json.loads((of / "run.json").read_text()), chance, 15):
        yield (f"run.json's {place} is {str(value)[:60]}",
               lambda folder, place=place, value=value: edit(folder / "run.json", place, value))  # fmt: skip
    yield "lock is a link to a thesis", lambda folder: as_link(folder / "lock")
    yield "lock is a folder", lambda folder: as_folder(folder / "lock")
    yield "a temporary name is a link to a thesis", lambda folder: as_link(folder / ".wan_mlx-run.json")


def put(name: str, source: Path, folder: Path) -> None:
    shutil.copyfile(source, folder / name)


def put_all(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        if path.name not in ("lock", "run.json"):
            shutil.copyfile(path, folder / path.name)


def rename(name: str, other: str, how: Callable, folder: Path) -> None:
    how(folder / name, folder / other)


def damage(name: str, data: bytes, chance: random.Random) -> Change:
    """A bit flipped, bytes cut or added, or zeros where there was something."""
    changed = bytearray(data)
    how, at = chance.choice(["flip", "cut", "more", "zeros"]), chance.randrange(max(1, len(data)))
    if how == "flip" and data:
        changed[at] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del changed[at:]
    elif how == "more":
        changed += chance.randbytes(chance.randint(1, 100))
    else:
        changed[at : at + 64] = bytes(len(changed[at : at + 64]))
    return f"{name}: {how} at {at}", lambda folder: (folder / name).write_bytes(changed)


def edits(record: Any, chance: random.Random, count: int) -> Iterator[tuple[tuple, Any]]:
    """Random places in a JSON object, and values for them."""
    places: list[tuple] = []

    def walk(value: Any, at: tuple) -> None:
        places.append(at)
        for key, inner in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            walk(inner, (*at, key))

    walk(record, ())
    for place in chance.sample(places, min(count, len(places))):
        yield place, chance.choice(ODD)


def edit(path: Path, place: tuple, value: Any) -> None:
    record = json.loads(path.read_text())
    if not place:
        record = value
    else:
        inner = record
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
    path.write_text(json.dumps(record))


def as_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "mine.txt").write_text("mine")


def as_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("../../user/thesis.txt")
