"""A job makes a file from Python as from the command line: it tells events, can be stopped, and goes on."""

import json
import threading

import numpy as np
import pytest
from PIL import Image

from wan_mlx.errors import Stopped
from wan_mlx.events import Finished, Previewed, StageEnded, Started, Stepped
from wan_mlx.media.preview import PreviewFiles
from wan_mlx.pipeline import WanPipeline
from wan_mlx.runs.folder import RunFolder
from wan_mlx.runs.job import Job
from wan_mlx.runs.record import check_same, model_of, normal, request_of

SMALL = dict(width=16, height=16, num_frames=5, steps=3, seed=3)


@pytest.fixture(scope="module")
def pipe(pico):
    return WanPipeline.from_pretrained(pico, dtype="float32", progress=False, prompt_cache=False)


@pytest.fixture
def job(pipe, tmp_path):
    return Job(pipe, pipe.request("a red circle", **SMALL), tmp_path / "a.npz", {"steps": 3})


def frames_of(path):
    with np.load(path) as arrays:
        return arrays["frames"]


def test_events_of_a_job(job, pipe):
    heard = []
    finished = job.make(heard.append)
    assert isinstance(heard[0], Started) and heard[0].settings["seed"] == 3 and heard[-1] is finished
    assert finished.output == job.output and [report.name for report in finished.reports][-1] == "decode"
    assert sum(isinstance(event, Stepped) for event in heard) == 3 and finished.forwards == (6, 6)
    video = pipe("a red circle", **SMALL)
    assert np.array_equal(frames_of(job.output), video.frames) and not RunFolder(job.output).path.exists()
    assert json.loads(json.dumps(finished.as_json()))["seconds"] == round(finished.seconds, 3)


def test_a_step_is_saved_before_its_event(job):
    def listener(event):
        if isinstance(event, Stepped):
            folder = RunFolder(job.output)
            assert folder.steps_done >= event.step.index  # that of the step is written while the next computes

    job.make(listener)


def test_stopped_by_another_thread_and_taken_up(job, pipe):
    def listener(event):
        if isinstance(event, Stepped) and event.step.index == 1:
            assert job.stops_soon
            thread = threading.Thread(target=job.stop)
            thread.start()
            thread.join()

    with pytest.raises(Stopped):
        job.make(listener)
    assert job.kept == 2 and not job.output.exists() and not job.stops_soon
    with pytest.raises(ValueError, match="there is an unfinished run"):
        Job(pipe, job.request, job.output).make()
    with pytest.raises(ValueError, match="--steps is 3, 4 was given"):
        Job(pipe, job.request, job.output, {"steps": 4}).make(free=())
    heard = []
    Job(pipe, job.request, job.output, {"steps": 3}).make(heard.append, free=())
    assert [event.step.index for event in heard if isinstance(event, Stepped)] == [1, 2]
    assert [event.name for event in heard if isinstance(event, StageEnded)][0] == "load transformer"
    assert np.array_equal(frames_of(job.output), pipe("a red circle", **SMALL).frames)


def test_a_failed_job_leaves_nothing_before_its_first_step(job):
    def listener(event):
        raise OSError("nobody listens")

    with pytest.raises(OSError):
        job.make(listener)
    assert job.kept is None and not RunFolder(job.output).path.exists()
    assert job.make().complaint is None or job.output.exists()


def test_the_record_is_enough_to_go_on(job, pipe, pico):
    with pytest.raises(Stopped):
        job.make(lambda event: job.stop() if isinstance(event, Stepped) else None)
    with RunFolder(job.output) as folder:
        record = folder.record()
        assert request_of(record) == job.request
        again = WanPipeline.from_pretrained(**model_of(record), progress=False)
        assert normal(again.opened_with) == normal(pipe.opened_with) == record["model"]
        assert record["model"]["model"] == str(pico) and record["asked"] == {"steps": 3, "seed": 3}
        check_same({"dtype": "float32", "num_frames": 5}, record, ())
        check_same({"memory": "8GB"}, record, {"memory"})
        with pytest.raises(ValueError, match="--dtype is float32, bfloat16 was given; --frames is 5, 9 was given"):
            check_same({"dtype": "bfloat16", "num_frames": 9}, record, ())
        Job(again, request_of(record), job.output).go_on(folder)
    assert np.array_equal(frames_of(job.output), pipe("a red circle", **SMALL).frames)


def test_previews_are_events(job, tmp_path):
    job.previews = PreviewFiles(tmp_path / "live.webp", every=2)
    heard = []
    job.make(heard.append)
    assert [event.step for event in heard if isinstance(event, Previewed)] == [1, 2]
    assert isinstance(heard[-1], Finished) and (tmp_path / "live.webp").exists()


def test_a_source_is_not_replaced(pipe, tmp_path):
    source = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(source)
    before = source.read_bytes()
    request = pipe.request("a", video=source, num_frames=1, steps=1, strength=1.0)
    with pytest.raises(ValueError, match="a.png is what the video is made from"):
        Job(pipe, request, tmp_path / ".." / tmp_path.name / "a.png", overwrite=True).make()
    assert source.read_bytes() == before and [*tmp_path.iterdir()] == [source]
