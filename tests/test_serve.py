"""The server as its users have it: processes, real videos, kill -9, and the clients of other programs."""

import importlib.util
import re
import signal
import subprocess
import sys
import time

import openai
import pytest
from paused_process import processes_naming
from served import Served

from wan_mlx.cli.main import main

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


def test_the_server_never_imports_mlx():
    code = "import sys; from wan_mlx.server import serving; sys.exit('mlx' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class TestCommand:
    def test_without_the_extra(self, monkeypatch, capsys):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
        assert main(["serve"]) == 1
        assert capsys.readouterr().err == "error: `serve` needs uvicorn: pip install 'wan-mlx[serve]'\n"

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


def test_ctrl_c_ends_it(tmp_path):
    server = Served(tmp_path)
    assert server.end(signal.SIGINT).strip() == "interrupted" and server.process.returncode == 130
