"""Whether two checkouts make the same bytes: many small runs of the command line in each, their files compared.

    python benchmarks/same_bytes.py --before FOLDER
    python benchmarks/same_bytes.py --before FOLDER --keep GOLDENS --only lora vace

FOLDER is a checkout from before a change that must change nothing. Every case runs in processes of its own, with empty
caches, once in each checkout; frames, latents, pixels and video streams of all files that come of it are compared byte
for byte, and so are the names of the files. With --keep, what the checkout before made is kept, and made anew only
where its code, the case, the inputs or the packages below it are others. Exit code 1 if anything differs.

nano's weights are each checkout's own: against one from before they were last trained, its cases differ, and so do all
cases that decode on a CPU against one from before its convolutions were one product (by rounding). All others are
random and tiny, in the formats they are published in, and are written once for both sides by
PyTorch, not by the code that is compared. Needs torch and gguf. MLX's compiled kernels are shared by all runs, since
their names tell what they compute; every run computes with one thread, whose sums have one order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from same_bytes_cases import Case, all_cases
from same_bytes_inputs import write_inputs

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageSequence

ROOT = Path(__file__).resolve().parent.parent


class Failed(Exception):
    """A command ended otherwise than it was to."""


@dataclass(frozen=True)
class Places:
    """Folders that all runs share: inputs, MLX's compiled kernels, Python's compiled modules."""

    inputs: Path
    kernels: Path
    modules: Path


def environment(checkout: Path, home: Path, places: Places) -> dict[str, str]:
    """Nothing of the caller's settings and caches; the package is that of ``checkout``."""
    ours = re.compile(r"PYTHON|XDG_|WAN_MLX|MLX_|HF_|TMPDIR|OMP_|OPENBLAS_|MKL_")
    kept = {name: value for name, value in os.environ.items() if not ours.match(name)}
    temporary = home / "tmp"
    if not temporary.exists():
        temporary.mkdir()
        (temporary / "mlx").symlink_to(places.kernels)
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return kept | one_thread | {
        "HOME": str(home), "TMPDIR": str(temporary), "XDG_CACHE_HOME": str(home / "cache"),
        "WAN_MLX_CACHE": str(home / "prompts"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(checkout),
        "PYTHONPYCACHEPREFIX": str(places.modules),
    }  # fmt: skip


def arguments_of(command: str, inputs: Path) -> list[str]:
    arguments = [word.replace("INPUTS", str(inputs)) for word in shlex.split(command)]
    named = {"--output", "--save_file", "--resume", "--prompts"} & set(arguments)
    return [*arguments, *([] if named else ["--output", "out.npz"]), "--json"]


def run(command: list[str], folder: Path, env: dict[str, str], kill_at: int = 0) -> list[dict]:
    """The events of a command that is run in ``folder``; after so many steps it is killed, and must not have ended
    before."""
    events, steps = [], 0
    with tempfile.TemporaryFile("w+") as errors:
        pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        with subprocess.Popen(command, cwd=folder, env=env, text=True, **pipes) as process:
            for line in process.stdout:
                if not line.startswith("{"):
                    continue
                events.append(json.loads(line))
                steps += events[-1]["event"] == "step"
                if kill_at and steps == kill_at:
                    process.kill()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode != (-9 if kill_at else 0):
        told = [event["message"] for event in events if event["event"] == "error"]
        raise Failed(f"exit code {process.returncode}: {(told or said or ['nothing was said'])[-1]}")
    return events


def run_case(case: Case, checkout: Path, folder: Path, places: Places) -> float:
    """Make the files of a case in ``folder``, which is emptied before; returns the seconds it took.

    Raises:
        Failed: a command did not end well; or what was cut did not go on to the same files.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as home:
        env = environment(checkout, Path(home), places)
        started = time.perf_counter()
        for number, command in enumerate(case.commands):
            arguments = [sys.executable, *case.program, *arguments_of(command, places.inputs)]
            events = run(arguments, folder, env, 0 if number else case.killed_at)
            steps = [event for event in events if event["event"] == "step"]
            if case.killed_at and number == 1 and not 0 < len(steps) < steps[0]["total"]:
                raise Failed(f"what was cut went on with {len(steps)} steps of {steps[0]['total']}")
        seconds = time.perf_counter() - started
    if case.killed_at:
        ending = Path(arguments_of(case.commands[1], places.inputs)[1]).suffix
        if (found := difference(*(content(folder / f"{name}{ending}") for name in ("cut", "whole")))) is not None:
            raise Failed(f"what was cut and went on is another: {found}")
    return seconds


# --- What files hold.


def ffmpeg(path: Path, *options: str) -> np.ndarray:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), *options, "-"]
    return np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.uint8)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "settings"}


def stream_of(path: Path) -> dict[str, np.ndarray]:
    """Pixels for the size of a difference; of the stream every byte."""
    pixels = ffmpeg(path, "-f", "rawvideo", "-pix_fmt", "rgb24")
    return {"pixels": pixels, "stream": ffmpeg(path, "-c", "copy", "-f", "h264")}


def pixels_of(path: Path) -> dict[str, np.ndarray]:
    with Image.open(path) as image:
        return {"pixels": np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])}


CONTENT: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".npz": arrays_of, ".mp4": stream_of, ".png": pixels_of, ".webp": pixels_of, ".gif": pixels_of,
}  # fmt: skip


def content(path: Path) -> dict[str, np.ndarray]:
    """Name → array of all that a file holds but the settings, which tell versions."""
    return CONTENT.get(path.suffix, lambda path: {})(path)


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> str | None:
    """The first difference, in words; None if every byte is the same."""
    if a.keys() != b.keys():
        return f"holds {', '.join(a)} and {', '.join(b)}"
    for name in a:
        if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape):
            return f"{name} is {a[name].dtype} {a[name].shape} and {b[name].dtype} {b[name].shape}"
        if a[name].tobytes() != b[name].tobytes():
            largest = np.abs(a[name].astype(np.float64) - b[name].astype(np.float64)).max()
            return f"{name} by up to {largest:.3g}"
    return None


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def compare(before: Path, after: Path) -> str | None:
    """How the files in two folders differ; None if they do not."""
    names = files_of(before), files_of(after)
    if names[0] != names[1]:
        return f"files are {', '.join(names[0])} and {', '.join(names[1])}"
    for name in names[0]:
        if (found := difference(content(before / name), content(after / name))) is not None:
            return f"{name}: {found}"
    return None


# --- The table.


def digest(folder: Path) -> str:
    """Of all files in it, names and bytes."""
    hashed = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        hashed.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return hashed.hexdigest()


def checked(checkout: Path, places: Places) -> Path:
    """The checkout's absolute path; ends the program unless its package is the one that runs there."""
    checkout = checkout.resolve()
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-c", "import wan_mlx; print(wan_mlx.__file__)"], cwd=home, text=True,
            env=environment(checkout, Path(home), places), capture_output=True,
        )  # fmt: skip
    found = done.stdout.strip() or done.stderr.strip().rpartition("\n")[2]
    if Path(found) != checkout / "wan_mlx/__init__.py":
        raise SystemExit(f"{checkout} is no checkout that can be run: wan_mlx is {found}")
    return checkout


