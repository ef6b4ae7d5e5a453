"""Models and LoRAs by name in WAN_MLX_MODELS; WAN_MLX_SOURCE; `wan-mlx models` and its `rm`; the end of long runs."""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from test_lora import random, save

import wan_mlx
from wan_mlx import mac, option, options
from wan_mlx.cli import notify
from wan_mlx.cli.flags import build_parser, keywords
from wan_mlx.cli.main import main
from wan_mlx.errors import Stopped
from wan_mlx.hub.model_folders import find_model, models_in
from wan_mlx.hub.resolve import folders_of
from wan_mlx.presets import BUNDLED, PRESETS, TASK_NAMES
from wan_mlx.runs.folder import RunFolder


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    """Two folders, of which the first is like ComfyUI's; and one that is worked in."""
    folder, other = tmp_path / "ComfyUI/models", tmp_path / "disk"
    for name in ("diffusion_models/wan.safetensors", "unet/deep/wan.gguf", "vae/wan_2.1_vae.safetensors",
                 "loras/style.safetensors", ".hidden/x.safetensors", "vae/put_vae_here"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"12345678")
    shutil.copytree(BUNDLED["nano"], other / "Wan2.1-mine", copy_function=os.link)
    (folder / "loop").symlink_to(folder)
    monkeypatch.setenv("WAN_MLX_MODELS", f"{folder}{os.pathsep}{other}")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder, other


class TestFolders:
    def test_names_with_and_without_endings_and_folders(self, comfy):
        folder, other = comfy
        assert find_model("wan.gguf") == find_model("deep/wan") == folder / "unet/deep/wan.gguf"
        assert find_model("style") == find_model("loras/style.safetensors") == folder / "loras/style.safetensors"
        assert find_model("wan_2.1_vae") == folder / "vae/wan_2.1_vae.safetensors"
        assert find_model("Wan2.1-mine") == other / "Wan2.1-mine"
        for name in ("x", "vae", "put_vae_here", "transformer.safetensors", "", "../wan.gguf", "a\0b", str(folder)):
            assert find_model(name) is None

    def test_what_may_be_either_is_refused_with_the_list(self, comfy, capsys):
        assert main(["--model", "wan", "--prompt", "a cat", "--dry-run"]) == 2
        said = capsys.readouterr().err
        assert "diffusion_models/wan.safetensors" in said and "unet/deep/wan.gguf" in said and said.count("\n") == 1

    def test_the_nearest_name_in_them_is_told(self, comfy, capsys):
        for given, near in ((["--lora", "styles:0.8"], "styles: no such file; nearest: style\n"),
                            (["--model", "Wan21_mine"], "Wan21_mine does not exist; nearest: Wan2.1-mine;"),
                            (["--model", "nano", "--vae", "wan_21_vae"], "nearest: wan_2.1_vae\n")):  # fmt: skip
            assert main([*given, "--prompt", "a cat", "--dry-run"]) != 0
            assert near in capsys.readouterr().err

    def test_without_the_variable_nothing_is(self, comfy, monkeypatch):
        for value in ("", os.pathsep, "/nowhere"):
            monkeypatch.setenv("WAN_MLX_MODELS", value)
            assert find_model("style") is None

    def test_one_that_does_not_exist_is_told_once(self, comfy, monkeypatch, capsys):
        monkeypatch.setenv("WAN_MLX_MODELS", "/nowhere/models")
        assert main(["-m", "nano", "--vae", "none", "-p", "a cat"]) == 2
        said = capsys.readouterr().err
        assert said.count("WAN_MLX_MODELS names /nowhere/models, and there is no such folder\n") == 1

    def test_a_loop_of_links_ends(self, comfy):
        folder, _ = comfy
        (folder / "vae/up").symlink_to("..")
        assert len([*models_in(folder)]) == 4

    def test_a_model_and_a_lora_by_name_and_going_on(self, comfy, flags, monkeypatch):
        folder, other = comfy
        pico = Path(flags[1])
        shutil.copytree(pico, other / "pico")
        rng = np.random.default_rng(1)
        dim = json.loads((pico / "config.json").read_text())["transformer"]["dim"]
        key = "diffusion_model.blocks.0.self_attn.q"
        save(folder / "loras/red.safetensors", {f"{key}.lora_A.weight": random(rng, 2, dim),
                                                f"{key}.lora_B.weight": random(rng, dim, 2)})  # fmt: skip
        pipe = wan_mlx.WanPipeline.from_pretrained("pico", loras="red:0.5", progress=False)
        assert pipe.checkpoint.path == other / "pico" and pipe.loras == [(folder / "loras/red.safetensors", 0.5)]
        command = ["--model", "pico", "--lora", "red:0.5", *flags[2:], "--output", "a.npz"]
        assert main([*command, "--stop-below", "20%"]) in (0, 3)
        keep = RunFolder.save_step

        def cut(folder, step, notes=None):
            keep(folder, step, notes)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save_step", cut)
            assert main([*command[:-1], "b.npz"]) == 130
        monkeypatch.delenv("WAN_MLX_MODELS")
        assert main(["resume", "b.npz"]) in (0, 3) and Path("a.npz").read_bytes() == Path("b.npz").read_bytes()

    def test_a_file_of_this_folder_comes_first(self, comfy):
        Path("Wan2.1-mine").mkdir()
        with pytest.raises(wan_mlx.WeightsError):
            wan_mlx.WanPipeline.from_pretrained("Wan2.1-mine")


