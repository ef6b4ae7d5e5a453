"""``wan-mlx queue``: the queue of a library on the command line, beside a server or without one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import options
from ..errors import UsageError
from ..presets import BUNDLED
from ..runs.queue import DONE, FAILED, RUNNING, STOPPED, Queue, Queued
from ..server.library import Library, default_library, is_plain
from ..server.machines import Machine, parse_machines, work_off
from .commands import as_flags
from .flags import Parser, given_flags
from .serve import MACHINES
from .terminal import FAILURE, Terminal, write

ACTIONS = ("list", "add", "run", "pause", "stop", "resume", "move", "rm")
SHORT = 6  # letters of an id that are shown
DESCRIPTION = """\
The queue that `wan-mlx serve` works on. Without a server, `run` makes what
waits; a job that was cut goes on where it was."""
EPILOG = """\
examples:
  wan-mlx queue add "a red circle moves right" --seed 7
  wan-mlx queue
  wan-mlx queue run
  wan-mlx queue stop 1f3a9c"""


def build_parser() -> Parser:
    parser = Parser(prog="wan-mlx queue", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("action", nargs="?", choices=ACTIONS, default="list", metavar="ACTION",
                        help="list (default); add PROMPT and flags of a run; run; pause, stop, resume, rm ID; move ID, "
                        "to the end or --before ID")  # fmt: skip
    parser.add_argument("id", nargs="?", help="the first letters of a job's id")
    parser.add_argument("--before", metavar="ID", help="of move: the job that it is put before")
    parser.add_argument("--library", metavar="FOLDER", type=Path, help="folder of the videos (Movies/wan_mlx)")
    parser.add_argument("--machines", metavar="LIST", help=f"of run: {MACHINES}")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def main(argv: list[str]) -> int:
    """Carry out the action; returns the exit code."""
    args, flags = build_parser().parse_known_args(argv)
    library = Library((args.library or default_library()).expanduser())
    queue = library.queue
    if args.action == "add":
        own = {"--library": 2, "--json": 1}
        return add(library, without(argv, own), args.json)
    if flags:
        build_parser().parse_args(argv)  # which says what is wrong
    if args.before and args.action != "move":
        raise UsageError("--before goes with move; leave it out")
    if args.action in ("list", "run"):
        if args.id:
            raise UsageError(f"queue {args.action} takes no id, {args.id!r} was given")
        machines = parse_machines(args.machines)
        return run(queue, args.json, machines) if args.action == "run" else show(queue, args.json)
    job = found(queue, args.id, args.action)
    if args.action == "move":
        queue.move(job.id, args.before and found(queue, args.before, "--before").id)
    elif args.action == "rm":
        remove(library, job)
    else:
        queue.ask(job.id, args.action)
    return show(queue, args.json)


def without(argv: list[str], flags: Mapping[str, int]) -> list[str]:
    """A command line of ``queue add`` without ``add`` and the flags of the queue, each of so many words."""
    left, words = [], iter(argv)
    for word in words:
        name = word.partition("=")[0]
        if name in flags:
            if "=" not in word and flags[name] == 2:
                next(words, None)
        else:
            left.append(word)
    left.remove("add")
    return left


def found(queue: Queue, id: str | None, what: str) -> Queued:
    """The job whose id begins so.

    Raises:
        UsageError: there is none, or there are several.
    """
    if not id:
        raise UsageError(f"queue {what}: expected the id of a job, which `wan-mlx queue` lists")
    letters = id.removeprefix("video_")
    jobs = [job for job in queue.all() if job.id.removeprefix("video_").startswith(letters)]
    if len(jobs) != 1:
        raise UsageError(f"{len(jobs) or 'no'} jobs have an id that begins with {id!r}; `wan-mlx queue` lists them")
    return jobs[0]


def add(library: Library, argv: list[str], as_json: bool) -> int:
    """Put a run into the queue, as its command line has it."""
    from ..server.clerk import check  # with MLX

    given = given_flags(as_flags("generate", argv, True))
    name = given.pop("output", None)
    known = {option.key: option for option in options.flags()}
    for key in given:
        if known[key].alone or known[key].no_effect or key in ("seeds", "num_videos", "num_images", "preview"):
            raise UsageError(f"{known[key].flags[0]} does not go with queue add, which takes one video; leave it out")
    wanted: dict[str, Any] = {key: lasting(known[key], value) for key, value in given.items()}
    wanted.setdefault("model", "nano-i2v" if wanted.get("image") else "nano")
    about = {"model": wanted["model"], **check(wanted)}
    if name is None:
        name = library.new_name(wanted.get("prompt", ""), ".png" if about.get("num_frames") == 1 else ".mp4")
    elif not is_plain(name):
        raise UsageError(f"--output is {name!r}, expected a file's name: the library is its folder")
    job = library.queue.add(wanted, name, about)
    write(json.dumps(row_of(library.queue, job)) if as_json else f"{short(job)}  {job.output}")
    return 0


def lasting(option: Any, value: Any) -> Any:
    """A value as JSON has it, such that it means the same in another folder."""
    if isinstance(value, list | tuple):
        return [lasting(option, one) for one in value]
    if not option.place or not isinstance(value, str) or value in BUNDLED:
        return value
    path = Path(re.sub(r":-?[\d.]+$", "", value) if option.repeats else value).expanduser()
    if option.place == "file" or path.exists():
        return str(path.absolute()) + value[len(str(path)) :] * option.repeats
    return value


def row_of(queue: Queue, job: Queued) -> dict[str, Any]:
    """A job for programs."""
    steps = [int(path.stem[5:]) for path in (queue.library / f"{job.output}.wan").glob("step-*.safetensors")]
    return {"id": job.id, "state": job.state, "output": str(queue.library / job.output), "prompt":
            job.options.get("prompt"), "model": job.options.get("model"), "step": max(steps, default=None),
            "steps": job.about.get("steps"), "error": job.error, "seconds": round(job.seconds, 1)}  # fmt: skip


def short(job: Queued) -> str:
    return job.id.removeprefix("video_")[:SHORT]


def show(queue: Queue, as_json: bool) -> int:
    """Print what runs and waits, in order, and then what is over."""
    order = queue.in_order()
    jobs = [*order, *(job for job in queue.all() if job.is_over)]
    rows = [row_of(queue, job) for job in jobs]
    if as_json:
        write(json.dumps(rows))
        return 0
    for job, row in zip(jobs, rows, strict=True):
        step = f"{row['step'] or 0}/{row['steps']} " if job.state not in (DONE,) and row["steps"] else ""
        why = f": {job.error}" if job.state == FAILED else ""
        write(f"{short(job)}  {job.state:<8}{step:<8}{row['model']}  {job.output}{why}")
    if not rows:
        write(f"nothing is in the queue of {queue.library}")
    return 0


def remove(library: Library, job: Queued) -> None:
    """Take a job out, and remove what an unfinished one has made; finished files stay."""
    if not library.queue.delete(job.id):
        return  # it runs: who makes it ends it first
    library.forget(job.id, job.output)
    if (library.folder / f"{job.output}.wan").is_dir():
        from ..server.clerk import forget  # with MLX

        forget(str(library.folder / job.output))


def run(queue: Queue, as_json: bool, machines: list[Machine]) -> int:
    """Make what waits, on other ``machines``, too; returns the exit code."""
    say = Terminal()

    def told(id: str, event: Mapping[str, Any]) -> None:
        if as_json:
            write(json.dumps({"id": id, **event}))
        elif event["event"] == "worker" and event["state"] == "died":
            message, at = event["message"], event.get("machine", "")
            say.note(message if at in message else f"{at}: {message}", important=True)
        elif event["event"] == "state" and event["state"] == RUNNING:
            say.note(f"\n{queue.get(id).output}: {queue.get(id).options.get('prompt', '')}")
        elif event["event"] == "step":
            which = f" {queue.get(id).output}:" * bool(machines)  # several are at work
            say.note(f"step     {which} {event['index'] + 1} of {event['total']}, {event['seconds']:.1f} s")
        elif event["event"] == "error":
            say.fail(event["message"], event["code"])
        elif event["event"] == "result":
            write(queue.library / event["output"])

    before = {job.id for job in queue.all(FAILED, STOPPED)}
    work_off(queue, told, machines)
    return FAILURE if any(job.id not in before for job in queue.all(FAILED)) else 0
