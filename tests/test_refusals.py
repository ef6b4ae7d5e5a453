"""Wrong and hostile command lines: one line says what is wrong, and a file that was received gives no orders."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.cli.terminal import explain
from wan_mlx.errors import printable
from wan_mlx.media.write import save_video
from wan_mlx.pipeline import WanPipeline
from wan_mlx.planning.machine import parse_memory
from wan_mlx.storage import parse_json

PACKAGE = Path(wan_mlx.__file__).parent
NANO = ["--model", "nano", "--prompt", "a red circle", "--dry-run"]
ESCAPES = "\x1b]0;evil\x07\x1b[2J\x9bK\u202e\x7f"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *argv: str, code: int = 2) -> str:
    """What is said, in one line, of a command line that is refused."""
    assert main(list(argv)) == code
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
    assert "--debug" not in said.err
    return said.err


class TestValues:
    @pytest.mark.parametrize(
        "flag",
        "--output --prompts --resume --task --report --cache --preview --image --lora --vae --memory --size --steps "
        "--model --prompt --quantize --solver --config".split(),
    )
    @pytest.mark.parametrize("value", ["", " "])
    def test_an_empty_one_is_a_variable_that_is_not_set(self, capsys, flag, value):
        assert "is empty" in refused(capsys, *NANO, flag, value)

    def test_nothing_may_be_avoided(self, capsys):
        assert main([*NANO, "--negative-prompt", ""]) == 0

    def test_a_name_that_is_not_utf8(self, capsys):
        assert "not UTF-8" in refused(capsys, *NANO, "--output", "caf\udce9.png")

    @pytest.mark.parametrize("memory", ["9" * 400 + "GB", "1001TB", "99MB"])
    def test_memory_has_limits(self, capsys, memory):
        assert "expected at least 100MB" in refused(capsys, *NANO, "--memory", memory)
        with pytest.raises(ValueError, match="at most 1000TB"):
            parse_memory(memory)

    def test_a_very_long_name_is_shortened(self, capsys):
        assert len(refused(capsys, *NANO, "--model", "a" * 5000, code=1)) < 1100

    @pytest.mark.parametrize(
        "given, said",
        [
            (["--preview-every", "2"], "--preview-every has no effect without --preview"),
            (["--report", "r.jsonl"], "--report has no effect without --prompts"),
            (["--extend-model", "some/model"], "--extend-model has no effect without --extend-prompt"),
            (["--taehv", "taew2_1.pth"], "--taehv has no effect without --preview or --tiny-vae or --draft"),
            (["--resume", "a.mp4", "--plan"], "--plan does not go with --resume"),
            (["--context-scale", "2"], "context_scale was given to a t2v model"),
            (["--image-encoder", "nano-i2v"], "image_encoder was given"),
        ],
    )
    def test_what_would_have_no_effect(self, capsys, given, said):
        assert said in refused(capsys, *NANO, *given)

    def test_a_batch_has_no_plan(self, capsys):
        assert "--plan does not go with --prompts" in refused(capsys, "--prompts", "none.jsonl", "--plan")

    def test_versions_are_shown_and_no_more(self, capsys):
        assert main(["--version", "--prompts", "none.jsonl"]) == 0 and "wan_mlx" in capsys.readouterr().out

    def test_programs_get_the_plan_as_events(self, capsys):
        assert main(["--plan", "--json", "--model", "nano", "--size", "16384x16384", "--frames", "81"]) == 1
        assert {json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()} == {"note"}

    def test_an_official_flag_without_effect_gets_a_line_in_a_batch_too(self, capsys, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"prompt": "a cat"}\n')
        assert main(["--model", "nano", "--prompts", "a.jsonl", "--dry-run", "--offload_model", "True"]) == 0
        assert capsys.readouterr().err.count("--offload_model has no effect here") == 1

    def test_python_says_the_same_of_wrong_types(self):
        pipe = WanPipeline.from_pretrained("nano", progress=False)
        wrong = {"steps": "4", "width": 64.5, "guidance_range": 5, "skip_layers": ["a"], "seed": True}
        for name, value in wrong.items():
            with pytest.raises(ValueError, match="expected"):
                pipe.request("a cat", **{name: value})
        assert pipe.request("a cat", width=np.int64(64), height=64, shift=np.float32(3)).width == 64


class TestOtherCommands:
    @pytest.mark.parametrize("words", [["", "out"], ["nano", ""], ["nano", "out", "--vae", " "], ["nano", "--model="]])
    def test_an_empty_value_of_convert(self, capsys, words):
        assert "it is empty; give it a value, or leave it out" in refused(capsys, "convert", *words)

    @pytest.mark.parametrize("flags", ["--overwrite", "--dtype float32", "--vae-dtype bfloat16", "--quantize q8",
                                       "--model nano"])  # fmt: skip
    def test_a_flag_of_writing_with_inspect(self, capsys, flags):
        said = refused(capsys, "inspect", "nano", *flags.split())
        assert said == f"error: {flags.split()[0]} has no effect with --inspect; leave it out\n"

    @pytest.mark.parametrize(
        "argv",
        [["models", "x"], ["models", "--foo"], ["doctor", "--foo"], ["inspect"], ["convert", "a"], ["convert", "--x"]],
        ids=" ".join,
    )
    def test_one_line(self, capsys, argv):
        refused(capsys, *argv)

    @pytest.mark.parametrize("command", ["info", "inspect", "convert", "smooth", "completion"])
    def test_what_is_left_out_is_told_by_an_example(self, capsys, command):
        assert f" is missing, as in wan-mlx {command} " in refused(capsys, command)

    @pytest.mark.parametrize("flags", ["--task t2v-1.3B", "--vae nano", "--vae nano --plan"])
    def test_no_model(self, capsys, flags):
        assert "--model is missing" in refused(capsys, "--prompt", "a cat", *flags.split())

    @pytest.mark.parametrize("argv", [["--nope"], ["--steps", "x"], ["--config", "none.json"]], ids=" ".join)
    def test_programs_get_an_event(self, capsys, argv):
        assert main(["--json", *argv]) == 2
        said = capsys.readouterr()
        assert json.loads(said.out)["event"] == "error" and not said.err


class TestConfig:
    @pytest.mark.parametrize(
        "settings",
        [
            {"skip_layers": 5}, {"skip_range": 5}, {"skip_layers": [1], "skip_range": 5}, {"skip_layers": [[1]]},
            {"guidance_range": [1]}, {"guidance_range": ["a", 1]}, {"dtype": 5}, {"dtype": []},
            {"loras": 5}, {"loras": [{}]}, {"loras": [{"file": 1, "strength": {}}]}, {"src_ref_images": 5},
            {"model": {}}, {"model": 5}, {"task": {}}, {"steps": [1]}, {"steps": 1.5}, {"steps": True},
            {"width": "a", "height": 2}, {"width": [1], "height": {}}, {"vae_tiling": [1, 2, 3]}, {"cfg_zero": [1]},
            {"prompt": ["a", "b"]}, {"draft": 5}, {"image": [1]}, {"size": [64, 32, 16]}, {"prompt": "\ud800"},
            {"slg": [1]}, [1], "x", 5, None,
        ],
        ids=json.dumps,
    )  # fmt: skip
    def test_values_of_another_type(self, capsys, settings):
        Path("c.json").write_text(json.dumps(settings))
        refused(capsys, *NANO, "--config", "c.json")

    def test_a_picture_larger_than_any(self, capsys):
        header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        length, check = struct.pack(">I", 13), struct.pack(">I", zlib.crc32(header))
        Path("c.png").write_bytes(b"\x89PNG\r\n\x1a\n" + length + header + check)
        assert "was not made by wan_mlx" in refused(capsys, *NANO, "--config", "c.png")

    @pytest.mark.parametrize("header", [b"{'descr': '<U9', 'shape': (", b"{", b"((((((", b"\xff\xfe"])
    def test_an_array_with_a_damaged_header(self, capsys, header):
        with zipfile.ZipFile("c.npz", "w") as file:
            length = struct.pack("<H", len(header) + 1)
            file.writestr("settings.npy", b"\x93NUMPY\x01\x00" + length + header + b"\n")
        assert "was not made by wan_mlx" in refused(capsys, *NANO, "--config", "c.npz")

    @pytest.mark.parametrize("checkpoint", [[], {}, 5])
    def test_notes_of_another_type_mean_nothing(self, checkpoint):
        Path("c.json").write_text(json.dumps({"checkpoint": checkpoint, "model_fps": "x", "stopped_after": {}}))
        assert main([*NANO, "--config", "c.json"]) == 0

    @pytest.mark.parametrize(
        "text, said",
        [
            ("[" * 100_000 + "]" * 100_000, "nested"),
            ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested"),
            ('{"steps": 1, "steps": 2}', "given twice"),
            ('{"steps": ' + "9" * 5000 + "}", "cannot be read"),
            ("", "cannot be read"),
        ],
        ids=range(5),
    )
    def test_json_that_is_none(self, capsys, text, said):
        Path("c.json").write_text(text)
        assert said in refused(capsys, *NANO, "--config", "c.json")
        Path("b.jsonl").write_text(text or "[")
        assert "b.jsonl line 1" in refused(capsys, "--model", "nano", "--prompts", "b.jsonl", "--dry-run")
        with pytest.raises(ValueError):
            parse_json(text)


class TestReceivedVideo:
    """What is embedded in a video or picture makes what it shows, and nothing else."""

    def with_settings(self, **settings) -> str:
        settings = {"prompt": "a red circle", "seed": 3, **settings}
        return str(save_video("got.png", np.zeros((1, 16, 16, 3), np.uint8), 16, settings))

    @pytest.mark.parametrize(
        "name, value",
        [
            ("output", "../stolen.mp4"), ("preview", "/tmp/x.webp"), ("model", "evil/repo"), ("model", "../evil"),
            ("loras", "evil/repo:a.safetensors"), ("lora", ["a.safetensors"]), ("transformer", "evil/repo"),
            ("text_encoder", "evil"), ("vae", "evil"), ("tokenizer", "evil"), ("taehv", "evil/repo:a"),
            ("source", "modelscope"), ("extend_prompt", True), ("prompt_extend_model", "evil/repo"),
            ("image", "/home/me/a.png"), ("video", "../a.mp4"), ("src_ref_images", ["a.png", "b/c.png"]),
            ("memory", "900GB"), ("num_images", 1000),
        ],
    )  # fmt: skip
    def test_names_no_place(self, capsys, name, value):
        said = refused(capsys, "--model", "nano", "--dry-run", "--config", self.with_settings(**{name: value})) \
            if name != "model" else refused(capsys, "--dry-run", "--config", self.with_settings(model=value))
        assert "not taken from a video or picture" in said

    def test_unless_it_is_typed_too(self, capsys):
        received = self.with_settings(model="evil/repo", output="theirs.png", num_frames=1)
        assert main(["--config", received, "--model", "nano", "--output", "mine.png", "--dry-run"]) == 0
        said = capsys.readouterr().err
        assert "mine.png" in said and "evil" not in said and "theirs" not in said

    def test_released_models_and_files_in_this_folder(self, capsys):
        Image.new("RGB", (16, 16)).save("first.png")
        received = self.with_settings(model="nano-i2v", checkpoint="nano-i2v", image="first.png", task="i2v")
        assert main(["--config", received, "--dry-run"]) == 0

    def test_a_file_of_one_s_own_may_name_places(self, capsys):
        Path("mine.json").write_text(json.dumps({"prompt": "a cat", "model": "nano", "output": "mine.png"}))
        assert main(["--config", "mine.json", "--dry-run", "--frames", "1"]) == 0
        assert "mine.png" in capsys.readouterr().err

    def test_does_not_say_where_sources_lay(self, tmp_path):
        source = tmp_path / "private/first.png"
        source.parent.mkdir()
        Image.new("RGB", (16, 16)).save(source)
        pipe = WanPipeline.from_pretrained("nano-i2v", progress=False)
        settings = pipe.settings(pipe.request("a cat", image=str(source)))
        assert settings["image"] == "first.png" and "private" not in json.dumps(settings)


class TestTerminal:
    def test_what_is_said_cannot_steer_it(self, capsys):
        Path("b.jsonl").write_text(json.dumps({"prompt": f"cat{ESCAPES}\nerror: gone", "seed": 1}))
        assert main(["--model", "nano", "--prompts", "b.jsonl", "--dry-run"]) == 0
        Path("c.json").write_text(json.dumps({f"pro{ESCAPES}mpt": "a cat"}))
        assert main(["--model", "nano", "--config", "c.json"]) == 2
        assert main(["--model", f"a\n{ESCAPES}", "--prompt", "x"]) == 2
        Path("d.json").write_text(json.dumps({"stopped_after": ESCAPES, "solver": "none"}))
        assert main(["--model", "nano", "--prompt", "x", "--config", "d.json"]) == 2
        said = "".join(capsys.readouterr())
        assert all(line.isprintable() for line in said.splitlines()) and len(said.splitlines()) == 7

    def test_programs_get_ascii(self, capsys):
        assert main([*NANO, "--prompt", f"猫{ESCAPES}", "--json"]) == 0
        said = capsys.readouterr().out
        assert said.isascii() and "\x7f" not in said
        assert any(f"猫{ESCAPES}" in json.loads(line).get("text", "") for line in said.splitlines())

    def test_printable(self):
        assert printable("a猫\n\t\x1b\udce9b") == "a猫\\n\\t\\x1b\\udce9b"

    def run(self, *argv, **options):
        words = [sys.executable, "-m", "wan_mlx.generate", *argv]
        env = {**os.environ, **options.pop("env", {}), "PYTHONPATH": str(PACKAGE.parent)}
        return subprocess.run(words, env=env, **{"stdout": -1, "stderr": -1, **options})

    def test_stderr_that_is_closed(self):
        done = self.run("--nope", preexec_fn=lambda: os.close(2))
        assert done.returncode == 2 and not done.stdout and not done.stderr

    def test_a_video_is_made_where_all_streams_are_closed(self, flags, tmp_path):
        output = tmp_path / "a.png"
        flags = [flag for flag in flags if flag != "--quiet"]
        done = self.run(*flags, "--frames", "1", "--steps", "1", "--output", str(output),
                        preexec_fn=lambda: os.closerange(0, 3))  # fmt: skip
        assert done.returncode == 0 and not done.stdout and not done.stderr and output.is_file()

    @pytest.mark.parametrize(
        "error",
        [
            "[Compile::eval_cpu] Failed to compile function Ab: Failed to execute command with return code 1: \"g++\", "
            "the output is: error: No space left on device\nmore",
            "filesystem error: temp_directory_path: No such file or directory",
        ],
    )
    def test_a_temporary_folder_that_is_full_or_gone(self, error):
        said, code = explain(RuntimeError(error))
        assert code == 1 and "TMPDIR" in said and "--debug" not in said and "\n" not in said

    def test_stdout_that_is_full(self):
        with open("/dev/full", "w") as full:
            done = self.run("--json", "--nope", stdout=full)
        assert done.returncode == 2 and not done.stderr

    def test_a_terminal_that_is_not_utf8(self):
        done = self.run("--resume", "café.png", env={"PYTHONIOENCODING": "ascii"})
        assert done.returncode == 2 and b"caf" in done.stderr and b"Traceback" not in done.stderr

    @pytest.mark.parametrize("door", ["wan_mlx.generate", "wan_mlx.doctor"])
    def test_ctrl_c_while_it_starts(self, door):
        """Before the command line is imported: the process waits in the import, as a slow disk has it."""
        code = (
            "import builtins, runpy, signal, sys, time\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where pytest runs in the background
            "before = builtins.__import__\n"
            "def slow(name, *rest, **kwargs):\n"
            "    if 'cli' in name:\n"
            "        print('importing', flush=True); time.sleep(20)\n"
            "    return before(name, *rest, **kwargs)\n"
            "builtins.__import__ = slow\n"
            f"runpy.run_module({door!r}, run_name='__main__')\n"
        )
        env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
        with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, env=env) as process:
            assert process.stdout.readline() == b"importing\n"
            process.send_signal(signal.SIGINT)
            started = time.monotonic()
            assert process.wait(15) in (-signal.SIGINT, 130) and time.monotonic() - started < 15
            assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("flag", ["--num-images", "--strength", "--lora", "--output"])
def test_two_dashes_are_no_value(capsys, flag):
    """argparse drops them, and leaves an empty list."""
    assert f"{flag}: expected a value" in refused(capsys, *NANO, f"{flag}=--")
