"""The durable queue, and the foreman who has its jobs made by a worker that may die."""

import sqlite3
import time

import pytest
from fake_children import Children, begin, finish, make

from wan_mlx.errors import BusyError, WanError
from wan_mlx.runs.queue import DONE, FAILED, FOLDER, PAUSED, QUEUED, RUNNING, STOPPED, Queue
from wan_mlx.server.foreman import MOST_DEATHS, Foreman


@pytest.fixture
def queue(tmp_path):
    found = Queue(tmp_path)
    yield found
    found.close()


@pytest.fixture
def three(queue):
    return [queue.add({"prompt": name, "seed": 5}, f"{name}.mp4").id for name in "abc"]


def order(queue) -> str:
    return "".join(job.options["prompt"] for job in queue.in_order())


class TestQueue:
    def test_outlives_its_process(self, queue, three):
        queue.take()
        again = Queue(queue.library)
        assert [job.state for job in again.all()] == [RUNNING, QUEUED, QUEUED]
        assert again.get(three[1]).options == {"prompt": "b", "seed": 5}
        with again.working():  # the one that ran was cut
            assert [job.state for job in again.all()] == [QUEUED] * 3
            assert again.get(three[0]).resumed == 1 and again.take().id == three[0]

    def test_order(self, queue, three):
        a, b, c = three
        queue.move(c, before=a)
        assert order(queue) == "cab"
        queue.move(c)
        assert order(queue) == "abc"
        queue.take()
        queue.move(c, before=b)
        assert order(queue) == "acb"
        with pytest.raises(ValueError, match=f"{a} is running, so it has no place"):
            queue.move(a)
        with pytest.raises(KeyError):
            queue.move(c, before="video_none")

    def test_wishes(self, queue, three):
        a, b, c = three
        assert queue.ask(b, "pause").state == PAUSED and queue.ask(c, "stop").state == STOPPED
        assert queue.take().id == a and queue.take() is None
        assert queue.ask(a, "stop").wish == "stop" and queue.ask(a, "resume").wish == ""
        queue.end(a, DONE)
        with pytest.raises(ValueError, match="is done, so it cannot be asked to pause"):
            queue.ask(a, "pause")
        assert queue.ask(c, "resume").state == QUEUED and queue.ask(b, "resume").state == QUEUED
        assert order(queue) == "bc"  # b kept its place
        queue.end(queue.take().id, FAILED, error="no", code="failed")
        assert queue.ask(b, "resume").error is None and order(queue) == "cb"

    def test_deletion(self, queue, three):
        assert queue.delete(three[0]) and queue.take().id == three[1]
        assert not queue.delete(three[1]) and queue.get(three[1]).wish == "delete"
        with pytest.raises(KeyError):
            queue.get(three[0])

    @pytest.mark.parametrize("seed", [None, -1])
    def test_a_seed_that_is_left_out_is_drawn_once(self, queue, seed):
        assert queue.add({"seed": seed}, "a.mp4").options["seed"] >= 0

    def test_two_jobs_cannot_have_one_output(self, queue, three):
        with pytest.raises(ValueError, match="output a.mp4 is that of another job"):
            queue.add({}, "a.mp4")

    def test_one_process_works_on_it(self, queue):
        with queue.working(), pytest.raises(BusyError, match="another process works"), Queue(queue.library).working():
            pass

    def test_another_process_sees_a_change(self, queue, three):
        other = Queue(queue.library)
        before = other.version
        queue.ask(three[0], "pause")
        assert other.version != before and other.get(three[0]).state == PAUSED

    def test_damaged_or_of_a_later_version(self, tmp_path):
        (tmp_path / FOLDER).mkdir()
        file = tmp_path / FOLDER / "queue.db"
        file.write_bytes(b"no database" * 100)
        with pytest.raises(WanError, match="cannot be opened"):
            Queue(tmp_path)
        file.unlink()
        sqlite3.connect(file).execute("PRAGMA user_version=9").close()
        with pytest.raises(WanError, match="later version"):
            Queue(tmp_path)


def worked_off(queue, worker) -> tuple[Foreman, list, Children]:
    told, children = [], Children(worker)
    foreman = Foreman(queue, lambda id, event: told.append((id, event)), children, until_empty=True)
    foreman.start()
    foreman._thread.join(20)
    assert not foreman._thread.is_alive() and foreman.error is None
    return foreman, told, children


