"""A model of two experts is a list of parts: nano's weights twice make the same bytes as nano alone."""

import math
import weakref
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from wan_mlx.opened import load_transformer
from wan_mlx.pipeline import WanPipeline
from wan_mlx.planning import choose
from wan_mlx.planning.sizes import sizes_of
from wan_mlx.presets import BUNDLED
from wan_mlx.types import Request, RunState
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.parts import Checkpoint

BOUNDARY, STEPS = 800.0, 5
OPTIONS = dict(width=64, height=64, num_frames=5, steps=STEPS, seed=3)


def two_experts(**of_the_second) -> Checkpoint:
    nano = open_checkpoint(BUNDLED["nano"])
    one = nano.part("transformer")
    high = replace(one, name="high_noise", timesteps=(BOUNDARY, math.inf))
    low = replace(one, name="low_noise", timesteps=(0.0, BOUNDARY), **of_the_second)
    return replace(nano, parts=(high, low, *(part for part in nano.parts if part is not one)))


def opened(checkpoint: Checkpoint, **options) -> WanPipeline:
    return WanPipeline(checkpoint, dtype="float32", progress=False, prompt_cache=False, **options)


def made(pipe: WanPipeline, resume: RunState | None = None) -> list:
    """The conditioning, the steps and the frames."""
    return list(pipe.stages(pipe.request("a red circle", **OPTIONS), resume))


@pytest.fixture(scope="module")
def alone() -> list:
    return made(opened(open_checkpoint(BUNDLED["nano"])))


@pytest.fixture
def loads(monkeypatch):
    """The names of the experts as they are loaded, each checked to be alone."""
    names, alive = [], []

    def load(part, *args, **kwargs):
        assert not any(other() for other in alive), f"{names[-1]} is still there"
        model = load_transformer(part, *args, **kwargs)
        names.append(part.name)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr("wan_mlx.opened.load_transformer", load)
    return names


def assert_same(got: list, want: list) -> None:
    for a, b in zip(got, want, strict=True):
        if isinstance(b, np.ndarray):
            assert a.tobytes() == b.tobytes()
        elif hasattr(b, "latents"):
            assert mx.array_equal(a.latents, b.latents)


@pytest.mark.parametrize("stream", [False, True])
def test_the_same_bytes_as_one(alone, loads, monkeypatch, stream):
    monkeypatch.setattr(choose, "LADDER", [(stream, 1024)])
    pipe = opened(two_experts())
    run = pipe.run(pipe.request("a red circle", **OPTIONS))
    assert_same(list(run.outputs()), alone)
    assert loads == ["high_noise", "low_noise"]
    stages = ["conditioning", "load high noise", "denoise", "load low noise", "denoise", "decode"]
    assert [report.name for report in run.reports] == stages


@pytest.mark.parametrize("steps", range(1, STEPS))
def test_resumed_on_either_side_of_the_boundary(alone, loads, steps):
    step = alone[steps]
    served_by_high = sum(step.timestep >= BOUNDARY for step in alone[1 : STEPS + 1])
    assert 0 < served_by_high < STEPS
    pipe = opened(two_experts())
    got = made(pipe, RunState(alone[0], steps, dict(step.state)))
    assert_same(got[1:], alone[steps:])
    assert loads == ["high_noise", "low_noise"][steps >= served_by_high :]


def test_both_stay_loaded_where_models_do(monkeypatch):
    names = []

    def load(part, *args, **kwargs):
        names.append(part.name)
        return load_transformer(part, *args, **kwargs)

    monkeypatch.setattr("wan_mlx.opened.load_transformer", load)
    pipe = opened(two_experts())
    with pipe.keep_loaded():
        for timestep in (999.0, 10.0, 999.0, BOUNDARY, 10.0):
            pipe.load_expert(pipe.expert(timestep))
    assert names == ["high_noise", "low_noise"]


def test_quantisation_is_of_a_part():
    pipe = opened(two_experts(quantize="q8"))
    assert pipe.quantized == {"low_noise": "q8"}
    high, low = sizes_of(pipe.checkpoint, "float32").experts
    assert not high.packings and low.packings and low.weights.all < high.weights.all


def test_plans_count_one_expert_at_a_time_or_all_that_stay():
    nets, one = sizes_of(two_experts(), "float32"), sizes_of(open_checkpoint(BUNDLED["nano"]), "float32")
    for kept in (False, True):
        request = Request("", "", 64, 64, 5, 10, 1.0, 3.0, "unipc", seed=0)
        wanted = choose.Wanted("nano", request, memory="4GB", kept=kept)
        two, single = (choose.choose(n, wanted) for n in (nets, one))
        assert two.peak - single.peak == kept * one.weights.all
        rows, row = ({r.stage: r for r in plan.rows}["denoise"] for plan in (two, single))
        assert (rows.flop, rows.reads) == (row.flop, 2 * row.reads)
