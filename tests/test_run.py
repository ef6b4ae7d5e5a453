"""A run tells its events in order, once, to listeners and to who iterates; one model makes one video at a time."""

import json
import threading

import mlx.core as mx
import numpy as np
import pytest

import wan_mlx
from wan_mlx import denoise
from wan_mlx.errors import BusyError, SamplingError, Stopped
from wan_mlx.events import Conditioned, Decoded, Note, Progress, StageEnded, StageStarted, Stepped, Within

SMALL = dict(width=16, height=16, num_frames=5, steps=3, seed=3)


@pytest.fixture(scope="module")
def pipe(pico):
    return wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=False, prompt_cache=False)


@pytest.fixture(scope="module")
def request_(pipe):
    return pipe.request("a red circle", **SMALL)


def test_events_of_a_run(pipe, request_):
    run, heard = pipe.run(request_), []
    run.listen(heard.append)
    events = list(run)
    assert [event for event in heard if not isinstance(event, Within)] == events
    assert [type(event) for event in events] == [
        Note, StageStarted, StageEnded, Conditioned, StageStarted, StageEnded,
        StageStarted, Stepped, Stepped, Stepped, StageEnded,
        StageStarted, Decoded, Decoded, StageEnded,
    ]  # fmt: skip
    assert [event for event in events if isinstance(event, StageEnded)] == run.reports
    assert run.stage is None and run.forwards == (6, 6)
    done = {(event.name, event.total): event.done for event in heard if isinstance(event, Progress)}
    assert done[("denoising", 3)] == 3 and done[("decoding", 2)] == 2 and {"loading transformer"} < {n for n, _ in done}


def test_events_say_themselves_as_json(pipe, request_):
    note, *said = [json.loads(json.dumps(event.as_json())) for event in pipe.run(request_)]
    assert set(note) == {"event", "text"} and note["event"] == "note"
    assert said[0] == {"event": "stage_started", "name": "conditioning"}
    assert set(said[1]) == {"event", "name", "seconds", "peak_bytes"} and said[1]["event"] == "stage"
    assert said[2] == {"event": "conditioning"}
    assert set(said[6]) == {"event", "index", "total", "seconds", "sigma", "forwards"} and said[6]["event"] == "step"
    assert said[11] == {"event": "frames", "done": 1, "total": 5}


def test_outputs_are_those_of_the_pipeline(pipe, request_):
    video = pipe("a red circle", **SMALL)
    first, *outputs = pipe.stages(request_)
    assert isinstance(first, wan_mlx.Conditioning) and len(outputs) == 5
    assert np.array_equal(video.frames, np.concatenate(outputs[3:]))
    assert [stage.name for stage in video.stages] == ["conditioning", "load transformer", "denoise", "decode"]


def test_a_run_happens_once(pipe, request_):
    run = pipe.run(request_)
    list(run)
    with pytest.raises(ValueError, match="has begun already"):
        list(run)


class TestOneAtATime:
    def test_the_second_of_two_threads_is_refused(self, pipe, request_, monkeypatch):
        want = pipe.run(request_).video().frames
        inside, goes_on, velocity = threading.Event(), threading.Event(), denoise.guided_velocity

        def waiting(*args):
            inside.set()
            assert goes_on.wait(60)
            return velocity(*args)

        monkeypatch.setattr(denoise, "guided_velocity", waiting)
        frames = []

        def other():
            with mx.stream(mx.new_stream(mx.default_device())):
                frames.append(pipe.run(request_).video().frames)

        thread = threading.Thread(target=other)
        thread.start()
        try:
            assert inside.wait(60)
            for again in (lambda: pipe("a cat", **SMALL), lambda: list(pipe.run(request_))):
                with pytest.raises(BusyError, match="making another video; wait"):
                    again()
        finally:
            goes_on.set()
            thread.join(60)
        assert np.array_equal(frames[0], want)
        assert np.array_equal(pipe.run(request_).video().frames, want)

    def test_after_a_run_that_was_left(self, pipe, request_):
        events = iter(pipe.run(request_))
        next(events)
        with pytest.raises(BusyError):
            list(pipe.run(request_))
        events.close()
        for _ in pipe.stages(request_):
            break
        assert len(list(pipe.stages(request_))) == 6

    def test_after_a_run_that_failed(self, pipe, request_, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(denoise, "guided_velocity", lambda *args: mx.array(np.nan))
            run = pipe.run(request_)
            with pytest.raises(SamplingError):
                list(run)
            assert [report.name for report in run.reports][-1] == "denoise" and run.stage is None
        assert len(list(pipe.stages(request_))) == 6

    def test_a_listener_that_fails_ends_the_run(self, pipe, request_):
        def fail(event):
            raise OSError("the disk is full")

        with pytest.raises(OSError, match="disk is full"):
            list(pipe.run(request_).listen(fail))
        assert len(list(pipe.stages(request_))) == 6


@pytest.mark.parametrize("kind, count", [(Stepped, 2), (Decoded, 1)])
def test_stop(pipe, request_, kind, count):
    """What is at work is finished and told; nothing after it."""
    run, seen = pipe.run(request_), []

    def listener(event):
        seen.append(event)
        if isinstance(event, kind) and sum(isinstance(e, kind) for e in seen) == count:
            assert run.stops_soon
            run.stop()

    with pytest.raises(Stopped):
        for event in run.listen(listener):
            last = event
    assert isinstance(last, kind) and sum(isinstance(e, kind) for e in seen) == count
    assert not run.stops_soon


def test_finish(pipe, request_):
    run = pipe.run(request_)
    video = run.video(lambda step: run.finish() if step.index == 1 else None)
    assert run.stopped_after == video.settings["stopped_after"] == 2 and video.frames.shape == (5, 16, 16, 3)
