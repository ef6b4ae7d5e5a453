"""Several machines at the command line: the first tells how it ended in a file, the others make the runs it makes."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import options
from ..distributed import Group
from ..errors import Differing, SamplingError, Stopped
from ..events import Failed
from ..heartbeat import end_process
from ..pipeline import WanPipeline
from ..runs.run import Run
from ..runs.together import request_in
from ..storage import whole_file
from .terminal import FAILURE, explain

STATUS = "wan-mlx.status.json"  # or what stands behind the output's name


@contextmanager
def told_in_file(args: argparse.Namespace, group: Group | None) -> Iterator[Callable[[int], int]]:
    """Where there are other machines, write how the command ended into a file: `mlx.launch` ends with 0 whatever
    happens. Yields a function of the exit code, which returns it."""
    if group is None:
        yield lambda code: code
        return
    output = args.output or args.resume
    path = Path(f"{output}.status.json" if output else STATUS)

    def write(code: int, message: str | None = None) -> int:
        state = "failed" if code not in (0, 3) else "done"
        with suppress(OSError), whole_file(path) as file:
            file.write_text(json.dumps({"state": state, "code": code, "message": message}) + "\n", encoding="utf-8")
        return code

    def end(message: str) -> None:
        write(FAILURE, message)
        if args.json:
            os.write(1, f"{json.dumps(Failed(message, FAILURE).as_json())}\n".encode())
        end_process(message)

    group.heartbeat.at_end = end
    path.unlink(missing_ok=True)
    try:
        yield write
    except Stopped as stopped:
        write(stopped.code, f"{stopped.why}{stopped.go_on}")
        raise
    except Exception as error:
        message, code = explain(error)
        write(code, message)
        raise


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
