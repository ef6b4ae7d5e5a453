"""Parts of a request that the video will not show are said in one line, before any work, and are in its settings."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.events import Note
from wan_mlx.media.write import read_settings
from wan_mlx.prompts.extend import Extension
from wan_mlx.runs.record import seed_of_made

SMALL = dict(width=16, height=16, num_frames=1, steps=1, seed=3)
LONG = "circle " * 599  # with the end-of-sequence 600 tokens
SAID = "the prompt has 600 tokens, of which the model reads 512: its end is left out"


@pytest.fixture
def pipe(pico):
    found = wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=False)
    found.preset = replace(found.preset, learned=())  # of sizes tells test_nano
    return found


@pytest.fixture
def command(pico, tmp_path):
    """Flags but for the prompt, and the file that they make."""
    size = ["--size", "16x16", "--frames", "1", "--steps", "1", "--seed", "3", "--dtype", "float32"]
    return ["--model", str(pico), *size, "--output", str(tmp_path / "a.npz")], tmp_path / "a.npz"


def test_a_prompt_of_600_tokens(pipe, caplog):
    video = pipe(LONG, negative_prompt="red " * 520, guidance_scale=2.0, **SMALL)
    assert video.settings["tokens"] == {"prompt": (512, 600), "negative_prompt": (512, 521)}
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [SAID, "the negative prompt has 521 tokens, of which the model reads 512: its end is left out"]
    cut = pipe("circle " * 511, negative_prompt="red " * 511, guidance_scale=2.0, **SMALL)
    assert np.array_equal(cut.latents, video.latents) and "tokens" not in cut.settings


def test_a_negative_prompt_that_is_not_read_is_not_counted(pipe):
    request = pipe.request("a circle", negative_prompt=LONG, guidance_scale=1.0, **SMALL)
    assert pipe.notes(request) == []


def test_the_limit_is_the_model_s(pipe, monkeypatch):
    request = pipe.request("circle " * 20, **SMALL)
    assert pipe.notes(request) == []
    monkeypatch.setattr(pipe, "config", replace(pipe.config, text_len=10))
    assert pipe.cut_texts(request)["prompt"] == (10, 21)
    assert pipe.encode_text(["circle " * 20])[0].shape[1] == 10


def test_a_run_says_it_once_to_who_listens(pipe):
    run, heard = pipe.run(pipe.request(LONG, guidance_scale=1.0, **SMALL)), []
    events = list(run.listen(heard.append))
    assert events[0] == Note(SAID, important=True) and [e for e in events if isinstance(e, Note)] == events[:1]
    assert heard[0] == events[0]


@pytest.mark.parametrize("quiet", [False, True])
def test_command_line(command, capsys, quiet):
    flags, output = command
    assert main([*flags, "--prompt", LONG, *["--quiet"] * quiet]) in (0, 3)
    assert capsys.readouterr().err.splitlines().count(SAID) == 1
    assert read_settings(output)["tokens"] == {"prompt": [512, 600]}


def test_json(command, capsys):
    assert main([*command[0], "--prompt", LONG, "--json"]) in (0, 3)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events.count({"event": "note", "text": SAID}) == 1


def test_dry_run(command, tmp_path, capsys):
    assert main([*command[0], "--prompt", LONG, "--dry-run"]) == 0
    assert capsys.readouterr().err.splitlines().count(SAID) == 1
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": LONG}))
    assert main([*command[0][:-2], "--prompts", str(tmp_path / "a.jsonl"), "--dry-run"]) == 0
    assert capsys.readouterr().err.splitlines().count(SAID) == 1


def test_the_count_is_a_note_not_a_choice(command, pipe, monkeypatch):
    """A video from before tokens were counted is still the one asked for, and --config takes one with a count."""
    flags, output = command
    with monkeypatch.context() as patch:
        patch.setattr(wan_mlx.WanPipeline, "cut_texts", lambda self, request: {})
        assert main([*flags, "--prompt", LONG]) in (0, 3)
    assert "tokens" not in read_settings(output) and seed_of_made(pipe, pipe.request(LONG, **SMALL), output) == 3
    b, c = (output.with_name(name) for name in ("b.npz", "c.npz"))
    for old, new in ((output, b), (b, c)):
        assert main(["--config", str(old), "--model", flags[1], "--output", str(new)]) in (0, 3)
        assert read_settings(new)["tokens"] == {"prompt": [512, 600]}


def test_a_prompt_that_was_written_out(command, capsys, monkeypatch):
    monkeypatch.setattr(Extension, "__call__", lambda self, preset, requests, tell: [
        replace(request, prompt=LONG, original_prompt="a", extended_by="b") for request in requests
    ])  # fmt: skip
    assert main([*command[0], "--prompt", "a", "--extend-prompt"]) in (0, 3)
    assert SAID in capsys.readouterr().err.splitlines()


def test_short_prompts_need_no_tokenizer(pipe, monkeypatch):
    """Of a model that does not know a few words alone."""
    monkeypatch.setattr(pipe, "preset", replace(pipe.preset, vocabulary=()))
    monkeypatch.setattr(wan_mlx.model_choices, "read_tokenizer", None)
    assert pipe.notes(pipe.request("a red circle moves " * 20, negative_prompt="", **SMALL)) == []
