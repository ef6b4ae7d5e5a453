"""``--prompts file.jsonl``: many requests, one a line, with the model kept loaded and all texts encoded together."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import options
from ..errors import Stopped, UsageError
from ..events import unheard
from ..media.preview import PreviewFiles, open_previews
from ..media.write import check_output
from ..prompts.extend import Extension
from ..runs.folder import RunFolder
from ..runs.interrupt import Interrupts
from ..runs.record import check_identity, check_same, make_record, request_of, seed_of_made
from ..runs.run import Result, make_file
from ..types import Request
from . import main as generate
from .flags import build_parser, json_flags
from .terminal import note
from .terminal import result as tell_result

if TYPE_CHECKING:
    from ..pipeline import WanPipeline

@dataclass
class Job:
    """A line of the file: its number, its flags with those of the command line, and what they come to."""

    line: int
    args: argparse.Namespace
    output: Path
    pipe: WanPipeline = field(repr=False)
    request: Request = field(repr=False)
    previews: PreviewFiles | None = field(default=None, repr=False)
    extension: Extension | None = None

    @property
    def draws(self) -> bool:
        """Whether the seed is drawn, so that any is the one asked for."""
        return self.args.seed is None or self.args.seed < 0


def run_batch(args: argparse.Namespace, argv: list[str], interrupts: Interrupts) -> int:
    """Make what the file asks for, and a report of it; returns the exit code.

    All lines are checked before the first is begun. Videos of one model are made one after the other, in the order of
    the lines. What is complete is skipped, what was cut goes on, and what fails does not stop the rest.

    Raises:
        UsageError: a line is wrong; says which, and what is nearest.
    """
    jobs = read_jobs(Path(args.prompts), argv, args.overwrite)
    note(f"batch     {len(jobs)} requests, {len({id(job.pipe) for job in jobs})} models")
    if args.dry_run:
        for job in jobs:
            note(f"line {job.line}: {job.output}: {job.request.prompt}")
        return 0
    path = Path(args.report or Path(args.prompts).with_suffix(".report.jsonl"))
    with path.open("w", encoding="utf-8") as file:
        report = Report(file)
        for pipe in dict.fromkeys(job.pipe for job in jobs):
            _run_jobs([job for job in jobs if job.pipe is pipe], report, interrupts, len(jobs), args)
    note(f"batch     {report.said()}; see {path}")
    return report.code()


class Report:
    """A line of JSON for each request, written as soon as it is over."""

    def __init__(self, file):
        self.file, self.counts = file, {}

    def add(self, job: Job, status: str, **rest: Any) -> None:
        entry = {"line": job.line, "status": status, "output": str(job.output), "seed": job.request.seed, **rest}
        self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.file.flush()
        self.counts[status] = self.counts.get(status, 0) + 1

    def said(self) -> str:
        return ", ".join(f"{count} {status}" for status, count in self.counts.items())

    def code(self) -> int:
        if "failed" in self.counts:
            return generate.FAILURE
        return generate.SUSPECT if "suspect" in self.counts else 0


def _run_jobs(
    jobs: list[Job], report: Report, interrupts: Interrupts, total: int, args: argparse.Namespace
) -> None:
    """Make the videos of one model."""
    pipe, left = jobs[0].pipe, []
    for job in jobs:
        if not job.args.overwrite and is_made(job):
            report.add(job, "skipped", reason="complete")
        else:
            left.append(job)
    _extend_prompts(left)
    with pipe.keep_loaded():
        _encode_texts(pipe, left)
        for job in left:
            done = sum(report.counts.values())
            note(f"\n[{done + 1}/{total}] line {job.line}: {job.output}: {job.request.prompt}")
            started = time.perf_counter()
            try:
                result = _make(job, interrupts)
            except Stopped as stopped:
                report.add(job, "interrupted", seconds=round(time.perf_counter() - started, 1))
                stopped.go_on = "; go on with the same command"
                raise
            except Exception as error:
                if args.debug:
                    raise
                said, _ = generate.explain(error)
                report.add(job, "failed", error=said, seconds=round(time.perf_counter() - started, 1))
                note(f"error: line {job.line}: {said}")
            else:
                said = {"complaint": result.complaint} if result.complaint else {}
                peak = max((stage.peak_bytes for stage in result.reports), default=0)
                rest = {"seconds": round(result.seconds, 1), "peak_gib": round(peak / 2**30, 2)}
                report.add(job, "suspect" if said else "done", **said, **rest)
                tell_result(job.output, **said, **rest)


def _extend_prompts(jobs: list[Job]) -> None:
    """Write the prompts out where that is asked for, those of one language model together."""
    new = [job for job in jobs if job.extension and (job.args.overwrite or not RunFolder(job.output).is_unfinished)]
    for extension in dict.fromkeys(job.extension for job in new):
        those = [job for job in new if job.extension == extension]
        for job, request in zip(those, generate.extend(extension, [job.request for job in those]), strict=True):
            job.request = request


def _encode_texts(pipe: WanPipeline, jobs: list[Job]) -> None:
    """All texts in one pass over the text encoder, which are then at hand for each request."""
    texts = []
    for job in jobs:
        if not RunFolder(job.output).is_unfinished:
            texts += [job.request.prompt] + [job.request.negative_prompt] * (job.request.guidance_scale != 1)
    try:
        if texts:
            pipe.encode_text(list(dict.fromkeys(texts)))
    except Exception as error:  # whose it is will be seen when each is encoded alone
        note(f"the texts could not be encoded together: {error}")


def _make(job: Job, interrupts: Interrupts) -> Result:
    """Make one video, or go on with it."""

    def make() -> Result:
        listener = job.previews.watcher(job.request, interrupts) if job.previews else unheard
        return make_file(job.pipe, job.request, folder, job.args.overwrite, interrupts, listener)

    with RunFolder(job.output) as folder:
        record = folder.record()
        if folder.is_finished():
            folder.delete()
            return Result(job.output, 0.0)
        if record is None or job.args.overwrite or not folder.is_unfinished:
            check_output(job.output, job.args.overwrite)
            with generate.keeping(folder, quietly=True):
                folder.begin(make_record(job.pipe, job.request, vars(job.args)))
                return make()
        free = options.free_on_resume() | ({"seed"} if job.draws else set())
        check_same({**vars(job.args), "seed": job.request.seed}, record, free)
        for difference in check_identity(record, job.pipe, folder):
            generate.note(difference)
        job.request = request_of(record)
        with generate.keeping(folder, quietly=True):
            return make()


def is_made(job: Job) -> bool:
    """Whether the output is there and says of itself that it is what the line asks for."""
    seed = seed_of_made(job.pipe, job.request, job.output, job.draws, job.extension)
    if seed is not None:
        job.request = replace(job.request, seed=seed)
    return seed is not None


def read_jobs(path: Path, argv: list[str], overwrite: bool) -> list[Job]:
    """The requests of the file, checked.

    Raises:
        UsageError: the file cannot be read, or a line of it is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path} cannot be read: {error}") from error
    parser, pipes, jobs = build_parser(), {}, []
    outputs: dict[Path, int] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            args = parser.parse_args([*argv, *json_flags(text)])
            for job in _jobs(number, args, path, pipes):
                if job.output in outputs:
                    raise UsageError(f"output {job.output} is that of line {outputs[job.output]}, too")
                if not is_made(job):  # then it is skipped
                    unfinished = RunFolder(job.output).is_unfinished
                    check_output(job.output, overwrite or unfinished)
                outputs[job.output] = number
                jobs.append(job)
        except (UsageError, ValueError) as error:
            raise UsageError(f"{path} line {number}: {error}") from error
    if not jobs:
        raise UsageError(f"--prompts {path} holds no request; expected one JSON object a line, such as "
                         '{"prompt": "a cat boxing", "seed": 1}')  # fmt: skip
    return jobs


def _jobs(number: int, args: argparse.Namespace, path: Path, pipes: dict[str, WanPipeline]) -> list[Job]:
    """What a line asks for: one video, or several stills."""
    generate.check_flags(args)
    extension = Extension.of(args)
    if args.num_images is not None and (args.seed is None or args.seed < 0):
        raise UsageError("num_images without a seed, which names the files; give one")
    key = json.dumps(generate.pipeline_options(args), default=str, sort_keys=True)
    if key not in pipes:
        pipes[key] = generate.pipeline_from(args)
    request = generate.request_from(pipes[key], args)
    output = args.output or f"{path.stem}_{number:04d}{'.png' if request.num_frames == 1 else '.mp4'}"
    outputs = generate.outputs_of(request, Path(output), args.num_images)
    files = [file for _, file in outputs]
    previews = open_previews(pipes[key], args.preview, args.preview_every, files, args.overwrite)
    if args.num_images is not None:  # each as if it had been asked for alone
        alone = [argparse.Namespace(**{**vars(args), "seed": still.seed}) for still, _ in outputs]
    else:
        alone = [args]
    jobs = zip(alone, outputs, strict=True)
    return [Job(number, one, file, pipes[key], request, previews, extension) for one, (request, file) in jobs]
