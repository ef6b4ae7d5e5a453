"""The command line beside making videos: JSON events, replayed settings, the list of models, completion, colours."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from wan_mlx.cli.flags import build_parser
from wan_mlx.cli.main import main
from wan_mlx.cli.terminal import Terminal, explain
from wan_mlx.media.write import read_settings
from wan_mlx.presets import PRESETS

SMALL = ["--model", "nano", "--prompt", "a red circle moves right", "--size", "32x32", "--frames", "5", "--steps", "2",
         "--dtype", "float32", "--guidance", "2", "--guidance-range", "0-0.5", "--seed", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    output = tmp_path_factory.mktemp("made") / "a.npz"
    assert main([*SMALL, "--output", str(output), "--quiet"]) in (0, 3)
    return output


def test_json_events(tmp_path, capsys):
    output = tmp_path / "a.npz"
    code = main([*SMALL, "--output", str(output), "--json"])
    said = capsys.readouterr()
    events = [json.loads(line) for line in said.out.splitlines()]
    kinds = [event["event"] for event in events]
    assert said.err == ""
    assert [e["index"] for e in events if e["event"] == "step"] == [0, 1] and kinds.count("result") == 1
    assert [e["done"] for e in events if e["event"] == "frames"] == [1, 5]
    assert [e["name"] for e in events if e["event"] == "stage"] == [
        "conditioning", "load transformer", "denoise", "decode"
    ]  # fmt: skip
    start = next(e for e in events if e["event"] == "start")
    assert start["settings"]["seed"] == 3 and start["output"] == str(output)
    result = next(e for e in events if e["event"] == "result")
    assert result["output"] == str(output) and (code == 3) == (result["complaint"] is not None)


def test_json_error(capsys):
    assert main(["--model", "nano", "--prompt", "x", "--steps", "0", "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["code"] == 2


def test_quiet_says_the_result_alone(made, tmp_path, capsys):
    assert main(["--config", str(made), "--output", str(tmp_path / "b.npz"), "--quiet"]) in (0, 3)
    said = capsys.readouterr()
    important = ("was written, but", "learned to draw at")
    assert said.out == f"{tmp_path / 'b.npz'}\n"
    assert all(any(text in line for text in important) for line in said.err.splitlines())


def test_config_replays_a_video(made, tmp_path):
    again, other = tmp_path / "again.npz", tmp_path / "other.npz"
    assert main(["--config", str(made), "--output", str(again)]) in (0, 3)
    assert main(["--config", str(made), "--output", str(other), "--seed", "4"]) in (0, 3)
    first, second, third = (np.load(path)["frames"] for path in (made, again, other))
    assert np.array_equal(first, second) and not np.array_equal(first, third)
    ours, theirs = read_settings(made), read_settings(other)
    assert {key for key in ours if ours[key] != theirs[key]} == {"seed"}


@pytest.mark.parametrize(
    "options",
    [
        ["--quantize", "q8", "--cfg-zero", "1", "--slg", "1,2:0-0.9", "--negative-prompt", "blue", "--solver", "dpm++"],
        ["--cache", "easycache", "--steps", "10", "--guidance", "1", "--guidance-range", "0-1", "--memory", "1GB"],
        ["--recipe", "lightx2v-4step", "--steps", "4", "--guidance", "1", "--guidance-range", "0-1"],
        ["--video", "source.png", "--strength", "0.5", "--guidance-range", "0-1", "--vae-tiling", "64x64"],
        ["--model", "nano-i2v", "--image", "source.png", "--preview", "look.webp", "--preview-every", "2"],
        ["--task", "t2v-14B", "--num-images", "1"],
    ],
    ids=lambda options: options[0],
)
def test_config_replays_every_option(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save("source.png")
    small = ["--size", "16x16", *(() if options[0] in ("--model", "--quantize") else ("--frames", "1"))]
    assert main([*SMALL, *options, *small, "--output", "a.npz", "--quiet"]) in (0, 3)
    first = "a_seed3.npz" if "--num-images" in options else "a.npz"
    assert main(["--config", first, "--output", "again.npz", "--quiet"]) in (0, 3)
    assert np.array_equal(np.load(first)["frames"], np.load("again.npz")["frames"])
    assert read_settings("again.npz") == read_settings(first)


def test_config_reports_options_it_cannot_replay(made, tmp_path, caplog):
    path = tmp_path / "settings.json"
    settings = read_settings(made) | {"stopped_after": 1, "dtype": "bfloat16, float32 from step 2"}
    path.write_text(json.dumps(settings))
    assert main(["--config", str(path), "--output", str(tmp_path / "b.npz"), "--quiet"]) in (0, 3)
    assert "was stopped after 1 steps; now all are made" in caplog.text
    assert "was made in bfloat16, float32 from step 2; now all of it is in bfloat16" in caplog.text
    assert read_settings(tmp_path / "b.npz")["dtype"] == "bfloat16"


def test_config_of_a_json_file(made, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(read_settings(made) | {"seed": 4}))
    assert main(["--config", str(path), "--output", str(tmp_path / "b.npz"), "--quiet"]) in (0, 3)
    assert read_settings(tmp_path / "b.npz")["seed"] == 4


@pytest.mark.parametrize(
    "text, said",
    [
        ("[1]", "expected an object"),
        ("{", "cannot be read"),
        ('{"promt": "a cat"}', "nearest: prompt"),
        ('{"prompt": "a cat", "image": {"kind": "array"}}', "in memory"),
        ('{"prompt": "a cat", "loras": [{"file": "style.safetensors", "strength": 0.8}]}', "--lora"),
    ],
)
def test_config_that_cannot_be_replayed(tmp_path, capsys, text, said):
    path = tmp_path / "settings.json"
    path.write_text(text)
    assert main(["--model", "nano", "--config", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_models(capsys, monkeypatch):
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(PRESETS) and rows["nano"]["here"]
    assert 1.4e9 < rows["t2v-1.3B"]["parameters"] < 1.5e9 and 14e9 < rows["t2v-14B"]["parameters"] < 14.5e9
    for columns, is_wide in ((80, False), (120, True)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["models"]) == 0
        said = capsys.readouterr().out
        assert ("Wan-AI/Wan2.1-VACE-14B" in said) == is_wide
        for line in said.splitlines():
            assert len(line) + len(re.findall("[\u3000-\uffef]", line)) <= columns, line  # twice as wide
            assert line.lstrip()[:1] not in ("、", "，", "；"), line
        assert " text, image to video 1280x704 " in said


def completed(script: str, *words: str) -> list[str]:
    typed = " ".join(f"'{word}'" for word in words)
    probe = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _shtab_wan_mlx; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", f"{script}\n{probe}"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completion(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, "wan-mlx", "--sol") == ["--solver"]
    assert completed(script, "wan-mlx", "mo") == ["models"]
    assert completed(script, "wan-mlx", "convert", "--vae-d") == ["--vae-dtype"]
    assert completed(script, "wan-mlx", "convert", "--source", "m") == ["modelscope"]
    assert completed(script, "wan-mlx", "plan", "--mem") == ["--memory"]
    assert completed(script, "wan-mlx", "plan", "vace") == ["vace-1.3B", "vace-14B", "vace-fun-A14B"]
    assert completed(script, "wan-mlx", "completion", "z") == ["zsh"]
    assert completed(script, "wan-mlx", "help", "rec") == ["recipes"]
    assert "unipc" in completed(script, "wan-mlx", "--solver", "")
    assert completed(script, "wan-mlx", "--extend-language", "e") == ["en"]
    assert completed(script, "wan-mlx", "--model", "vace") == ["vace-1.3B", "vace-14B", "vace-fun-A14B"]


@pytest.mark.parametrize("shell, line", [("zsh", "#compdef wan-mlx"), ("fish", "-l solver -l sample_solver -x")])
def test_other_completion(capsys, shell, line):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert line in script
    for action in build_parser()._actions:
        if action.help != "==SUPPRESS==":
            assert action.option_strings[0].lstrip("-") in script


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_the_shell_s_language(capsys, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    done = subprocess.run([shell, "-n", "-c", script] if shell != "fish" else [shell, "-n", "/dev/stdin"],
                          input=script if shell == "fish" else None, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_completion_of_no_such_shell(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "expected one of bash" in capsys.readouterr().err and main(["completion"]) == 2


def test_colours_on_a_terminal_alone(monkeypatch, capsys):
    say = Terminal()
    say.fail("no", 1)
    say.note("model     nano")
    assert capsys.readouterr().err == "error: no\nmodel     nano\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    say.fail("no", 1)
    assert capsys.readouterr().err.startswith("\033[31merror:")
    monkeypatch.setenv("NO_COLOR", "1")
    say.fail("no", 1)
    assert capsys.readouterr().err == "error: no\n"


def test_help_shows_every_model_s_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["--help-all"])
    said = capsys.readouterr().out
    assert all(name in said for name in PRESETS)


def test_a_full_temporary_folder_is_one_line():
    """MLX's own error has the compiler's command and all that it said."""
    said = (
        '[Compile::eval_cpu] Failed to compile function BI6: Failed to execute command with return code 1: "g++ -O3 '
        '"/tmp/mlx/tmp_8f.cpp" -o "/tmp/mlx/tmp_8f.so" 2>&1", the output is: /tmp/mlx/tmp_8f.cpp:1: fatal error: error '
        "closing /tmp/ccoF.s: No space left on device\ncompilation terminated."
    )
    message, code = explain(RuntimeError(said))
    assert code == 1 and "\n" not in message and "(run again" not in message
    assert "closing /tmp/ccoF.s: No space left on device); it needs" in message and "TMPDIR names another" in message