def kept_seconds(folder: Path, key: str) -> float | None:
    """How long the files that are kept there took; None unless they are those of ``key``."""
    try:
        about = json.loads((folder / "about.json").read_text())
    except (OSError, ValueError):
        return None
    return about["seconds"] if about["key"] == key else None


def before_of(case: Case, checkout: Path, key: str, folder: Path, places: Places) -> float:
    """Have the files of ``case`` in ``folder``/files, made now unless they are there; returns the seconds they took."""
    seconds = kept_seconds(folder, key)
    if seconds is None:
        (folder / "about.json").unlink(missing_ok=True)
        try:
            seconds = run_case(case, checkout, folder / "files", places)
        except Failed as failed:
            raise SystemExit(f"{case.name}: the checkout before the change fails: {failed}") from None
        (folder / "about.json").write_text(json.dumps({"case": case.name, "key": key, "seconds": seconds}))
    return seconds


def compare_all(cases: list[Case], before: Path, after: Path, kept: Path, work: Path, json_path: Path | None) -> bool:
    """Run, print and write the table; returns whether all is the same."""
    places = Places(kept / "inputs", kept / "kernels", work / "modules")
    for folder in (places.kernels, places.modules):
        folder.mkdir(parents=True, exist_ok=True)
    before, after = checked(before, places), checked(after, places)
    written = kept / "inputs_are_by"
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("same_bytes*.py"))]
    ours = hashlib.sha256(b"".join(texts)).hexdigest()
    if not written.exists() or written.read_text() != ours:
        shutil.rmtree(places.inputs, ignore_errors=True)
        write_inputs(places.inputs, before)
        written.write_text(ours)
    below = {name: version(name) for name in ("mlx", "numpy", "pillow", "av")}
    machine = {"system": platform.system(), "processor": platform.machine(), "python": platform.python_version()}
    common = [digest(before / "wan_mlx"), digest(places.inputs), below, machine]
    rows = []
    print(f"{'case':<40}{'before s':>9}{'after s':>9}  result", flush=True)
    for case in cases:
        key = hashlib.sha256(json.dumps([case.commands, case.killed_at, case.program, *common]).encode()).hexdigest()
        folder = kept / "before" / re.sub(r"\W+", "_", case.name)
        row = {"case": case.name, "before": before_of(case, before, key, folder, places), "after": None}
        try:
            row["after"] = run_case(case, after, work / "after", places)
            row["difference"] = compare(folder / "files", work / "after")
        except Failed as failed:
            row["difference"] = str(failed)
        rows.append(row)
        said = "same" if row["difference"] is None else f"DIFFERENT: {row['difference']}"
        seconds = "".join("        -" if n is None else f"{n:>9.1f}" for n in (row["before"], row["after"]))
        print(f"{case.name:<40}{seconds}  {said}", flush=True)
        if json_path:  # after every case, so that what is cut short has not been for nothing
            about = {"before": str(before), "after": str(after), "machine": machine | below}
            json_path.write_text(json.dumps({**about, "rows": rows}, indent=1))
    different = sum(row["difference"] is not None for row in rows)
    totals = [sum(row[side] or 0 for row in rows) for side in ("before", "after")]
    print(f"{f'{len(rows)} cases':<40}{totals[0]:>9.1f}{totals[1]:>9.1f}  {different or 'none'} different")
    return not different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="FOLDER", help="checkout before the change")
    parser.add_argument("--after", type=Path, default=ROOT, metavar="FOLDER", help="default: this checkout")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="cases whose names hold one of these")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for inputs and the results before the change")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="print the cases' command lines, and stop")
    args = parser.parse_args()
    cases = [case for case in all_cases() if any(word in case.name for word in args.only)]
    if args.list:
        for case in cases:
            print(case.name, *case.commands, sep="\n    ")
        return 0
    if not cases:
        raise SystemExit(f"no case has {' or '.join(args.only)} in its name")
    with tempfile.TemporaryDirectory() as work:
        kept = args.keep.resolve() if args.keep else Path(work) / "kept"
        return 0 if compare_all(cases, args.before, args.after, kept, Path(work), args.json) else 1


if __name__ == "__main__":
    sys.exit(main())