class TestSource:
    def test_variable_flag_and_keyword(self, monkeypatch):
        def taken(*argv):
            return keywords(build_parser().parse_args(argv), option.MODEL)["source"]

        assert taken() == "huggingface" == options.filled(option.MODEL, {})["source"]
        monkeypatch.setenv("WAN_MLX_SOURCE", "modelscope")
        assert taken() == "modelscope" == options.filled(option.MODEL, {"source": None})["source"]
        assert taken("--source", "huggingface") == "huggingface"
        assert options.filled(option.MODEL, {"source": "huggingface"})["source"] == "huggingface"

    def test_another_value(self, monkeypatch, capsys):
        monkeypatch.setenv("WAN_MLX_SOURCE", "github")
        assert main(["--prompt", "a cat", "--dry-run"]) == 2
        assert "WAN_MLX_SOURCE is 'github', expected huggingface or modelscope" in capsys.readouterr().err
        assert main(["--help"]) == 0

    def test_of_other_commands(self, monkeypatch, capsys):
        monkeypatch.setenv("WAN_MLX_SOURCE", "github")
        for command in ("inspect", "info"):
            assert main([command, "nano"]) == 2 and "WAN_MLX_SOURCE" in capsys.readouterr().err, command


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """With T2V-1.3B, not whole, and another repository."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for repo in ("Wan-AI--Wan2.1-T2V-1.3B", "other--model"):
        (cache / f"models--{repo}/blobs").mkdir(parents=True)
        (cache / f"models--{repo}/blobs/1").write_bytes(b"x" * 3_000_000)
        (cache / f"models--{repo}/snapshots/main").mkdir(parents=True)
        (cache / f"models--{repo}/snapshots/main/a").symlink_to("../../blobs/1")
    return cache


class TestModels:
    def test_every_task_has_its_column(self, capsys):
        assert main(["models"]) == 0
        rows = {line.split()[0]: line for line in capsys.readouterr().out.split("\n\n")[0].splitlines()}
        for preset in PRESETS.values():
            width, height = preset.size
            assert f" {TASK_NAMES[preset.task]} " in rows[preset.name] and f" {width}x{height} " in rows[preset.name]

    def test_sizes_on_disk_and_folders(self, hub_cache, comfy, capsys):
        assert main(["models"]) == 0
        said = capsys.readouterr().out
        assert "part, 3.0 MB" in next(line for line in said.splitlines() if line.startswith("t2v-1.3B"))
        assert "  diffusion_models/wan.safetensors  8 bytes" in said and "  loras: style" in said
        assert "  Wan2.1-mine  " in said and "style.safetensors" not in said
        assert main(["models", "--json"]) == 0
        rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
        assert rows["t2v-1.3B"]["bytes_on_disk"] == 3_000_000 and rows["t2v-14B"]["bytes_on_disk"] == 0

    @pytest.mark.parametrize("name", ["t2v-1.3B", "Wan-AI/Wan2.1-T2V-1.3B"])
    def test_rm_deletes_the_download_alone(self, hub_cache, capsys, name):
        assert main(["models", "rm", name, "--yes"]) == 0
        assert "3.0 MB" in capsys.readouterr().out
        assert [path.name for path in hub_cache.iterdir()] == ["models--other--model"]
        assert main(["models", "rm", name, "--yes"]) == 2 and "nothing of" in capsys.readouterr().err

    @pytest.mark.parametrize("answer, left", [("n\n", 2), ("\n", 2), ("", 2), ("y\n", 1)])
    def test_rm_asks(self, hub_cache, monkeypatch, capsys, answer, left):
        stdin = io.StringIO(answer)
        stdin.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["models", "rm", "t2v-1.3B"]) == left - 1
        assert len([*hub_cache.iterdir()]) == left and "[y/N]" in capsys.readouterr().err

    def test_rm_where_nobody_can_be_asked(self, hub_cache, monkeypatch, capsys):
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
        assert main(["models", "rm", "t2v-1.3B"]) == 2 and "give --yes" in capsys.readouterr().err
        assert len([*hub_cache.iterdir()]) == 2

    def test_rm_of_converted_folders_and_of_others(self, comfy, hub_cache, capsys):
        folder, other = comfy
        assert main(["convert", "nano", str(other / "nano-q8"), "--quantize", "8", "--quiet"]) == 0
        before = {*folder.parent.parent.rglob("*")}
        (other / "mine").mkdir()
        (other / "mine/config.json").write_text("{}")
        for name in ("mine", "style", "nano", str(other), "Wan-AI/none", "none"):
            assert main(["models", "rm", name, "--yes"]) == 2, name
        assert before <= {*folder.parent.parent.rglob("*")}
        assert main(["models", "rm", "nano-q8", "--yes"]) == 0 and not (other / "nano-q8").exists()
        (other / "linked").symlink_to(other / "Wan2.1-mine")
        assert main(["models", "rm", str(other / "linked"), "--yes"]) == 2 and (other / "Wan2.1-mine").is_dir()

    @pytest.mark.parametrize("argv, said", [(["rm"], "expected the name"), (["--yes"], "without rm"), (["x"], "rm")])
    def test_wrong_use(self, capsys, argv, said):
        assert main(["models", *argv]) == 2 and said in capsys.readouterr().err

    def test_modelscope_s_folders(self, tmp_path, monkeypatch, hub_cache):
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "scope"))
        folder = tmp_path / "scope/hub/models/Wan-AI/Wan2___1-T2V-1___3B"
        folder.mkdir(parents=True)
        assert folder in folders_of("Wan-AI/Wan2.1-T2V-1.3B")


class TestTheEnd:
    @pytest.fixture
    def told(self, monkeypatch):
        found = []
        monkeypatch.setattr(notify, "tell", found.append)
        return found

    def end(self, monkeypatch, seconds, error=None, **flags):
        times = iter([0.0, seconds])
        monkeypatch.setattr(notify.time, "monotonic", lambda: next(times))
        plain = dict(notify=True, output="a.mp4", resume=None, prompts=None, prompt="a cat")
        with notify.end_told(argparse.Namespace(**{**plain, **flags})):
            if error:
                raise error

    def test_only_of_long_runs(self, monkeypatch, told):
        self.end(monkeypatch, notify.LONG - 1)
        self.end(monkeypatch, 7000, notify=False)
        assert told == []
        self.end(monkeypatch, notify.LONG)
        self.end(monkeypatch, 7000, output=None)
        assert told[0].startswith("a.mp4 is done after ") and told[1].startswith("a cat is done after ")

    @pytest.mark.parametrize(
        "error, said",
        [
            (ValueError("x"), "failed"), (Stopped(), ""), (KeyboardInterrupt(), ""),
            (Stopped(why="the battery is at 19 %"), "was stopped"),
        ],
    )  # fmt: skip
    def test_however_it_ends_but_by_hand(self, monkeypatch, told, error, said):
        with pytest.raises(type(error)):
            self.end(monkeypatch, 7000, error)
        assert len(told) == bool(said) and all(f"a.mp4 {said} after" in text for text in told)

    def test_the_flag_and_a_real_run(self, monkeypatch, told, flags, tmp_path):
        monkeypatch.setattr(notify, "LONG", 0)
        assert main([*flags, "--output", str(tmp_path / "a.npz")]) in (0, 3) and len(told) == 1
        assert main([*flags, "--output", str(tmp_path / "b.npz"), "--no-notify"]) in (0, 3) and len(told) == 1

    def test_macos_gets_the_text_as_an_argument(self, monkeypatch):
        asked = []

        def run(command, **options):
            asked.append(command)
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(subprocess, "run", run)
        text = '"; do shell script "rm -rf ~" --'
        assert mac.show_notification("wan_mlx", text)
        assert asked[0][-1] == text and all(text not in word for word in asked[0][:-1])

    @pytest.mark.parametrize("error", [OSError("no"), subprocess.TimeoutExpired("osascript", 20), ValueError("null")])
    def test_what_fails_fails_nothing(self, monkeypatch, capsys, error):
        def run(*a, **k):
            raise error

        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(shutil, "which", lambda name: name)
        monkeypatch.setattr(subprocess, "run", run)
        notify.tell("a.mp4 is done")
        assert capsys.readouterr().err == ""  # no terminal

    def test_elsewhere_the_bell_on_a_terminal_alone(self, monkeypatch, capsys):
        notify.tell("a.mp4 is done")
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        notify.tell("a.mp4 is done")
        assert capsys.readouterr().err == "\a"
        monkeypatch.setattr(sys, "stderr", None)
        notify.tell("a.mp4 is done")
