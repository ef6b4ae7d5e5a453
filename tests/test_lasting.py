"""Computing happens in threads that last: a pipeline may be called from any thread, and the process ends well."""

import subprocess
import sys
import threading

import pytest

from wan_mlx.lasting import LastingThread, computes, lasts, yields_computed

# MLX aborts now and then ("terminate called without an active exception") where a thread that computed has ended.
TWO_THREADS = """
import sys, threading
import numpy as np
import wan_mlx

pipe = wan_mlx.WanPipeline.from_pretrained(sys.argv[1], dtype="float32", progress=False, prompt_cache=False)
small, made = dict(width=16, height=16, num_frames=5, steps=1, seed=3), []

def call():
    made.append(pipe("a red circle", callback=lambda step: step.preview(), **small).frames)

def iterate():
    *_, step, first, second = pipe.stages(pipe.request("a red circle", **small))
    assert np.isfinite(np.array(step.latents)).all()
    made.append(np.concatenate([first, second]))

for work in (call, iterate, call, iterate):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
assert len(made) == 4 and all(np.array_equal(made[0], frames) for frames in made)
"""


def test_called_from_worker_threads_in_turn_the_process_ends_well(pico):
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", TWO_THREADS, str(pico)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


DAEMON = """
import sys, threading
import wan_mlx

pipe = wan_mlx.WanPipeline.from_pretrained(sys.argv[1], dtype="float32", progress=False, prompt_cache=False)
begun = threading.Event()

def work():
    pipe("a red circle", callback=lambda step: begun.set(), width=64, height=64, num_frames=9, steps=500, seed=3)

threading.Thread(target=work, daemon=True).start()
begun.wait(60)
"""


def test_the_process_ends_well_in_the_middle_of_a_daemon_s_run(pico):
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", DAEMON, str(pico)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "learned to draw at" in done.stderr and done.stderr.count("\n") == 1


def test_what_is_interrupted_ends_and_the_thread_goes_on():
    thread, entered = LastingThread(), threading.Event()

    def work():
        entered.set()
        while True:
            pass

    future = thread.start(work)
    entered.wait(10)
    assert thread.interrupt() is future and isinstance(future.exception(10), SystemExit)
    assert thread.interrupt() is None and thread.call(lambda: 3) == 3


def in_a_thread(work):
    """What ``work`` returns, or raises, in a thread that ends."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    return found[0]


@computes
def where():
    return threading.current_thread()


@yields_computed
def counted(closed):
    try:
        while True:
            yield threading.current_thread()
    finally:
        closed.append(threading.current_thread())


def test_the_main_thread_computes_itself():
    assert where() is threading.main_thread()
    assert next(counted([])) is threading.main_thread()


def test_another_thread_has_it_computed():
    first = in_a_thread(where)
    assert first is in_a_thread(where) and first is not threading.main_thread()  # it lasts
    assert in_a_thread(lambda: computes(lambda: (lasts(), where()))()) == (True, first)  # and does what it calls itself


def test_a_generator_stays_in_one_thread_and_is_closed_there():
    closed = []

    def work():
        items = counted(closed)
        found = {next(items) for _ in range(3)}
        in_between = where()
        items.close()
        return found, in_between

    found, in_between = in_a_thread(work)
    assert len(found) == 1 and closed == [*found] and in_between not in found


def test_errors_and_what_is_yielded_come_through():
    @computes
    def fail():
        raise ValueError("no")

    assert str(in_a_thread(fail)) == "no"
    assert in_a_thread(lambda: list(yields_computed(lambda: iter_of(3))())) == [0, 1, 2]


def iter_of(count):
    yield from range(count)


def test_a_thread_may_call_itself():
    thread = LastingThread()
    assert thread.call(lambda: thread.call(lambda: "there")) == "there"


@pytest.mark.parametrize("kept", ["result", "error"])
def test_an_idle_thread_keeps_nothing_alive(kept):
    import gc
    import weakref

    class Model:
        pass

    def work(model=None):
        found = weakref.ref(model)
        if kept == "error":
            computes(lambda: 1 / (0 * bool(model)))()
        return found

    def run():
        model = Model()
        found = weakref.ref(model)
        try:
            computes(lambda: work(model))()
        except ZeroDivisionError:
            pass
        return found

    found = in_a_thread(run)
    gc.collect()
    assert found() is None
