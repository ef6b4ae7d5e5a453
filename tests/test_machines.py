"""The queue's videos on several machines: a worker at the other end of a command, which runs on this machine here."""

import hashlib
import shutil
import sys
from pathlib import Path

import pytest
from fake_children import Children, make

from wan_mlx.cli import queue as command
from wan_mlx.errors import UsageError
from wan_mlx.media.write import read_settings
from wan_mlx.runs.queue import DONE, Queue
from wan_mlx.server.machines import Crew, Machine, RemoteForeman, add_piece, parse_machines, pieces

ROOT = Path(__file__).parent.parent
SSH = """\
import os, sys
host, program, *words = sys.argv[1:]
assert (program, words) == ("wan-mlx", ["serve", "--worker"]), sys.argv
if host == "gone":
    sys.exit("ssh: connect to host gone port 22: Operation timed out")
os.environ["WAN_MLX_CACHE"] = os.path.join({folder!r}, host)
from wan_mlx.cli.main import main
sys.exit(main(words))
"""
SMALL = {"size": [16, 16], "num_frames": 1, "steps": 1, "seed": 7, "dtype": "float32"}


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """A command in the place of ssh; a host is a folder."""
    script = tmp_path / "ssh.py"
    script.write_text(SSH.format(folder=str(tmp_path)))
    monkeypatch.setenv("WAN_MLX_SSH", f"{sys.executable} {script}")
    return tmp_path


@pytest.fixture
def queue(tmp_path):
    found = Queue(tmp_path / "library")
    (found.folder / "previews").mkdir()
    return found


def work(queue, machines, make_child=None) -> list[dict]:
    told: list[dict] = []
    crew = Crew(queue, lambda id, event: told.append({"id": id, **event}), machines, until_empty=True,
                **({"make_child": make_child} if make_child else {}))  # fmt: skip
    crew.start()
    crew.join()
    assert crew.error is None
    return told


def test_a_machine_makes_a_video_and_sends_it_back(ssh, queue, monkeypatch):
    monkeypatch.setattr(Crew, "accepts", lambda self, job: False)
    shutil.copy(ROOT / "examples/sources/first.png", queue.library / "first.png")
    image = str(queue.library / "first.png")
    job = queue.add({"prompt": "it moves", "model": "nano-i2v", "image": image, **SMALL}, "moves.png")
    told = work(queue, [Machine("mac2")])
    done = queue.get(job.id)
    assert (done.state, done.about["machine"]) == (DONE, "mac2"), done
    found = read_settings(queue.library / "moves.png")
    assert found["seed"] == 7
    assert found["source_sha256"] == [hashlib.sha256((queue.library / "first.png").read_bytes()).hexdigest()]
    assert (queue.folder / "previews" / f"{job.id}.webp").stat().st_size
    assert [event["index"] for event in told if event["event"] == "step"] == [0]
    assert told[-1]["event"] in ("result", "worker")
    left = {path.name for path in (ssh / "mac2" / "worker").iterdir()}
    assert left == {"sources", "previews"} and not list((ssh / "mac2" / "worker" / "sources").iterdir())


def test_others_make_what_a_machine_that_is_gone_was_to_make(ssh, queue):
    """The local worker is none; that of the machine is a real process, which ends at once."""
    from wan_mlx.server.child import Child

    children = Children(make)

    def child(module, arguments, hear, gone, command=()):
        return Child(module, arguments, hear, gone, command) if command else children(module, arguments, hear, gone)

    jobs = [queue.add({"prompt": "a circle", "model": "nano", **SMALL}, f"{number}.png") for number in range(3)]
    told = work(queue, [Machine("gone")], child)
    assert [queue.get(job.id).state for job in jobs] == [DONE] * 3
    assert all("machine" not in queue.get(job.id).about for job in jobs)
    said = [event["message"] for event in told if event["event"] == "worker" and event["state"] == "died"]
    assert not said or "gone cannot be reached" in said[0]


def test_weights_of_this_machine_and_begun_videos_stay_here(queue):
    remote = RemoteForeman(Machine("mac2"), queue, lambda id, event: None)
    plain = queue.add({"prompt": "a", "model": "t2v-1.3B"}, "a.mp4")
    own = queue.add({"prompt": "a", "model": "t2v-1.3B", "loras": ["/home/me/style.safetensors:0.8"]}, "b.mp4")
    begun = queue.add({"prompt": "a", "model": "nano"}, "c.mp4")
    (queue.library / "c.mp4.wan").mkdir()
    assert [remote.accepts(job) for job in (plain, own, begun)] == [True, False, False]
    queue.note(plain.id, about={"machine": "mac3"})
    assert not remote.accepts(queue.get(plain.id))


@pytest.mark.parametrize("size", [0, 1, 1 << 19, (1 << 19) + 7])
def test_files_come_whole(tmp_path, size):
    there, here = tmp_path / "there", tmp_path / "here"
    there.write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    arrived = [add_piece(line, here) for line in pieces(there, "here")]
    assert arrived[-1] and not any(arrived[:-1]) and here.read_bytes() == there.read_bytes()


def test_the_list_of_machines():
    assert parse_machines("mac2,me@10.0.0.2=/opt/wan/bin/wan-mlx") == [
        Machine("mac2"), Machine("me@10.0.0.2", "/opt/wan/bin/wan-mlx"),
    ]  # fmt: skip
    assert parse_machines(None) == parse_machines("") == []
    for wrong in ("-oProxyCommand=x", "mac2,mac2", "mac 2", "mac2;rm"):
        with pytest.raises(UsageError, match="--machines"):
            parse_machines(wrong)


def test_who_has_several_at_work_reads_whose_step_it_is(queue, monkeypatch, capsys):
    job = queue.add({"prompt": "a", "model": "nano"}, "a.mp4")

    def work_off(queue, told, machines):
        told(job.id, {"event": "step", "index": 0, "total": 8, "seconds": 0.5})
        died = {"event": "worker", "state": "died"}
        for machine, message in (("mac2", "the worker ended"), ("mac3", "mac3 cannot be reached")):
            told("", {**died, "machine": machine, "message": message})
        told("", {**died, "message": "the worker here ended"})

    monkeypatch.setattr(command, "work_off", work_off)
    for machines, said in (([Machine("mac2")], "step      a.mp4: 1 of 8, 0.5 s"), ([], "step      1 of 8, 0.5 s")):
        assert command.run(queue, False, machines) == 0
        assert capsys.readouterr().err.splitlines() == [
            said, "mac2: the worker ended", "mac3 cannot be reached", "the worker here ended"
        ]  # fmt: skip
