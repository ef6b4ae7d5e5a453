"""A run on several machines: what they agree on before it begins, and what rank 0 tells the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, replace
from typing import Any

from .. import __version__
from ..denoise import named, part_of
from ..distributed import Group
from ..errors import Differing, SamplingError, Stopped, WanError
from ..opened import OpenedModel
from ..parallel import Team
from ..planning.machine import mlx_version
from ..planning.plan import Plan
from ..planning.several import choose_mode
from ..storage import sample_digest
from ..types import Conditioning, Request, RunState
from .record import files_of_weights, normal, request_of

# What the others need no files of: rank 0 encodes.
ENCODED_BY_FIRST = ("text_encoder", "image_encoder", "audio_encoder", "tokenizer")
OF_FIRST = ("last_frames",)  # of a conditioning: what only rank 0 needs, which encodes the next clip
STOP, FINISH = 2, 1  # what may be asked of a run while it samples


def words_of(pipe: OpenedModel, request: Request) -> dict[str, Any]:
    """What the others are told, so that they make the same run."""
    fields = normal(request.settings()) | {"geometry": list(astuple(request.geometry))}
    told = {"model": pipe.opened_with, "request": fields, "keeps": pipe.keeps_loaded}
    return json.loads(json.dumps(told, default=str))


def request_in(words: Mapping[str, Any]) -> Request:
    """The request that rank 0 has told."""
    return request_of({**words, "machine": {"wan_mlx": __version__}})


def assemble(
    group: Group, pipe: OpenedModel, request: Request, plan: Plan, note: Callable[[str], Any]
) -> tuple[Team, Request, Plan]:
    """Have all machines begin the same run: the team, and the request and plan that all have.

    Raises:
        WanError: the machines differ in what must be the same.
    """
    words = words_of(pipe, request)
    if group.rank == 0:
        group.heartbeat.say({"run": words})
    elif (told := group.heartbeat.hear()) != {"end": True}:
        drawn = {"seed": told["run"]["request"]["seed"]}  # where none is given, each would draw its own
        request, words["request"] = replace(request, **drawn), words["request"] | drawn
    else:
        raise Stopped(why="rank 0 has ended")
    group.heartbeat.meet("run", lambda name: note(f"waiting for {name}"))
    group.agree("the version", {"wan_mlx": __version__, "mlx": mlx_version()})
    opened = {name: words["model"].get(name) for name in ("dtype", "quantize", "loras")}
    group.agree("the request", {**words["request"], **opened})
    group.agree("the checksum of weights", _weights(pipe))
    how = group.gather_values([plan.tokens_at_once, plan.decode_tile])
    plan = replace(plan, tokens_at_once=min(tokens for tokens, _ in how))
    tiles = [tile for _, tile in how if tile]
    if tiles:
        plan = replace(plan, decode_tile=tuple(map(min, zip(*tiles, strict=True))))
    tokens = request.geometry.seq_len(request.latent_shape)
    mode = choose_mode(pipe.parallel, pipe.config, tokens, request.passes, group.size, group.link)
    return Team(group, group.gather_values(mode)[0]), request, plan


def _weights(pipe: OpenedModel) -> dict[str, str]:
    """A digest of samples of each file of weights that every machine reads."""
    kinds = {part.name: part.kind for part in pipe.checkpoint.parts}
    found = files_of_weights(pipe, None).items()
    return {name: sample_digest(path) for name, path in found if kinds.get(name) not in ENCODED_BY_FIRST}


def shared_state(group: Group, reached: RunState | None, before: Conditioning | None = None) -> RunState:
    """Rank 0's state of the run, on all ranks, which have the conditioning of the clip ``before``, if there is one."""
    arrays, values = None, None
    if reached is not None:
        given = {name: array for name, array in reached.conditioning.arrays().items() if name not in OF_FIRST}
        same = [name for name, array in given.items() if array is getattr(before, name, None)]
        new = {name: array for name, array in given.items() if name not in same}
        arrays = named("conditioning", new) | named("state", reached.state)
        plain = {name: value for name, value in vars(reached.conditioning).items() if isinstance(value, int | float)}
        values = {"steps": reached.steps, "heard": reached.conditioning.heard, "same": same, **plain}
    values = group.gather_values(values)[0]
    told = group.broadcast(arrays)
    if reached is not None:
        return reached
    steps, heard, same = (values.pop(name) for name in ("steps", "heard", "same"))
    fields: dict[str, Any] = {name: getattr(before, name) for name in same}
    fields |= {**part_of(told, "conditioning"), **values, "heard": tuple(heard)}
    return RunState(Conditioning(**fields), steps, part_of(told, "state"))


@contextmanager
def failing_together(group: Group | None) -> Iterator[None]:
    """Within this block a failure here ends the other machines' processes, which would wait for this one for ever.

    What all ranks raise alike passes: latents that are not finite, differences, and a stop that was agreed upon.
    """
    try:
        yield
    except (SamplingError, Differing, GeneratorExit):
        raise
    except BaseException as error:
        if group is None or (isinstance(error, Stopped) and error.agreed):
            raise
        is_lost = isinstance(error, RuntimeError) and "peer" in str(error)
        if is_lost:
            group.heartbeat.wait_for_cause()
        why = error.why if isinstance(error, Stopped) else str(error)
        group.heartbeat.fail(why or type(error).__name__)
        if is_lost:
            raise WanError("the connection to another machine was lost") from error
        raise
