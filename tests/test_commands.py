"""The commands of ``wan-mlx``: the first word, the word without a flag, names of outputs, pages of help."""

import io
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import wan_mlx
from wan_mlx import opened
from wan_mlx.cli.commands import COMMANDS, as_flags, help_page
from wan_mlx.cli.flags import build_parser
from wan_mlx.cli.jobs import default_output
from wan_mlx.cli.main import main
from wan_mlx.media.write import read_settings
from wan_mlx.option import REQUEST
from wan_mlx.options import flags as all_flags
from wan_mlx.planning import speed
from wan_mlx.presets import PRESETS
from wan_mlx.recipes import RECIPES
from wan_mlx.request_builder import build_request
from wan_mlx.runs.folder import RunFolder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *argv: str) -> str:
    assert main(list(argv)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
    return said.err


def dry(capsys, *argv: str) -> str:
    assert main([*argv, "--dry-run"]) == 0
    return capsys.readouterr().err


class TestTheWordWithoutAFlag:
    @pytest.mark.parametrize(
        "name, given, wanted",
        [
            ("generate", "a_cat --seed 1", "--prompt=a_cat --seed 1"),
            ("generate", "--seed 1 a_cat --quiet", "--seed 1 --prompt=a_cat --quiet"),
            ("generate", "--model nano nano", "--model nano --prompt=nano"),
            ("generate", "--lora a:0.5 -", "--lora a:0.5 --prompt=-"),
            ("plan", "t2v-14B --memory 8GB", "--plan --model=t2v-14B --memory 8GB"),
            ("plan", "--model t2v-14B", "--plan --model t2v-14B"),
            ("resume", "a.mp4", "--resume=a.mp4"),
        ],
    )
    def test_becomes_one(self, name, given, wanted):
        assert as_flags(name, given.split(), True) == wanted.split()

    def test_a_prompt_is_made_into_a_video_of_nano_s(self, capsys):
        said = dry(capsys, "a red circle moves right")
        assert "prompt    a red circle moves right" in said and "output    a_red_circle_moves_right.mp4" in said
        assert "model     nano, which comes with the package" in said

    def test_a_picture_is_for_nano_i2v(self, capsys):
        Image.new("RGB", (64, 64)).save("first.png")
        said = dry(capsys, "it moves right", "--image", "first.png")
        assert "nano-i2v (bundled, " in said and "assets" not in said

    @pytest.mark.parametrize(
        "word", ["猫", "circle", "-p plan", "-p cat", "generate cat", "generate plan", "plan of a house"]
    )
    def test_is_a_prompt(self, capsys, word):
        words = word.split(" ") if word[:2] in ("-p", "ge") else [word]
        assert f"prompt    {words[-1]}" in dry(capsys, *words)

    @pytest.mark.parametrize(
        "argv, said",
        [
            (["genrate"], "nearest: wan-mlx generate"),
            (["plna"], "nearest: wan-mlx plan"),
            (["recipe"], "nearest: wan-mlx recipes"),
            (["a.avi"], "nearest: wan-mlx --video a.avi"),
            (["notes.pages"], "looks like no prompt, but like a file's name; as a prompt: wan-mlx -p notes.pages"),
            (["--quiet", "models"], "nearest: wan-mlx models"),
            (["t2v-14B"], "nearest: wan-mlx plan t2v-14B"),
            (["t2v-14b"], "nearest: wan-mlx plan t2v-14B, or wan-mlx -m t2v-14B "),
            (["nanoo"], "nearest: wan-mlx plan nano, "),
            (["Wan-AI/Wan2.1-T2V-1.3B"], "nearest: wan-mlx plan Wan-AI/Wan2.1-T2V-1.3B"),
            (["cats.jsonl"], "nearest: wan-mlx --prompts cats.jsonl"),
            (["my.mp4"], "nearest: wan-mlx info my.mp4"),
            (["./my.safetensors"], "nearest: wan-mlx info ./my.safetensors"),
            (["first.png"], "nearest: wan-mlx --image first.png"),
            (["a", "red", "circle"], "in quotes: wan-mlx generate 'a red circle'"),
            (["a cat", "--prompt", "a dog"], "'a cat' stands without a flag, and --prompt is given"),
            (["plan", "t2v-14B", "-m", "nano"], "'t2v-14B' stands without a flag, and --model is given"),
            (["a cat", "--lora", "x.safetensors", "0.8"], "--lora x.safetensors:0.8"),
            (["--lora", "x.safetensors", "0.8", "a cat"], "--lora x.safetensors:0.8"),
            (["generate"], "--prompt is missing"),
            (["help", "genrate"], "expected one of generate, plan"),
            (["help", "plna"], "; nearest: plan\n"),
            (["plna", "t2v-1.3B"], "nearest: wan-mlx plan t2v-1.3B; as a prompt: wan-mlx -p 'plna t2v-1.3B'"),
            (["modles", "rm", "t2v-1.3B"], "nearest: wan-mlx models rm t2v-1.3B;"),
            (["resum", "x.mp4"], "nearest: wan-mlx resume x.mp4;"),
            (["doctr", "--share"], "nearest: wan-mlx doctor --share;"),
            (["plna", "--help"], "nearest: wan-mlx plan --help;"),
            (["-m", "nano", "plan", "--frames", "5"], "goes first; nearest: wan-mlx plan --frames 5 -m nano;"),
            (["-m", "nano", "resume", "x.mp4"], "goes first; nearest: wan-mlx resume x.mp4 -m nano;"),
            (["models", "lst"], "models lst: expected one of list, rm; nearest: list\n"),
            (["models", "remove", "nano"], "models remove: expected one of list, rm; nearest: rm\n"),
            (["models", "list", "nano"], "a name and --yes have no effect without rm"),
            (["queue", "ad", "a cat"], "; nearest: add\n"),
            (["completion", "fsh"], "; nearest: fish\n"),
        ],
    )
    def test_is_refused_with_what_may_be_meant(self, capsys, argv, said):
        assert said in refused(capsys, *argv)

    def test_in_a_prompt_of_several_a_command_s_name_is_a_word(self, capsys):
        assert "prompt    plna b" in dry(capsys, "plna b")

    @pytest.mark.parametrize("word", ["ls", "version", "list", "cat"])
    def test_that_nano_does_not_know_is_refused_with_its_words(self, capsys, word):
        assert main([word]) == 2
        said = capsys.readouterr().err
        assert f"{word!r} is no command, and nano does not know {word}. It knows: circle, " in said
        assert said.endswith(f"; as a prompt: wan-mlx -p {word}\n")

    @pytest.mark.parametrize("argv", ["plan", "generate red --seeds 1,2 --plan"])
    def test_a_plan_without_a_model_is_nano_s(self, capsys, monkeypatch, argv):
        monkeypatch.setattr(speed, "measure_rates", lambda *_: speed.Rates(1e12, 1e12, 1e12, 1e12))
        assert main(argv.split()) == 0
        assert "\nnano 128x128, 17 frames" in "\n" + capsys.readouterr().out

    def test_models_list_is_the_table(self, capsys):
        assert main(["models", "list"]) == 0 and "\nnano " in capsys.readouterr().out

    def test_an_unknown_flag_is_told_and_not_its_value(self, capsys):
        assert "unknown argument --sise 16x16; nearest: --size" in refused(capsys, "--sise", "16x16")


class TestPrompts:
    def test_from_standard_input(self, capsys, monkeypatch):
        for argv in (["-p", "-"], ["-"]):
            monkeypatch.setattr(sys, "stdin", io.StringIO("a red\ncircle\n"))
            assert r"prompt    a red\ncircle" in dry(capsys, *argv)
        assert "where nothing came" in refused(capsys, "-p", "-")

    def test_from_a_text_file(self, capsys):
        Path("a.txt").write_text("\na red circle\n")
        assert "prompt    a red circle\n" in dry(capsys, "-p", "a.txt")
        assert "prompt    b.txt\n" in dry(capsys, "-p", "b.txt")
        Path("a.txt").write_text("a red circle\na blue star\n")
        assert "holds 2 lines, expected one prompt; each line as a prompt: wan-mlx --prompts a.txt" in refused(
            capsys, "-p", "a.txt"
        )
        assert refused(capsys, "a.txt").endswith("nearest: wan-mlx --prompts a.txt\n")

    def test_a_file_s_dash_is_no_standard_input(self, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("another"))
        Path("a.json").write_text('{"prompt": "-"}')
        assert "prompt    -\n" in dry(capsys, "--config", "a.json")

    def test_a_text_file_has_one_a_line(self, capsys):
        Path("a.txt").write_text('a red circle\n\n  {"prompt": 1}\r\n')
        said = dry(capsys, "--prompts", "a.txt")
        assert "line 1: a_0001.mp4: a red circle\n" in said and 'line 3: a_0003.mp4: {"prompt": 1}\n' in said

    def test_a_name_is_made_of_the_prompt_and_never_taken(self):
        preset = PRESETS["nano"]
        request = build_request(preset, preset.transformer, preset.geometry, "A cat, boxing!", seed=1)
        assert default_output(request) == Path("A_cat_boxing.mp4")
        Path("A_cat_boxing.mp4").symlink_to("nowhere")
        assert default_output(request) == Path("A_cat_boxing_2.mp4")
        Path("A_cat_boxing_2.mp4.wan").mkdir()
        assert default_output(request) == Path("A_cat_boxing_3.mp4")
        still = build_request(preset, preset.transformer, preset.geometry, "?!", num_frames=1)
        assert default_output(still) == Path("video.png")


class TestSizes:
    def video(self, capsys, *argv: str) -> str:
        lines = dry(capsys, "a red circle", *argv).splitlines()
        return next(line for line in lines if line.startswith("video")).split()[1].rstrip(",")

    @pytest.mark.parametrize(
        "given, wanted",
        [
            ("--size 16:9", "160x96"), ("--size 9:16", "96x160"), ("--size 1:1", "128x128"), ("--size 480p", "832x480"),
            ("--width 64 --height 32", "64x32"), ("--size 720P", "1280x720"), ("--size 64×32", "64x32"),
        ],
    )  # fmt: skip
    def test_flags(self, capsys, given, wanted):
        assert self.video(capsys, *given.split()) == wanted

    def test_a_name_is_said_as_a_size(self, capsys):
        assert "16:9 is 160x96 for nano" in dry(capsys, "a red circle", "--size", "16:9")

    def test_the_later_of_two_files_and_the_command_line_holds(self, capsys):
        Path("a.json").write_text('{"width": 64, "height": 32, "seeds": [1, 2]}')
        assert self.video(capsys, "--config", "a.json") == "64x32"
        assert self.video(capsys, "--config", "a.json", "--size", "1:1") == "128x128"
        Path("b.json").write_text('{"size": "16:9"}')
        assert self.video(capsys, "--config", "b.json", "--width", "64", "--height", "32") == "64x32"
        Path("b.jsonl").write_text('{"prompt": "a", "width": 96, "height": 32}\n{"prompt": "a"}\n')
        assert main(["--prompts", "b.jsonl", "--size", "16:9", "--dry-run", "--seed", "1"]) == 0

    @pytest.mark.parametrize(
        "given, said",
        [
            ("--width 64", "--width is given alone; expected --height, too"),
            ("--height 64", "--height is given alone; expected --width, too"),
            ("--size 1:1 --width 64 --height 64", "--size and --width are both given"),
            ("-s 1 --seeds 1,2", "-s and --seeds are both given"),
            ("--seeds 1,2 --num-videos 2", "--seeds and --num-videos are given; expected one"),
            ("--seeds 1,1", "seed 1 is in '1,1' 2 times"),
            ("--size 0:1", "is no size; expected"),
            ("--size 4k", "or 16:9, 9:16, 1:1, 480p, 720p"),
        ],
    )
    def test_refused(self, capsys, given, said):
        assert said in refused(capsys, "a red circle", *given.split())

    def test_python(self):
        pipe = wan_mlx.WanPipeline.from_pretrained("nano", progress=False)
        for size in ("16:9", (160, 96), "160x96"):
            request = pipe.request("a cat", size=size)
            assert (request.width, request.height) == (160, 96)
        with pytest.raises(ValueError, match="and width or height is given too"):
            pipe.request("a cat", size="16:9", width=64)
        assert str(wan_mlx.plan("nano", memory="1GB", size="16:9")) == str(wan_mlx.plan("nano", 160, 96, memory="1GB"))


class TestSeveralVideos:
    def test_their_seeds_are_told(self, capsys):
        assert ", seeds 5, 3\n" in dry(capsys, "a red circle", "--seeds", "5,3")
        assert ", seeds 7, 8\n" in dry(capsys, "a red circle", "--num-videos", "2", "-s", "7")
        assert ", seed 7\n" in dry(capsys, "a red circle", "-s", "7")

    @pytest.mark.parametrize("given, seeds", [("--seeds 5,3", [5, 3]), ("--num-videos 2 -s 7", [7, 8])])
    def test_of_one_load_are_those_made_alone(self, flags, monkeypatch, given, seeds):
        flags = flags[: flags.index("--seed")] + flags[flags.index("--seed") + 2 :]
        loads = []
        load = opened.load_transformer
        monkeypatch.setattr(opened, "load_transformer", lambda *a, **k: loads.append(1) or load(*a, **k))
        assert main([*flags, *given.split(), "-o", "a.npz"]) in (0, 3) and len(loads) == 1
        for seed in seeds:
            assert main([*flags, "--seed", str(seed), "--output", "alone.npz", "--overwrite"]) in (0, 3)
            one, other = (np.load(name)["frames"] for name in (f"a_seed{seed}.npz", "alone.npz"))
            assert np.array_equal(one, other) and read_settings(f"a_seed{seed}.npz")["seed"] == seed
        Path(f"a_seed{seeds[1]}.npz").unlink()
        assert main([*flags, *given.split(), "-o", "a.npz"]) in (0, 3)  # goes on
        assert Path(f"a_seed{seeds[1]}.npz").exists()

    def test_one_that_was_cut_goes_on(self, flags, monkeypatch):
        flags = [*flags, "-o", "a.npz"]
        flags[flags.index("--seed") : flags.index("--seed") + 2] = ["--seeds", "3,4"]
        keep, kept = RunFolder.save_step, []

        def cut(folder, step, notes=None):
            keep(folder, step, notes)
            kept.append(folder.output.name)
            if kept.count("a_seed4.npz") == 2:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save_step", cut)
            assert main(flags) == 130
        assert Path("a_seed4.npz.wan").is_dir() and Path("a_seed3.npz").exists()
        kept.clear()
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save_step", lambda f, s, n=None: kept.append(f.output.name) or keep(f, s, n))
            assert main(flags) in (0, 3)
        assert kept == ["a_seed4.npz"] and not Path("a_seed4.npz.wan").exists()

    def test_of_a_prompt_file_s_line(self, capsys):
        Path("b.jsonl").write_text('{"prompt": "a", "seeds": [1, 2]}\n{"prompt": "b", "num_videos": 2, "seed": 5}\n')
        said = dry(capsys, "--prompts", "b.jsonl")
        assert all(f"b_{name}.mp4" in said for name in ("0001_seed1", "0001_seed2", "0002_seed5", "0002_seed6"))
        Path("b.jsonl").write_text('{"prompt": "a", "num_videos": 2}')
        assert "num_videos without a seed" in refused(capsys, "--prompts", "b.jsonl")


class TestResume:
    def test_without_a_name_is_the_list(self, capsys, flags, monkeypatch):
        assert main(["resume"]) == 0 and "no run is unfinished in" in capsys.readouterr().out

        def failing(folder, step, notes=None):
            raise KeyboardInterrupt if step.index == 1 else OSError("full")

        keep = RunFolder.save_step
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save_step", lambda *a: keep(*a) if a[1].index == 0 else failing(*a))
            assert main([*flags, "--output", "it's.npz"]) == 130
        Path("b.mp4.wan").mkdir()
        Path("c.mp4.wan").mkdir()
        Path("c.mp4.wan/notes.txt").write_text("mine")
        before = sorted(Path().rglob("*"))
        capsys.readouterr()
        assert main(["resume", "--json"]) == 0
        other, row = sorted(json.loads(capsys.readouterr().out), key=lambda row: row["output"])
        assert (row["output"], row["done"], row["steps"], row["prompt"]) == ("it's.npz", 1, 3, "a red circle")
        assert other["output"] == "c.mp4" and "no run has made it" in other["error"]
        assert {*Path().rglob("*")} - {*before} <= {Path("b.mp4.wan/lock")}
        with RunFolder("it's.npz"):
            assert main(["resume"]) == 0 and "is making it's.npz" in capsys.readouterr().out
        assert main(["resume"]) == 0
        command = capsys.readouterr().out.splitlines()[-1]
        assert command == "  wan-mlx resume 'it'\"'\"'s.npz'"
        assert main(["resume", "it's.npz", "--quiet"]) == 0 and Path("it's.npz").exists()


class TestHelp:
    @pytest.mark.parametrize("columns", [80, 120])
    def test_one_screen_names_every_command(self, monkeypatch, columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        page = help_page("generate").splitlines()
        assert len(page) <= 60 and max(map(len, page)) <= 100
        assert all(any(line.startswith(f"  {name} ") for line in page) for name in COMMANDS)

    def test_its_examples_run(self, capsys, monkeypatch):
        monkeypatch.setattr(speed, "measure_rates", lambda *_: speed.Rates(1e12, 1e12, 1e12, 1e12))
        Image.new("RGB", (64, 64)).save("first.png")
        lines = [line for line in help_page("generate").splitlines() if line.startswith("  wan-mlx")]
        examples = [line.strip().split("   ")[0] for line in lines]
        assert len(examples) == 5
        for example in examples:
            command = example.replace("t2v-1.3B", "nano").replace("resume cat.mp4", "resume")
            assert main([*shlex.split(command)[1:], *(["--dry-run"] if "plan" not in command else [])]) == 0, command

    @pytest.mark.parametrize("name", COMMANDS)
    def test_of_each_command(self, capsys, monkeypatch, name):
        monkeypatch.setenv("COLUMNS", "80")
        assert main(["help", name]) == 0
        said = capsys.readouterr().out
        assert said.startswith("usage: wan-mlx") and len(said.splitlines()) <= 60
        assert name in ("generate", "help") or said.startswith(f"usage: wan-mlx {name} ")
        assert max(map(len, said.splitlines())) <= 80

    def test_of_every_flag_in_a_narrow_terminal(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit):
            main(["--help-all"])
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80

    def test_nothing_given(self, capsys):
        assert main([]) == 2 and "usage: wan-mlx" in capsys.readouterr().out

    def test_is_quick(self):
        command = [sys.executable, "-m", "wan_mlx.generate", "--help"]
        env = {"PYTHONPATH": str(Path(wan_mlx.__file__).parent.parent)}
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            subprocess.run(command, env=env, check=True, capture_output=True)
            times.append(time.perf_counter() - begun)
        assert min(times) < 1  # 0.15 s; more on a busy machine

    def test_short_flags(self):
        given = build_parser().parse_args("-m nano -p x -o a.mp4 -s 3 -q 8".split())
        assert (given.model, given.prompt, given.output, given.seed, given.quantize) == ("nano", "x", "a.mp4", 3, "q8")
        assert all(len(flag) == 2 for option in all_flags() for flag in option.short)


def test_recipes(capsys):
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in RECIPES) and "12 steps (or 4, 5," in said


def test_python_takes_what_flags_take():
    assert wan_mlx.WanPipeline.from_pretrained("nano", quantize=8).quantize == "q8"
    pipe = wan_mlx.WanPipeline.from_pretrained("nano", stop_below="20%")
    assert pipe.stop_below == 20 and pipe.request("a cat", guidance_range="0-0.6").guidance_range == (0.0, 0.6)
    assert str(wan_mlx.plan("nano", memory="1GB", quantize=8)) == str(wan_mlx.plan("nano", memory="1GB", quantize="q8"))
    with pytest.raises(ValueError, match="'half' is no range"):
        pipe.request("a cat", guidance_range="half")
    assert all(option.meaning(None) is None for option in all_flags() if option.of == REQUEST)
