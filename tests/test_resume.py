"""A run that was cut goes on to the same bytes; what is asked to stop stops in good order."""

import mlx.core as mx
import numpy as np
import pytest
from sampling import always

import wan_mlx
from wan_mlx.denoise import denoise
from wan_mlx.guidance import Guidance
from wan_mlx.schedulers import SOLVERS
from wan_mlx.types import Conditioning, RunState, Step

PROMPT = "a red circle moves right on a blue background"
SMALL = dict(width=16, height=16, num_frames=5, steps=3, seed=3)


@pytest.fixture(scope="module")
def pipe(pico):
    return wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=False, prompt_cache=False)


@pytest.fixture(scope="module")
def whole(pipe):
    """The events of a run without a break."""
    return list(pipe.stages(pipe.request(PROMPT, **SMALL)))


def field(latents, timestep, context, shared=None):
    """Stands for the transformer: every step depends on the ones before it."""
    return mx.sin(3 * latents + timestep / 300) + context.sum() * latents


@pytest.mark.parametrize("solver", SOLVERS)
def test_resumed_denoising_is_uninterrupted_denoising(solver):
    noise = mx.random.normal((1, 2, 4, 4, 3), key=mx.random.key(1))
    conditioning = Conditioning(noise, mx.full((1, 2), 0.1), mx.full((1, 2), -0.2))
    mx.eval(conditioning.arrays())

    def steps(**where):
        return list(denoise(always(field, Guidance(4.0)), conditioning, SOLVERS[solver](6, 5.0), **where))

    want = steps()
    for first in range(1, 6):
        got = steps(first=first, state=want[first - 1].state)
        assert [step.index for step in got] == list(range(first, 6))
        for a, b in zip(got, want[first:], strict=True):
            assert a.state.keys() == b.state.keys()
            assert all(mx.array_equal(a.state[name], b.state[name]) for name in b.state)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_resumed_run_is_uninterrupted_run(pipe, whole, done):
    conditioning, steps = whole[0], [event for event in whole if isinstance(event, Step)]
    state = RunState(conditioning, done, steps[done - 1].state)
    events = list(pipe.stages(pipe.request(PROMPT, **SMALL), state))
    got = [event for event in events if isinstance(event, Step)]
    assert [step.index for step in got] == list(range(done - 1, 3))
    assert all(mx.array_equal(a.latents, b.latents) for a, b in zip(got, steps[done - 1 :], strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(events[-2:], whole[-2:], strict=True))


def test_callback_that_returns_false_stops(pipe, whole):
    """The video is then the estimate at that step."""
    seen = []

    def stop_at_the_second(step):
        seen.append(step.index)
        return step.index < 1

    video = pipe(PROMPT, callback=stop_at_the_second, **SMALL)
    assert seen == [0, 1] and video.settings["stopped_after"] == 2
    estimate = [event for event in whole if isinstance(event, Step)][1].denoised
    assert np.array_equal(np.moveaxis(video.latents, 0, -1), np.array(estimate[0]))
    assert video.frames.shape == (5, 16, 16, 3)
    assert np.array_equal(video.frames, np.concatenate(list(pipe.decode(estimate))))


def test_kept_loaded_is_loaded_anew(pipe, whole, monkeypatch):
    """Two videos in one block: weights are read once, and nothing of the first is in the second."""
    from wan_mlx import opened

    loads = []
    for name in ("load_transformer", "load_vae", "load_text_encoder"):
        load = getattr(opened, name)
        monkeypatch.setattr(opened, name, lambda *a, load=load, **k: loads.append(load.__name__) or load(*a, **k))
    with pipe.keep_loaded():
        pipe("a green square moves up on a black background", **SMALL | {"steps": 1})
        video = pipe(PROMPT, **SMALL)
    assert np.array_equal(video.frames, np.concatenate([e for e in whole if isinstance(e, np.ndarray)]))
    assert sorted(loads) == ["load_text_encoder", "load_text_encoder", "load_transformer", "load_vae"]
    pipe(PROMPT, **SMALL | {"steps": 1})
    assert len(loads) == 7  # nothing stays loaded after the block
