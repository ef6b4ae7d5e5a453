"""The server as its users have it: processes, real videos, kill -9, and the clients of other programs."""

import importlib.util
import json
import os
import plistlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from fake_children import Children, make
from paused_process import processes_naming
from served import Served

from wan_mlx.cli import queue, serve
from wan_mlx.cli.main import main
from wan_mlx.errors import install_command
from wan_mlx.runs.queue import Queue
from wan_mlx.server.foreman import Foreman

ROOT = Path(__file__).parent.parent
# As small as a video can be.
TINY = {"size": "32x32", "num_frames": 1, "steps": 2, "dtype": "float32"}


def made_alone(folder, monkeypatch, prompt: str, seed: int, name: str) -> bytes:
    """The bytes of an undisturbed run."""
    monkeypatch.chdir(folder)
    argv = ["-p", prompt, "--size", "32x32", "--frames", "1", "--steps", "2", "--dtype", "float32", "-s", str(seed)]
    assert main([*argv, "-o", name, "--quiet"]) in (0, 3)
    return (folder / name).read_bytes()


def test_kill_9_of_the_server_in_the_midst_of_a_video(tmp_path, monkeypatch, capsys):
    """The worker ends with it; the next server goes on by itself, and every video has the bytes of an undisturbed
    run. The OpenAI SDK fetches one, httpx the other."""
    library = tmp_path / "library"
    server = Served(library)
    assert server.seconds < 20  # 1 s where nothing else runs
    first = server.ask(prompt="a red circle", seed=1, **TINY)
    second = server.ask(prompt="a blue square", seed=2, **TINY)
    server.until(first, "step", "done")
    server.end()
    end = time.monotonic() + 20
    while processes_naming(str(library)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not processes_naming(str(library))  # neither worker nor clerk is left
    with Served(library) as server:
        client = openai.OpenAI(api_key="none", base_url=f"{server.address}v1")
        with pytest.warns(DeprecationWarning):
            assert client.videos.list().data[-1].id == first
            server.until(second, "done")
            video = client.videos.retrieve(first)
            content = client.videos.download_content(first).read()
        assert (video.status, video.progress, video.size) == ("completed", 100, "32x32")
        alone = made_alone(tmp_path, monkeypatch, "a red circle", 1, "one.png")
        assert content == alone
        content = server.client.get(f"/v1/videos/{second}/content").content
        assert content == made_alone(tmp_path, monkeypatch, "a blue square", 2, "two.png")
        assert not [path for path in library.iterdir() if path.name.endswith(".wan")]
        with pytest.warns(DeprecationWarning):
            assert client.videos.create(prompt="a star", model="nano", size="32x32", seconds="1").status == "queued"
        assert server.client.post("/v1/models/pause", json={"model": "nano"}).status_code == 200


def test_the_worker_gives_way_to_the_server(tmp_path):
    """It is nicer, which between two sessions would count for nothing (Linux's autogroups); Ctrl-C is not for it."""
    with Served(tmp_path) as server:
        server.until(server.ask(prompt="a red circle", **TINY), "done")
        own = server.process.pid
        rows = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines()
        children = {int(row.split()[0]) for row in rows if int(row.split()[1]) == own}
        assert len(children) == 2 and {os.getsid(pid) for pid in children} == {os.getsid(own)}
        assert all(os.getpgid(pid) == pid for pid in children)
        niceness = sorted(os.getpriority(os.PRIO_PROCESS, pid) for pid in (own, *children))
        assert niceness == [niceness[0], niceness[0], niceness[0] + 10]


def test_the_server_never_imports_mlx():
    code = "import sys; from wan_mlx.server import serving; sys.exit('mlx' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class TestCommand:
    def test_without_the_extra(self, monkeypatch, capsys):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
        assert main(["serve"]) == 1
        assert capsys.readouterr().err == f"error: `serve` needs uvicorn: {install_command('uvicorn')}\n"

    @pytest.mark.parametrize(
        "flags, said",
        [
            (["--port", "70000"], "--port is 70000, expected 0 to 65535; nearest: 65535"),
            (["--model", "nanoo"], "--model is 'nanoo', expected one that `wan-mlx models` lists"),
            (["--host", "203.0.113.7", "--port", "0"], "203.0.113.7 port 0 cannot be listened at"),
            (["--hots", "x"], "unknown argument --hots x; nearest: --host"),
        ],
    )
    def test_wrong_usage(self, tmp_path, capsys, flags, said):
        assert main(["serve", "--library", str(tmp_path), *flags]) in (1, 2)
        assert said in capsys.readouterr().err

    def test_beyond_loopback_it_prints_a_token(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WAN_MLX_TOKEN", "of-my-own-choice")
        from wan_mlx.server.serving import Serving

        beyond, here = Serving("0.0.0.0", 0, tmp_path, "nano"), Serving("127.0.0.1", 0, tmp_path, "nano")
        assert re.fullmatch(r"http://127.0.0.1:\d+/\?token=of-my-own-choice", beyond.address)
        assert here.token is None and "token" not in here.address
        beyond.close()
        here.close()


def of_docs(language: str, address: str) -> list[str]:
    """The page's blocks, for this server, with videos as small as can be."""
    text = (ROOT / "docs/serve.md").read_text(encoding="utf-8").replace("http://127.0.0.1:8190", address.rstrip("/"))
    text = re.sub("""((?:num_frames|steps)"?[=:] ?)1[27]""", r"\g<1>1", text.replace("128x128", "32x32"))
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_what_the_page_shows(tmp_path, monkeypatch):
    """Its lines of curl and of Python, as they stand; then Ctrl-C ends the server."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples/sources/first.png", tmp_path)
    server = Served(tmp_path / "library")
    lines = [line for block in of_docs("sh", server.address) for line in block.splitlines() if line.startswith("curl")]
    assert len(lines) >= 7
    for line in lines:
        done = subprocess.run(shlex.split(line), capture_output=True, text=True)
        answer = json.loads(done.stdout or (tmp_path / "video.json").read_text())
        assert done.returncode == 0 and "error" not in answer or answer["error"] is None, (line, answer)
    (block,) = of_docs("python", server.address)
    for id in [video["id"] for video in server.client.get("/v1/queue").json()["data"]]:
        server.client.delete(f"/v1/videos/{id}")
    exec(block, {})
    assert (tmp_path / "circle.mp4").read_bytes()[1:4] == b"PNG"  # of one frame
    assert server.end(signal.SIGINT).strip() == "interrupted" and server.process.returncode == 130


def test_the_service_of_the_docs():
    """launchd's file is one, and wan-mlx takes the command that is in it."""
    text = (ROOT / "docs/serve.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```xml\n(<\?xml.*?)^```$", text, re.MULTILINE | re.DOTALL)
    service = plistlib.loads(block.encode())
    program, command, *flags = service["ProgramArguments"]
    assert (Path(program).name, command) == ("wan-mlx", "serve")
    assert serve.build_parser().parse_args(flags).no_browser


class TestQueueCommand:
    """``wan-mlx queue``, with workers that are none."""

    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(queue, "work_off", self.worked_off)

    @staticmethod
    def worked_off(jobs, told, machines):
        foreman = Foreman(jobs, told, Children(make), until_empty=True)
        foreman.start()
        foreman.join()

    def said(self, capsys, command: str, code: int = 0) -> str:
        assert main(["queue", *shlex.split(command), "--library", "lib"]) == code
        return "".join(capsys.readouterr())

    def test_from_the_first_job_to_the_last(self, capsys):
        assert "nothing is in the queue" in self.said(capsys, "")
        shutil.copy(ROOT / "examples/sources/first.png", "first.png")
        self.said(capsys, "add 'a circle' --seed 7 --size 64x64")
        small = "--size 64x64 --frames 5 --guidance-range 0-0.6"
        self.said(capsys, f"add 'it moves' --image first.png -o moves.mp4 {small}")
        first, second = json.loads(self.said(capsys, "--json"))
        made = f"{Path.cwd()}/lib/moves.mp4"
        assert (first["model"], second["model"], second["output"]) == ("nano", "nano-i2v", made)
        a, b = (row["id"].removeprefix("video_")[:6] for row in (first, second))
        assert self.said(capsys, f"move {a}").split()[0] == b
        assert "paused" in self.said(capsys, f"pause {a}")
        said = self.said(capsys, "run")
        assert "step      2 of 2" in said and made in said.splitlines()
        assert [row["state"] for row in json.loads(self.said(capsys, "--json"))] == ["paused", "done"]
        self.said(capsys, f"rm {b}")
        assert Path("lib/moves.mp4").exists() and b not in self.said(capsys, "list")
        image = Queue(Path("lib")).get(first["id"]).options
        assert image["seed"] == 7

    def test_files_are_named_from_everywhere(self, capsys):
        shutil.copy(ROOT / "examples/sources/first.png", "first.png")
        self.said(capsys, "add x --image first.png --size 64x64")
        (job,) = Queue(Path("lib")).all()
        assert job.options["image"] == str(Path("first.png").absolute())

    @pytest.mark.parametrize(
        "command, line",
        [
            ("add 'a' --size 33x32", "width is 33, expected a positive multiple of 16; nearest: 32"),
            ("add 'a' --seeds 1,2", "--seeds does not go with queue add"),
            ("add 'a' -o ../a.mp4", "expected a file's name"),
            ("rm zz", "no jobs have an id that begins with 'zz'"),
            ("stop", "queue stop: expected the id of a job"),
            ("list x", "queue list takes no id"),
            ("list --before x", "--before goes with move"),
            ("fly", "queue fly: expected one of list, add"),
        ],
    )
    def test_wrong_usage(self, capsys, command, line):
        assert line in self.said(capsys, command, 2)
