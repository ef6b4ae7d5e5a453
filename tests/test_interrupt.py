"""Ctrl-C, once and twice, by real signals to a real process: exit code, what is kept, and that nothing else is left."""

import os
import signal

import pytest
from paused_process import PausedProcess, processes_naming

from wan_mlx.cli.interrupt import Interrupts
from wan_mlx.cli.main import main
from wan_mlx.errors import Stopped


@pytest.fixture(scope="module")
def whole(tmp_path_factory, flags):
    path = tmp_path_factory.mktemp("whole") / "whole.mp4"
    assert main([*flags, "--output", str(path)]) == 0
    return path.read_bytes()


def check_resumable(tmp_path, whole, code, errors, kept_steps):
    assert code == 130, errors
    output = tmp_path / "a.mp4"
    last = errors.strip().splitlines()[-1]
    assert last.startswith("interrupted; ") and "Traceback" not in errors, errors
    assert f"{kept_steps} steps are kept; go on with: wan-mlx resume {output}" in last
    assert os.listdir(tmp_path) == ["a.mp4.wan"]
    assert processes_naming(str(tmp_path)) == []
    assert main(["--resume", str(output), "--quiet"]) == 0
    assert output.read_bytes() == whole and os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("where, kept_steps", [("step", 2), ("frame", 3)])
def test_first_ctrl_c_finishes_the_step_at_work(tmp_path, flags, whole, where, kept_steps):
    paused = PausedProcess(where, 1, *flags, "--output", str(tmp_path / "a.mp4"))
    paused.process.send_signal(signal.SIGINT)
    paused.wait_for("Ctrl-C again stops at once")
    paused.go_on()
    code, errors = paused.finish()
    if where == "frame":  # the one at work, too
        assert len((tmp_path / "a.mp4.wan/frames.index").read_text().splitlines()) == 2
    check_resumable(tmp_path, whole, code, errors, kept_steps)


@pytest.mark.parametrize("where, kept_steps", [("step", 1), ("frame", 3)])
def test_twice_stops_at_once(tmp_path, flags, whole, where, kept_steps):
    paused = PausedProcess(where, 1, *flags, "--output", str(tmp_path / "a.mp4"))
    paused.process.send_signal(signal.SIGINT)
    paused.wait_for("Ctrl-C again stops at once")
    paused.process.send_signal(signal.SIGINT)
    code, errors = paused.finish()  # it was still paused
    check_resumable(tmp_path, whole, code, errors, kept_steps)


def test_while_encoding(tmp_path, flags, whole):
    """A thread encodes while the next frames are decoded, so that the first Ctrl-C waits for those at work."""
    paused = PausedProcess("encoding", 1, *flags, "--output", str(tmp_path / "a.mp4"))
    assert len((tmp_path / "a.mp4.wan/frames.index").read_text().splitlines()) == 2
    paused.process.send_signal(signal.SIGINT)
    paused.wait_for("Ctrl-C again stops at once")
    paused.process.send_signal(signal.SIGINT)
    paused.go_on()  # what the thread is encoding is waited for
    check_resumable(tmp_path, whole, *paused.finish(), kept_steps=3)


def test_terminated(tmp_path, flags):
    paused = PausedProcess("step", 0, *flags, "--output", str(tmp_path / "a.mp4"))
    paused.process.terminate()
    code, errors = paused.finish()
    assert code == 128 + signal.SIGTERM and "wan-mlx resume" in errors  # the texts are encoded
    assert not processes_naming(str(tmp_path))


class Stoppable:
    """A job of nothing."""

    def __init__(self, stops_soon: bool):
        self.stops_soon, self.stopped = stops_soon, False

    def stop(self) -> None:
        self.stopped = True


class TestInterrupts:
    @pytest.fixture(autouse=True)
    def as_in_a_terminal(self):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would have it ignored
        yield
        signal.signal(signal.SIGINT, before)

    def test_patience(self):
        before, job = signal.getsignal(signal.SIGINT), Stoppable(stops_soon=True)
        with Interrupts() as interrupts, interrupts.stopping(job):
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.asked and job.stopped
            with pytest.raises(Stopped) as stopped:
                os.kill(os.getpid(), signal.SIGINT)
            assert stopped.value.code == 130
        assert signal.getsignal(signal.SIGINT) is before

    def test_nothing_is_begun_after_a_job_that_was_done_before_it_could_stop(self):
        with Interrupts() as interrupts:
            with interrupts.stopping(Stoppable(stops_soon=True)):
                os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Stopped), interrupts.stopping(Stoppable(stops_soon=True)):
                pytest.fail("the next one began")

    def test_no_patience(self):
        with Interrupts(), pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)

    def test_no_patience_while_weights_are_read(self):
        job = Stoppable(stops_soon=False)
        with Interrupts() as interrupts, interrupts.stopping(job), pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
        assert not job.stopped

    def test_ignored_stays_ignored(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with Interrupts():
                os.kill(os.getpid(), signal.SIGHUP)  # nohup's
        finally:
            signal.signal(signal.SIGHUP, before)
