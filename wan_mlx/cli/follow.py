"""Several machines at the command line: the first tells how it ended in a file, the others make the runs it makes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import options
from ..distributed import LATE, Group, backend_given, open_group, rank_given
from ..errors import Differing, SamplingError, Stopped, WanError, resume_command
from ..events import Failed
from ..heartbeat import LAST_WORD, end_process
from ..parallel import ALONE
from ..pipeline import WanPipeline
from ..runs.folder import ENDING, RunFolder
from ..runs.run import Run
from ..runs.together import request_in
from ..storage import whole_file
from .terminal import FAILURE, explain

STATUS = "wan-mlx.status.json"  # or what stands behind the output's name


def path_of(output: str | None) -> Path:
    """The file that tells how the command for a file ended."""
    return Path(f"{output.removesuffix(ENDING)}.status.json" if output else STATUS)


def write_status(output: str | None, code: int, message: str | None = None) -> int:
    """Write how the command for a file ended; returns its exit code."""
    state = "failed" if code not in (0, 3) else "done"
    with suppress(OSError, WanError), whole_file(path_of(output)) as file:
        file.write_text(json.dumps({"state": state, "code": code, "message": message}) + "\n", encoding="utf-8")
    return code


def write_refusal(argv: list[str], message: str, code: int) -> None:
    """Write that a command line was refused, on the first of several machines. The others wait until it has: with the
    first to end `mlx.launch` ends all."""
    if rank_given():
        time.sleep(LAST_WORD)
    elif backend_given():
        words = [part for word in argv for part in word.split("=", 1)]
        named = (after for word, after in pairwise(words) if word in ("-o", "--output", "--resume", "resume"))
        write_status(next(named, None), code, message)


@contextmanager
def told_in_file(args: argparse.Namespace) -> Iterator[Callable[[int], int]]:
    """On the first of several machines, write how the command ended into a file: `mlx.launch` ends with 0 whatever
    happens. Yields a function of the exit code, which returns it."""
    if backend_given() is None:
        yield lambda code: code
        return
    output = args.output or args.resume
    write = partial(write_status, output)

    def end(message: str) -> None:
        message += kept_of(output)
        write(FAILURE, message)
        if args.json:
            os.write(1, f"{json.dumps(Failed(message, FAILURE).as_json())}\n".encode())
        end_process(message)

    try:
        write(FAILURE, LATE)  # the process ends by itself if they do not come
        group = None if args.parallel == ALONE else open_group()
        path_of(output).unlink(missing_ok=True)
        if group is not None:
            group.heartbeat.at_end = end
        yield write
    except Stopped as stopped:
        write(stopped.code, f"{stopped.why}{stopped.go_on}")
        raise
    except Exception as error:
        message, code = explain(error)
        write(code, message)
        raise


def kept_of(output: str | None) -> str:
    """How to go on with the run of a file, if it has steps."""
    with suppress(Exception):  # it may be at work there
        if output and (steps := RunFolder(Path(output.removesuffix(ENDING))).steps_kept):
            return f"; {steps} steps are kept; go on with: {resume_command(output.removesuffix(ENDING))}"
    return ""


def follow(group: Group) -> int:
    """Make rank 0's runs until it ends; returns the exit code."""
    for signum in (signal.SIGINT, signal.SIGHUP):  # rank 0 heeds Ctrl-C, and ssh that ends must not end this
        signal.signal(signum, signal.SIG_IGN)
    pipe, key = None, ""
    with ExitStack() as kept:
        while "run" in (words := group.heartbeat.hear(keep=True)):
            try:
                told = words["run"]
                if key != (wanted := json.dumps(told["model"], sort_keys=True)):
                    kept.close()
                    pipe, key = opened(told["model"]), wanted
                assert pipe is not None
                if told["keeps"]:
                    kept.enter_context(pipe.keep_loaded())
                for _ in Run(pipe, request_in(told)):
                    pass
            except (SamplingError, Stopped, Differing):  # rank 0's run has ended so, too
                continue
            except Exception as error:
                group.heartbeat.fail(explain(error)[0])
                raise
    return 0


def opened(model: dict[str, Any]) -> WanPipeline:
    """The model that rank 0 has opened, from this machine's files."""
    known = {option.name for option in options.of(options.MODEL)}
    given = {name: value for name, value in model.items() if name in known}
    for name in options.LORAS:
        given[name] = [tuple(lora) for lora in given.get(name) or ()]
    return WanPipeline.from_pretrained(**{**given, "progress": False})