class TestForeman:
    def test_makes_one_after_the_other_with_one_worker(self, queue, three):
        _, told, children = worked_off(queue, make)
        assert [job.state for job in queue.all()] == [DONE] * 3
        assert [line["make"] for line in children.made[0].sent] == three and len(children.made) == 1
        job = queue.get(three[0])
        assert (job.seconds, job.peak, job.step_seconds, job.about["size"]) == (1.0, 5 << 20, 0.5, [64, 64])
        states = [event["state"] for id, event in told if id == three[0] and event["event"] == "state"]
        assert states == [RUNNING, DONE]
        assert [event for id, event in told if id == three[0]][-1]["event"] == "result"

    def test_a_queue_that_cannot_be_changed_for_now_is_tried_again(self, queue, three, monkeypatch):
        """Its disk was full when a job ended: that job is made again."""
        full, told, whole = iter([WanError("the disk is full")]), [], queue.end

        def end(*args, **changes):
            for error in full:
                raise error
            whole(*args, **changes)

        monkeypatch.setattr(queue, "end", end)
        foreman = Foreman(queue, lambda id, event: told.append(event), Children(make))
        foreman.start()
        until = time.monotonic() + 20
        while not all(job.state == DONE for job in queue.all()) and time.monotonic() < until:
            time.sleep(0.02)
        foreman.end()
        assert [job.state for job in queue.all()] == [DONE] * 3 and queue.get(three[0]).resumed == 1
        assert "the disk is full" in [event.get("message") for event in told]

    def test_a_worker_that_dies_is_replaced_and_the_job_goes_on_first(self, queue, three):
        deaths = iter([1, 2])

        def dies_twice(order, worker):
            begin(order, worker, next(deaths, 2))
            if len(children_made(worker)) < 2:
                dead.append(worker)
                worker.die()
            else:
                finish(order, worker)

        dead = []

        def children_made(worker):
            return dead

        foreman, told, children = worked_off(queue, dies_twice)
        assert [job.state for job in queue.all()] == [DONE] * 3 and foreman.restarts == 2
        assert [child.sent[0]["make"] for child in children.made] == [three[0]] * 3
        assert queue.get(three[0]).resumed == 2
        said = [event["message"] for id, event in told if not id and event.get("state") == "died"]
        assert said == ["the worker ended (signal 9); another one goes on from the last step"] * 2
        deaths = [event["death"] for id, event in told if not id]
        # It is told until that job is over.
        assert deaths[0] is None and deaths[-1] is None and [death for death in deaths if death] == said[:1] * 6

    def test_a_job_at_which_every_worker_dies_fails_and_the_next_is_made(self, queue, three):
        def dies(order, worker):
            if order["make"] == three[0]:
                begin(order, worker, 1)
                worker.die("signal 6: assertion")
            else:
                make(order, worker)

        _, _, children = worked_off(queue, dies)
        job = queue.get(three[0])
        assert job.state == FAILED and job.code == "worker_died" and len(children.made) == MOST_DEATHS + 1
        assert f"ended {MOST_DEATHS} times after step 1 (signal 6: assertion)" in job.error
        assert queue.get(three[1]).state == DONE

    def test_a_failure(self, queue, three):
        def fails(order, worker):
            if order["make"] == three[0]:
                worker.say({"event": "ended", "state": "failed", "error": "no memory", "code": "out_of_memory",
                            "is_spent": True})  # fmt: skip
            else:
                make(order, worker)

        _, told, children = worked_off(queue, fails)
        assert queue.get(three[0]).error == "no memory" and queue.get(three[2]).state == DONE
        assert len(children.made) == 2  # memory that ran out may stay so
        assert (three[0], {"event": "error", "message": "no memory", "code": 1}) in told

    @pytest.mark.parametrize("soon", [True, False])
    @pytest.mark.parametrize("wish, state", [("stop", STOPPED), ("pause", PAUSED), ("delete", None)])
    def test_wishes_at_a_running_job(self, queue, three, wish, state, soon):
        """It ends after its step where the worker hears soon of it; else the worker is ended."""

        def runs(order, worker):
            if order.get("make") == three[0]:
                begin(order, worker, 1)
                queue.delete(three[0]) if wish == "delete" else queue.ask(three[0], wish)
            elif "stop" in order:
                worker.say({"event": "stopping", "soon": soon})
                if soon:
                    worker.say({"event": "ended", "state": "stopped", "error": "interrupted"})
            else:
                make(order, worker)

        _, told, children = worked_off(queue, runs)
        left = {job.id: job.state for job in queue.all()}
        assert left.pop(three[0], None) == state and [*left.values()] == [DONE, DONE]
        assert len(children.made) == (1 if soon and wish != "delete" else 2)
        if wish == "delete":
            assert (three[0], {"event": "deleted", "id": three[0], "output": "a.mp4"}) in told

    def test_what_is_added_while_it_waits_is_made(self, queue):
        foreman = Foreman(queue, lambda *_: None, Children(make))
        foreman.start()
        job = Queue(queue.library).add({"prompt": "x"}, "x.mp4")  # another process
        until = time.monotonic() + 10
        while queue.get(job.id).state != DONE and time.monotonic() < until:
            time.sleep(0.01)
        foreman.end()
        assert queue.get(job.id).state == DONE
