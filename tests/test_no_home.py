"""A user without a home folder, as in a container that does not know its user: nothing stops, "~" is one line."""

import os
import pwd
import sys

import pytest
from huggingface_hub import constants

from wan_mlx.cli import doctor, measure, selftest
from wan_mlx.cli.main import main
from wan_mlx.errors import WanError
from wan_mlx.hub import modelscope
from wan_mlx.hub.resolve import is_cached
from wan_mlx.prompts.extend import extend_prompt
from wan_mlx.storage import cache_folder


@pytest.fixture(autouse=True)
def no_home(monkeypatch, tmp_path):
    def unknown(user):
        raise KeyError(user)

    for name in ("HOME", "WAN_MLX_CACHE", "XDG_CACHE_HOME", "MODELSCOPE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", os.path.expanduser("~/.cache/huggingface/hub"))  # as when it starts
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError):
        os.fspath(selftest.Path.home())


def test_a_video_is_made_and_no_prompt_kept(flags, caplog):
    flags = [flag for flag in flags if flag != "--no-prompt-cache"]
    assert main([*flags, "--frames", "1", "--steps", "1", "--output", "a.png"]) == 0
    assert caplog.text.count("encoded prompts are not kept: there is no home folder; WAN_MLX_CACHE") == 1
    assert os.listdir() == ["a.png"]


def test_a_named_cache_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("WAN_MLX_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"


def test_the_hub_answers():
    assert not is_cached("someone/model") and modelscope.cache().name == "modelscope"


@pytest.mark.parametrize("command", [["models"], ["--plan", "--model", "t2v-14B", "--size", "16384x16384"]])
def test_what_needs_no_download_is_said(command, capsys):
    assert main(command) == ("--plan" in command)  # which does not fit
    assert "t2v-14B" in capsys.readouterr().out


@pytest.mark.parametrize("source, variable", [("huggingface", "HF_HOME"), ("modelscope", "MODELSCOPE_CACHE")])
def test_a_download_names_the_way_out(source, variable, flags, capsys):
    assert main([*flags[2:], "--model", "someone/model", "--source", source, "--dry-run"]) == 1
    said = f"error: someone/model cannot be fetched without a home folder; set {variable} to a folder\n"
    assert capsys.readouterr().err == said and os.listdir() == []


def test_a_language_model_is_not_downloaded_to_a_folder_called_tilde():
    with pytest.raises(WanError, match="someone/model cannot be fetched without a home folder; set HF_HOME"):
        extend_prompt("a", "someone/model")
    assert os.listdir() == []


def test_the_doctor_looks_at_all(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "all_checks", selftest.surroundings)
    monkeypatch.setattr(measure, "all_rates", lambda look: ({}, []))
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert "disk for models" in said and sys.executable in said


def test_a_path_in_the_home_folder_is_one_line(flags, capsys):
    assert main([*flags[2:], "--model", "~/model", "--output", "a.png"]) == 2
    assert capsys.readouterr().err == "error: a path begins with ~, but that home folder is not known\n"
