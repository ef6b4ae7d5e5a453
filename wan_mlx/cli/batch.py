"""``--prompts FILE``: many requests, one a line, with the model kept loaded and all texts encoded together.

Of a .txt file a line is a prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from io import RawIOBase
from pathlib import Path
from typing import Any

from .. import options
from ..errors import Stopped, UsageError, WanError
from ..media.write import check_output
from ..pipeline import WanPipeline
from ..prompts.extend import Extension
from ..runs.folder import RunFolder
from ..runs.job import Job
from ..runs.record import seed_of_made
from ..storage import parse_json, place_of
from .config_file import read_text
from .flags import free_on_resume, json_flags, keywords, run_parser
from .interrupt import Interrupts
from .jobs import check_flags, extend, extension_of, is_series, jobs_from, open_model, request_from
from .summary import tell_awake, tell_notes
from .terminal import FAILURE, SUSPECT, Terminal, explain

OF_REPORT = {"line", "status", "output", "seed"}  # in each line of a report
LONGEST_LINE = 1 << 20


@dataclass
class Line:
    """A video or a still that a line of the file asks for; with ``extension`` its prompt is to be written out."""

    number: int
    job: Job
    extension: Extension | None = field(default=None, repr=False)

    @property
    def draws(self) -> bool:
        """Whether the seed is drawn, so that any is the one asked for."""
        return self.job.asked["seed"] is None or self.job.asked["seed"] < 0

    @property
    def begins(self) -> bool:
        """Whether it is made from the start."""
        return self.job.overwrite or not RunFolder(self.job.output).is_unfinished

    @property
    def previews(self) -> list[Path]:
        return [] if self.job.previews is None else [self.job.previews.path, self.job.previews.sheet]

    def is_made(self) -> bool:
        """Whether the output is there, with the settings that the line asks for."""
        job = self.job
        seed = seed_of_made(job.pipe, job.request, job.output, self.draws, self.extension)
        if seed is not None:
            job.request = replace(job.request, seed=seed)
        return seed is not None


def run_batch(args: argparse.Namespace, argv: list[str], say: Terminal, interrupts: Interrupts) -> int:
    """Make the videos of the file, and a report; returns the exit code.

    The other flags are the defaults of every line. All lines are checked before the first is begun. Videos of one
    model are made one after the other, in the order of the lines. Complete videos are skipped, interrupted ones go on,
    and a failure does not stop the rest.

    Raises:
        UsageError: a line is wrong; says which, and names the nearest.
    """
    if args.resume:
        raise UsageError("--resume does not go with --prompts: the same command again goes on with the batch")
    if args.plan:
        raise UsageError("--plan does not go with --prompts: give it with the flags of one line")
    for flag in ("prompt", "output"):
        if getattr(args, flag) is not None:
            raise UsageError(f"--{flag} does not go with --prompts: it belongs into the lines of {args.prompts}")
    lines = read_lines(Path(args.prompts), argv, args.overwrite, say)
    path = Path(args.report or Path(args.prompts).with_suffix(".report.jsonl"))
    check_report(path, lines)
    pipes = list(dict.fromkeys(line.job.pipe for line in lines))
    say.note(f"batch     {len(lines)} requests, {len(pipes)} models")
    tell_awake(args.caffeinate, say)
    if args.dry_run:
        for line in lines:
            say.note(f"line {line.number}: {line.job.output}: {line.job.request.prompt}")
            tell_notes(line.job.pipe, line.job.request, say)
        return 0
    say.details = False
    with path.open("wb", buffering=0) as file:
        report = Report(file, len(lines))
        try:
            for pipe in pipes:
                _make_lines([line for line in lines if line.job.pipe is pipe], report, say, interrupts, args.debug)
        except Stopped as stopped:
            raise Stopped(stopped.signum, "; go on with the same command", stopped.why) from stopped
    say.note(f"batch     {', '.join(f'{count} {status}' for status, count in report.counts.items())}; see {path}")
    return FAILURE if report.counts["failed"] else SUSPECT if report.counts["suspect"] else 0


class Report:
    """A line of JSON for each of ``total`` requests, written as soon as it is over."""

    def __init__(self, file: RawIOBase, total: int):
        self.file, self.total = file, total
        self.counts: Counter[str] = Counter()

    def add(self, line: Line, status: str, **rest: Any) -> None:
        output, seed = str(line.job.output), line.job.request.seed
        entry = {"line": line.number, "status": status, "output": output, "seed": seed, **rest}
        try:
            self.file.write(f"{json.dumps(entry, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise WanError(f"the report cannot be written: {error}") from error
        self.counts[status] += 1


def check_report(path: Path, lines: list[Line]) -> None:
    """Refuse a name that is not free for the report: only a report may be replaced.

    Raises:
        UsageError: a file of another kind is there, or a line makes one there; or there is no such folder.
    """
    if not path.parent.is_dir():
        raise UsageError(f"report {path}: there is no folder {path.parent}")
    if (path.exists() or path.is_symlink()) and not _is_report(path):
        raise UsageError(f"report {path} exists and is no report of a batch; choose another name with --report")
    for line in lines:
        for file in (line.job.output, RunFolder(line.job.output).path, *line.previews):
            if place_of(file) == place_of(path):
                raise UsageError(f"report {path} would be written over {file}, which line {line.number} makes")


def _is_report(path: Path) -> bool:
    """Whether every line of a file is one of `Report.add`; the last may be cut. A terminal or pipe keeps nothing."""
    if path.is_char_device() or path.is_fifo():
        return True
    try:
        with path.open(encoding="utf-8") as file:
            for line in iter(lambda: file.readline(LONGEST_LINE), ""):
                whole = line.endswith("\n")
                if not (OF_REPORT <= parse_json(line).keys() if whole else line.startswith('{"line": ')):
                    return False
    except (OSError, ValueError, AttributeError):  # AttributeError: a line of JSON that is no object
        return False
    return True


def _make_lines(lines: list[Line], report: Report, say: Terminal, interrupts: Interrupts, debug: bool) -> None:
    """Make the videos of one model: those of one language model are written out together, and all texts encoded."""
    left = []
    for line in lines:
        if not line.job.overwrite and line.is_made():
            report.add(line, "skipped", reason="complete")
        else:
            left.append(line)
    new = [line for line in left if line.begins]
    for extension in dict.fromkeys(line.extension for line in new if line.extension):
        extend(extension, [line.job for line in new if line.extension == extension], say)
    pipe, requests = lines[0].job.pipe, [line.job.request for line in new]
    texts = [text for r in requests for text in (r.prompt, r.negative_prompt)[: r.passes]]
    with pipe.keep_loaded():
        try:
            if texts:
                pipe.encode_text(list(dict.fromkeys(texts)))
        except Exception as error:  # whose it is will be seen when each is encoded alone
            say.note(f"the texts could not be encoded together: {error}")
        for line in left:
            job = line.job
            done = report.counts.total()
            say.note(f"\n[{done + 1}/{report.total}] line {line.number}: {job.output}: {job.request.prompt}")
            started = time.perf_counter()
            try:
                with interrupts.stopping(job):
                    made = job.make(say, free_on_resume() | ({"seed"} if line.draws else set()))
            except Stopped:
                report.add(line, "interrupted", seconds=round(time.perf_counter() - started, 1))
                raise
            except Exception as error:
                if debug:
                    raise
                said, code = explain(error)
                report.add(line, "failed", error=said, seconds=round(time.perf_counter() - started, 1))
                say.fail(f"line {line.number}: {said}", code)
            else:
                said = {"complaint": made.complaint} if made.complaint else {}
                rest = {"seconds": round(made.seconds, 1), "peak_gib": made.peak_gib}
                report.add(line, "suspect" if said else "done", **said, **rest)


def read_lines(path: Path, argv: list[str], overwrite: bool, say: Terminal) -> list[Line]:
    """The requests of the file, checked.

    Raises:
        UsageError: the file cannot be read, or a line of it is wrong.
    """
    texts = read_text(path, "--prompts", (".txt", ".jsonl")).split("\n")  # not splitlines: text may hold U+2028
    parser, lines = run_parser(), list[Line]()
    pipes: dict[Any, Any] = {}
    made, replaced = dict[str, int](), dict[str, int]()  # place of an output → the line that makes it; makes it now
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            given = [f"--prompt={text.strip()}"] if path.suffix.lower() == ".txt" else json_flags(text)
            args = parser.parse_args([*argv, *given])
            for line in _lines(number, args, path, pipes, say):
                output = line.job.output
                check_output(output, overwrite=True)
                if (place := place_of(output)) in made:
                    raise UsageError(f"output {output} is that of line {made[place]}, too")
                if overwrite or not line.is_made():  # else it is skipped
                    check_output(output, overwrite or RunFolder(output).is_unfinished)
                    replaced[place] = number
                made[place] = number
                lines.append(line)
        except (UsageError, ValueError, OSError) as error:
            raise UsageError(f"{path} line {number}: {error}") from error
        except WanError as error:
            raise WanError(f"{path} line {number}: {error}") from error
    for line in lines:
        sources = [(file, replaced) for file in line.job.request.source_files]
        for file, taken in sources + [(file, made) for file in line.previews]:
            if other := taken.get(place_of(file)):
                raise UsageError(f"{path} line {line.number}: {file} is also the output of line {other}")
    if not lines:
        raise UsageError(f"--prompts {path} holds no request; expected one JSON object a line, such as "
                         '{"prompt": "a cat boxing", "seed": 1}, or of a .txt file a prompt')  # fmt: skip
    return lines


def _lines(
    number: int, args: argparse.Namespace, path: Path, pipes: dict[str, WanPipeline], say: Terminal
) -> list[Line]:
    """The request of a line: one video, or several stills."""
    check_flags(args)
    extension = extension_of(args)
    if args.seeds is None and is_series(args) and (args.seed is None or args.seed < 0):
        name = "num_images" if args.num_images is not None else "num_videos"
        raise UsageError(f"{name} without a seed, which names the files; give one")
    model = keywords(args, options.MODEL)
    key = json.dumps(model, default=str, sort_keys=True)
    if key not in pipes:
        pipes[key] = open_model(model, say)
    request = request_from(pipes[key], args)
    output = args.output or f"{path.stem}_{number:04d}{'.png' if request.num_frames == 1 else '.mp4'}"
    return [Line(number, job, extension) for job in jobs_from(pipes[key], args, request, Path(output))]
